"""Estimation of a column's distribution function: knots at quantiles or cell borders, shrinkage, and tails."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["TAILS", "Cells", "QuantileTable", "TableOptions", "fit_table"]

Array = NDArray[np.float64]

TAILS = ("normal", "pareto", "edge")
_MIN_EXCESSES = 10  # rows in a tail for its own scale
_MAX_SHAPE = 1.0  # heavier tails overflow float32 at ten standard deviations
_MIN_SHAPE = 1e-3  # practically exponential
_EDGE_SHAPE = 0.25  # beyond a sharp edge: decays fast, yet a row there costs its logarithm only
_BORDER = 1e-9  # in cells: a value on a border, which may be rounded to below it, belongs to the upper cell
_MIN_WIDTH = 1e-6  # of a piece, relative to the range of the central 98 %


@dataclass(frozen=True)
class Cells:
    """Cells [origin + k step, origin + (k + 1) step) of a dequantised column."""

    origin: float
    step: float


@dataclass(frozen=True)
class TableOptions:
    """Options of :func:`fit_table`: number of pieces, interpolation, tail family on each side, shrinkage."""

    pieces: int
    smooth: bool = True
    tails: tuple[str, str] = ("normal", "normal")
    prior: float = 1.0


@dataclass(frozen=True)
class QuantileTable:
    """One column's row of :class:`~cnf.transforms.quantile_map.MarginalState`, in units of y."""

    origin: float
    width: Array
    mass: Array
    left: Array
    right: Array
    tail_mass: tuple[float, float]
    tail_shape: tuple[float, float]
    tail_scale: tuple[float, float]


def fit_table(y: Array, options: TableOptions, cells: Cells | None = None) -> QuantileTable:
    """Estimate the distribution function of a standardised column.

    Each piece's probability is (count + prior G) / (N + prior): the prior distribution G is half normal and half
    uniform on the range, so that no piece is empty. Cell borders are knots, all of them if there are at most
    ``options.pieces`` cells, otherwise a selection that splits the rows evenly; within a piece F is then linear.

    Args:
        y: (N,) sorted values.
        options: number of pieces, interpolation and tails.
        cells: cells of the column in units of y, if it is discrete.

    Example:
        >>> table = fit_table(np.linspace(0, 1, 1001), TableOptions(4, tails=("edge", "edge")))
        >>> table.width.round(2), [round(float(m), 2) for m in table.mass]
        (array([0.25, 0.25, 0.25, 0.25]), [0.25, 0.25, 0.25, 0.25])
    """
    edges = (options.tails[0] == "edge" or cells is not None, options.tails[1] == "edge" or cells is not None)
    knots = _quantile_knots(y, options.pieces, edges) if cells is None else _cell_knots(y, options.pieces, cells)
    count, prior = len(y), options.prior
    at = np.searchsorted(y, knots, side="left").astype(float)
    if edges[1]:
        at[-1] = count  # ties at the largest value are inside the last piece
    inside = np.diff(at) + prior * _prior(y, knots)
    # half a row at least: a tail without rows still has some probability
    beyond = np.maximum(_ndtr(np.array([knots[0], -knots[-1]])), 0.5 / (1 + prior))
    outer = np.array([at[0], count - at[-1]]) + prior * beyond
    total = inside.sum() + outer.sum()
    width, mass, tail_mass = np.diff(knots), inside / total, outer / total
    shape, scale = [0.0, 0.0], [1.0, 1.0]
    for side, (edge, piece) in enumerate(((knots[0], 0), (knots[-1], -1))):
        excess = edge - y[: int(at[0])] if side == 0 else y[int(at[-1]) :] - edge
        if edges[side]:
            spacing = cells.step if cells else width[piece] / max(1.0, inside[piece])
            shape[side], scale[side] = _EDGE_SHAPE, max(spacing, _MIN_WIDTH * float(knots[-1] - knots[0]))
        else:
            shape[side], scale[side] = _fit_tail(excess, -_ndtri(tail_mass[side]), options.tails[side])
    slope = mass / width
    if options.smooth and cells is None:
        ends = [_tail_density(tail_mass[s], shape[s], scale[s]) for s in (0, 1)]
        left, right = _end_slopes(width, slope, [None if e else d for e, d in zip(edges, ends, strict=True)])
    else:
        left = right = np.ones_like(slope)
    low, high = (float(v) for v in tail_mass)
    shapes, scales = (shape[0], shape[1]), (scale[0], scale[1])
    return QuantileTable(float(knots[0]), width, mass, left, right, (low, high), shapes, scales)


def _quantile_knots(y: Array, pieces: int, edges: tuple[bool, bool]) -> Array:
    """Return knots at the quantiles j / pieces; the extremes belong to them on sides with an edge."""
    quantiles = np.quantile(y, np.linspace(0, 1, pieces + 1))
    # an edge lies one mean spacing of the outer piece's rows beyond the extreme, so that no row is exactly on it
    quantiles[0] -= (quantiles[1] - quantiles[0]) * pieces / len(y)
    quantiles[-1] += (quantiles[-1] - quantiles[-2]) * pieces / len(y)
    quantiles = quantiles[0 if edges[0] else 1 : None if edges[1] else -1]
    low, high = np.quantile(y, [0.01, 0.99])
    least = _MIN_WIDTH * float(high - low or y[-1] - y[0])
    kept = [float(quantiles[0])]
    for knot in quantiles[1:]:
        if knot - kept[-1] > least:
            kept.append(float(knot))
    if len(kept) < 2:  # nearly all rows have one value: a piece that spans the rest
        kept = [float(y[0]), float(y[-1])]
    return np.array(kept)


def _cell_knots(y: Array, pieces: int, cells: Cells) -> Array:
    """Return cell borders from the first to the last occupied cell."""
    index = np.floor((y - cells.origin) / cells.step + _BORDER).astype(np.int64)
    first, last = int(index[0]), int(index[-1]) + 1
    if last - first <= pieces:
        chosen = np.arange(first, last + 1)
    else:
        # both borders of heavy cells and of cells at quantiles
        found, counts = np.unique(index, return_counts=True)
        heavy = found[counts * pieces > 2 * len(y)]
        spare = max(1, pieces - 2 * len(heavy))
        inner = np.quantile(index, np.linspace(0, 1, spare + 1), method="lower")[1:-1]
        chosen = np.unique(np.concatenate([[first, last], heavy, heavy + 1, inner]))
    return np.asarray(cells.origin + cells.step * (chosen - _BORDER), dtype=np.float64)


def _prior(y: Array, knots: Array) -> Array:
    """Return the probability of each piece, half normal and half uniform on the range."""
    uniform = np.diff(np.clip((knots - y[0]) / max(float(y[-1] - y[0]), 1e-300), 0, 1))
    # the upper half from the other side, for the precision of small differences
    below, above = _ndtr(knots), _ndtr(-knots)
    normal = np.where(knots[:-1] > 0, above[:-1] - above[1:], below[1:] - below[:-1])
    return np.asarray(np.maximum(0.5 * (uniform + normal), 1e-6 / len(normal)), dtype=np.float64)


def _ndtr(values: Array) -> Array:
    found: Array = torch.special.ndtr(torch.from_numpy(values)).numpy()
    return found


def _ndtri(p: float) -> float:
    return float(torch.special.ndtri(torch.tensor(p, dtype=torch.float64)))


def _end_slopes(width: Array, slope: Array, ends: list[float | None]) -> tuple[Array, Array]:
    """Return the density at both ends of each piece over its mean: three-point estimates, continuous at the knots."""
    inner = (width[:-1] * slope[1:] + width[1:] * slope[:-1]) / (width[:-1] + width[1:])
    first = slope[0] if ends[0] is None else ends[0]
    last = slope[-1] if ends[1] is None else ends[1]
    density = np.concatenate([[first], inner, [last]])
    # bounds keep the density within a piece positive and of the size of its mean
    return np.clip(density[:-1] / slope, 0.05, 20), np.clip(density[1:] / slope, 0.05, 20)


def _tail_density(mass: float, shape: float, scale: float) -> float:
    """Return the density where a tail begins."""
    if shape > 0:
        return mass / scale
    z = _ndtri(mass)
    return scale * math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _fit_tail(excess: Array, start: float, family: str) -> tuple[float, float]:
    """Return shape and scale of the maximum-likelihood tail; ``start`` is -z at its beginning."""
    excess = np.maximum(excess, 0)
    mean, square = float(excess.mean()) if len(excess) else 0.0, float(np.square(excess).mean()) if len(excess) else 0.0
    if len(excess) < _MIN_EXCESSES or square == 0:
        return 0.0, 1.0  # of the standard normal
    if family == "normal":
        # maximise the mean of ln b - (start + b e)² / 2
        return 0.0, (-start * mean + math.sqrt((start * mean) ** 2 + 4 * square)) / (2 * square)

    from scipy.optimize import minimize_scalar  # needed by fits only, and slow to import

    def shape(log_rate: float) -> float:
        return float(np.clip(np.log1p(math.exp(log_rate) * excess).mean(), _MIN_SHAPE, _MAX_SHAPE))

    def loss(log_rate: float) -> float:
        # negative profile log-likelihood of the generalised Pareto law in rate = shape / scale
        xi, logs = shape(log_rate), float(np.log1p(math.exp(log_rate) * excess).mean())
        return math.log(xi) - log_rate + (1 + 1 / xi) * logs

    centre = -math.log(mean)
    best = minimize_scalar(loss, bounds=(centre - 9, centre + 5), method="bounded", options={"xatol": 1e-6})
    xi = shape(float(best.x))
    return xi, xi / math.exp(float(best.x))
