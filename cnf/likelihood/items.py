"""Evaluation noise that depends on each row alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cnf.errors import ConfigError
from cnf.noise import Kind, Noise

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

    Raises:
        ConfigError: from a draw of another number of rows than ``items``.

    Example:
        >>> whole = ItemNoise(0, range(8)).draw("dequantize", "uniform", (8, 3))
        >>> bool((ItemNoise(0, [6, 2]).draw("dequantize", "uniform", (2, 3)) == whole[[6, 2]]).all())
        True
    """

    def __init__(self, seed: int, items: Sequence[int], draw: int = 0, sample: int = 0):
        super().__init__(seed, f"evaluation/{draw}")
        self.items, self.number, self.sample = items, draw, sample

    def draw(self, name: str, kind: Kind, shape: Sequence[int], *, batch_dim: int | None = 0, **options: Any) -> Tensor:
        purpose = f"{self.purpose}/{self.sample}" if name == "dequantize" else self.purpose

        def one(item: int, part: Sequence[int]) -> Tensor:
            noise = Noise(self.seed, purpose, item)
            noise.path = self.path
            return noise.draw(name, kind, part, batch_dim=None, **options)

        if batch_dim is None:
            return one(-1, shape)
        part = list(shape)
        rows = part.pop(batch_dim)
        if rows != len(self.items):
            raise ConfigError(f"noise for {rows} rows was asked of ItemNoise, which has {len(self.items)} items")
        return torch.stack([one(int(item), part) for item in self.items], batch_dim)
