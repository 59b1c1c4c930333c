"""Training phases: one, or flow matching followed by fine-tuning of the likelihood."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from cnf.losses import Objective
from cnf.training.batches import Batches

__all__ = ["Factor", "LearningRate", "Phase"]

Factor = Callable[[int, int], float]
"""Learning-rate factor of (step in the phase, steps of the phase)."""


@dataclass(frozen=True)
class Phase:
    """One training phase.

    Attributes:
        objective: the loss with its validation.
        batches: the training batches.
        optimizer: returns a new optimiser of the model, with its peak learning rates.
        schedule: learning-rate factor of (step in the phase, steps of the phase), or a scheduler of torch.
        steps: number of steps; None for the last phase, which takes the rest.
        message: printed at its start.
    """

    objective: Objective
    batches: Batches
    optimizer: Callable[[nn.Module], Optimizer]
    schedule: Factor | LRScheduler
    steps: int | None = None
    message: str = ""


class LearningRate:
    """Learning rates of an optimiser: a schedule of the step, or a scheduler of torch, times the rollback factor.

    Args:
        optimizer: with its peak learning rates.
        schedule: factor of (step, steps), or a scheduler of torch.
    """

    def __init__(self, optimizer: Optimizer, schedule: Factor | LRScheduler):
        self.optimizer, self.schedule = optimizer, schedule
        self.scheduler = schedule if isinstance(schedule, LRScheduler) else None
        self.peaks = [group["lr"] for group in optimizer.param_groups]

    def set(self, step: int, steps: int, factor: float) -> float:
        """Set the learning rates of a step and return the first one."""
        if isinstance(self.schedule, LRScheduler):
            rates = [float(rate) for rate in self.schedule.get_last_lr()]
        else:
            scale = self.schedule(step, steps)
            rates = [scale * peak for peak in self.peaks]
        self._put([rate * factor for rate in rates])
        return float(rates[0] * factor)

    def advance(self) -> None:
        """Advance a scheduler of torch by one step."""
        if self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            self._put(self.scheduler.get_last_lr())  # without the rollback factor
            self.scheduler.step()

    def validated(self, value: float) -> None:
        """Report a validation to a scheduler that follows it."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self._put(self.scheduler.get_last_lr())
            self.scheduler.step(value)

    def reset(self) -> None:
        """Set the peak learning rates again."""
        if self.scheduler is None:
            self._put(self.peaks)

    def _put(self, rates: Iterable[Any]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
