"""Training phases: one, or flow matching followed by fine-tuning of the likelihood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cnf.objectives import Objective
from cnf.training.batches import Batches

__all__ = ["Factor", "Phase"]

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
