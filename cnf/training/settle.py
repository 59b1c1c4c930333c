"""Metrics of optimiser steps: buffered on the device, read together, processed in the order of the steps."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from cnf.errors import DataError, SolverError
from cnf.flow import Flow
from cnf.training.recovery import skip
from cnf.training.step import culprit, micro_batches

if TYPE_CHECKING:
    from cnf.training.loop import Trainer

__all__ = ["Ledger", "Outcome", "advance", "settle", "told"]

READ_SECONDS = 5.0  # longest age of the metrics in the progress bar


@dataclass
class Outcome:
    """Result of one step, on the host."""

    step: int
    """The step, counted from 0."""
    values: dict[str, float]
    """Means over the batch, gradient norm and learning rate; empty if a solve failed."""
    failure: str = ""
    """Why there is no gradient, where known without synchronisation."""
    place: str = ""
    """The first parameter whose gradient is not finite; "" if there is none."""
    void: bool = False
    """Whether a rollback has discarded the weights before and after this step."""

    @property
    def taken(self) -> bool:
        """Whether the step changed the weights: the same condition as on the device."""
        return not self.failure and all(map(math.isfinite, self.values.values()))


class Ledger:
    """Buffer of step metrics, kept on the device and read together, to avoid synchronisation.

    Reading may happen at any time and changes nothing. Processing (:func:`settle`) happens at steps fixed by the
    settings, or after a failed solve, since its effects, such as a rollback, must not depend on when a run was
    interrupted. Unprocessed outcomes are therefore part of the resume state.

    Args:
        model: the trained model, whose parameter names are reported.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.failed = False
        self.last: Outcome | None = None  # the latest outcome read, for display
        self.read = time.monotonic()  # time of the latest read
        self._away: list[tuple[int, float, tuple[str, ...], Tensor]] = []
        self._known: list[Outcome] = []

    def __len__(self) -> int:
        return len(self._known) + len(self._away)

    def add(self, step: int, rate: float, names: tuple[str, ...], row: Tensor) -> None:
        """Append the metrics of a step, still on the device: norm, place (see :func:`advance`), one per name."""
        self._away.append((step, rate, names, row))

    def fail(self, step: int, failure: str) -> None:
        """Append a step that has no gradient."""
        self._enter([*self.fetch(), Outcome(step, {}, failure)])
        self.failed = True

    def fetch(self) -> list[Outcome]:
        """Read the metrics on the device; return all unprocessed outcomes in order.

        The caller removes the outcomes that it has processed from the returned list.
        """
        if self._away:
            numbers = iter(torch.cat([row for *_, row in self._away]).tolist())  # one transfer from the device
            found = []
            for step, rate, names, _ in self._away:
                norm, place = next(numbers), int(next(numbers))
                values = {name: next(numbers) for name in names}
                for name in ("nfe", "nfe_backward"):  # fractional where it is a mean over processes or micro-batches
                    values[name] = round(values[name], 3)
                found.append(Outcome(step, {**values, "grad_norm": norm, "lr": rate}, place=self._named(place)))
            self._away = []
            self._enter([*self._known, *found])
        return self._known

    def state(self) -> list[dict[str, Any]]:
        """Return the unprocessed outcomes as plain values."""
        return [dataclasses.asdict(outcome) for outcome in self.fetch()]

    def load(self, state: Iterable[dict[str, Any]]) -> None:
        """Restore :meth:`state`."""
        self._away = []
        self._enter([Outcome(**outcome) for outcome in state])
        self.failed = any(outcome.failure for outcome in self._known)

    def _enter(self, known: list[Outcome]) -> None:
        self._known = known
        self.last = known[-1] if known else self.last
        self.read = time.monotonic()

    def _named(self, place: int) -> str:
        if not place:
            return ""
        return [name for name, p in self.model.named_parameters() if p.grad is not None][place - 1]


def advance(trainer: Trainer, rate: float, names: tuple[str, ...], figures: Tensor) -> None:
    """Clip the gradients and update weights and their average, masked where not finite, without synchronisation.

    Where loss or gradient is not finite, weights, moments, average and counters stay unchanged. The ledger receives the
    norm before clipping, the number (from 1) of the first parameter whose gradient is not finite (0 for none), and the
    figures (k,).
    """
    norms = torch.stack(torch._foreach_norm([p.grad for p in trainer.weights if p.grad is not None]))
    norm = torch.linalg.vector_norm(norms)
    clip_grads_with_norm_(trainer.weights, trainer.config.max_grad_norm or math.inf, norm)
    wrong = ~norms.isfinite()
    place = (wrong.long().argmax() + 1) * wrong.any()
    row = torch.cat([torch.stack([norm.double(), place.double()]), figures])
    taken = row.isfinite().all()
    trainer.optimizer.step_where(taken)
    trainer.ema.update_parameters(trainer.flow, taken)
    trainer.ledger.add(trainer.step, rate, names, row)


def settle(trainer: Trainer) -> dict[str, float] | None:
    """Process all pending outcomes and return the latest step's metrics; None if it was skipped or void.

    Too many consecutive skipped steps cause a rollback; the pending steps after it are void, neither good nor bad.

    Raises:
        TrainingError: if all rollbacks have been used.
        Abandoned: on a signal; unprocessed outcomes are processed later.
    """
    ledger, found = trainer.ledger, None
    outcomes = ledger.fetch()
    while outcomes:
        outcome, found = outcomes[0], None
        if outcome.void:
            trainer.skipped += not outcome.taken
        elif outcome.taken:
            trainer.recovery.count(outcome.values)
            trainer.skips_in_row, found = 0, outcome.values
        elif skip(trainer, outcome.step, lambda outcome=outcome: _reason(trainer, outcome)):  # type: ignore[misc]
            for later in outcomes[1:]:
                later.void = True
        del outcomes[0]
    ledger.failed = False
    return found


def told(trainer: Trainer, rate: float, extra: dict[str, Any]) -> str:
    """Format the latest known metrics for the progress bar or a log line: samples per second, and the validation."""
    if time.monotonic() - trainer.ledger.read > READ_SECONDS:
        trainer.ledger.fetch()
    form = ".4f" if isinstance(trainer.flow, Flow) else ".4g"  # a predictor's loss may fall by orders of magnitude
    parts, last = [], trainer.ledger.last
    if last is not None:
        metric, unit = trainer.objective.metric, trainer.objective.metric_unit
        parts.append(f"{last.values[metric]:{form}} {unit}".rstrip() + f", NFE {last.values['nfe']:g}" if last.taken else "batch skipped")
    parts.append(f"{rate * trainer.batches.size:,.0f} samples/s")
    if trainer.best_weights:
        now = f"validation {extra['validation']:{form}}, " if "validation" in extra else ""
        parts.append(f"{now}best {trainer.best:{form}} at {trainer.best_step}")
    return ", ".join(parts)


def _reason(trainer: Trainer, outcome: Outcome) -> str:
    """Return why a batch was skipped."""
    if outcome.failure:
        return outcome.failure
    figures = {name: value for name, value in outcome.values.items() if name not in ("grad_norm", "lr")}
    if not all(map(math.isfinite, figures.values())) and (found := _again(trainer, outcome.step)):
        return found
    return culprit(trainer.flow, figures, outcome.values["grad_norm"], outcome.place)


def _again(trainer: Trainer, step: int) -> str:
    """Evaluate a step's batch again with all value checks and return its failure, "" if there is none."""
    failure = ""
    trainer.objective.train()
    try:
        with torch.no_grad(), trainer.signals.abandoning():
            for part in micro_batches(*trainer.batches(step), trainer.config.accumulate):
                trainer.objective.evaluate(*part)
    except (SolverError, DataError) as error:
        failure = str(error)
    return failure if trainer.group.size == 1 else trainer.group.reasons(failure)
