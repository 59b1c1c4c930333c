"""Training by the likelihood within a given time, with early stopping on validation rows."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnf.estimators.rows import in_chunks
from cnf.flow import Flow
from cnf.ode.continuous import EVALUATION
from cnf.solvers import FixedGrid

__all__ = ["Data", "Outcome", "choose_solver", "mean_log_prob", "now", "train"]

now: Callable[[], float] = time.perf_counter
_PATIENCE = 15  # validations
_EVERY, _EPOCHS = 50, 10  # steps between validations, and epochs in a small table
_VALIDATION_ROWS = 4096
_ERROR = 1e-3  # nats, of every row, by the evaluation solver


@dataclass(frozen=True)
class Data:
    """Points (N, \\*event) and their context (N, C), or None."""

    x: Tensor
    context: Tensor | None = None

    def rows(self, index: Tensor | slice) -> tuple[Tensor, ...]:
        """Return points, and context if there is one, of the rows."""
        return (self.x[index],) if self.context is None else (self.x[index], self.context[index])

    def to(self, *target: Any) -> Data:
        """Return the data on a device, or in a dtype."""
        return Data(self.x.to(*target), None if self.context is None else self.context.to(*target))


@dataclass(frozen=True)
class Outcome:
    """Steps taken, and the validation log-likelihood (nats) at the start and of the weights that are kept."""

    steps: int
    start: float
    best: float


def mean_log_prob(flow: Flow, data: Data, limit: int | None = None) -> float:
    """Return the mean log-likelihood (nats) of the first ``limit`` rows; -inf if one is not finite."""
    value = in_chunks(flow.log_prob, *data.rows(slice(limit))).double().mean()
    return float(value) if bool(value.isfinite()) else -math.inf


def train(
    flow: Flow,
    data: Data,
    validation: Data,
    groups: Sequence[dict[str, Any]],
    *,
    seconds: float,
    steps: int | None,
    seed: int,
    batch_size: int = 256,
    patience: int = _PATIENCE,
    on_progress: Callable[[str], None] | None = None,
) -> Outcome:
    """Train in place and keep the averaged weights of the best validation, those of the start included.

    The learning rates fall as a cosine of the share of steps or of time that is used, whichever is larger. With
    ``steps`` in time the result is a function of the seed.

    Args:
        flow: model.
        data, validation: rows to fit, and to choose by.
        groups: parameter groups of AdamW, each with its ``lr``.
        seconds, steps: limits; no limit of steps if None.
        seed: of the batches.
        batch_size: rows of a step; tables of at most twice as many take all rows.
        patience: validations without a better one before training ends.
        on_progress: is called with a line at every validation.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(list(groups), betas=(0.9, 0.99), weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    flow.eval()
    start = best = mean_log_prob(flow, validation, _VALIDATION_ROWS)
    kept = [p.detach().clone() for p in trained]
    average = [p.detach().clone() for p in trained]
    began, step, worse, order, place = now(), 0, 0, torch.empty(0, dtype=torch.long), 0
    n = len(data.x)
    size = n if n <= 2 * batch_size else batch_size
    every = min(_EVERY, max(1, _EPOCHS * (n // size)))
    while (steps is None or step < steps) and worse < patience:
        share = max((now() - began) / seconds if seconds > 0 else 1.0, 0.0 if steps is None else step / steps)
        if share >= 1:
            break
        if place + size > len(order):
            order, place = torch.randperm(n, generator=generator), 0
        index, place = order[place : place + size].to(data.x.device), place + size
        warm = min(1.0, (step + 1) / 20)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * share))
        flow.train()
        loss = -flow.log_prob(*data.rows(index)).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 10.0)
        if bool(norm.isfinite()):
            optimizer.step()
        step += 1
        decay = min(1 - 0.5 / every, step / (step + 9))
        with torch.no_grad():
            torch._foreach_lerp_(average, trained, 1 - decay)
        if step % every == 0 or step == steps:
            score = _score_of(flow, trained, average, validation)
            better = score > best
            worse = 0 if better else worse + 1
            if better:
                best, kept = score, copy.deepcopy(average)
            if on_progress is not None:
                on_progress(f"step {step}: validation {score:.4f} nats, best {best:.4f}")
    if step % every and step != steps and (score := _score_of(flow, trained, average, validation)) > best:
        best, kept = score, average
    with torch.no_grad():
        for p, value in zip(trained, kept, strict=True):
            p.copy_(value)
    flow.eval()
    return Outcome(step, start, best)


def _score_of(flow: Flow, trained: list[Tensor], average: list[Tensor], validation: Data) -> float:
    """Return the validation score of the averaged weights; the flow keeps its own."""
    with torch.no_grad():
        own = [p.clone() for p in trained]
        for p, value in zip(trained, average, strict=True):
            p.copy_(value)
        score = mean_log_prob(flow.eval(), validation, _VALIDATION_ROWS)
        for p, value in zip(trained, own, strict=True):
            p.copy_(value)
    return score


def choose_solver(flow: Flow, data: Data, *, most: int = 64) -> None:
    """Set the evaluation solver of the flow's blocks: the coarsest fixed grid with an error below 1e-3 nats in each row.

    On a fixed grid a row's likelihood does not depend on the other rows. If ``most`` steps do not suffice, the adaptive
    solver controls the error.
    """
    if not flow.blocks:
        return

    def log_prob(steps: int) -> Tensor:
        for block in flow.blocks:
            block.eval_solver = FixedGrid("rk4", steps)
        return in_chunks(flow.log_prob, *data.rows(slice(_VALIDATION_ROWS)))

    flow.eval()
    steps, value = 4, log_prob(4)
    while steps < most:
        finer = log_prob(2 * steps)
        # the error of 2 steps is that of steps / 16
        if bool(((finer - value).abs() <= 8 * _ERROR).all()):
            return  # the finer grid is set
        steps, value = 2 * steps, finer
    for block in flow.blocks:
        block.eval_solver = copy.copy(EVALUATION)
