"""Metrics of optimiser steps: buffered on the device and read together."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MetricBuffer", "StepResult"]


@dataclass
class StepResult:
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


class MetricBuffer:
    """Buffer of step metrics, kept on the device and read together, to avoid synchronisation.

    Reading may happen at any time and changes nothing. Results are processed at steps fixed by the settings, or after a
    failed solve, since the effects, such as a rollback, must not depend on when a run was interrupted. Unprocessed
    results are therefore part of the resume state.

    Args:
        model: the trained model, whose parameter names are reported.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.failed = False
        self.last: StepResult | None = None  # the latest result read, for display
        self.read_at = time.monotonic()
        self._on_device: list[tuple[int, float, tuple[str, ...], Tensor]] = []
        self._results: list[StepResult] = []

    def __len__(self) -> int:
        return len(self._results) + len(self._on_device)

    def add(self, step: int, rate: float, names: tuple[str, ...], row: Tensor) -> None:
        """Append a step's metrics, still on the device: gradient norm, number of its parameter, one value per name."""
        self._on_device.append((step, rate, names, row))

    def fail(self, step: int, failure: str) -> None:
        """Append a step that has no gradient."""
        self._put([*self.read(), StepResult(step, {}, failure)])
        self.failed = True

    def read(self) -> list[StepResult]:
        """Read the metrics on the device; return all unprocessed results in order.

        The caller removes the results that it has processed from the returned list.
        """
        if self._on_device:
            numbers = iter(torch.cat([row for *_, row in self._on_device]).tolist())  # one transfer from the device
            results = []
            for step, rate, names, _ in self._on_device:
                norm, place = next(numbers), int(next(numbers))
                values = {name: next(numbers) for name in names}
                for name in ("nfe", "nfe_backward"):  # fractional where it is a mean over processes or micro-batches
                    values[name] = round(values[name], 3)
                results.append(StepResult(step, {**values, "grad_norm": norm, "lr": rate}, place=self._name(place)))
            self._on_device = []
            self._put([*self._results, *results])
        return self._results

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the unprocessed results as plain values."""
        return [dataclasses.asdict(result) for result in self.read()]

    def load_state_dict(self, state: Iterable[dict[str, Any]]) -> None:
        """Restore :meth:`state_dict`."""
        self._on_device = []
        self._put([StepResult(**result) for result in state])
        self.failed = any(result.failure for result in self._results)

    def _put(self, results: list[StepResult]) -> None:
        self._results = results
        self.last = results[-1] if results else self.last
        self.read_at = time.monotonic()

    def _name(self, place: int) -> str:
        if not place:
            return ""
        return [name for name, p in self.model.named_parameters() if p.grad is not None][place - 1]
