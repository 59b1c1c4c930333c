"""Callbacks: what happens next to the optimiser steps of a training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from cnf._utils.errors import ConfigError
from cnf.distributed import Group
from cnf.losses import Objective
from cnf.training.batches import Batches, Validation
from cnf.training.metrics import StepResult
from cnf.training.phases import Phase
from cnf.training.schedule import Average
from cnf.training.state import TrainState

__all__ = ["Callback", "EarlyStopping", "Run", "TimeLimit", "WeightAverage", "replaced"]

C = TypeVar("C", bound="Callback")


class Run(Protocol):
    """What a callback sees of a training; :class:`~cnf.training.Trainer` implements it.

    Attributes:
        state: everything that a checkpoint holds.
        model: the trained model.
        phases: the training phases, usually one.
        group: the processes that train together.
        steps: total number of steps.
        history: the logged rows, as in metrics.jsonl.
        figures: what the callbacks' ``on_step`` have returned for the latest step.
        elapsed: seconds since this call began, the same on all processes.
        rate_factor: factor on the scheduled learning rate.
        limits: evaluations of a forward solve and of its backward pass above which a batch is skipped.
        quiet: whether messages and progress are off.
        validation: validation rows, if there are any.
    """

    state: TrainState
    model: nn.Module
    validation: Validation | None
    phases: list[Phase]
    group: Group
    steps: int
    history: list[dict[str, Any]]
    figures: dict[str, Any]
    elapsed: float
    limits: tuple[float, float]
    rate_factor: float
    quiet: bool

    @property
    def objective(self) -> Objective:
        """The objective of the current phase."""

    @property
    def batches(self) -> Batches:
        """The batches of the current phase."""

    @property
    def phase_end(self) -> int:
        """The step at which the current phase ends."""

    @property
    def last_phase(self) -> bool:
        """Whether the current phase is the last one."""

    @property
    def due(self) -> bool:
        """Whether this step gets a row in metrics.jsonl."""

    def say(self, line: str) -> None:
        """Print a warning."""

    def report(self, event: str, text: str, /, **values: Any) -> None:
        """Print an event (see :func:`cnf._utils.output.emit`)."""

    def callback(self, kind: type[C]) -> C | None:
        """Return the callback of a class; None if there is none."""

    def averaged(self) -> nn.Module:
        """Return the model that is validated."""

    def best_model(self) -> Any:
        """Return a copy of the model with the best weights."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of :class:`TrainState`."""

    def snapshot(self) -> dict[str, Any]:
        """Return the state_dicts of weights, their average and optimiser."""

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Put a snapshot back."""

    def explain(self, result: StepResult) -> str:
        """Return why a step was skipped."""


class Callback:
    """Base class of callbacks; every hook does nothing by default.

    A step takes place in this order: the optimiser step and ``on_update``; ``on_metrics`` for every step whose metrics
    are read; ``on_step``; a validation and ``on_validation`` if one is due; ``on_row`` if a row is; ``on_step_end``.

    Example:
        >>> class Norms(Callback):
        ...     def on_step(self, run):
        ...         return {"weight_norm": run.model.weight.norm().item()} if run.due else None
    """

    def setup(self, run: Run) -> None:
        """Prepare, once, when the training is put together."""

    def on_start(self, run: Run) -> None:
        """Act before the first step of this call; :meth:`on_end` follows in any case."""

    def on_phase(self, run: Run) -> None:
        """Act at the start of every later phase."""

    def on_update(self, run: Run, taken: Tensor) -> None:
        """Act after the optimiser step; ``taken`` () is False on the device where it was masked. Must not read values."""

    def on_metrics(self, run: Run, result: StepResult) -> bool:
        """Act on the metrics of one step, read later and in order; True discards the steps after it (a rollback)."""
        return False

    def due(self, run: Run) -> bool:
        """Return whether this step gets a row in metrics.jsonl, which requires reading the metrics of all steps before it."""
        return False

    def on_step(self, run: Run) -> Mapping[str, Any] | None:
        """Act after a step; return figures for the row of this step."""
        return None

    def on_validation(self, run: Run, better: bool) -> None:
        """Act after a validation; its figures are in ``run.figures``."""

    def on_row(self, run: Run, row: dict[str, Any]) -> None:
        """Log a row of metrics."""

    def on_step_end(self, run: Run) -> None:
        """Act when a step is complete: show progress, save."""

    def stop_reason(self, run: Run) -> str | None:
        """Return why training ends now, the same on all processes; None while it continues."""
        return None

    def on_finish(self, run: Run) -> None:
        """Act after the last step, before a validation of the last weights."""

    def on_end(self, run: Run) -> None:
        """Release what :meth:`on_start` has taken, also after an error."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""


def replaced(defaults: Iterable[Callback], own: Iterable[Callback | type[Callback]] | Callback | type[Callback]) -> list[Callback]:
    """Return the default callbacks with a user's own ones.

    An object takes the place of the default of its class or of a base class; a class leaves that default out; any other
    object is appended.

    Example:
        >>> found = replaced([EarlyStopping(3), TimeLimit(60.0)], [EarlyStopping(5), TimeLimit, Callback()])
        >>> [type(c).__name__ for c in found], found[0].patience
        (['EarlyStopping', 'Callback'], 5)
    """
    found = list(defaults)
    for one in [own] if isinstance(own, Callback | type) else own:
        kind = one if isinstance(one, type) else type(one)
        if not issubclass(kind, Callback):
            raise ConfigError(f"callbacks must be cnf.training.Callback objects or classes, got {one!r}")
        place = next((i for i, c in enumerate(found) if issubclass(kind, type(c))), None)
        if isinstance(one, type):
            found = [c for c in found if not isinstance(c, one)]
        elif place is None:
            found.append(one)
        else:
            found[place] = one
    return found


class EarlyStopping(Callback):
    """Stop after ``patience`` validations in a row without a better one, in the last phase; 0 never stops."""

    def __init__(self, patience: int = 0):
        self.patience = patience

    def stop_reason(self, run: Run) -> str | None:
        """Return ``"patience"`` after too many validations without a better one."""
        return "patience" if self.patience and run.state.worse >= self.patience and run.last_phase else None


class TimeLimit(Callback):
    """Stop after ``seconds`` of this call; None never stops."""

    def __init__(self, seconds: float | None = None):
        self.seconds = seconds

    def stop_reason(self, run: Run) -> str | None:
        """Return ``"max_time"`` when the time is up."""
        return "max_time" if self.seconds is not None and run.elapsed >= self.seconds else None


class WeightAverage(Callback):
    """Exponential moving average of the weights (:class:`~cnf.training.schedule.Average`), which is validated and saved.

    Args:
        decay: of the average; 0 keeps the latest weights.
    """

    def __init__(self, decay: float = 0.999):
        self.decay = decay

    def setup(self, run: Run) -> None:
        """Start from the model's weights."""
        self.average = Average(run.model, self.decay)

    def on_phase(self, run: Run) -> None:
        """Start again from the weights at the beginning of a phase."""
        self.setup(run)

    def on_update(self, run: Run, taken: Tensor) -> None:
        """Update the average."""
        self.average.update_parameters(run.model, taken)

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights and their count."""
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.average.load_state_dict(state)
