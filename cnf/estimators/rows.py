"""Rows of the estimators: weights, discrete columns, split into training and validation, tables of samples."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnf._utils.errors import ConfigError, DataError, constant_column, require_at_least, require_inside
from cnf.data.checks import repeated_values
from cnf.data.dependence import dependent_columns
from cnf.data.lattice import lattice_step
from cnf.estimators.units import Units

__all__ = ["Layout", "PreparedRows", "check_parameters", "check_weights", "gains", "in_chunks", "prepare_rows", "read_rows", "scored_rows", "seed_of"]

Array = NDArray[np.float64]

LEAST_ROWS = 5
_ROWS_PER_SECOND, _LEAST_READ = 5000, 20_000  # training rows that a time suffices for: their transform alone takes 100 µs for 50 columns
_SCORED = 20_000  # validation rows
_MOST_ROWS = 1_000_000  # of weighted rows as repeated rows
_RESOLUTION = 4  # repeated rows for each row with fractional weights


@dataclass(frozen=True)
class Layout:
    """Columns of a table: names, dtypes and class of the frame (None for an array)."""

    names: tuple[str, ...] | None
    dtypes: tuple[str, ...]
    frame: type | None

    @classmethod
    def of(cls, x: Any, names: Any) -> Layout:
        """Return the layout of what ``fit`` was given; ``names`` is ``feature_names_in_`` or None."""
        if names is None:
            return cls(None, (), None)
        return cls(tuple(map(str, names)), tuple(str(t).lower() for t in x.dtypes), type(x))

    def restore(self, x: Array) -> Any:
        """Return samples (n, D) as the kind of table that ``fit`` was given, integer columns as integers."""
        if self.names is None or self.frame is None:
            return x
        columns = {}
        for j, (name, dtype) in enumerate(zip(self.names, self.dtypes, strict=True)):
            whole = dtype.startswith(("int", "uint", "bool"))
            kept = dtype if whole or dtype in ("float32", "float64") else "float64"
            columns[name] = (np.rint(x[:, j]) if whole else x[:, j]).astype(kept)
        return self.frame(columns)


@dataclass(frozen=True)
class PreparedRows:
    """Training and validation rows, dequantised.

    Attributes:
        x: (N, D).
        group: (N,) numbers of distinct rows, which stay together.
        held: (N,) whether a row is for validation.
        steps: of the D columns' lattices, NaN for a continuous column.
        origins, ends: least and largest value of each column.
    """

    x: Array
    group: NDArray[np.int64]
    held: NDArray[np.bool_]
    steps: Array
    origins: Array
    ends: Array

    @property
    def train(self) -> Array:
        """The training rows (n, D)."""
        return self.x[~self.held]

    @property
    def validation(self) -> Array:
        """The validation rows (m, D)."""
        return self.x[self.held]

    def folds(self, count: int, seed: int) -> list[tuple[Array, Array]]:
        """Return training and validation rows of a cross-validation with at most ``count`` folds."""
        order = np.random.default_rng(seed).permutation(int(self.group.max()) + 1)
        fold = order[self.group] % min(count, len(order))
        return [(self.x[fold != k], self.x[fold == k]) for k in range(int(fold.max()) + 1)]

    def cells(self, units: Units, columns: slice = slice(None)) -> list[tuple[float, float] | None] | None:
        """Return (border, step) of the discrete columns' cells in units, None for the others; None if all are continuous."""
        pairs = zip(units.apply(self.origins[columns]), self.steps[columns] / units.scale, strict=True)
        out = [None if np.isnan(step) else (float(origin - step / 2), float(step)) for origin, step in pairs]
        return out if any(out) else None


def seed_of(random_state: Any) -> int:
    """Return a seed for ``random_state``: None, an integer, or a RandomState."""
    from sklearn.utils import check_random_state

    return int(check_random_state(random_state).randint(2**31 - 1))


def check_weights(sample_weight: Any, x: Array) -> Array | None:
    """Return the weights (N,) of the rows, or None.

    Raises:
        ValueError: for another shape, NaN, infinite or negative weights, or none above zero.
    """
    if sample_weight is None:
        return None
    from sklearn.utils.validation import _check_sample_weight

    weight: Array = _check_sample_weight(sample_weight, x, dtype=np.float64)
    if (bad := np.flatnonzero(weight < 0)).size:
        raise DataError(f"sample_weight must not be negative, got {weight[bad[0]]:g} in row {bad[0]}")
    if not weight.any():
        raise DataError("sample_weight must have at least one non-zero entry, got zeros only")
    return weight


def _counts(weight: Array, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return how often each row is repeated: integer weights exactly, others by systematic resampling."""
    for scaled in (weight, weight / weight.min()):
        whole = np.rint(scaled)
        if np.allclose(scaled, whole, rtol=1e-12, atol=0) and whole.sum() <= max(_MOST_ROWS, _RESOLUTION * len(weight)):
            return whole.astype(np.int64)  # type: ignore[no-any-return]
    total = max(len(weight), min(_RESOLUTION * len(weight), _MOST_ROWS))
    steps = np.floor(np.cumsum(weight) * (total / weight.sum()) + generator.uniform())
    counts: NDArray[np.int64] = np.diff(steps, prepend=0.0).astype(np.int64)
    return counts


def prepare_rows(
    x: Array,
    weight: Array | None,
    fraction: float,
    seed: int,
    *,
    discrete: bool = True,
    targets: slice = slice(None),
    labels: Sequence[str] | None = None,
) -> PreparedRows:
    """Sort, weight, dequantise and split rows (N, D).

    Rows are sorted first, so that the result does not depend on their order, and a row of integer weight w is the same
    as w equal rows. Equal rows fall into the same part unless all columns are discrete.

    Args:
        x: rows without NaN and infinity.
        weight: (N,), or None.
        fraction: of the rows, for validation.
        seed: of the split and of dequantisation.
        discrete: whether to dequantise columns on a lattice.
        targets: columns with a density, which must not be constant; others are never dequantised.
        labels: names of the target columns for messages; "column 0" and so on if None.

    Raises:
        DataError: for a constant column, columns that determine one another, or fewer than five rows of positive weight.
    """
    generator = np.random.default_rng(seed)
    if weight is not None:
        x, weight = x[weight > 0], weight[weight > 0]
    order = np.lexsort(x.T[::-1])
    x = x[order]
    if weight is not None:
        x = x.repeat(_counts(weight[order], generator), axis=0)
    if len(x) < LEAST_ROWS:
        raise DataError(f"{len(x)} rows of positive weight, expected at least {LEAST_ROWS}")
    steps, columns = np.full(x.shape[1], np.nan), range(x.shape[1])[targets]
    labels = labels or [f"column {j}" for j in columns]
    for j, label in zip(columns, labels, strict=True):
        if x[:, j].min() == x[:, j].max():
            raise constant_column(label, x[0, j])
        steps[j] = (lattice_step(x[:, j], np.finfo(np.float64).eps) or np.nan) if discrete else np.nan
    changes = (x[1:] != x[:-1]).any(1)
    distinct = x[np.concatenate([[True], changes])]  # a weight is no repetition
    spikes = [repeated_values(distinct[:, j], label) for j, label in zip(columns, labels, strict=True) if discrete and np.isnan(steps[j])]
    if said := "; ".join(filter(None, spikes)):
        warnings.warn(said, stacklevel=3)
    modelled = x[:, targets]
    if relations := dependent_columns(modelled / Units.of(modelled).scale, labels):
        words = "; ".join(relation for _, relation in relations[:10])
        raise DataError(f"columns depend on each other ({words}), so that they have no joint density: drop one of each relation")
    origins, ends = x.min(0), x.max(0)
    if not np.isnan(steps).any():  # in a table of discrete columns equal rows are not the same row
        changes[:] = True
    group = np.concatenate([[0], np.cumsum(changes)])
    noise = generator.uniform(-0.5, 0.5, x.shape) * np.nan_to_num(steps)
    held = _held_out(group, fraction, generator)
    return PreparedRows(x + noise, group, held, steps, origins, ends)


def _held_out(group: NDArray[np.int64], fraction: float, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Return the mask of the validation rows: whole groups, at least one, and never all."""
    sizes = np.bincount(group)
    if len(sizes) < 2:
        raise DataError("all rows are equal and have no density: expected at least two distinct rows")
    order = generator.permutation(len(sizes))
    total = np.cumsum(sizes[order])
    count = int(np.searchsorted(total, max(1.0, round(fraction * len(group))), side="right"))
    count = min(max(count, 1), len(sizes) - 1)
    held: NDArray[np.bool_] = np.isin(group, order[:count])
    return held


def read_rows(x: Tensor, minutes: float, seed: int) -> Tensor:
    """Return the indices of the training rows (N, D) that a search within a time reads."""
    return _some(x, int(max(_LEAST_READ, _ROWS_PER_SECOND * 60 * minutes)), seed)


def scored_rows(x: Tensor, seed: int) -> Tensor:
    """Return the indices of the validation rows (N, D) that choose between the parts of a search within a time."""
    return _some(x, _SCORED, seed)


def _some(x: Tensor, rows: int, seed: int) -> Tensor:
    """Return indices of rows at random, and of those with the least and the largest value of each column, whose range is kept."""
    if len(x) <= rows:
        return torch.arange(len(x), device=x.device)
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:rows].to(x.device)
    index: Tensor = torch.cat([chosen, x.argmin(0), x.argmax(0)]).unique()  # type: ignore[no-untyped-call]
    return index


def in_chunks(function: Any, *parts: Tensor, rows: int = 8192) -> Tensor:
    """Apply a function to rows of tensors in chunks, without gradient, and concatenate."""
    with torch.no_grad():
        return torch.cat([function(*piece) for piece in zip(*(part.split(rows) for part in parts), strict=True)])


def gains(rows: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Return by how much each part is better than the one before, in nats, with the standard error over the rows."""
    names = list(rows)
    apart = {name: rows[before] - rows[name] for before, name in itertools.pairwise(names)}
    return {name: (float(d.mean()), float(d.std()) / math.sqrt(len(d)) if len(d) > 1 else math.nan) for name, d in apart.items()}


def check_parameters(estimator: Any) -> None:
    """Validate the parameters that both estimators have."""
    if isinstance(estimator.hidden, int | str) or not all(isinstance(width, Integral) for width in estimator.hidden):
        raise ConfigError(f"hidden must be the widths of the hidden layers, such as (64, 64), got {estimator.hidden!r}")
    require_inside(0, math.inf, max_minutes=estimator.max_minutes)
    require_inside(0, 1, validation_fraction=estimator.validation_fraction)
    require_at_least(1, max_steps=estimator.max_steps)
    if estimator.discrete not in ("auto", None):
        raise ConfigError(f"discrete must be 'auto' or None, got {estimator.discrete!r}")
    if estimator.components != "auto":
        if isinstance(estimator.components, str):
            raise ConfigError(f"components must be 'auto' or a number, got {estimator.components!r}")
        require_at_least(1, components=estimator.components)
