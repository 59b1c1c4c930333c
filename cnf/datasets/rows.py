"""Choosing rows of arrays, also of those that are memory maps of files."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "hold_out", "is_mapped", "keep_rows"]

Array = NDArray[Any]


def is_mapped(x: Array) -> bool:
    """Whether an array is (a view of) a memory map of a file."""
    return isinstance(x, np.memmap) and x.filename is not None


def keep_rows(x: Array, rows: Array) -> tuple[Array, Array]:
    """The chosen rows of an array, and their numbers in the order in which they come.

    Rows of an ordinary array are copied, in the order of ``rows``. A memory map (private, as mode ``"c"`` makes it)
    stays one: its first len(rows) places become the result, and those that hold other rows are overwritten, in memory
    and never in the file, by the chosen ones from further down. So read the other rows first.

    Args:
        x: (N, ...).
        rows: different row numbers.
    """
    if not is_mapped(x):
        return x[rows], rows
    count = len(rows)
    chosen = np.zeros(len(x), dtype=bool)
    chosen[rows] = True
    holes, fillers = np.flatnonzero(~chosen[:count]), count + np.flatnonzero(chosen[count:])
    for start in range(0, len(holes), 1024):
        part = slice(start, start + 1024)
        x[holes[part]] = x[fillers[part]]
    order = np.arange(count)
    order[holes] = fillers
    return x[:count], order


def hold_out(n: int, count: int, split_seed: int) -> tuple[Array, Array]:
    """Row numbers of the rest, and of ``count`` rows held out of n at random by ``split_seed``.

    Example:
        >>> rest, held_out = hold_out(10, 3, split_seed=0)
        >>> len(rest), sorted({*rest.tolist(), *held_out.tolist()}) == list(range(10))
        (7, True)
    """
    order = np.random.default_rng(split_seed).permutation(n)
    return order[count:], order[:count]
