"""Settings of solvers and divergence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cnf.config.model import ODE
from cnf.config.rules import COUNT, DENSITY, GENERATIVE, NONNEGATIVE, POSITIVE, Bounds, Family, setting, tag
from cnf.config.tagged import Settings

__all__ = [
    "BY_LIKELIHOOD", "FREE", "GRID", "AdamsConfig", "AdaptiveConfig", "AdaptiveLikelihoodConfig", "ExactConfig", "GridConfig",
    "HutchinsonConfig", "SolverConfig",
]  # fmt: skip

GRID = Family("train_solver", ("grid",), "fixed grids")
FREE = Family("step_size", (None,), "grids without --step-size")
SHARE = Bounds("above 0, at most 1", above=0, most=1)
SOLVING = Family("solves", (True,), "training that solves an ODE")
BY_LIKELIHOOD = Family("objective", ("likelihood", "both", "regression", "classification", "elbo"), "training that solves an ODE")
TRACED = Family("traced", (True,), "densities, and autoencoders with a CNF")
DENOISER = Family("denoiser", (True,), "denoisers (field='unet', dequantize='truncated-normal')")
COMPILED = Family("compile", (True,), "training with --compile")
STORED = Family("gradient", ("direct",), "--gradient direct, which keeps what a checkpoint would compute again")
ADAPTIVE_LIKELIHOOD = Family("likelihood_solver", ("adaptive",), "likelihoods by the adaptive solver")


@dataclass(frozen=True)
class GridConfig(Settings):
    """Training on a fixed grid of solver steps."""

    kind: Literal["grid"] = tag("grid")
    method: Literal["euler", "midpoint", "heun", "rk4", "rk4-classic", "dopri5"] = "rk4"
    """Training solver. Fixed grid: euler, midpoint, heun, rk4, rk4-classic, dopri5; adaptive: dopri5, dopri8, bosh3, ..."""
    grid_steps: int = setting(4, COUNT, given=(FREE,))
    """Training: solver steps of each block (solver checks may raise them)."""
    step_size: float | None = setting(None, SHARE, later=True)
    """Training: step size of the grid as a fraction of each block's time, which no solver check changes, in place of
    --grid-steps (RNODE: 0.25, four steps)."""
    automatic_steps: bool = setting(False, given=(BY_LIKELIHOOD, FREE))
    """Training on a grid: choose the solver steps of each block from --solver-check-tolerance, starting at --grid-
    steps."""
    gradient: Literal["direct", "checkpoint", "reversible"] = "direct"
    """Training gradient on a grid: direct, checkpoint, or reversible (a reversible scheme of the same order)."""

    @property
    def steps(self) -> int:
        """Solver steps at the start of training: those of ``step_size``, or ``grid_steps``."""
        return self.grid_steps if self.step_size is None else math.ceil(1 / self.step_size - 1e-9)


@dataclass(frozen=True)
class AdaptiveConfig(Settings):
    """Training with an adaptive solver."""

    kind: Literal["adaptive"] = tag("adaptive")
    method: Literal["dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2"] = "dopri5"
    """Training solver. Fixed grid: euler, midpoint, heun, rk4, rk4-classic, dopri5; adaptive: dopri5, dopri8, bosh3, ..."""
    rtol: float = setting(1e-5, POSITIVE)
    """Training: relative tolerance of an adaptive solver."""
    atol: float = setting(1e-5, POSITIVE)
    """Training: absolute tolerance of an adaptive solver."""
    gradient: Literal["direct", "adjoint"] = "direct"
    """Training gradient of an adaptive solver: direct, or adjoint."""


@dataclass(frozen=True)
class ExactConfig(Settings):
    """Exact trace."""

    kind: Literal["exact"] = tag("exact")


@dataclass(frozen=True)
class HutchinsonConfig(Settings):
    """Hutchinson's estimate of the trace."""

    kind: Literal["hutchinson"] = tag("hutchinson")
    hutchinson_noise: Literal["rademacher", "gaussian"] = "rademacher"
    """Hutchinson: distribution of the probes."""
    hutchinson_mode: Literal["forward", "reverse"] = "forward"
    """Hutchinson: derivative product, forward (J e) or reverse (eᵀJ)."""
    probes: int = setting(1, COUNT)
    """Hutchinson: probes for each row."""


@dataclass(frozen=True)
class AdaptiveLikelihoodConfig(Settings):
    """Likelihoods by the adaptive solver of evaluation."""

    kind: Literal["adaptive"] = tag("adaptive")


@dataclass(frozen=True)
class AdamsConfig(Settings):
    """Likelihoods of denoisers by an exponential Adams method, with its number of steps from an error estimate."""

    kind: Literal["adams"] = tag("adams", given=(DENOISER,))
    likelihood_steps: int = setting(32, COUNT, given=(DENOISER,))
    """Likelihoods by adams: solver steps, one fewer than evaluations, with which to begin."""
    likelihood_order: Literal[3, 4] = setting(4, given=(DENOISER,))
    """Likelihoods by adams: order of the method."""
    likelihood_tolerance: float = setting(0.005, NONNEGATIVE, given=(DENOISER,))
    """Likelihoods by adams: mean of the estimated errors of a batch's rows in bits/dim, above which it is solved again in
    more steps; 0 takes --likelihood-steps as they are."""


@dataclass(frozen=True)
class SolverConfig(Settings):
    """Solvers of training and evaluation, divergence and precision.

    Example:
        >>> SolverConfig(train_solver=GridConfig(grid_steps=2)) == SolverConfig.of(grid_steps=2)
        True
    """

    train_solver: GridConfig | AdaptiveConfig = setting(GridConfig(), given=(SOLVING,))
    """Training solver: a fixed grid, or adaptive (evaluation has --eval-method)."""
    eval_method: Literal["dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2"] = setting("dopri5", given=(ODE,))
    """Evaluation and sampling: adaptive solver (for likelihoods see --likelihood-solver)."""
    eval_rtol: float = setting(1e-5, POSITIVE, given=(ODE,))
    """Evaluation: relative tolerance."""
    eval_atol: float = setting(1e-5, POSITIVE, given=(ODE,))
    """Evaluation: absolute tolerance."""
    eval_tolerance: float = setting(1e-4, NONNEGATIVE, given=(DENSITY, ADAPTIVE_LIKELIHOOD))
    """Evaluation: error of the log-det in bits/dim or nats/dim, integrated at few nodes along the path; 0 integrates at
    every solver stage."""
    likelihood_solver: AdaptiveLikelihoodConfig | AdamsConfig = setting(AdaptiveLikelihoodConfig(), given=(DENSITY,), later=True)
    """Evaluation: adaptive, or for denoisers adams, an exponential Adams method that needs a quarter of the
    evaluations (samples and latents stay adaptive)."""
    divergence: ExactConfig | HutchinsonConfig = setting(ExactConfig(), given=(TRACED,))
    """Exact trace, or Hutchinson's estimate."""
    steer: float = setting(0.0, given=(DENSITY,))
    """Half-width of a random end time in training (STEER)."""
    compile: bool = setting(False, given=(DENSITY,))
    """Training: compile the solver's steps (torch.compile): faster training, after about a minute for every shape."""
    compile_unit: Literal["step", "solve"] = setting("step", given=(DENSITY, BY_LIKELIHOOD, GRID, COMPILED, STORED), later=True)
    """With --compile: a solver step (a custom field always), or the whole solve on the grid: faster for small fields,
    recompiled for each number of steps."""
    precision: Literal["fp32", "bf16", "tf32", "fp64"] = setting("fp32", given=(GENERATIVE,))
    """bf16: inside the fields, in training only; tf32: in training only, on a GPU; fp64: everything."""
