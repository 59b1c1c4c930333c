"""Steps of the grid chosen while training: in each block as many as the measured error asks for, few while the flow is straight."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from cnf.distributed import ALONE, Group
from cnf.errors import SolverError
from cnf.noise import Noise
from cnf.solvers import FixedGrid
from cnf.training.watch import Watch

__all__ = ["AutomaticSteps"]

SOONEST = 5  # steps between measurements at the beginning, when the field moves fastest; a fifth to a tenth of all steps later on
SHARE, FEWEST_ROWS = 4, 8  # one in so many rows of a batch is measured, but no fewer than so many
CALM = 0.5  # of the tolerance: what the error has to stay below with a step less in one of the blocks


class AutomaticSteps(Watch):
    """A watch that gives every block its own number of steps, and takes steps away where they are not needed.

    A block's error is how far the batch's likelihood moves when this block alone is solved again with twice its steps. Where
    the blocks' errors together exceed the tolerance, those with more than their share of it get as many steps more as the
    method's order says, twice as many at most; as long as they would stay below half of it with one step less in a block, the
    block where that does least loses one. All blocks are first refined at once, and each alone only where that says that
    something may be to change. Every process of a group measures rows of its own, and all decide alike by the means.

    Args:
        objective, config, tolerance, max_grid_steps, every, say: see :class:`~cnf.training.watch.Watch`; ``tolerance`` is that of
            all blocks together, and ``every`` the longest time between two measurements.
    """

    @property
    def grids(self) -> list[FixedGrid]:
        """The blocks' present grids."""
        found = [solver for solver in self.objective.solvers if isinstance(solver, FixedGrid)]
        assert len(found) == len(self.objective.solvers)
        return found

    def due(self, step: int) -> bool:
        """Whether it measures after this many steps: every 5 before step 50, every 10 before step 100, and so on."""
        apart = SOONEST
        while 10 * apart <= step and apart < self.every:
            apart *= 2
        return step % min(apart, self.every) == 0

    def state(self) -> dict[str, Any]:
        return {"refinements": 0, "grids": [grid.steps for grid in self.grids]}

    def load(self, state: dict[str, Any]) -> None:
        self._put([int(steps) for steps in state["grids"]])

    def _put(self, steps: list[int]) -> None:
        self.objective.put_solvers([grid.with_steps(n) for grid, n in zip(self.grids, steps, strict=True)])

    def measure(self, step: int, x: Tensor, context: Tensor | None, noise: Noise, group: Group = ALONE) -> dict[str, Any]:
        """``solver_error``, the sum of the blocks' errors, and the mean and the largest number of steps from now on."""
        self.objective.train()
        rows = min(len(x), max(FEWEST_ROWS, len(x) // SHARE))
        some = None if context is None else context[:rows]
        before = [grid.steps for grid in self.grids]
        batch = x[:rows], some, noise.rows(0, len(x))
        try:
            errors = self.objective.block_errors(*batch, whole=True, group=group)
            if not errors[0] <= self.tolerance or (errors[0] <= CALM * self.tolerance and max(before) > 1):
                errors = self.objective.block_errors(*batch, group=group)
        except SolverError:
            errors = [math.inf] * len(before)
        errors = [error if math.isfinite(error) else math.inf for error in errors]
        after = before if len(errors) < len(before) else self.choose(before, errors)
        found = f"step {step}: the training solver's error is {sum(errors):.3g} {self.objective.per_dim_unit}"
        if sum(errors) > self.tolerance and max(after) >= self.max_grid_steps and after == before:
            self._give_up(found, f"a grid of {max(after)} steps")
        if after != before:
            self._put(after)
            if max(after) > max(before):
                self.say(f"{found}, above --watch-tolerance {self.tolerance:g}: now {told(after)} steps")
        return {"solver_error": sum(errors), "grid_steps": sum(after) / len(after), "most_grid_steps": max(after)}

    def choose(self, steps: list[int], errors: list[float]) -> list[int]:
        """The numbers of steps from now on, from those of the present and their errors.

        Example:
            >>> from cnf import ModelConfig, SolverConfig, build
            >>> from cnf.objectives import Likelihood
            >>> config = SolverConfig(grid_steps=1)
            >>> flow = build(ModelConfig(hidden=(4,), blocks=2), config, (2,))
            >>> watch = AutomaticSteps(Likelihood(flow), config, 0.01, 64, 100, print)
            >>> watch.choose([1, 4], [0.02, 0.001]), watch.choose([3, 4], [0.0001, 0.0001])
            ([2, 4], [2, 2])
        """
        order, most, share = self.grids[0].tableau.order, self.max_grid_steps, self.tolerance / len(steps)
        total = sum(errors)
        if total > self.tolerance:
            return [_more(n, error, share, order, most) for n, error in zip(steps, errors, strict=True)]
        steps, errors = list(steps), list(errors)
        while grown := {i: errors[i] * (n / (n - 1)) ** order for i, n in enumerate(steps) if n > 1}:
            best = min(grown, key=lambda i: grown[i] - errors[i])
            if sum(errors) - errors[best] + grown[best] > CALM * self.tolerance:
                break
            steps[best], errors[best] = steps[best] - 1, grown[best]
        return steps


def _more(n: int, error: float, share: float, order: int, most: int) -> int:
    """Steps that bring one block's error down to its share, as the order says."""
    if error <= share:
        return n
    wanted: float = max(n + 1, n * (error / share) ** (1 / order))
    return max(n, math.ceil(min(wanted, 2 * n, most)))


def told(steps: list[int]) -> str:
    """For the reader: one number, or every block's.

    Example:
        >>> told([3, 3]), told([1, 2])
        ('3', '1, 2')
    """
    return str(steps[0]) if len(set(steps)) == 1 else ", ".join(map(str, steps))
