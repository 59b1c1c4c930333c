"""Columns whose values lie on a lattice: finding the step, and spreading the values over it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["few_distinct", "find_step", "lattice_step"]

Values = NDArray[np.float64]

TOLERANCE = 0.05  # of a step: values recorded to five digits miss their lattice by this order (100.025 -> 100.02)
FRACTION_TOLERANCE = 0.005  # where the step is a fraction of the smallest gap a loose fit would prove nothing
MAX_FRACTION = 12
ROWS_PER_VALUE = 10
FEW_CELLS = 100


def find_step(distinct: Values, spacing: float = 0.0) -> float | None:
    """Step of the coarsest lattice that holds all ``distinct`` values, or None.

    The lattice may have any origin. Gaps between neighbouring values must be whole multiples of the step, to 5 % of it
    (0.5 % where the step is smaller than the smallest gap).

    Args:
        distinct: sorted, without repetitions.
        spacing: gaps up to this size are rounding noise of one and the same value.
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
        worst = np.abs(positions - origin - slope * index).max() / slope
        if worst <= tolerance:
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


def few_distinct(rows: int, distinct: int) -> bool:
    """Whether values repeat so much (ten rows each on average) that the column is discrete whatever its values."""
    return distinct * ROWS_PER_VALUE <= rows


def lattice_step(column: Values, epsilon: float) -> float | None:
    """The step by which a column should be dequantised, or None where it is not discrete.

    The rule: all values lie on one lattice (:func:`find_step`) **and** they repeat: either ten rows share a value on
    average, or two do and the lattice is coarse (at most 100 steps between the 5 % and the 95 % quantile, as
    integers and one-decimal readings in a small table). A continuous column rounded to float32, or printed with five
    digits, lies on a lattice too, but on one so fine that its values hardly repeat.

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
    step = find_step(distinct, spacing=4.0 * epsilon * float(np.abs(distinct).max()))
    if step is None:
        return None
    low, high = np.quantile(column, [0.05, 0.95])
    coarse = high - low <= FEW_CELLS * step
    return step if few_distinct(n, k) or coarse else None
