"""Marginal transform of tables: standardisation, logarithm, logit or Gaussianization, chosen for each column."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cnf._utils.async_checks import deferred
from cnf._utils.errors import ConfigError, DataError, constant_column, require_at_least, require_inside, unknown_name
from cnf.transforms.base import DeterministicTransform, Shape
from cnf.transforms.marginal_selection import ColumnMarginal, ColumnSpec, defined, select_marginal, stack_marginals
from cnf.transforms.quantile_fit import Cells
from cnf.transforms.quantile_map import KINDS, LOG, LOGIT, MarginalState, forward_map, inverse_map

__all__ = ["MarginalTransform"]

_LEAST_ROWS = 50  # for a choice; with fewer, columns are standardised


class MarginalTransform(DeterministicTransform):
    r"""Invertible map of each column of a table (N, D) towards a standard normal, chosen by held-out likelihood.

    Candidates, from the simplest: ``standardize``; ``log`` of positive columns, or of those with a declared lower
    bound; ``logit`` of those with two declared bounds; ``gaussianize``, z = Φ⁻¹(F(x)), F the column's distribution
    function (Gaussianization flows, 2003.01941). Logarithm and logit are standardised. F has knots at quantiles and a
    rational quadratic on each piece, which makes the density continuous (neural spline flows, 1906.04032), and tails
    that are Gaussian, generalised Pareto, or short behind a sharp edge. The borders of declared cells are knots and F
    is linear between them: dequantised columns with at most ``knots`` cells are represented exactly.

    The choice looks at each column alone. A joint model behind it may prefer fewer transforms, since a monotone map
    bends linear dependence: compare on validation rows, and restrict with ``kinds``.

    Computed in float64; z and x are returned in the argument's dtype. Beyond the support of log and logit there is no
    density. All state is in buffers whose sizes depend on D and ``knots`` only.

    Args:
        dim: number of columns D.
        knots: maximum number of pieces of F; fewer rows use fewer, about one for 60 rows.
        kinds: candidates, or one choice for each column, such as ``["log", "standardize"]`` with ``fixed=True``.
        fixed: take ``kinds`` as the D columns' choices.
        bounds: support of each column, (low, inf) or (low, high), or None for the real line.
        cells: (origin, step) of each dequantised column, or None for a continuous one.
        margin: extension of an interval on both sides, relative to its length, which keeps its ends finite.
        names: column names for messages.

    Raises:
        ConfigError: for unknown kinds, arguments of another length than D, or invalid bounds, cells or margin.
        DataError: for another shape, integers, a constant column, non-finite values, or values outside a support.

    Example:
        >>> x = torch.distributions.LogNormal(0.0, 1.0).sample((2000, 1))
        >>> transform = MarginalTransform(1, kinds=("standardize", "log"), names=["income"])
        >>> transform.fit(x[:1500], validation=x[1500:])
        >>> transform.choices
        ('log',)
        >>> print(transform.report()[0])
        column 0 ('income'): log, ... nats per row over standardising
    """

    gain: Tensor

    def __init__(
        self,
        dim: int,
        *,
        knots: int = 200,
        kinds: Sequence[str] = KINDS,
        fixed: bool = False,
        bounds: Sequence[tuple[float, float] | None] | None = None,
        cells: Sequence[tuple[float, float] | None] | None = None,
        margin: float = 1e-3,
        names: Sequence[str] | None = None,
    ):
        super().__init__()
        require_at_least(1, dim=dim)
        require_at_least(8, knots=knots)
        require_inside(0, 1, margin=margin)
        given = {"kinds": kinds if fixed else None, "bounds": bounds, "cells": cells, "names": names}
        for argument, values in given.items():
            if values is not None and len(values) != dim:
                raise ConfigError(f"{argument} must have one entry for each of {dim} columns, got {len(values)}")
        for kind in kinds:
            if kind not in KINDS:
                raise unknown_name("kinds", kind, KINDS, "MarginalTransform")
        if not kinds:
            raise ConfigError(f"kinds must have at least one of {', '.join(map(repr, KINDS))}, got none")
        self.dim, self.knots = dim, knots
        self.names = None if names is None else tuple(names)
        self._kinds, self._fixed, self._bounds, self._cells, self._margin = tuple(kinds), fixed, bounds, cells, margin
        for j in range(len(bounds or cells or ())):
            self._spec(j)
        start = stack_marginals([ColumnMarginal("standardize", 0.0, 1.0)], knots)
        for name, value in start._asdict().items():
            value = value.to(torch.get_default_dtype()) if value.is_floating_point() else value
            # expanded, so that a width beyond any memory costs nothing on the meta device
            self.register_buffer(name, value.expand(dim, *value.shape[1:]).clone())
        self.register_buffer("gain", torch.zeros(dim))

    def _spec(self, j: int) -> ColumnSpec:
        kinds = (self._kinds[j],) if self._fixed else self._kinds
        support, cell = self._bounds[j] if self._bounds else None, self._cells[j] if self._cells else None
        if support is not None and not (math.isfinite(support[0]) and support[0] < support[1]):
            expected = "(low, inf) or (low, high) with low < high"
            raise ConfigError(f"bounds of {self._name(j)} must be {expected}, got {support}")
        if cell is not None and not (math.isfinite(cell[0]) and 0 < cell[1] < math.inf):
            raise ConfigError(f"cells of {self._name(j)} must be (origin, step) with a positive step, got {cell}")
        return ColumnSpec(kinds, support, self._margin, None if cell is None else Cells(*map(float, cell)), self.knots)

    def _name(self, j: int) -> str:
        return f"column {j}" + (f" ({self.names[j]!r})" if self.names else "")

    @property
    def choices(self) -> tuple[str, ...]:
        """Transform of each column, one of standardize, log, logit and gaussianize."""
        kind: Tensor = self.get_buffer("kind")
        return tuple(KINDS[k] for k in kind.tolist())

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Support of each column, (D,) each, infinite where the transform is defined on the real line."""
        state = self._state()
        logit = state.kind == LOGIT
        low = torch.where((state.kind == LOG) | logit, state.low, -math.inf)
        return low, torch.where(logit, state.high, math.inf)

    def report(self) -> list[str]:
        """Return one line per column: choice and held-out gain over standardising in nats per row."""
        rows = enumerate(zip(self.choices, self.gain.tolist(), strict=True))
        return [f"{self._name(j)}: {kind}, {gain:+.4f} nats per row over standardising" for j, (kind, gain) in rows]

    def fit(self, x: Tensor, validation: Tensor | None = None) -> None:
        """Choose and fit the transform of each column of data (N, D).

        Args:
            x: training data.
            validation: (M, D) rows for the choice; without them a fifth of the training rows is held out for it.
        """
        rows = self._rows("x", x)
        held_out = None if validation is None else self._rows("validation", validation)
        if len(rows) < 2:
            raise DataError(f"x must have at least 2 rows, got {len(rows)}")
        if held_out is not None and len(held_out) == 0:
            raise DataError("validation has no rows, expected some to choose by, or None")
        parts = [None if held_out is None else held_out[:, j] for j in range(self.dim)]
        fitted = [self._fit_column(j, rows[:, j], part) for j, part in enumerate(parts)]
        state = stack_marginals([column for column, _ in fitted], self.knots)
        for name, value in state._asdict().items():
            self.get_buffer(name).copy_(value)
        self.gain.copy_(torch.tensor([gain for _, gain in fitted]))

    def fit_batches(self, batches: Iterable[Tensor]) -> None:
        """Choose and fit the transforms to data in batches (n, D), which are concatenated; see :meth:`fit`."""
        parts = [batch.detach().cpu() for batch in batches]
        if not parts:
            raise DataError("x must have at least 2 rows, got 0")
        self.fit(torch.cat(parts))

    def _rows(self, name: str, x: Tensor) -> np.ndarray:
        self._check(name, x)
        if (bad := _first_column(~x.isfinite())) is not None:
            raise DataError(f"{name} holds NaN or infinity in {self._name(bad)}: remove or replace such rows")
        rows: np.ndarray = x.detach().cpu().double().numpy()
        return rows

    def _fit_column(self, j: int, x: np.ndarray, held_out: np.ndarray | None) -> tuple[ColumnMarginal, float]:
        spec = self._spec(j)
        # the mean of a constant column is rounded, which leaves a deviation of about eps |mean|
        if not x.std() > 4 * np.finfo(np.float64).eps * abs(x.mean()):
            raise constant_column(self._name(j), x[0])
        if spec.bounds is not None:
            low, high = spec.bounds
            for part in (x, x if held_out is None else held_out):
                if part.min() < low or part.max() > high or (part.min() == low and math.isinf(high)):
                    spans = f"{self._name(j)} spans [{part.min():g}, {part.max():g}]"
                    raise DataError(f"{spans}, outside its bounds ({low:g}, {high:g})")
        if len(x) < _LEAST_ROWS and "standardize" in spec.kinds:
            spec = replace(spec, kinds=("standardize",))
        if not any(defined(kind, x, held_out, spec) for kind in spec.kinds):
            kinds, spans = " and ".join(spec.kinds), f"{self._name(j)} spans [{x.min():g}, {x.max():g}]"
            expected = "log takes positive values or a lower bound, logit two bounds, gaussianize three values or more"
            raise DataError(f"{spans}, undefined for {kinds}: {expected}")
        return select_marginal(x, held_out, spec)

    def latent_shape(self, shape: Shape) -> Shape:
        """Return (D,)."""
        if tuple(shape) != (self.dim,):
            raise ConfigError(f"MarginalTransform has {self.dim} columns, got event_shape {tuple(shape)}")
        return shape

    def _check(self, name: str, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise DataError(f"{name} has shape {tuple(x.shape)}, expected (N, {self.dim})")
        if not x.is_floating_point():
            raise DataError(f"{name} has type {x.dtype}, expected floats")

    def _state(self) -> MarginalState:
        return MarginalState(*(self.get_buffer(name) for name in MarginalState._fields))

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check("x", x)
        z, slope = forward_map(self._state(), x)
        z = z.to(x)
        if not deferred(z) and not bool(z.isfinite().all()):
            self._refuse(x, z)
        return z, slope.sum(1).to(x)

    def _refuse(self, x: Tensor, z: Tensor) -> None:
        """Raise a DataError that names the first column without a finite value."""
        column = _first_column(~z.isfinite())
        assert column is not None
        values = x.detach()[:, column]
        if not bool(values.isfinite().all()):
            raise DataError(f"x holds NaN or infinity in {self._name(column)}: remove or replace such rows")
        low, high = (float(bound[column]) for bound in self.bounds)
        spans = f"{self._name(column)} spans [{values.min():g}, {values.max():g}]"
        raise DataError(f"{spans}, outside the support ({low:g}, {high:g}) of its {self.choices[column]}")

    def _inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        self._check("z", z)
        state = self._state()
        x, slope = inverse_map(state, z)
        # rounding to the argument's dtype must not leave the open support
        low, high = (bound.to(z) for bound in self.bounds)
        middle = 0.5 * (state.low + state.high).to(z)
        x = torch.minimum(torch.maximum(x.to(z), _towards(low, middle)), _towards(high, middle))
        if not deferred(x) and (bad := _first_column(~x.isfinite())) is not None:
            raise DataError(f"z maps to NaN or infinity in {self._name(bad)}: too far in a tail for {z.dtype}")
        return x, slope.sum(1).to(z)


def _towards(bound: Tensor, middle: Tensor) -> Tensor:
    """Return the number next to a finite bound on the inside; infinite bounds unchanged."""
    return torch.where(bound.isfinite(), torch.nextafter(bound, middle), bound)


def _first_column(bad: Tensor) -> int | None:
    """Return the first column (N, D) with a True, or None."""
    where = bad.any(0).nonzero()
    return int(where[0]) if len(where) else None
