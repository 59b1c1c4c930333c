"""A trainer that keeps time: what training takes, without validations and checkpoints, and without compilation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from cnf.training import Trainer

__all__ = ["Stopwatch", "graphs"]


def graphs() -> int:
    """Graphs that torch.compile has made so far in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


class Stopwatch(Trainer):
    """Times a training; the watch over the solver's error is a part of it, validations and checkpoints are not.

    Args are the trainer's. After :meth:`run`: ``updates``, the seconds of every update; ``compiling``, which of them compiled
    something; ``grids``, every block's steps then; ``total``, all seconds of the training.
    """

    target = -float("inf")
    """Training stops at the first validation that is as good."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.updates: list[float] = []
        self.compiling: list[bool] = []
        self.grids: list[list[int]] = []
        self.total = self._aside = 0.0

    def update(self) -> Any:
        self.grids.append([int(getattr(block.solver, "steps", 0)) for block in self.phase.objective.flow.blocks])
        before, began = graphs(), time.perf_counter()
        result = super().update()
        if self.batches.device.type == "cuda":
            torch.cuda.synchronize()
        self.updates.append(time.perf_counter() - began)
        self.compiling.append(graphs() > before)
        return result

    def _outside(self, function: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = function()
        self._aside += time.perf_counter() - began
        return result

    def validate(self) -> dict[str, Any]:
        found: dict[str, Any] = self._outside(super().validate)
        return found

    def stop_reason(self) -> str | None:
        return "target" if self.state.best <= self.target else super().stop_reason()

    def run(self) -> str:
        began = time.perf_counter()
        reason = super().run()
        self.total = time.perf_counter() - began - self._aside
        return reason

    @property
    def compilation(self) -> float:
        """Seconds of ``total`` that went into compiling: what updates that compiled took beyond the median of the others."""
        pairs = list(zip(self.updates, self.compiling, strict=True))
        usual = statistics.median([t for t, c in pairs if not c] or self.updates)
        return sum(max(0.0, t - usual) for t, c in pairs if c)
