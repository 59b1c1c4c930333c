"""Columns whose values lie on a lattice: finding the step."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from cnf.datasets.dependence import rounding

__all__ = ["few_distinct", "find_step", "lattice_step"]

Values = NDArray[np.float64]

TOLERANCE = 0.05  # of a step: values recorded to five digits miss their lattice by this order (100.025 -> 100.02)
FRACTION_TOLERANCE = 0.005  # where the step is a fraction of the smallest gap a loose fit would prove nothing
MAX_FRACTION = 12
ROWS_PER_VALUE = 10
FEW_CELLS = 100
MANY_VALUES = 8
MOST_CELLS = 10_000  # of a lattice of decimals: on a finer one the values are no quantities


def find_step(distinct: Values, spacing: float = 0.0, error: float = math.inf) -> float | None:
    """Step of the coarsest lattice that holds all ``distinct`` values, or None.

    The lattice may have any origin. Gaps between neighbouring values must be whole multiples of the step, to 5 % of it
    (0.5 % where the step is smaller than the smallest gap).

    Args:
        distinct: sorted, without repetitions.
        spacing: gaps up to this size are rounding noise of one and the same value.
        error: largest distance of a value from its lattice point.
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
        # Least squares over the indices: small errors of the step do not add up over a long column.
        slope, origin = np.polyfit(index, positions, 1) if len(index) > 2 else (step, positions[0])
        worst = np.abs(positions - origin - slope * index).max()
        if worst <= min(tolerance * slope, error):
            return float(slope)
    return None


def _refine(gaps: Values, step: float) -> float:
    """Sharpen a step by ever longer gaps: each doubling knows it well enough to count the next gaps' multiples."""
    reach = 1.5
    while True:
        part = gaps[gaps <= reach * step] if reach * step < gaps.max() else gaps
        if len(part):
            step = float(part.sum() / np.maximum(1.0, np.rint(part / step)).sum())
        if len(part) == len(gaps):
            return step
        reach *= 2.0


def _unit(distinct: Values, epsilon: float) -> float:
    """Spacing to which the values were rounded when they were written, float32's errors aside."""
    if epsilon < 1e-9:
        return rounding(distinct)
    digits = max(1, math.floor(-math.log10(epsilon)))
    return rounding(np.array([float(f"{v:.{digits}g}") for v in distinct[:: max(1, len(distinct) // 2000)]]))


def _keeps_whole(distinct: Values, step: float) -> bool:
    """Whether whole numbers are those of the lattice, rounded."""
    places = np.rint((distinct - distinct[0]) / step)
    whole = bool((distinct == np.rint(distinct)).all())
    return not whole or bool((np.rint(distinct[0] + step * places) == distinct).all())


def _decimal_step(distinct: Values, unit: float, spacing: float) -> float | None:
    """Greatest common divisor of the gaps between values that are whole multiples of ``unit``, or None."""
    units = (distinct - distinct[0]) / unit
    if np.abs(units - np.rint(units)).max() > max(1e-3, min(0.2, spacing / unit)) or units[-1] > 2**53:
        return None
    step = int(np.gcd.reduce(np.rint(units).astype(np.int64)))
    return step * unit if step else None


def few_distinct(rows: int, distinct: int) -> bool:
    """Whether values repeat so much (ten rows each on average) that the column is discrete whatever its values."""
    return distinct * ROWS_PER_VALUE <= rows


def lattice_step(column: Values, epsilon: float) -> float | None:
    """The step by which a column should be dequantised, or None where it is not discrete.

    The rule: all values lie on one lattice (:func:`find_step`) **and** they repeat: either ten rows share a value on
    average, or two do and the lattice is coarse (at most 100 steps between the 5 % and the 95 % quantile, as
    integers and one-decimal readings in a small table). A continuous column rounded to float32, or printed with five
    digits, lies on a lattice too, but on one so fine that its values hardly repeat. Values miss their lattice by no more than
    the rounding with which they are written: 0, 100 and 205 have the step 5, and not 102.5.

    Args:
        column: (N,) values.
        epsilon: relative rounding of the type that the values were stored in.

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
    # a lattice with an error can be found for any few values
    error = 0.55 * unit if k >= MANY_VALUES else 1e-6 * float(distinct[-1] - distinct[0])
    step = find_step(distinct, spacing, error=max(error, spacing))
    if step is None or not _keeps_whole(distinct, step):
        step = _decimal_step(distinct, unit, spacing)
        if step is None or high - low > MOST_CELLS * step:
            return None
    coarse = high - low <= FEW_CELLS * step
    return step if few_distinct(n, k) or coarse else None
