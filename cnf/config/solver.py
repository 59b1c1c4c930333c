"""Settings of solvers and divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["LATER", "SolverConfig"]

LATER = {"optional": True}  # metadata of settings that older run folders lack; their default applies


@dataclass(frozen=True)
class SolverConfig:
    """How the ODE is solved and the trace taken."""

    method: str = "rk4"
    """Training: a fixed grid's (euler, midpoint, heun, rk4, rk4-classic, dopri5); with --adaptive dopri5, dopri8, bosh3, ..."""
    grid_steps: int = 4
    """Training: steps of the fixed grid, per block (the watch may raise it)."""
    adaptive: bool = False
    """Training: solve adaptively (--method dopri5, say) instead of on a grid."""
    gradient: Literal["direct", "checkpoint", "reversible", "adjoint"] = "direct"
    """Training gradient: direct; checkpoint (grids); reversible (grids; a scheme of its own, of the same order); adjoint (adaptive)."""
    rtol: float = 1e-5
    """Training: relative tolerance of an adaptive method."""
    atol: float = 1e-5
    """Training: absolute tolerance of an adaptive method."""
    eval_method: str = "dopri5"
    """Evaluation and sampling: an adaptive method."""
    eval_rtol: float = 1e-5
    """Evaluation: relative tolerance."""
    eval_atol: float = 1e-5
    """Evaluation: absolute tolerance."""
    eval_tolerance: float = 1e-4
    """Evaluation: error of the log-det, bits/dim or nats/dim, taken at few nodes of the path; 0 takes it in every stage."""
    divergence: Literal["exact", "hutchinson"] = "exact"
    """The trace: exact, or Hutchinson's estimate."""
    probe: Literal["rademacher", "gaussian"] = "rademacher"
    """Hutchinson's probe."""
    mode: Literal["forward", "reverse"] = "forward"
    """Hutchinson's product: J e or eᵀJ."""
    probes: int = 1
    """Hutchinson's number of probes."""
    steer: float = 0.0
    """Half-width of a random end time in training (STEER)."""
    automatic_steps: bool = False
    """Training, grids: from --grid-steps on, as many steps in each block as --watch-tolerance takes, measured while training."""
    compile: bool = False
    """Training: compile the fields (torch.compile): faster steps, after a minute or so for every shape that a block has."""
    precision: Literal["fp32", "bf16", "tf32", "fp64"] = "fp32"
    """bf16: inside the fields, in training alone; tf32: in training alone, on a GPU; fp64: everything."""
