"""Measurement of the flow-matching loss over time, from which the training times are sampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cnf._utils.errors import SolverError
from cnf.losses import FlowMatching
from cnf.training.callbacks import Callback, Run
from cnf.training.solver_monitor import spacing

__all__ = ["TimeSampler"]

SOONEST = 10  # optimiser steps between measurements at the beginning


class TimeSampler(Callback):
    """Importance sampling of the times of flow matching: measure at intervals where the loss is large.

    Args:
        every: longest interval between two measurements, in steps.
    """

    def __init__(self, every: int = 100):
        self.every = every
        self.objective: FlowMatching | None = None

    def setup(self, run: Run) -> None:
        """Measure the first objective that is flow matching, if there is one."""
        self.objective = next((p.objective for p in run.phases if isinstance(p.objective, FlowMatching)), None)

    def due(self, run: Run) -> bool:
        """Return whether to measure after this step."""
        if self.objective is None or run.objective is not self.objective or len(self.objective.times.square) == 1:
            return False
        return run.state.step % min(spacing(SOONEST, run.state.step), self.every) == 0

    def on_step(self, run: Run) -> Mapping[str, Any] | None:
        """Update the distribution of the times from one batch and return its median as ``early_times``.

        Return {} and change nothing if the augmented time cannot be solved.
        """
        if not self.due(run):
            return None
        assert self.objective is not None
        self.objective.train()
        try:
            return self.objective.learn(*run.batches(run.state.step), group=run.group)
        except SolverError:
            return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the measurements."""
        return {} if self.objective is None else {"times": self.objective.times.square.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        if self.objective is not None and state:
            self.objective.times.square = torch.tensor(state["times"], dtype=torch.float64)
