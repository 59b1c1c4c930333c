"""Checks of tables: what makes a density meaningless is refused, mended with a notice, or reported."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cnf.datasets.lattice import few_distinct, lattice_step
from cnf.datasets.splits import Array, Options
from cnf.errors import DataError

__all__ = ["as_numbers", "column_name", "dequantize", "duplicate_rows", "require_usable"]

Table = NDArray[np.float64]

DEQUANTIZE_STREAM = 1  # second word of the generator's seed, apart from those that draw toy points
ATOM_SHARE = 0.05


def column_name(columns: tuple[str, ...], j: int) -> str:
    """How messages call column ``j``: by number, and by name where it has one of its own."""
    return f"column {j}" if columns[j] == f"column {j}" else f"column {j} ({columns[j]!r})"


def as_numbers(x: Array, name: str) -> Table:
    """A table (N, D) in float64.

    Raises:
        DataError: for text, complex numbers or objects, or an array that is not two-dimensional.
    """
    if x.ndim != 2:
        raise DataError(
            f"{name!r} holds an array of shape {x.shape}; expected a table (rows, columns), or uint8 images of shape "
            "(N, H, W), (N, H, W, C) or (N, C, H, W). A single column is reshape(-1, 1)"
        )
    if x.dtype.kind not in "biuf":
        raise DataError(f"{name!r} has dtype {x.dtype}; expected real numbers")
    if x.shape[1] == 0:
        raise DataError(f"{name!r} has no columns; expected at least one")
    return x.astype(np.float64)


def require_usable(table: Table, columns: tuple[str, ...], name: str) -> None:
    """Refuse what no density can be fitted to.

    Raises:
        DataError: for NaN or infinite values, a constant column, or a column that float32 cannot resolve.
    """
    bad = ~np.isfinite(table)
    if bad.any():
        row, j = (int(i) for i in np.argwhere(bad)[0])
        raise DataError(
            f"{name!r} has {int(bad.sum()):,} values that are NaN or infinite, the first in row {row}, "
            f"{column_name(columns, j)}: {table[row, j]}; remove those rows or fill them in"
        )
    if len(table) == 0:
        raise DataError(f"{name!r} has no rows")
    for j in range(table.shape[1]):
        column = table[:, j]
        if column.min() == column.max():
            raise DataError(
                f"{column_name(columns, j)} of {name!r} is constant ({column[0]:g}); it has no density: remove it"
            )
        largest = np.abs(column).max()
        if largest > np.finfo(np.float32).max or np.spacing(np.float32(largest)) > 1e-3 * column.std():
            raise DataError(
                f"{column_name(columns, j)} of {name!r} has values up to {largest:g} but spreads by {column.std():g} "
                "only: float32 cannot resolve it; subtract its mean (or rescale it) in the file"
            )


def duplicate_rows(x: Array, labels: Array | None = None) -> NDArray[np.bool_]:
    """(N,) True for each row that repeats an earlier one exactly (label included)."""
    flat = np.ascontiguousarray(x.reshape(len(x), -1))
    if flat.dtype.kind == "f":
        flat = flat + 0.0  # -0.0 and 0.0 are one value
    if labels is not None:
        codes = np.unique(labels, return_inverse=True)[1].reshape(-1, 1).astype(np.int64)
        flat = np.concatenate([flat.view(np.uint8).reshape(len(x), -1), codes.view(np.uint8)], axis=1)
    flat = np.ascontiguousarray(flat)
    as_bytes = flat.view(np.dtype((np.void, flat.dtype.itemsize * flat.shape[1]))).reshape(-1)
    first = np.unique(as_bytes, return_index=True)[1]
    repeated = np.ones(len(x), dtype=bool)
    repeated[first] = False
    return repeated


def dequantize(
    table: Table, columns: tuple[str, ...], options: Options, epsilon: float, name: str
) -> tuple[Table, list[str]]:
    """Spread lattice columns over one step of uniform noise, value v to [v, v + step), as ``options.discrete`` says.

    The noise depends on ``options.seed`` and the column's number only, and is drawn once: the table that is trained on, validated
    and tested is one and the same.

    Args:
        table: (N, D), distinct rows.
        columns: their names.
        epsilon: relative rounding of the type that the values were stored in.
        name: of the data set, for messages.

    Returns:
        The table, and a notice for each column on a lattice or with repeated values off a lattice.

    Raises:
        DataError: if there is such a column and ``discrete="error"``.
    """
    table = table.copy()
    notices, found = [], []
    for j in range(table.shape[1]):
        column, label = table[:, j], column_name(columns, j)
        step = lattice_step(column, epsilon)
        counts = np.unique(column, return_counts=True)[1]
        if step is not None:
            found.append(label)
            what = f"{label} has {len(counts):,} distinct values in {len(column):,} rows, on a lattice of step {step:.6g}"
            if options.discrete == "dequantize":
                noise = np.random.default_rng([options.seed, DEQUANTIZE_STREAM, j]).random(len(column))
                table[:, j] = column + step * noise
                notices.append(f"{what}: dequantised by one step of uniform noise, seed {options.seed}")
            else:
                notices.append(f"{what}: kept, so its density is unbounded and the likelihood is not to be trusted")
        elif few_distinct(len(column), len(counts)):
            found.append(label)
            notices.append(
                f"{label} has {len(counts):,} distinct values in {len(column):,} rows but on no lattice: its density is "
                "unbounded and the likelihood is not to be trusted; encode it as integers, or remove it"
            )
        elif counts.max() >= max(2.0, ATOM_SHARE * len(column)):
            value = np.unique(column)[counts.argmax()]
            notices.append(
                f"{label} is {value:g} in {counts.max() / len(column):.0%} of the rows: a spike there can make the density as "
                "high as it likes; read the likelihood with care"
            )
    if found and options.discrete == "error":
        raise DataError(
            f"{', '.join(found)} of {name!r}: discrete values, whose density is unbounded; expected continuous columns "
            "with discrete='error'; try discrete='dequantize', or remove them"
        )
    return table, notices
