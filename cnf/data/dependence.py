"""Detection of linearly dependent columns (copies, sums, percentages of 100 %), whose joint density is unbounded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cnf.data.rows import Array, Table

__all__ = ["dependent_columns", "rounding"]

CANDIDATE = 0.05  # largest eigenvalue of the correlation matrix that may indicate a relation
COARSE = 0.25  # in standard deviations of a column: coarser rounding does not explain residuals
NOISE = 1.25  # residuals up to this multiple of the expected rounding error count as rounding
MOST_ROWS, MOST_COLUMNS = 200_000, 1024
DIGITS = 9
FLOAT32 = 2.0**-23


def rounding(column: Table) -> float:
    """Return the spacing of a rounded column, from its decimals or significant digits; at least float32's.

    Example:
        >>> rounding(np.array([0.12, 3.5, 2.0])), rounding(np.array([1234.0, 5.678]))
        (0.01, 1.0)
    """
    largest = float(np.abs(column).max())
    if largest == 0:
        return 0.0
    sample = column[:: max(1, len(column) // 2000)]
    nonzero = sample[sample != 0]
    mantissas = nonzero / 10.0 ** np.floor(np.log10(np.abs(nonzero)))
    exponent = math.floor(math.log10(largest))
    decimals = next((d for d in range(DIGITS + 1) if _whole(sample * 10.0**d)), 99)
    digits = next((d for d in range(1, DIGITS + 1) if _whole(mantissas * 10.0 ** (d - 1))), 99)
    # decimals, unless significant digits need at least two digits fewer
    power = exponent - digits + 1 if digits + 1 < decimals + exponent + 1 else -decimals
    return max(FLOAT32 * largest, 10.0**power)


def _whole(values: Table) -> bool:
    return bool(np.abs(values - np.rint(values)).max(initial=0.0) <= 1e-6)


def dependent_columns(table: Table, names: Sequence[str], given: Sequence[Array] = ()) -> list[tuple[tuple[str, ...], str]]:
    """Find linear relations among columns that hold up to rounding.

    A relation is an eigenvector of the correlation matrix with a small eigenvalue whose residuals do not exceed the
    rounding error of the columns (or of float32, in which models are trained). High correlation with noise is not a
    relation. Relations among conditions only are ignored.

    Args:
        table: (N, D) modelled columns.
        names: names of the modelled columns, then of the conditions.
        given: numeric conditions, (N,) each.

    Returns:
        For each relation the names of its columns, and its equation as text.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(100, 2))
        >>> dependent_columns(np.c_[x, 2 * x[:, 0] - x[:, 1] + 3], ["a", "b", "c"])
        [(('a', 'b', 'c'), 'c = 2 a - b + 3')]
    """
    modelled = table.shape[1]
    table = np.concatenate([table, *(np.asarray(g, dtype=np.float64)[:, None] for g in given)], axis=1)
    table = table[:: max(1, len(table) // MOST_ROWS)]
    n, width = table.shape
    std = table.std(0)
    if width < 2 or width > MOST_COLUMNS or n < 2 * width + 10 or not (std > 0).all():
        return []
    quanta = np.array([rounding(table[:, j]) for j in range(width)])
    # integers of small spread count as exact, since any relation leaves residuals of whole steps
    quanta = np.where(quanta > COARSE * std, FLOAT32 * np.abs(table).max(0), quanta)
    z = (table - table.mean(0)) / std
    values, vectors = np.linalg.eigh(z.T @ z / n)
    relations = []
    for value, w in zip(values, vectors.T, strict=True):
        if value > CANDIDATE:
            break
        error = np.abs(w) * quanta / std
        residual = z @ w
        if math.sqrt(max(float(np.mean(residual**2)), 0.0)) <= NOISE * math.sqrt(float((error**2).sum()) / 12) and np.abs(residual).max() <= 0.55 * error.sum():
            relations.append(w)
    return _relations(np.array(relations), table, std, quanta / std, modelled, names) if relations else []


def _relations(
    basis: Array, table: Table, std: Array, error: Array, modelled: int, names: Sequence[str]
) -> list[tuple[tuple[str, ...], str]]:
    """Return the relations in reduced row echelon form, each solved for a modelled column."""
    rows = basis.copy()
    order = [*range(modelled - 1, -1, -1), *range(modelled, table.shape[1])]  # solve for the last columns first
    pivots: list[int] = []
    for j in order:
        free = rows[len(pivots) :, j]
        if not len(free) or np.abs(free).max() < 1e-2:
            continue
        best = len(pivots) + int(np.abs(free).argmax())
        rows[[len(pivots), best]] = rows[[best, len(pivots)]]
        rows[len(pivots)] /= rows[len(pivots), j]
        for i in range(len(rows)):
            if i != len(pivots):
                rows[i] -= rows[i, j] * rows[len(pivots)]
        pivots.append(j)
    relations = []
    for pivot, row in zip(pivots, rows, strict=False):
        least = min(1e-2, 5 * float(np.linalg.norm(row * error)))  # smaller coefficients are rounding errors
        used = [j for j in range(len(row)) if abs(row[j]) > least]
        if not any(j < modelled for j in used):
            continue
        coefficients = {j: -row[j] * std[pivot] / std[j] for j in used if j != pivot}
        constant = float(table[:, pivot].mean() - sum(c * table[:, j].mean() for j, c in coefficients.items()))
        relations.append((tuple(names[j] for j in used), _words(pivot, coefficients, constant, float(std[pivot]), names)))
    return relations


def _words(pivot: int, coefficients: dict[int, float], constant: float, scale: float, names: Sequence[str]) -> str:
    text = ""
    for j, value in coefficients.items():
        sign = " - " if value < 0 else " + "
        size = f"{abs(value):.3g}"
        text += (sign if text else sign.strip().replace("+", "")) + ("" if size == "1" else f"{size} ") + names[j]
    if abs(constant) > 1e-3 * scale:
        text += f"{' - ' if constant < 0 else ' + '}{abs(constant):.3g}"
    return f"{names[pivot]} = {text or f'{constant:.3g}'}"
