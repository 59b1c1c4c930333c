"""Automatic selection of the number of solver steps of each block during training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cnf._utils.errors import ConfigError, SolverError
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.random import Noise
from cnf.solvers import FixedGrid
from cnf.training.solver_monitor import SolverMonitor, spacing

__all__ = ["AutoSteps"]

SOONEST = 5  # optimiser steps between measurements at the beginning and after a change
SHARE, FEWEST_ROWS = 4, 8  # measure one in SHARE rows of a batch, at least FEWEST_ROWS
CALM = 0.5  # fraction of the tolerance that bounds the error after removing a solver step


class AutoSteps(SolverMonitor):
    """Solver monitor that sets the number of solver steps of each block from its measured error.

    A block's error is the mean absolute change of the rows' likelihoods when this block alone is solved with twice its
    steps. If the sum of the errors exceeds the tolerance, each block above its share gets the number of steps that the
    method's order predicts, at most twice as many, and the errors are measured again. While the predicted sum stays
    below half the tolerance, the block whose error grows least loses one step. All blocks are refined together first,
    and one by one only if that result may lead to a change. Every process of a group measures its own rows; all decide
    on the means.

    Training exploits the discretisation error of a coarse grid within tens of updates: the likelihood rises with the
    error. A change is therefore followed by a measurement soon after, the next ones at doubling intervals, and a number
    of steps that was too small for a block is not used again until it has been trained for as long again.

    Args:
        tolerance: of the sum over the blocks, in bits/dim (images), nats/dim, or the loss's unit.
        max_grid_steps: limit of a block's steps.
        every: longest interval between two measurements, in steps.
        settling: measurements at the start of a later phase.
    """

    def __init__(self, tolerance: float = 0.01, max_grid_steps: int = 64, every: int = 100, settling: int = 3):
        super().__init__(tolerance, max_grid_steps, every, settling)
        self.since: int | None = None  # step of the first measurement
        self.last, self.apart = 0, SOONEST  # step of the latest measurement, interval to the next
        # block: (minimum number of solver steps, optimiser step until which it holds)
        self.least: dict[int, tuple[int, int]] = {}

    @property
    def grids(self) -> list[FixedGrid]:
        """The current grid of each block."""
        assert self.objective is not None
        solvers = self.objective.solvers
        grids = [solver for solver in solvers if isinstance(solver, FixedGrid)]
        if len(grids) < len(solvers):
            raise ConfigError(f"AutoSteps is for solvers on a grid, got {solvers}: take SolverMonitor for an adaptive solver")
        return grids

    def measures(self, step: int) -> bool:
        """Return whether to measure after ``step`` steps.

        Measurements follow soon after a change, and otherwise at a fifth to a tenth of all steps.
        """
        return step == self.last > 0 or step - self.last >= min(self.apart, self.every)

    def state_dict(self) -> dict[str, Any]:
        """Return the grids and what is known of earlier ones."""
        if self.objective is None:
            return {}
        grids, least = [grid.steps for grid in self.grids], [[i, *kept] for i, kept in self.least.items()]
        return {"grids": grids, "measured": [self.since, self.last, self.apart], "least": least}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        if not state:
            return
        self._put([int(steps) for steps in state["grids"]])
        since, last, apart = state.get("measured", (None, 0, SOONEST))  # absent in checkpoints of earlier versions
        self.since, self.last, self.apart = None if since is None else int(since), int(last), int(apart)
        self.least = {int(i): (int(steps), int(until)) for i, steps, until in state.get("least", [])}

    def _put(self, steps: list[int]) -> None:
        assert self.objective is not None
        self.objective.put_solvers([grid.with_steps(n) for grid, n in zip(self.grids, steps, strict=True)])

    def measure(self, step: int, x: Tensor, context: Tensor | None, noise: Noise, group: Group = SINGLE_PROCESS) -> dict[str, Any]:
        """Measure the blocks' errors on one batch and adapt their grids.

        Return ``solver_error``, the sum of the errors before the change, and the new mean and maximum number of solver
        steps (``grid_steps``, ``most_grid_steps``).
        """
        assert self.objective is not None
        self.objective.train()
        rows = min(len(x), max(FEWEST_ROWS, len(x) // SHARE))
        batch = x[:rows], None if context is None else context[:rows], noise.rows(0, len(x))
        self.since = step if self.since is None else self.since
        before = steps = [grid.steps for grid in self.grids]
        kept = [n if step < until else 1 for n, until in (self.least.get(i, (1, 0)) for i in range(len(steps)))]
        first = errors = self._errors(batch, group, any(n > least for n, least in zip(steps, kept, strict=True)))
        while sum(errors) > self.tolerance:
            self._require_more(step, steps, errors)
            steps, coarser = self.choose(steps, errors), steps
            if steps == coarser:
                self._give_up(self._text(step, first), f"a grid of {max(steps)} steps")
                break
            self._put(steps)
            if not math.isfinite(sum(errors)):  # the weights may be the cause: one doubling per measurement
                break
            errors = self._errors(batch, group, False)
        else:
            if steps == before and len(errors) == len(steps):
                steps = self.choose(steps, errors, kept)
                self._put(steps)
        if max(steps) > max(before):
            self.say(f"{self._text(step, first)}, above --solver-check-tolerance {self.tolerance:g}: now {steps_text(steps)} steps")
        self._schedule(step, changed=steps != before)
        return {"solver_error": sum(first), "grid_steps": sum(steps) / len(steps), "most_grid_steps": max(steps)}

    def _text(self, step: int, errors: list[float]) -> str:
        assert self.objective is not None
        return f"step {step}: the training solver's error is {sum(errors):.3g} {self.objective.per_dim_unit}"

    def _errors(self, batch: tuple[Tensor, Tensor | None, Noise], group: Group, fewer: bool) -> list[float]:
        """Return the error of each block, or a single joint one where that rules out a change.

        More steps are ruled out below the tolerance; fewer, where ``fewer`` allows them, above CALM times the
        tolerance.
        """
        assert self.objective is not None
        try:
            errors = self.objective.block_errors(*batch, whole=True, group=group)
            if not errors[0] <= self.tolerance or (fewer and errors[0] <= CALM * self.tolerance):
                errors = self.objective.block_errors(*batch, group=group)
        except SolverError:
            errors = [math.inf] * len(self.grids)
        return [error if math.isfinite(error) else math.inf for error in errors]

    def _require_more(self, step: int, steps: list[int], errors: list[float]) -> None:
        """Require one more solver step of each block above its share, for as long as it has been trained so far."""
        assert self.since is not None
        until = step + max(step - self.since, SOONEST)
        for i, (n, error) in enumerate(zip(steps, errors, strict=True)):
            if error > self.tolerance / len(steps):
                self.least[i] = n + 1, until

    def _schedule(self, step: int, changed: bool) -> None:
        """Schedule the next measurement."""
        assert self.since is not None
        self.last, self.apart = step, SOONEST if changed else min(2 * self.apart, spacing(SOONEST, step - self.since))

    def choose(self, steps: list[int], errors: list[float], least: Sequence[int] | None = None) -> list[int]:
        """Return the new number of solver steps of each block, given the current ones, their errors and the minima.

        Example:
            >>> from cnf import FlowConfig, SolverConfig, build
            >>> from cnf.losses import Likelihood
            >>> monitor = AutoSteps()
            >>> monitor.attach(Likelihood(build(FlowConfig.of(hidden=(4,), blocks=2), SolverConfig(), (2,))), print)
            >>> monitor.choose([1, 4], [0.02, 0.001]), monitor.choose([3, 4], [0.0001, 0.0001])
            ([2, 4], [2, 2])
            >>> monitor.choose([3, 4], [0.0001, 0.0001], [1, 3])
            [2, 3]
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
    """Return the number of steps that reduces one block's error to its share, as predicted by the method's order."""
    if error <= share:
        return n
    wanted: float = max(n + 1, n * (error / share) ** (1 / order))
    return max(n, math.ceil(min(wanted, 2 * n, most)))


def steps_text(steps: list[int]) -> str:
    """Format the number of solver steps: one number if all blocks agree, else one for each block.

    Example:
        >>> steps_text([3, 3]), steps_text([1, 2])
        ('3', '1, 2')
    """
    return str(steps[0]) if len(set(steps)) == 1 else ", ".join(map(str, steps))
