"""The watch over the training solver: its error is measured now and then, and the solver refined where it is too large."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from cnf.errors import SolverError
from cnf.flow import Flow
from cnf.likelihood import solver_error
from cnf.models import SolverConfig, train_solver
from cnf.noise import Noise
from cnf.solvers import FixedGrid, Solver

__all__ = ["Watch"]

MIN_RTOL = 1e-7  # where an adaptive solver is not tightened any further: float32 has no more digits


class Watch:
    """A coarse grid's likelihood can be gamed: the log-det of the grid leaves that of the flow, and training follows it.

    So a batch is solved again, finer, now and then. Where the mean likelihood moves by more than the tolerance, a grid gets
    twice the steps, an adaptive method a tenth of its tolerances. How often that happened is ``refinements``, which is all
    the state there is.

    Args:
        flow: what is trained.
        config: its solver.
        tolerance: in bits/dim (images) or nats/dim.
        max_grid_steps: where doubling stops.
        say: takes a line for the reader.
    """

    def __init__(self, flow: Flow, config: SolverConfig, tolerance: float, max_grid_steps: int, say: Callable[[str], None]):
        self.flow, self.config, self.tolerance, self.max_grid_steps = flow, config, tolerance, max_grid_steps
        self.say = say
        self.refinements = 0
        self._warned = False

    def solver(self, refinements: int | None = None) -> Solver:
        """The training solver after so many refinements; those made so far if not given."""
        solver = train_solver(self.config)
        for _ in range(self.refinements if refinements is None else refinements):
            solver = solver.refined()
        return solver

    def apply(self) -> None:
        """Put the present solver into every block."""
        for block in self.flow.blocks:
            block.solver = self.solver()

    def measure(self, step: int, x: Tensor, context: Tensor | None, noise: Noise) -> dict[str, Any]:
        """``solver_error`` on one batch, and the grid's steps (or rtol) from now on."""
        self.flow.train()
        try:
            error = solver_error(self.flow, x, context, noise=noise)
        except SolverError:
            error = math.inf
        if not error <= self.tolerance:  # nan is no pass
            self._refine(f"step {step}: the training solver's error is {error:.3g} {'bits' if self.flow.levels else 'nats'}/dim")
        solver = self.solver()
        now = {"grid_steps": solver.steps} if isinstance(solver, FixedGrid) else {"rtol": getattr(solver, "rtol", math.nan)}
        return {"solver_error": error, **now}

    def _refine(self, found: str) -> None:
        finer = self.solver(self.refinements + 1)
        if isinstance(finer, FixedGrid):
            possible = finer.steps <= self.max_grid_steps
        else:
            possible = getattr(finer, "rtol", 0.0) >= MIN_RTOL
        if possible:
            self.refinements += 1
            self.apply()
            self.say(f"{found}, above --watch-tolerance {self.tolerance:g}: now {finer!r}")
        elif not self._warned:
            self._warned = True
            self.say(
                f"{found}, and {self.solver()!r} is not refined any further (validation and test do not use it): a new run "
                "with --kinetic, or a larger --max-grid-steps, may help"
            )
