"""The watch over flow matching: when its loss over time is measured, by which times are drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnf.distributed import ALONE, Group
from cnf.errors import SolverError
from cnf.noise import Noise
from cnf.objectives import FlowMatching
from cnf.training.watch import spacing

__all__ = ["TimesWatch"]

SOONEST = 10  # steps between measurements at the beginning


class TimesWatch:
    """Measures the loss over time on a batch, often at the start, and has times drawn by it.

    Args:
        objective: what is trained.
        every: the longest time between two measurements, in steps.
    """

    def __init__(self, objective: FlowMatching, every: int):
        self.objective, self.every = objective, every
        self.learns = len(objective.times.square) > 1

    def due(self, step: int) -> bool:
        """Whether it measures after this many steps."""
        return self.learns and step % min(spacing(SOONEST, step), self.every) == 0

    def state(self) -> dict[str, Any]:
        """What resuming needs."""
        return {"times": self.objective.times.square.tolist()}

    def load(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state`."""
        self.objective.times.square = torch.tensor(state["times"], dtype=torch.float64)

    def measure(self, step: int, x: Tensor, context: Tensor | None, noise: Noise, group: Group = ALONE) -> dict[str, Any]:
        """Half of the times are drawn before ``early_times``, from now on; nothing changes where an augmented time cannot be solved."""
        self.objective.train()
        try:
            return self.objective.learn(x, context, noise, group=group)
        except SolverError:
            return {}
