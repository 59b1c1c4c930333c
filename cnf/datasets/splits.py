"""What a data set is to the program: three disjoint splits and what is known about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.errors import DataError

__all__ = ["DataSplits", "contexts", "one_hot", "split_indices"]


@dataclass(frozen=True)
class DataSplits:
    """Train, validation and test (N, \\*event): uint8 images (N, C, H, W), or float32 vectors (N, D)."""

    name: str
    kind: str  # "toy", "image" or "table"
    train: Tensor
    validation: Tensor
    test: Tensor
    train_context: Tensor | None = None
    validation_context: Tensor | None = None
    test_context: Tensor | None = None
    classes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    levels: int | None = None  # grey levels of images; None for vectors
    entropy: float | None = None  # differential entropy in nats, of toy sets where it is known
    notices: tuple[str, ...] = ()  # what was done to the data
    flip: bool = False  # horizontal flips in training

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one item."""
        return tuple(self.train.shape[1:])


def split_indices(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """80 / 10 / 10 by seed.

    Raises:
        DataError: for fewer than 20 items.
    """
    if n < 20:
        raise DataError(f"{n} items are too few to split into training, validation and test: give at least 20")
    order = np.random.default_rng(seed).permutation(n)
    tenth = n // 10
    return order[2 * tenth :], order[tenth : 2 * tenth], order[:tenth]


def one_hot(labels: np.ndarray, count: int) -> Tensor:
    """Class numbers (N,) as contexts (N, count), float32."""
    return torch.nn.functional.one_hot(torch.as_tensor(labels, dtype=torch.long), count).float()


def contexts(labels: list[np.ndarray], count: int, condition: str | None) -> dict[str, Any]:
    """The three splits' contexts as keywords of :class:`DataSplits`; none without a condition."""
    if not condition:
        return {}
    names = ("train_context", "validation_context", "test_context")
    return {name: one_hot(rows, count) for name, rows in zip(names, labels, strict=True)}
