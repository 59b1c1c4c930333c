"""Steps of the grid chosen while training: in each block as many as the measured error asks for, few while the flow is straight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cnf.distributed import ALONE, Group
from cnf.errors import SolverError
from cnf.noise import Noise
from cnf.solvers import FixedGrid
from cnf.training.watch import Watch, spacing

__all__ = ["AutomaticSteps"]

SOONEST = 5  # steps between measurements at the beginning, and after a change
SHARE, FEWEST_ROWS = 4, 8  # one in so many rows of a batch is measured, but no fewer than so many
CALM = 0.5  # of the tolerance: what the error has to stay below with a step less in one of the blocks


class AutomaticSteps(Watch):
    """A watch that gives every block its own number of steps, and takes steps away where they are not needed.

    A block's error is how far the batch's likelihood moves when this block alone is solved again with twice its steps. Where
    the blocks' errors together exceed the tolerance, those with more than their share of it get as many steps more as the
    method's order says, twice as many at most, and are measured again at once; as long as they would stay below half of it
    with one step less in a block, the block where that does least loses one. All blocks are first refined at once, and each
    alone only where that says that something may be to change. Every process of a group measures rows of its own, and all
    decide alike by the means.

    A grid that is too coarse is gamed: its likelihood rises as its error does, within tens of updates. So a change is
    followed by a measurement soon after, the next ones twice as far apart each; and a number of steps that was not enough
    for a block is not given to it again until it has been trained for as long again.

    Args:
        objective, config, tolerance, max_grid_steps, every, say: see :class:`~cnf.training.watch.Watch`; ``tolerance`` is that of
            all blocks together, and ``every`` the longest time between two measurements.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.since: int | None = None  # the step of the first measurement
        self.last, self.apart = 0, SOONEST  # the latest measurement, and the steps from it to the next
        self.least: dict[int, tuple[int, int]] = {}  # of a block: steps that it has to keep, and until when

    @property
    def grids(self) -> list[FixedGrid]:
        """The blocks' present grids."""
        found = [solver for solver in self.objective.solvers if isinstance(solver, FixedGrid)]
        assert len(found) == len(self.objective.solvers)
        return found

    def due(self, step: int) -> bool:
        """Whether it measures after this many steps: soon after a change, and every fifth to tenth of all steps where nothing changes."""
        return step == self.last > 0 or step - self.last >= min(self.apart, self.every)

    def state(self) -> dict[str, Any]:
        grids, least = [grid.steps for grid in self.grids], [[i, *kept] for i, kept in self.least.items()]
        return {"refinements": 0, "grids": grids, "measured": [self.since, self.last, self.apart], "least": least}

    def load(self, state: dict[str, Any]) -> None:
        self._put([int(steps) for steps in state["grids"]])
        since, last, apart = state.get("measured", (None, 0, SOONEST))  # a checkpoint of an earlier version has none
        self.since, self.last, self.apart = None if since is None else int(since), int(last), int(apart)
        self.least = {int(i): (int(steps), int(until)) for i, steps, until in state.get("least", [])}

    def _put(self, steps: list[int]) -> None:
        self.objective.put_solvers([grid.with_steps(n) for grid, n in zip(self.grids, steps, strict=True)])

    def measure(self, step: int, x: Tensor, context: Tensor | None, noise: Noise, group: Group = ALONE) -> dict[str, Any]:
        """``solver_error``, the sum of the blocks' errors, and the mean and the largest number of steps from now on."""
        self.objective.train()
        rows = min(len(x), max(FEWEST_ROWS, len(x) // SHARE))
        batch = x[:rows], None if context is None else context[:rows], noise.rows(0, len(x))
        self.since = step if self.since is None else self.since
        before = steps = [grid.steps for grid in self.grids]
        kept = [n if step < until else 1 for n, until in (self.least.get(i, (1, 0)) for i in range(len(steps)))]
        first = errors = self._errors(batch, group, any(n > least for n, least in zip(steps, kept, strict=True)))
        while sum(errors) > self.tolerance:
            self._keep(step, steps, errors)
            steps, coarser = self.choose(steps, errors), steps
            if steps == coarser:
                self._give_up(self._found(step, first), f"a grid of {max(steps)} steps")
                break
            self._put(steps)
            if not math.isfinite(sum(errors)):  # the weights may be to blame: one doubling a measurement
                break
            errors = self._errors(batch, group, False)
        else:
            if steps == before and len(errors) == len(steps):
                steps = self.choose(steps, errors, kept)
                self._put(steps)
        if max(steps) > max(before):
            self.say(f"{self._found(step, first)}, above --watch-tolerance {self.tolerance:g}: now {told(steps)} steps")
        self._plan(step, changed=steps != before)
        return {"solver_error": sum(first), "grid_steps": sum(steps) / len(steps), "most_grid_steps": max(steps)}

    def _found(self, step: int, errors: list[float]) -> str:
        return f"step {step}: the training solver's error is {sum(errors):.3g} {self.objective.per_dim_unit}"

    def _errors(self, batch: tuple[Tensor, Tensor | None, Noise], group: Group, fewer: bool) -> list[float]:
        """The blocks' errors; of all at once, one number, where that says that nothing is to change: no more steps, and, where
        there may be ``fewer``, no fewer ones."""
        try:
            errors = self.objective.block_errors(*batch, whole=True, group=group)
            if not errors[0] <= self.tolerance or (fewer and errors[0] <= CALM * self.tolerance):
                errors = self.objective.block_errors(*batch, group=group)
        except SolverError:
            errors = [math.inf] * len(self.grids)
        return [error if math.isfinite(error) else math.inf for error in errors]

    def _keep(self, step: int, steps: list[int], errors: list[float]) -> None:
        """From blocks whose steps were not enough, one step more is not to be taken away for as long again as they were trained."""
        assert self.since is not None
        until = step + max(step - self.since, SOONEST)
        for i, (n, error) in enumerate(zip(steps, errors, strict=True)):
            if error > self.tolerance / len(steps):
                self.least[i] = n + 1, until

    def _plan(self, step: int, changed: bool) -> None:
        """When to measure again."""
        assert self.since is not None
        self.last, self.apart = step, SOONEST if changed else min(2 * self.apart, spacing(SOONEST, step - self.since))

    def choose(self, steps: list[int], errors: list[float], least: Sequence[int] | None = None) -> list[int]:
        """The numbers of steps from now on, from those of the present, their errors, and how many each block has to keep.

        Example:
            >>> from cnf import ModelConfig, SolverConfig, build
            >>> from cnf.objectives import Likelihood
            >>> config = SolverConfig(grid_steps=1)
            >>> flow = build(ModelConfig(hidden=(4,), blocks=2), config, (2,))
            >>> watch = AutomaticSteps(Likelihood(flow), config, 0.01, 64, 100, print)
            >>> watch.choose([1, 4], [0.02, 0.001]), watch.choose([3, 4], [0.0001, 0.0001]), watch.choose([3, 4], [0.0001, 0.0001], [1, 3])
            ([2, 4], [2, 2], [2, 3])
        """
        order, most, share = self.grids[0].tableau.order, self.max_grid_steps, self.tolerance / len(steps)
        total, least = sum(errors), least or [1] * len(steps)
        if total > self.tolerance:
            return [_more(n, error, share, order, most) for n, error in zip(steps, errors, strict=True)]
        steps, errors = list(steps), list(errors)
        while grown := {i: errors[i] * (n / (n - 1)) ** order for i, n in enumerate(steps) if n > max(1, least[i])}:
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
