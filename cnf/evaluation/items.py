"""Evaluation noise that depends on each row alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cnf._utils.errors import ConfigError
from cnf.random import Kind, Noise

__all__ = ["ItemNoise"]


class ItemNoise(Noise):
    """Noise as a pure function of (seed, draw, row), so that figures do not depend on the batches.

    The samples of one importance-weighted bound differ only in the dequantisation noise: they share the probe, whose
    noise would otherwise enter every weight and inflate their mean.

    Args:
        seed: of the evaluation.
        items: indices in their split of this batch's rows.
        draw: index of the noise draw.
        sample: index of the importance sample within the draw.

    Example:
        >>> whole = ItemNoise(0, range(8)).draw("dequantize", "uniform", (8, 3))
        >>> bool((ItemNoise(0, [6, 2]).draw("dequantize", "uniform", (2, 3)) == whole[[6, 2]]).all())
        True
    """

    def __init__(self, seed: int, items: Sequence[int], draw: int = 0, sample: int = 0):
        super().__init__(seed, f"evaluation/{draw}")
        self.items, self.number, self.sample = items, draw, sample

    def select(self, rows: Sequence[int]) -> ItemNoise:
        """Return the noise of some rows of the batch."""
        return ItemNoise(self.seed, [self.items[i] for i in rows], self.number, self.sample)

    def draw(self, name: str, kind: Kind, shape: Sequence[int], *, batch_dim: int | None = 0, **options: Any) -> Tensor:
        purpose = f"{self.purpose}/{self.sample}" if name == "dequantize" else self.purpose

        def draw_row(index: int, shape: Sequence[int]) -> Tensor:
            noise = Noise(self.seed, purpose, index)
            noise.path = self.path
            return noise.draw(name, kind, shape, batch_dim=None, **options)

        if batch_dim is None:
            return draw_row(-1, shape)
        row_shape = list(shape)
        rows = row_shape.pop(batch_dim)
        if rows != len(self.items):
            raise ConfigError(f"ItemNoise has noise for {len(self.items)} rows, but {rows} rows were requested")
        return torch.stack([draw_row(int(index), row_shape) for index in self.items], batch_dim)
