"""Table checks: constant, non-finite and discrete columns and duplicate rows are rejected, corrected or reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cnf._utils.errors import DataError
from cnf.data.lattice import few_distinct, lattice_step
from cnf.data.rows import Array, Table
from cnf.data.schema import TableColumn, snap
from cnf.data.splits import Options

__all__ = ["column_name", "dequantize", "duplicate_rows", "find_lattices", "repeated_values", "repetition", "require_finite", "require_table", "require_usable"]

DEQUANTIZE_STREAM = 1  # second word of the generator's seed, distinct from the toy sets' streams
ATOM_SHARE = 0.05
UNBOUNDED = "its density is unbounded and the likelihood is not to be trusted"
DIGEST_BYTES = 256  # wider rows are compared by digest, to save memory


def column_name(columns: Sequence[str], j: int) -> str:
    """Return the description of column ``j`` for messages: its number, and its name if it has one."""
    return f"column {j}" if columns[j] == f"column {j}" else f"column {j} ({columns[j]!r})"


def require_table(x: Array, name: str) -> None:
    """Check that an array is a table (N, D) of real numbers.

    Raises:
        DataError: for text, complex numbers or objects, an array that is not two-dimensional, or one without columns.
    """
    if x.ndim != 2:
        raise DataError(
            f"{name!r} must be a table (rows, columns), or uint8 images (N, H, W), (N, H, W, C) or (N, C, H, W), got shape "
            f"{x.shape}; reshape a single column to (-1, 1)"
        )
    if x.dtype.kind not in "biuf":
        raise DataError(f"{name!r} must hold real numbers, got dtype {x.dtype}")
    if x.shape[1] == 0:
        raise DataError(f"{name!r} must have at least one column, got none")


def require_finite(table: Table, columns: Sequence[str], name: str) -> None:
    """Check that all values (N, D) are finite.

    Raises:
        DataError: for NaN or infinite values; the first is named by its row and its column in ``columns``.
    """
    bad = ~np.isfinite(table)
    if bad.any():
        row, j = (int(i) for i in np.argwhere(bad)[0])
        raise DataError(
            f"{name!r} has {int(bad.sum()):,} values that are NaN or infinite, the first in row {row}, "
            f"{column_name(columns, j)}: {table[row, j]:g}; remove those rows or fill them in"
        )


def require_usable(table: Table, columns: Sequence[str], name: str) -> None:
    """Check that a density can be fitted to a table (N, D).

    Raises:
        DataError: for NaN or infinite values, no rows, a constant column, or a column that float32 cannot resolve.
    """
    require_finite(table, columns, name)
    if len(table) == 0:
        raise DataError(f"{name!r} has no rows")
    for j, column in enumerate(table.T):
        label = f"{column_name(columns, j)} of {name!r}"
        if column.min() == column.max():
            flat = len(columns) >= 64 and table.min() >= 0 and table.max() <= 255 and bool((table == np.rint(table)).all())
            hint = " (if the rows are flattened images, reshape them to (N, height, width) in the file)" if flat else ""
            raise DataError(f"{label} is constant ({column[0]:g}), so it has no density; remove it (--drop-columns){hint}")
        largest = np.abs(column).max()
        with np.errstate(over="ignore"):
            std = column.std()
        if largest > np.finfo(np.float32).max:
            raise DataError(f"{label} has values up to {largest:g}, beyond float32 (3.4e+38); correct or rescale them in the file")
        if np.spacing(np.float32(largest)) > 1e-3 * std:
            raise DataError(
                f"{label} has values up to {largest:g} but a standard deviation of {std:g}, which float32 cannot resolve; "
                "subtract its mean (or rescale it) in the file"
            )


def duplicate_rows(pieces: Sequence[Array], labels: Array | None = None) -> NDArray[np.bool_]:
    """Return a mask (N,) of the rows that repeat an earlier one exactly (label included).

    Args:
        pieces: consecutive arrays of rows; wide rows of a memory map are read one at a time.
        labels: (N,), or None.

    Example:
        >>> duplicate_rows([np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 2.0]])]).tolist()
        [False, False, True]
    """
    wide = pieces[0][:1].nbytes > DIGEST_BYTES
    keys = [_digests(x) if wide else _plain_keys(x) for x in pieces]
    if labels is not None:
        codes = np.unique(labels, return_inverse=True)[1].reshape(-1, 1).astype(np.int64)
        keys = [np.concatenate([np.concatenate(keys), codes.view(np.uint8)], axis=1)]
    table = np.ascontiguousarray(np.concatenate(keys))
    as_bytes = table.view(np.dtype((np.void, table.shape[1]))).reshape(-1)
    repeated = np.ones(len(table), dtype=bool)
    repeated[np.unique(as_bytes, return_index=True)[1]] = False
    return repeated


def _plain_keys(x: Array) -> NDArray[np.uint8]:
    flat = x.reshape(len(x), -1)
    if flat.dtype.kind == "f":
        flat = flat + 0.0  # -0.0 equals 0.0
    return np.ascontiguousarray(flat).view(np.uint8).reshape(len(x), -1)


def _digests(x: Array) -> NDArray[np.uint8]:
    """Return a 16-byte digest of each row; among a billion rows the collision probability is about 1e-21."""
    rows = b"".join(blake2b(_plain_keys(row[None]).data, digest_size=16).digest() for row in x)
    return np.frombuffer(rows, dtype=np.uint8).reshape(len(x), 16)


def find_lattices(
    table: Table, columns: Sequence[TableColumn], options: Options, epsilon: float, name: str
) -> tuple[tuple[TableColumn, ...], list[str]]:
    """Detect columns whose values lie on a lattice, and mark them for the treatment in ``options.discrete``.

    Args:
        table: (N, D), distinct rows.
        columns: the D columns.
        options: ``discrete`` and ``seed``.
        epsilon: machine epsilon of the dtype in which the values were stored.
        name: name of the data set, for messages.

    Returns:
        The columns with their steps, and a notice for each column on a lattice or with repeated values off a lattice.

    Raises:
        DataError: if a column is discrete and ``discrete="error"``.
    """
    notices, discrete, out = [], [], []
    names = tuple(c.name for c in columns)
    for j, known in enumerate(columns):
        column, label = table[:, j], column_name(names, j)
        distinct, counts = np.unique(column, return_counts=True)
        step = known.step or lattice_step(column, epsilon)
        repeated = f"{label} has {len(counts):,} distinct values in {len(column):,} rows"
        if step is not None:
            discrete.append(label)
            spread = options.discrete == "dequantize"
            treatment = f"dequantised by one step of uniform noise, seed {options.seed}" if spread else f"kept, so {UNBOUNDED}"
            notices.append(f"{repeated}, on a lattice of step {step:.6g}: {treatment}")
            kind: Literal["date", "discrete"] = "date" if known.kind == "date" else "discrete"
            known = replace(known, kind=kind, step=step, origin=float(distinct[0]), last=float(distinct[-1]), dequantised=spread)
        elif said := repeated_values(column, label):
            discrete += [label] * few_distinct(len(column), len(counts))
            notices.append(said)
        out.append(known)
    if discrete and options.discrete == "error":
        raise DataError(
            f"{', '.join(discrete)} of {name!r} must be continuous with discrete='error', got discrete values; set discrete='dequantize', or remove them"
        )
    return tuple(out), notices


def repeated_values(column: Array, label: str) -> str:
    """Return a sentence about a column (N,) off any lattice whose values repeat, so that its density is unbounded; else "".

    Example:
        >>> repeated_values(np.array([0.0, 0.0, 1.3, 2.1]), "column 'rain'")
        "column 'rain' is 0 in 50% of the rows: the density has a spike there, and a likelihood can grow without bound"
    """
    fact = repetition(column, label)
    if not fact:
        return ""
    if few_distinct(len(column), len(np.unique(column))):
        return f"{fact} but on no lattice: {UNBOUNDED}; encode it as integers, or remove it"
    return f"{fact}: the density has a spike there, and a likelihood can grow without bound"


def repetition(column: Array, label: str) -> str:
    """Return how the values of a column (N,) repeat, as a clause; "" where they hardly do.

    Example:
        >>> repetition(np.array([0.0, 0.0, 1.3, 2.1]), "column 0")
        'column 0 is 0 in 50% of the rows'
    """
    distinct, counts = np.unique(column, return_counts=True)
    if few_distinct(len(column), len(counts)):
        return f"{label} has {len(counts):,} distinct values in {len(column):,} rows"
    if counts.max() >= max(2.0, ATOM_SHARE * len(column)):
        return f"{label} is {distinct[counts.argmax()]:g} in {counts.max() / len(column):.0%} of the rows"
    return ""


def dequantize(table: Table, columns: Sequence[TableColumn], seed: int) -> Table:
    """Dequantise columns with uniform noise: value v becomes uniform in [v, v + step).

    The noise depends on the seed and the column index only and is drawn once, for training, validation and test rows
    alike.
    """
    table = table.copy()
    for j, column in enumerate(columns):
        if column.dequantised:
            table[:, j] = snap(column, table[:, j]) + column.step * np.random.default_rng([seed, DEQUANTIZE_STREAM, j]).random(len(table))
    return table
