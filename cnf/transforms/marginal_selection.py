"""Selection of one column's marginal transform by held-out likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from cnf.transforms.quantile_fit import TAILS, Cells, QuantileTable, TableOptions, fit_table
from cnf.transforms.quantile_map import KINDS, MarginalState, forward_map

__all__ = ["ColumnMarginal", "ColumnSpec", "defined", "select_marginal", "stack_marginals"]

Array = NDArray[np.float64]

# fewer overfit: at 1,000 rows 12 to 25 pieces have the best held-out likelihood, at 36,000 rows 100 to 200
_ROWS_PER_PIECE = 60
_LEAST_PIECES = 8
_SIGNIFICANT = 2.0  # standard errors of the mean difference
_WINSORIZED = 0.01  # share of the rows on each side; a few outliers neither decide nor hide a difference
_PARAMETERS = {"normal": 1, "pareto": 2, "edge": 2}
_ONE = np.ones(1)
_UNUSED = QuantileTable(-1.0, 2 * _ONE, 0.6 * _ONE, _ONE, _ONE, (0.2, 0.2), (0.0, 0.0), (1.0, 1.0))


@dataclass(frozen=True)
class ColumnSpec:
    """Description of a column: candidates, support, margin of the logit, cells if discrete, limit of pieces."""

    kinds: tuple[str, ...] = KINDS
    bounds: tuple[float, float] | None = None
    margin: float = 1e-3
    cells: Cells | None = None
    pieces: int = 200


@dataclass(frozen=True)
class ColumnMarginal:
    """Fitted transform of one column; ``low`` and ``high`` are the support of log and logit."""

    kind: str
    loc: float
    scale: float
    low: float = 0.0
    high: float = 1.0
    table: QuantileTable = _UNUSED

    def log_density(self, x: Array) -> Array:
        """Return the log-density (N,) of the column in nats; NaN or infinite outside the support."""
        z, slope = forward_map(stack_marginals([self], len(self.table.width)), torch.as_tensor(x)[:, None])
        out: Array = (slope - 0.5 * z.square() - 0.5 * math.log(2 * math.pi))[:, 0].numpy()
        return out


def stack_marginals(columns: Sequence[ColumnMarginal], pieces: int) -> MarginalState:
    """Return the state of D columns in float64, each table padded to ``pieces`` pieces."""

    def numbers(values: Sequence[object]) -> torch.Tensor:
        return torch.tensor(np.array(values, dtype=np.float64))

    def padded(name: str) -> torch.Tensor:
        return numbers([np.pad(row := getattr(c.table, name), (0, pieces - len(row))) for c in columns])

    tables = ("origin", "tail_mass", "tail_shape", "tail_scale")
    return MarginalState(
        kind=torch.tensor([KINDS.index(c.kind) for c in columns]),
        **{name: numbers([getattr(c, name) for c in columns]) for name in ("loc", "scale", "low", "high")},
        pieces=torch.tensor([len(c.table.width) for c in columns]),
        **{name: numbers([getattr(c.table, name) for c in columns]) for name in tables},
        **{name: padded(name) for name in ("width", "mass", "left", "right")},
    )


def select_marginal(x: Array, held_out: Array | None, spec: ColumnSpec, seed: int = 0) -> tuple[ColumnMarginal, float]:
    """Select and fit the transform of a column; return it and its held-out gain over standardising, in nats per row.

    Candidates are compared from the simplest to the richest. One replaces a simpler one if its mean log-density is
    higher by two standard errors of the (winsorised) differences.

    Args:
        x: (N,) training values, not constant.
        held_out: (M,) values for the choice; every fifth training value (in random order) if None.
        spec: description of the column.
        seed: seed of that order.

    Example:
        >>> x = np.random.default_rng(0).lognormal(size=2000)
        >>> column, gain = select_marginal(x[:1500], x[1500:], ColumnSpec(kinds=("standardize", "log")))
        >>> column.kind, gain > 0.5
        ('log', True)
    """
    part = x
    if held_out is None:
        part, held_out = _split(x, seed)
    x, part = np.sort(x), np.sort(part)
    base, best, chosen = _affine("standardize", part, spec).log_density(held_out), None, ""
    options = _table_options(part, held_out, spec) if "gaussianize" in spec.kinds else TableOptions(_LEAST_PIECES)
    for kind in KINDS:
        if kind in spec.kinds and defined(kind, x, held_out, spec):
            trial = _gaussianize(part, spec, options) if kind == "gaussianize" else _affine(kind, part, spec)
            score = trial.log_density(held_out)
            if best is None or _better(score, best):
                chosen, best = kind, score
    if best is None:
        raise ValueError("no candidate is defined")
    gain = float((best - base).mean()) if len(held_out) else 0.0
    if chosen != "gaussianize":
        return _affine(chosen, x, spec), gain
    # more rows carry proportionally more pieces
    options = replace(options, pieces=min(spec.pieces, options.pieces * len(x) // len(part)))
    return _gaussianize(x, spec, options), gain


def defined(kind: str, x: Array, held_out: Array | None, spec: ColumnSpec) -> bool:
    """Return whether a candidate applies: log to half-lines and positive columns, logit to declared intervals."""
    if kind == "standardize":
        return True
    if kind == "gaussianize":
        return len(np.unique(x)) > 2
    if spec.bounds is not None:
        return math.isinf(spec.bounds[1]) == (kind == "log")
    least = min(float(part.min()) for part in (x, held_out) if part is not None and len(part))
    if spec.cells is not None:  # the border of its cell
        least = spec.cells.origin + spec.cells.step * math.floor((least - spec.cells.origin) / spec.cells.step)
    return kind == "log" and least > 0


def _split(x: Array, seed: int) -> tuple[Array, Array]:
    order = np.random.default_rng(seed).permutation(len(x))
    return x[order[len(x) // 5 :]], x[order[: len(x) // 5]]


def _better(score: Array, best: Array) -> bool:
    """Return whether a score exceeds another in mean and, beyond chance, without its extreme rows."""
    difference = score - best
    if not len(difference) or not np.isfinite(difference).all() or difference.mean() <= 0:
        return False
    # rank by rank, so that of fewer than 100 rows the extreme ones are clipped too
    low, high = np.quantile(difference, _WINSORIZED, method="higher"), np.quantile(difference, 1 - _WINSORIZED, method="lower")
    clipped = np.clip(difference, low, high)
    return bool(clipped.mean() > _SIGNIFICANT * clipped.std() / math.sqrt(len(clipped)))


def _affine(kind: str, x: Array, spec: ColumnSpec) -> ColumnMarginal:
    """Return the standardised identity, logarithm or logit of a column."""
    if kind == "standardize":
        return ColumnMarginal(kind, float(x.mean()), float(x.std(ddof=1)))
    low, high = spec.bounds or (0.0, math.inf)
    if kind == "logit":
        extra = spec.margin * (high - low)
        low, high = low - extra, high + extra
        values = np.log(x - low) - np.log(high - x)
    else:
        values, high = np.log(x - low), low + 1.0
    return ColumnMarginal(kind, float(values.mean()), float(values.std(ddof=1)), low, high)


def _gaussianize(x: Array, spec: ColumnSpec, options: TableOptions) -> ColumnMarginal:
    """Return the quantile map of a column's sorted values."""
    loc, scale = float(x.mean()), float(x.std(ddof=1))
    cells = None if spec.cells is None else Cells((spec.cells.origin - loc) / scale, spec.cells.step / scale)
    return ColumnMarginal("gaussianize", loc, scale, table=fit_table((x - loc) / scale, options, cells))


def _table_options(part: Array, held_out: Array, spec: ColumnSpec) -> TableOptions:
    """Return the number of pieces of the highest held-out likelihood, and then the tails of the lowest AIC.

    Held-out rows in a tail are too few to compare tails, and a Gaussian one chosen by mistake is costly: a row far out
    loses tens of nats. So training and held-out rows count together, less the number of fitted parameters.
    """

    def score(options: TableOptions) -> float:
        return float(_gaussianize(part, spec, options).log_density(held_out).sum())

    def criterion(options: TableOptions) -> float:
        log_p = _gaussianize(part, spec, options).log_density(outer)
        return float(log_p.sum()) - sum(_PARAMETERS[t] for t in options.tails)

    most = min(spec.pieces, max(_LEAST_PIECES, len(part) // _ROWS_PER_PIECE))
    if spec.cells is not None:
        # a piece for each cell costs 1 / (2 N) nats, so all cells may have one
        return max((TableOptions(p) for p in sorted({spec.pieces, most, max(_LEAST_PIECES, most // 4)})), key=score)
    best = max((TableOptions(p) for p in sorted({most, max(_LEAST_PIECES, most // 3)})), key=score)
    # tails change the density of the outer pieces only
    low, high = np.quantile(part, [2 / best.pieces, 1 - 2 / best.pieces])
    outer = np.concatenate([part, held_out])
    outer = outer[(outer <= low) | (outer >= high)]
    for side in (0, 1):
        choices = [replace(best, tails=(t, best.tails[1]) if side == 0 else (best.tails[0], t)) for t in TAILS]
        best = max(choices, key=criterion)
    return best
