"""Training of a flow in memory, within a time and by a number of steps, with :class:`~cnf.training.Trainer`."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnf.data import DataSplits
from cnf.estimators.budget import Budget
from cnf.estimators.rows import in_chunks
from cnf.flow import Flow
from cnf.losses import Likelihood
from cnf.ode.continuous import EVALUATION
from cnf.solvers import FixedGrid
from cnf.training import NonFinitePolicy, Run, Trainer, WeightAverage
from cnf.training.batches import Batches, Validation
from cnf.training.callbacks import Callback
from cnf.training.phases import Phase

__all__ = ["Pace", "choose_solver", "train"]

MAX_GRAD_NORM = 10.0
ERROR = 1e-3  # nats, of every row, by the evaluation solver
VALIDATION_ROWS = 4096  # by which a solver is chosen


class Pace(Callback):
    """End of a training by steps, or by time: the learning rate follows the share that is done.

    Args:
        steps: planned number; without a limit of time it is kept.
        budget: the clock of the search.
        until: time by that clock at which the training ends.
        validations: planned during the training.
        most: number of steps that is never exceeded.
        every: steps between two corrections of the plan.
    """

    def __init__(self, steps: int, budget: Budget, until: float = math.inf, validations: int = 0, most: int | None = None, every: int = 20):
        self.planned, self.budget, self.until, self.every, self.validations = steps, budget, until, every, validations + 1
        self.most = math.inf if most is None else most
        self._last, self._steps, self.validation_seconds = 0.0, [0.02], 0.0

    @property
    def step_seconds(self) -> float:
        """Median time of the latest steps, without validations; positive, though a clock may stand between two steps."""
        return max(1e-4, statistics.median(self._steps or [0.02]))

    def on_start(self, run: Run) -> None:
        """Start the clock."""
        self._last, self._steps = self.budget.spent, []

    def on_validation(self, run: Run, better: bool) -> None:
        """Measure the time of the validation."""
        now = self.budget.spent
        self.validation_seconds, self._last, self.validations = now - self._last, now, self.validations - 1

    def on_step_end(self, run: Run) -> None:
        """Correct the number of steps by the time that they take, and what validations will take."""
        now, step = self.budget.spent, run.state.step
        self._steps, self._last = [*self._steps[-50:], now - self._last], now
        if self.until < math.inf and step % self.every == 0:
            left = self.until - now - max(0, self.validations) * self.validation_seconds
            self.planned = step + max(0, int(left / self.step_seconds))

    def rate(self, warmup: int, *, decay: bool = True) -> Callable[[int, int], float]:
        """Return the learning-rate factor: a linear rise, and a cosine of the share that is done if ``decay``."""

        def factor(step: int, _: int) -> float:
            share = min(1.0, step / max(1.0, min(self.planned, self.most)))
            return min(1.0, (step + 1) / warmup) * (0.5 * (1 + math.cos(math.pi * share)) if decay else 1.0)

        return factor

    def stop_reason(self, run: Run) -> str | None:
        """Return ``"steps"`` when the planned steps are done."""
        return "steps" if run.state.step >= min(self.planned, self.most) else None


def train(
    flow: Flow,
    data: DataSplits,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    pace: Pace,
    rate: Callable[[int, int], float],
    *,
    batch_size: int,
    seed: int,
    average: float,
    validate_every: int,
    callbacks: Sequence[Callback] = (),
) -> Trainer:
    """Train a flow in place by the likelihood; it gets the weights of the best validation, those of the start included.

    Args:
        flow: model, with a base that is fitted.
        data: training rows, and validation rows of at least one.
        optimizer: returns an optimiser of the model.
        pace: ends the training.
        rate: learning-rate factor of the step; see :meth:`Pace.rate`.
        batch_size: rows of a step.
        seed: of the batches.
        average: decay of the averaged weights, which are validated.
        validate_every: steps.
        callbacks: further ones.

    Returns:
        The trainer, with ``state`` and ``history``.
    """
    like = flow.like
    batches = Batches(data, batch_size, seed, like.device, dtype=like.dtype)
    x, context = data.validation.to(like), data.validation_context
    rows = Validation(x, None if context is None else context.to(like), torch.arange(len(x)))
    trainer = Trainer(
        flow, [Phase(Likelihood(flow), batches, optimizer, rate)], steps=10**9, validation=rows,
        callbacks=[WeightAverage(average), *callbacks, NonFinitePolicy(), pace],
        validate_every=validate_every, log_every=50, max_grad_norm=MAX_GRAD_NORM, quiet=True,
    )  # fmt: skip
    trainer.run()
    flow.load_state_dict(trainer.state.best_weights)
    flow.eval()
    return trainer


def choose_solver(flow: Flow, x: Tensor, context: Tensor | None = None, *, most: int = 64) -> None:
    """Set the evaluation solver of the flow's blocks: the coarsest fixed grid with an error below 1e-3 nats in each row.

    On a fixed grid a row's likelihood does not depend on the other rows. If ``most`` steps do not suffice, the adaptive
    solver controls the error.

    Args:
        flow: model.
        x: rows (N, \\*event), of which the first 4,096 are solved.
        context: (N, C).
        most: steps.
    """
    if not flow.blocks:
        return
    some: tuple[Any, ...] = (x[:VALIDATION_ROWS],) if context is None else (x[:VALIDATION_ROWS], context[:VALIDATION_ROWS])

    def log_prob(steps: int) -> Tensor:
        for block in flow.blocks:
            block.eval_solver = FixedGrid("rk4", steps)
        return in_chunks(flow.log_prob, *some)

    flow.eval()
    steps, value = 4, log_prob(4)
    while steps < most:
        finer = log_prob(2 * steps)
        # the error of 2 steps is that of steps / 16
        if bool(((finer - value).abs() <= 8 * ERROR).all()):
            return  # the finer grid is set
        steps, value = 2 * steps, finer
    for block in flow.blocks:
        block.eval_solver = copy.copy(EVALUATION)
