"""Lattice detection: the step of a column of discrete values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cnf.data.dependence import rounding
from cnf.data.rows import Table

__all__ = ["few_distinct", "find_step", "lattice_points", "lattice_step", "to_lattice"]

TOLERANCE = 0.05  # in steps: rounding to five digits moves values this far off (100.025 -> 100.02)
FRACTION_TOLERANCE = 0.005  # tighter, since almost any values fit a small fraction of the smallest gap
MAX_FRACTION = 12
ROWS_PER_VALUE = 10
FEW_CELLS = 100
MANY_VALUES = 8
MOST_CELLS = 10_000  # a decimal lattice with more cells in the range is not evidence of discrete values


def find_step(distinct: Table, spacing: float = 0.0, error: float = math.inf) -> float | None:
    """Return the step of the coarsest lattice that contains all ``distinct`` values, or None.

    The lattice may have any origin. Values must lie within 5 % of a step of their lattice points (0.5 % if the step is
    smaller than the smallest gap).

    Args:
        distinct: sorted values without repetitions.
        spacing: gaps up to this size count as rounding noise of a single value.
        error: maximum distance of a value from its lattice point.
    """
    gaps = np.diff(distinct)
    real = gaps > spacing
    gaps = gaps[real]
    if len(gaps) == 0:
        return None
    positions = np.concatenate([distinct[:1], distinct[1:][real]])
    for fraction in range(1, MAX_FRACTION + 1):
        tolerance = TOLERANCE if fraction == 1 else FRACTION_TOLERANCE
        step = _refine(gaps, float(gaps.min()) / fraction)
        index = np.concatenate([[0.0], np.cumsum(np.maximum(1.0, np.rint(gaps / step)))])
        # least squares over the indices, so that errors of the step do not accumulate over a long column
        slope, origin = np.polyfit(index, positions, 1) if len(index) > 2 else (step, positions[0])
        worst = np.abs(positions - origin - slope * index).max()
        if worst <= min(tolerance * slope, error):
            return float(slope)
    return None


def _refine(gaps: Table, step: float) -> float:
    """Refine a step by ever longer gaps; each estimate is accurate enough to count steps in gaps twice as long."""
    reach = 1.5
    while True:
        part = gaps[gaps <= reach * step] if reach * step < gaps.max() else gaps
        if len(part):
            step = float(part.sum() / np.maximum(1.0, np.rint(part / step)).sum())
        if len(part) == len(gaps):
            return step
        reach *= 2.0


def _unit(distinct: Table, epsilon: float) -> float:
    """Return the spacing to which the values were rounded, ignoring float32 errors."""
    if epsilon < 1e-9:
        return rounding(distinct)
    digits = max(1, math.floor(-math.log10(epsilon)))
    return rounding(np.array([float(f"{v:.{digits}g}") for v in distinct[:: max(1, len(distinct) // 2000)]]))


def _keeps_whole(distinct: Table, step: float) -> bool:
    """Return whether integer values equal their lattice points after rounding; True for other values."""
    indices = np.rint((distinct - distinct[0]) / step)
    whole = bool((distinct == np.rint(distinct)).all())
    return not whole or bool((np.rint(distinct[0] + step * indices) == distinct).all())


def _decimal_step(distinct: Table, unit: float, spacing: float) -> float | None:
    """Return the greatest common divisor of the gaps if they are multiples of ``unit``, else None."""
    units = (distinct - distinct[0]) / unit
    if np.abs(units - np.rint(units)).max() > max(1e-3, min(0.2, spacing / unit)) or units[-1] > 2**53:
        return None
    step = int(np.gcd.reduce(np.rint(units).astype(np.int64)))
    return step * unit if step else None


def few_distinct(rows: int, distinct: int) -> bool:
    """Return whether a column is discrete by repetition alone: at least ten rows per distinct value on average."""
    return distinct * ROWS_PER_VALUE <= rows


def lattice_step(column: Table, epsilon: float) -> float | None:
    """Return the dequantisation step of a column, or None if it is not discrete.

    A column is discrete if all values lie on one lattice (:func:`find_step`) **and** they repeat: ten rows per value on
    average, or two and a coarse lattice (at most 100 steps between the 5 % and the 95 % quantile, such as integers and
    one-decimal readings in a small table). A continuous column rounded to float32, or printed with five digits, also
    lies on a lattice, but one so fine that its values hardly repeat. Values deviate from the lattice by at most the
    rounding with which they are written: 0, 100 and 205 have the step 5, not 102.5.

    Args:
        column: (N,) values.
        epsilon: machine epsilon of the dtype in which the values were stored.

    Example:
        >>> round(lattice_step(np.repeat([0.0, 0.5, 2.0], 20), 1e-16), 9)
        0.5
    """
    distinct = np.unique(column)
    n, k = len(column), len(distinct)
    if k < 2 or 2 * k > n:
        return None
    low, high = np.quantile(column, [0.05, 0.95])
    spacing = 4.0 * epsilon * float(np.abs(distinct).max())
    unit = _unit(distinct, epsilon)
    # any few values fit a lattice within rounding, so fewer than 8 must fit to 1e-6 of their range
    error = 0.55 * unit if k >= MANY_VALUES else 1e-6 * float(distinct[-1] - distinct[0])
    step = find_step(distinct, spacing, error=max(error, spacing))
    if step is None or not _keeps_whole(distinct, step):
        step = _decimal_step(distinct, unit, spacing)
        if step is None or high - low > MOST_CELLS * step:
            return None
    coarse = high - low <= FEW_CELLS * step
    return _snapped(step, bool((distinct == np.rint(distinct)).all())) if few_distinct(n, k) or coarse else None


def lattice_points(origin: float, step: float, indices: Table) -> Table:
    """Return the points ``origin + step * indices``, as the decimals that they are: 0.3, not 0.30000000000000004."""
    digits = 9 - math.floor(math.log10(step))
    points = origin + step * indices
    return np.round(points, digits) if abs(digits) < 300 else points


def to_lattice(
    values: Table, steps: Sequence[float] | Table, origins: Sequence[float] | Table, ends: Sequence[float | None] | Table, floor: Sequence[bool] | None = None
) -> Table:
    """Round values (..., D) of discrete columns to their lattices, and into the range of the data: a count is never negative.

    Args:
        values: of D columns.
        steps: of the columns' lattices; 0 or NaN for a continuous column, which is not changed.
        origins: a point of each lattice, the least one if the column has an end.
        ends: largest point of each lattice; None for a lattice without limits.
        floor: whether a point stands for the step above it, [v, v + step), instead of the step around it.

    Example:
        >>> to_lattice(np.array([[0.2, 0.2, 0.2], [0.7, 0.7, 9.0]]), [0.5, 0.5, 0.0], [0.0] * 3, [5.0] * 3, [True, False, False]).tolist()
        [[0.0, 0.0, 0.2], [0.5, 0.5, 9.0]]
    """
    out = values.copy()
    for j, (step, origin, end) in enumerate(zip(steps, origins, ends, strict=True)):
        if not step > 0:
            continue
        indices = (values[..., j] - origin) / step
        whole = np.floor(indices) if floor is not None and floor[j] else np.rint(indices)
        if end is not None:
            whole = np.clip(whole, 0, np.rint((end - origin) / step))
        out[..., j] = lattice_points(origin, step, whole)
    return out


def _snapped(step: float, whole: bool) -> float:
    """Round a fitted step to the nearest integer (``whole``) or to 9 digits, if within the error of the fit."""
    nearest = float(np.rint(step)) if whole else float(f"{step:.9g}")
    return nearest if nearest and abs(nearest - step) <= (1e-4 if whole else 1e-10) * step else step
