"""Measurements of the flow-matching loss over time, for importance sampling of times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnf.distributed import SINGLE_PROCESS, Group
from cnf.errors import SolverError
from cnf.noise import Noise
from cnf.objectives import FlowMatching
from cnf.training.watch import spacing

__all__ = ["TimesWatch"]

SOONEST = 10  # optimiser steps between measurements at the beginning


class TimesWatch:
    """Periodic measurement of the loss over time, from which the training times are sampled.

    Args:
        objective: the flow-matching objective.
        every: longest interval between two measurements, in steps.
    """

    def __init__(self, objective: FlowMatching, every: int):
        self.objective, self.every = objective, every
        self.learns = len(objective.times.square) > 1

    def due(self, step: int) -> bool:
        """Return whether to measure after ``step`` steps."""
        return self.learns and step % min(spacing(SOONEST, step), self.every) == 0

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"times": self.objective.times.square.tolist()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`."""
        self.objective.times.square = torch.tensor(state["times"], dtype=torch.float64)

    def measure(self, step: int, x: Tensor, context: Tensor | None, noise: Noise, group: Group = SINGLE_PROCESS) -> dict[str, Any]:
        """Update the time distribution from one batch and return its median as ``early_times``.

        Return {} and change nothing if the augmented time cannot be solved.
        """
        self.objective.train()
        try:
            return self.objective.learn(x, context, noise, group=group)
        except SolverError:
            return {}
