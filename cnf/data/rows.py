"""Row selection in arrays and memory maps, and errors of readers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnf._utils.errors import CNFError, DataError

__all__ = ["Array", "Table", "hold_out", "is_mapped", "keep_rows", "optional_module", "reading"]

Array = NDArray[Any]
Table = NDArray[np.float64]


def optional_module(module: str, subject: str, alternative: str = "", error: type[CNFError] = DataError) -> Any:
    """Import a module of an optional package; ``subject`` and ``alternative`` complete the message.

    Raises:
        error: if the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise error(f"{subject} needs the package {package}: pip install {package}{alternative}") from None


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Raise any failure of the block as a DataError that names the file; a DataError passes."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # readers raise many exception types for damaged files
        raise DataError(f"{str(path)!r} cannot be read as {what}: {error or type(error).__name__}") from None


def is_mapped(x: Array) -> bool:
    """Return whether an array is (a view of) a memory map of a file."""
    return isinstance(x, np.memmap) and x.filename is not None


def keep_rows(x: Array, rows: Array) -> tuple[Array, Array]:
    """Select rows of an array; return them and their row numbers in the order of the result.

    Rows of an ordinary array are copied, in the order of ``rows``. A memory map (private, mode ``"c"``) is modified in
    place: the result is a view of its first len(rows) rows, where unselected rows are overwritten, in memory and never
    in the file, by selected rows from further down. Read the other rows first.

    Args:
        x: (N, ...).
        rows: distinct row numbers.
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
    """Hold out ``count`` of n rows at random by ``split_seed``; return the row numbers of the rest and of those.

    Example:
        >>> rest, held_out = hold_out(10, 3, split_seed=0)
        >>> len(rest), sorted({*rest.tolist(), *held_out.tolist()}) == list(range(10))
        (7, True)
    """
    order = np.random.default_rng(split_seed).permutation(n)
    return order[count:], order[:count]
