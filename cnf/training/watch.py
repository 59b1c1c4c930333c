"""Monitor of the training solver's error, which refines the solver where the error is too large."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from cnf.distributed import SINGLE_PROCESS, Group
from cnf.errors import SolverError
from cnf.models import SolverConfig, train_solver
from cnf.noise import Noise
from cnf.objectives import Objective
from cnf.solvers import FixedGrid, Solver

__all__ = ["Watch", "spacing"]

MIN_RTOL = 1e-7  # smallest rtol of an adaptive solver: float32 has no more digits


def spacing(soonest: int, age: int) -> int:
    """Return the steps between measurements at ``age``: ``soonest`` at first, later a fifth to a tenth of ``age``.

    Example:
        >>> [spacing(5, age) for age in (0, 49, 50, 100, 1000)]
        [5, 5, 10, 20, 160]
    """
    while 10 * soonest <= age:
        soonest *= 2
    return soonest


class Watch:
    """Monitor of the training solver: training can exploit the discretisation error of a coarse grid.

    A batch is solved again with a finer solver at intervals. If its mean likelihood (mean loss of a predictor) moves by
    more than the tolerance, a grid gets twice the steps, an adaptive method a tenth of its tolerances. ``refinements``
    counts these changes and is the whole state.

    Args:
        objective: in training mode during measurements.
        config: the solver's settings.
        tolerance: in bits/dim (images), nats/dim, or the loss's unit.
        max_grid_steps: limit of the grid's steps.
        every: steps between two measurements.
        say: prints a message.
    """

    def __init__(
        self,
        objective: Objective,
        config: SolverConfig,
        tolerance: float,
        max_grid_steps: int,
        every: int,
        say: Callable[[str], None],
    ):
        self.objective, self.config, self.tolerance, self.max_grid_steps = objective, config, tolerance, max_grid_steps
        self.every, self.say = every, say
        self.refinements = 0
        self._warned = False

    def solver(self, refinements: int | None = None) -> Solver:
        """Return the training solver after ``refinements`` refinements; the current number if None."""
        solver = train_solver(self.config)
        for _ in range(self.refinements if refinements is None else refinements):
            solver = solver.refined()
        return solver

    def apply(self) -> None:
        """Set the current solver as the objective's training solver."""
        if self.objective.solves:
            self.objective.put_solvers([self.solver()] * len(self.objective.solvers))

    def due(self, step: int) -> bool:
        """Return whether to measure after ``step`` steps."""
        return self.objective.solves and step % self.every == 0

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"refinements": self.refinements}

    def load(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state` and set the solver accordingly."""
        self.refinements = int(state["refinements"])
        self.apply()

    def measure(self, step: int, x: Tensor, context: Tensor | None, noise: Noise, group: Group = SINGLE_PROCESS) -> dict[str, Any]:
        """Measure the solver's error on one batch and refine the solver if it exceeds the tolerance.

        Each process passes its own rows. Return ``solver_error`` and the new ``grid_steps`` (or ``rtol``).
        """
        self.objective.train()
        try:
            error = self.objective.solver_error(x, context, noise, group=group)
        except SolverError:
            error = math.inf
        if not error <= self.tolerance:  # NaN fails
            self._refine(f"step {step}: the training solver's error is {error:.3g} {self.objective.per_dim_unit}")
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
            self.say(f"{found}, above --solver-check-tolerance {self.tolerance:g}: now {finer!r}")
        else:
            self._give_up(found, repr(self.solver()))

    def _give_up(self, found: str, solver: str) -> None:
        """Report once that the error is too large for the finest solver allowed."""
        if not self._warned:
            self._warned = True
            hint = "a new run with --kinetic, or a larger --max-grid-steps, may help"
            if self.objective.metric != "nll":  # no density, no regularisers
                hint = "a smaller --lr, or a larger --max-grid-steps, may help"
            self.say(f"{found}, and {solver} is not refined any further (validation and test do not use it): {hint}")
