"""Monitor of the training solver's error, which refines the solver where the error is too large."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from cnf._utils.errors import SolverError
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.losses import Objective
from cnf.random import Noise
from cnf.solvers import FixedGrid, Solver
from cnf.training.callbacks import Callback, Run

__all__ = ["SolverMonitor", "spacing"]

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


class SolverMonitor(Callback):
    """Monitor of the training solver: training can exploit the discretisation error of a coarse grid.

    A batch is solved again with a finer solver at intervals. If its mean likelihood (mean loss of a predictor) moves by
    more than the tolerance, a grid gets twice the steps, an adaptive method a tenth of its tolerances.

    Args:
        tolerance: in bits/dim (images), nats/dim, or the loss's unit.
        max_grid_steps: limit of the grid's steps.
        every: steps between two measurements.
        settling: measurements at the start of a later phase.
    """

    def __init__(self, tolerance: float = 0.01, max_grid_steps: int = 64, every: int = 100, settling: int = 3):
        self.tolerance, self.max_grid_steps, self.every, self.settling = tolerance, max_grid_steps, every, settling
        self.refinements = 0
        self.objective: Objective | None = None
        self._warned = False

    def setup(self, run: Run) -> None:
        """Monitor the objective that solves an ODE, if there is one."""
        solving = [phase.objective for phase in run.phases if phase.objective.solves and phase.objective.solvers]
        if solving:
            self.attach(solving[-1], run.say)

    def attach(self, objective: Objective, say: Callable[[str], None]) -> None:
        """Monitor ``objective``, with messages to ``say``."""
        self.objective, self.say = objective, say
        self.base = list(objective.solvers)

    def solvers(self, refinements: int) -> list[Solver]:
        """Return the training solver of each block after ``refinements`` refinements."""
        solvers = list(self.base)
        for _ in range(refinements):
            solvers = [solver.refined() for solver in solvers]
        return solvers

    def apply(self) -> None:
        """Set the current solvers as the objective's training solvers."""
        if self.objective is not None:
            self.objective.put_solvers(self.solvers(self.refinements))

    def due(self, run: Run) -> bool:
        """Return whether to measure after this step."""
        return self.objective is not None and run.objective is self.objective and self.measures(run.state.step)

    def measures(self, step: int) -> bool:
        """Return whether to measure after ``step`` steps."""
        return step % self.every == 0

    def on_phase(self, run: Run) -> None:
        """Measure a few times at the start of a later phase."""
        if run.objective is self.objective:
            for _ in range(self.settling):
                self.measure(run.state.step, *run.batches(run.state.step), run.group)

    def on_step(self, run: Run) -> Mapping[str, Any] | None:
        """Measure where it is due."""
        return self.measure(run.state.step, *run.batches(run.state.step), run.group) if self.due(run) else None

    def reset(self) -> None:
        """Give the objective the solvers back that it had before the training."""
        if self.objective is not None:
            self.objective.put_solvers(self.base)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of refinements."""
        return {"refinements": self.refinements}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict` and refine the solvers accordingly."""
        self.refinements = int(state["refinements"])
        self.apply()

    def measure(
        self, step: int, x: Tensor, context: Tensor | None, noise: Noise, group: Group = SINGLE_PROCESS
    ) -> dict[str, Any]:
        """Measure the solver's error on one batch and refine the solver if it exceeds the tolerance.

        Each process passes its own rows. Return ``solver_error`` and the new ``grid_steps`` (or ``rtol``).
        """
        assert self.objective is not None
        self.objective.train()
        try:
            error = self.objective.solver_error(x, context, noise, group=group)
        except SolverError:
            error = math.inf
        if not error <= self.tolerance:  # NaN fails
            self._refine(f"step {step}: the training solver's error is {error:.3g} {self.objective.per_dim_unit}")
        solver = self.solvers(self.refinements)[0]
        now = {"grid_steps": solver.steps} if isinstance(solver, FixedGrid) else {"rtol": getattr(solver, "rtol", math.nan)}
        return {"solver_error": error, **now}

    def _refine(self, text: str) -> None:
        finer = self.solvers(self.refinements + 1)
        if all(s.steps <= self.max_grid_steps if isinstance(s, FixedGrid) else getattr(s, "rtol", 0.0) >= MIN_RTOL for s in finer):
            self.refinements += 1
            self.apply()
            self.say(f"{text}, above --solver-check-tolerance {self.tolerance:g}: now {finer[0]!r}")
        else:
            self._give_up(text, repr(self.solvers(self.refinements)[0]))

    def _give_up(self, text: str, solver: str) -> None:
        """Report once that the error is too large for the finest solver allowed."""
        if not self._warned:
            self._warned = True
            assert self.objective is not None
            hint = "a new run with --kinetic, a larger --max-grid-steps or a smaller --step-size may help"
            if self.objective.metric != "nll":  # no density, no regularisers
                hint = "a smaller --lr, a larger --max-grid-steps or a smaller --step-size may help"
            self.say(f"{text}, and {solver} is not refined any further (validation and test do not use it): {hint}")
