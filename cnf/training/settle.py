"""What steps gave: kept on the device, read together some steps later, and judged in the order of the steps."""

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

READ_SECONDS = 5.0  # what the bar shows is hardly older than that


@dataclass
class Outcome:
    """What one step gave, as the host knows it."""

    step: int
    """Its number: the first one is 0."""
    values: dict[str, float]
    """Means over the batch, the gradient's norm and the rate; empty where a solve failed."""
    failure: str = ""
    """Why there was no gradient, where that was known without waiting for the device."""
    place: str = ""
    """The first parameter whose gradient is not finite; "" where all are, or there is none."""
    void: bool = False
    """Whether the weights it was made with, and led to, have been given up since."""

    @property
    def taken(self) -> bool:
        """Whether the weights moved: the same condition as on the device."""
        return not self.failure and all(map(math.isfinite, self.values.values()))


class Ledger:
    """The outcomes of steps that have not been judged yet.

    Reading one makes the CPU wait until a GPU has come to it, so they are read together. That can be at any time, and
    changes nothing; they are judged (:func:`settle`) at steps that the settings decide, or a failed solve: what follows, such
    as going back to earlier weights, must not depend on when a run was interrupted. So those not judged yet are part of
    the resume state.

    Args:
        model: what is trained, whose parameters are named.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.failed = False
        self.last: Outcome | None = None  # for display: the latest that is known
        self.read = time.monotonic()  # when that was
        self._away: list[tuple[int, float, tuple[str, ...], Tensor]] = []
        self._known: list[Outcome] = []

    def __len__(self) -> int:
        return len(self._known) + len(self._away)

    def add(self, step: int, rate: float, names: tuple[str, ...], row: Tensor) -> None:
        """A step's figures, which may still be computed: those of :func:`advance`, then one for each name."""
        self._away.append((step, rate, names, row))

    def fail(self, step: int, failure: str) -> None:
        """A step that has no gradient."""
        self._enter([*self.fetch(), Outcome(step, {}, failure)])
        self.failed = True

    def fetch(self) -> list[Outcome]:
        """Read what is on the device, and everything that is not judged, in the order of the steps; judged ones leave this list."""
        if self._away:
            numbers = iter(torch.cat([row for *_, row in self._away]).tolist())  # all leave the device together
            found = []
            for step, rate, names, _ in self._away:
                norm, place = next(numbers), int(next(numbers))
                values = {name: next(numbers) for name in names}
                for name in ("nfe", "nfe_backward"):  # no whole number where it is a mean over processes
                    values[name] = round(values[name], 3)
                found.append(Outcome(step, {**values, "grad_norm": norm, "lr": rate}, place=self._named(place)))
            self._away = []
            self._enter([*self._known, *found])
        return self._known

    def state(self) -> list[dict[str, Any]]:
        """What is not judged, as plain values."""
        return [dataclasses.asdict(outcome) for outcome in self.fetch()]

    def load(self, state: Iterable[dict[str, Any]]) -> None:
        """Take up :meth:`state`."""
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
    """Clip the gradients and move the weights and their average where all is finite, without waiting to know whether it is.

    Where it is not, weights, moments, average and counters stay as they are. The ledger gets the norm before clipping, the
    place (from 1) of the first parameter whose gradient is not finite (0: none), and the figures (k,).
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
    """Judge all steps that have not been, and say what the latest gave: None where it was skipped, or has become void.

    Where too many in a row were skipped the weights go back, and the steps since are void: neither good nor bad.

    Raises:
        TrainingError: when going back has been of no use.
        Abandoned: for a signal; what is not judged by then can be judged later.
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
    """The latest figures that are known, for the bar or a line: steps a second, and what a validation has given by now."""
    if time.monotonic() - trainer.ledger.read > READ_SECONDS:
        trainer.ledger.fetch()
    form = ".4f" if isinstance(trainer.flow, Flow) else ".4g"  # a loss may fall by orders of magnitude
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
    """Why a batch was skipped, in words."""
    if outcome.failure:
        return outcome.failure
    figures = {name: value for name, value in outcome.values.items() if name not in ("grad_norm", "lr")}
    if not all(map(math.isfinite, figures.values())) and (found := _again(trainer, outcome.step)):
        return found
    return culprit(trainer.flow, figures, outcome.values["grad_norm"], outcome.place)


def _again(trainer: Trainer, step: int) -> str:
    """What a step's batch fails of, found by solving it once more with every check; "" where it does not, by now."""
    failure = ""
    trainer.objective.train()
    try:
        with torch.no_grad(), trainer.signals.abandoning():
            for part in micro_batches(*trainer.batches(step), trainer.config.accumulate):
                trainer.objective.evaluate(*part)
    except (SolverError, DataError) as error:
        failure = str(error)
    return failure if trainer.group.size == 1 else trainer.group.reasons(failure)
