"""The watch over the training solver: its error is measured now and then, and the solver refined where it is too large."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from cnf.distributed import ALONE, Group
from cnf.errors import SolverError
from cnf.models import SolverConfig, train_solver
from cnf.noise import Noise
from cnf.objectives import Objective
from cnf.solvers import FixedGrid, Solver

__all__ = ["Watch", "spacing"]

MIN_RTOL = 1e-7  # where an adaptive solver is not tightened any further: float32 has no more digits


def spacing(soonest: int, age: int) -> int:
    """Steps between measurements after ``age`` steps: ``soonest`` at first, a fifth to a tenth of all steps later on.

    Example:
        >>> [spacing(5, age) for age in (0, 49, 50, 100, 1000)]
        [5, 5, 10, 20, 160]
    """
    while 10 * soonest <= age:
        soonest *= 2
    return soonest


class Watch:
    """A coarse grid's likelihood can be gamed: the log-det of the grid leaves that of the flow, and training follows it.

    So a batch is solved again, finer, now and then. Where the mean likelihood (of what predicts: the mean loss) moves by more than the tolerance, a grid gets
    twice the steps, an adaptive method a tenth of its tolerances. How often that happened is ``refinements``, which is all
    the state there is.

    Args:
        objective: what is trained, in training mode when it is measured.
        config: its solver.
        tolerance: in bits/dim (images), nats/dim, or the loss's unit.
        max_grid_steps: where doubling stops.
        every: steps between two measurements.
        say: takes a line for the reader.
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
        """The training solver after so many refinements; those made so far if not given."""
        solver = train_solver(self.config)
        for _ in range(self.refinements if refinements is None else refinements):
            solver = solver.refined()
        return solver

    def apply(self) -> None:
        """Train with the present solver."""
        if self.objective.solves:
            self.objective.put_solvers([self.solver()] * len(self.objective.solvers))

    def due(self, step: int) -> bool:
        """Whether it measures after this many steps."""
        return self.objective.solves and step % self.every == 0

    def state(self) -> dict[str, Any]:
        """What resuming needs."""
        return {"refinements": self.refinements}

    def load(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state`, and train with the solver it tells."""
        self.refinements = int(state["refinements"])
        self.apply()

    def measure(self, step: int, x: Tensor, context: Tensor | None, noise: Noise, group: Group = ALONE) -> dict[str, Any]:
        """``solver_error`` on one batch, of which each process gives its rows, and the grid's steps (or rtol) from now on."""
        self.objective.train()
        try:
            error = self.objective.solver_error(x, context, noise, group=group)
        except SolverError:
            error = math.inf
        if not error <= self.tolerance:  # nan is no pass
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
            self.say(f"{found}, above --watch-tolerance {self.tolerance:g}: now {finer!r}")
        else:
            self._give_up(found, repr(self.solver()))

    def _give_up(self, found: str, solver: str) -> None:
        """Tell once that the error is too large for the finest solver there may be."""
        if not self._warned:
            self._warned = True
            hint = "a new run with --kinetic, or a larger --max-grid-steps, may help"
            if self.objective.metric != "nll":  # no density, no regularisers
                hint = "a smaller --lr, or a larger --max-grid-steps, may help"
            self.say(f"{found}, and {solver} is not refined any further (validation and test do not use it): {hint}")
