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
    """Training solver. Fixed grid: euler, midpoint, heun, rk4, rk4-classic, dopri5; with --adaptive: dopri5, dopri8,
    bosh3, ..."""
    grid_steps: int = setting(4, COUNT, given=(GRID, SOLVING,))
    """Training: solver steps of each block (solver checks may raise them)."""
    adaptive: bool = setting(False, given=(SOLVING,))
    """Training: adaptive solver (such as --method dopri5) instead of a fixed grid."""
    gradient: Literal["direct", "checkpoint", "reversible", "adjoint"] = setting("direct", given=(SOLVING,))
    """Training gradient: direct; checkpoint (grids); reversible (grids; a reversible scheme of the same order);
    adjoint (adaptive)."""
    rtol: float = setting(1e-5, POSITIVE, given=(ADAPTIVE, SOLVING,))
    """Training: relative tolerance of an adaptive solver."""
    atol: float = setting(1e-5, POSITIVE, given=(ADAPTIVE, SOLVING,))
    """Training: absolute tolerance of an adaptive solver."""
    eval_method: str = setting("dopri5", given=(ODE,))
    """Evaluation and sampling: adaptive solver."""
    eval_rtol: float = setting(1e-5, POSITIVE, given=(ODE,))
    """Evaluation: relative tolerance."""
    eval_atol: float = setting(1e-5, POSITIVE, given=(ODE,))
    """Evaluation: absolute tolerance."""
    eval_tolerance: float = setting(1e-4, NONNEGATIVE, given=(DENSITY,))
    """Evaluation: error of the log-det in bits/dim or nats/dim, integrated at few nodes along the path; 0 integrates at
    every solver stage."""
    divergence: Literal["exact", "hutchinson"] = setting("exact", given=(DENSITY,))
    """Exact trace, or Hutchinson's estimate."""
    probe: Literal["rademacher", "gaussian"] = setting("rademacher", given=(DENSITY, HUTCHINSON,))
    """Hutchinson: distribution of the probes."""
    mode: Literal["forward", "reverse"] = setting("forward", given=(DENSITY, HUTCHINSON,))
    """Hutchinson: derivative product, forward (J e) or reverse (eᵀJ)."""
    probes: int = setting(1, COUNT, given=(DENSITY, HUTCHINSON,))
    """Hutchinson: probes for each row."""
    steer: float = setting(0.0, given=(DENSITY,))
    """Half-width of a random end time in training (STEER)."""
    automatic_steps: bool = setting(False, given=(GRID, BY_LIKELIHOOD,))
    """Training on a grid: choose the solver steps of each block from --solver-check-tolerance, starting at --grid-
    steps."""
    compile: bool = setting(False, given=(DENSITY,))
    """Training: compile the fields (torch.compile): faster steps, after about a minute for every shape."""
    precision: Literal["fp32", "bf16", "tf32", "fp64"] = setting("fp32", given=(DENSITY,))
    """bf16: inside the fields, in training only; tf32: in training only, on a GPU; fp64: everything."""

    def __post_init__(self) -> None:
        check_settings(self)
