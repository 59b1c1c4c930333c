"""State of a training: all that a checkpoint holds."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cnf.training.metrics import MetricBuffer

__all__ = ["Pending", "Stateful", "TrainState", "upgrade"]


class Stateful(Protocol):
    """An object with a state for checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Restore :meth:`state_dict`."""


@dataclass
class Pending:
    """What is known of the latest step until all that follows it is complete."""

    values: dict[str, float] | None = None
    """Metrics of the step; None if it was skipped, or not read."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Figures of the callbacks and the validation."""
    measured: bool = False
    """Whether the callbacks' ``on_step`` are done."""


@dataclass
class TrainState:
    """Everything that changes while training; the same for any number of processes.

    Attributes:
        model: the trained model.
        optimizer: of the current phase.
        metrics: results of steps that are not processed yet.
        callbacks: those with a state, by name.
        scheduler: a scheduler of torch, if one sets the learning rate.
        step: steps taken.
        phase: number of the current phase, and ``since``, its first step.
        skipped: steps left out because loss or gradient was not finite.
        best: best validation, and ``best_step``, where it was.
        worse: validations since then.
        validated: step of the latest validation.
        seconds: of all calls.
        best_weights: those of the best validation.
        pending: of the latest step, None when it is complete.
    """

    model: nn.Module
    optimizer: Optimizer
    metrics: MetricBuffer
    callbacks: dict[str, Stateful] = field(default_factory=dict)
    scheduler: LRScheduler | None = None
    step: int = 0
    phase: int = 0
    since: int = 0
    skipped: int = 0
    best: float = math.inf
    best_step: int = 0
    worse: int = 0
    validated: int = -1
    seconds: float = 0.0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    pending: Pending | None = None

    NUMBERS = ("step", "phase", "since", "skipped", "best", "best_step", "worse", "validated", "seconds")

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "best_weights": self.best_weights,
            "numbers": {name: getattr(self, name) for name in self.NUMBERS},
            "pending": None if self.pending is None else dataclasses.asdict(self.pending),
            "results": self.metrics.state_dict(),
            "callbacks": {name: callback.state_dict() for name, callback in self.callbacks.items()},
        }

    def load_numbers(self, state: dict[str, Any]) -> None:
        """Restore step, phase and the other numbers, which decide what the rest of the state belongs to."""
        for name in self.NUMBERS:
            setattr(self, name, type(getattr(self, name))(state["numbers"][name]))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; a callback without a state in it stays as it is."""
        self.load_numbers(state)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        device = next((v.device for v in self.model.state_dict().values()), None)
        self.best_weights = {k: v.to(device) for k, v in state["best_weights"].items()}
        for name, callback in self.callbacks.items():
            if name in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][name])
        self.metrics.load_state_dict(state["results"])
        self.pending = None if state["pending"] is None else Pending(**state["pending"])


def upgrade(state: dict[str, Any]) -> dict[str, Any]:
    """Convert the checkpoint of an earlier version, which had the same contents under other names."""
    if "callbacks" in state:
        return state
    numbers, pending, rollback = dict(state["numbers"]), state["pending"], dict(state["recovery"])
    names = {"flow": "model", "ema": "average", "optimizer": "optimizer"}
    policy = {
        "skips_in_row": numbers.pop("skips_in_row"),
        "rollbacks": rollback["rollbacks"],
        "recent_nfe": rollback["usual"],
        "good_step": rollback["good_step"],
        "good": {names[name]: part for name, part in rollback["good"].items()},
    }
    callbacks = {"WeightAverage": state["ema"], "NonFinitePolicy": policy}
    if "times" in state:
        callbacks["TimeSampler"] = {"times": state["times"]}
    elif "grids" in state:
        callbacks["AutoSteps"] = {name: state[name] for name in ("grids", "measured", "least") if name in state}
    else:
        callbacks["SolverMonitor"] = {"refinements": state["refinements"]}
    numbers["phase"] = numbers.pop("stage")
    # every step was processed at once before there were outcomes
    waits = bool(pending)
    return {
        **{name: state[name] for name in ("optimizer", "best_weights", "data")},
        "penalty_scale": state.get("penalty_scale"),
        "earlier": True,
        "model": state["flow"],
        "scheduler": None,
        "numbers": numbers,
        "pending": {"values": pending["values"], "figures": pending["extra"], "measured": bool(pending["extra"])} if waits else None,
        "results": state.get("outcomes", []),
        "callbacks": callbacks,
        "rows": state["metrics"],
    }
