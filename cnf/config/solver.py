"""Settings of solvers and divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cnf.config.model import ODE
from cnf.config.rules import COUNT, DENSITY, NONNEGATIVE, POSITIVE, Family, check_settings, setting

__all__ = ["BY_LIKELIHOOD", "GRID", "SolverConfig"]

GRID = Family("adaptive", (False,), "fixed grids")
ADAPTIVE = Family("adaptive", (True,), "adaptive solving (evaluation has eval_rtol and eval_atol)")
HUTCHINSON = Family("divergence", ("hutchinson",), "divergence='hutchinson'")
SOLVING = Family("solves", (True,), "training that solves an ODE")
BY_LIKELIHOOD = Family("objective", ("likelihood", "both", "regression", "classification"), "training that solves an ODE")


@dataclass(frozen=True)
class SolverConfig:
    """Solver of the ODE and divergence strategy."""

    method: str = setting("rk4", given=(SOLVING,))
    """Training: a fixed grid's (euler, midpoint, heun, rk4, rk4-classic, dopri5); with --adaptive dopri5, dopri8, bosh3, ..."""
    grid_steps: int = setting(4, COUNT, given=(GRID, SOLVING,))
    """Training: steps of the fixed grid, per block (the watch may raise it)."""
    adaptive: bool = setting(False, given=(SOLVING,))
    """Training: solve adaptively (--method dopri5, say) instead of on a grid."""
    gradient: Literal["direct", "checkpoint", "reversible", "adjoint"] = setting("direct", given=(SOLVING,))
    """Training gradient: direct; checkpoint (grids); reversible (grids; a scheme of its own, of the same order); adjoint (adaptive)."""
    rtol: float = setting(1e-5, POSITIVE, given=(ADAPTIVE, SOLVING,))
    """Training: relative tolerance of an adaptive method."""
    atol: float = setting(1e-5, POSITIVE, given=(ADAPTIVE, SOLVING,))
    """Training: absolute tolerance of an adaptive method."""
    eval_method: str = setting("dopri5", given=(ODE,))
    """Evaluation and sampling: an adaptive method."""
    eval_rtol: float = setting(1e-5, POSITIVE, given=(ODE,))
    """Evaluation: relative tolerance."""
    eval_atol: float = setting(1e-5, POSITIVE, given=(ODE,))
    """Evaluation: absolute tolerance."""
    eval_tolerance: float = setting(1e-4, NONNEGATIVE, given=(DENSITY,))
    """Evaluation: error of the log-det, bits/dim or nats/dim, taken at few nodes of the path; 0 takes it in every stage."""
    divergence: Literal["exact", "hutchinson"] = setting("exact", given=(DENSITY,))
    """The trace: exact, or Hutchinson's estimate."""
    probe: Literal["rademacher", "gaussian"] = setting("rademacher", given=(DENSITY, HUTCHINSON,))
    """Hutchinson's probe."""
    mode: Literal["forward", "reverse"] = setting("forward", given=(DENSITY, HUTCHINSON,))
    """Hutchinson's product: J e or eᵀJ."""
    probes: int = setting(1, COUNT, given=(DENSITY, HUTCHINSON,))
    """Hutchinson's number of probes."""
    steer: float = setting(0.0, given=(DENSITY,))
    """Half-width of a random end time in training (STEER)."""
    automatic_steps: bool = setting(False, given=(GRID, BY_LIKELIHOOD,))
    """Training, grids: from --grid-steps on, as many steps in each block as --solver-check-tolerance takes, measured while training."""
    compile: bool = setting(False, given=(DENSITY,))
    """Training: compile the fields (torch.compile): faster steps, after a minute or so for every shape that a block has."""
    precision: Literal["fp32", "bf16", "tf32", "fp64"] = setting("fp32", given=(DENSITY,))
    """bf16: inside the fields, in training alone; tf32: in training alone, on a GPU; fp64: everything."""

    def __post_init__(self) -> None:
        check_settings(self)
