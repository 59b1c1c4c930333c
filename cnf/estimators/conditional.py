"""Conditional density p(y | X) as a scikit-learn estimator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import check_array, check_is_fitted, validate_data
from torch import Tensor

from cnf._utils.errors import ConfigError, DataError, require_at_least, require_inside
from cnf.data import DataSplits
from cnf.data.lattice import to_lattice
from cnf.estimators.conditional_fit import fit_conditional
from cnf.estimators.quantiles import cdf, mean, quantiles, sorted_crps
from cnf.estimators.rows import (
    LEAST_ROWS,
    check_parameters,
    check_weights,
    in_chunks,
    prepare_rows,
    seed_of,
)
from cnf.estimators.units import Units, require_numbers, spread
from cnf.random import Noise

__all__ = ["ConditionalDensityEstimator"]

Array = NDArray[np.float64]

_CROSS_VALIDATED = 2000  # fewer rows: an ensemble of networks, one for each fold, without a field
_FOLDS = 5
_DRAWS = 500  # of each row, for quantiles of several columns
_LEVELS = 200  # quantiles of each row, for the CRPS


class ConditionalDensityEstimator(MultiOutputMixin, RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Conditional density p(y | X): a mixture density network that a conditional continuous normalizing flow refines.

    The mixture starts at the ridge regression of y on X with a mixture of its residuals. Transform of y, number of
    components and weights are chosen on validation rows, by which the standard deviations are calibrated at the end. With
    fewer than 2,000 rows the validation rows are those of a five-fold cross-validation, and the density is the ensemble of
    its networks without a field: on such tables the choice by one small split costs more than a field gains.

    ``score`` is the mean log-likelihood, by which grid search selects calibrated densities; for R² of the mean pass
    ``scoring="r2"``. Columns of y on a lattice (counts, for example) are dequantised, as in
    :class:`~cnf.estimators.DensityEstimator`.

    Args:
        max_minutes: limit of the fit.
        max_steps: limit of the optimiser steps of each training; if it ends all of them before the time does, the
            result is reproducible. None: no limit.
        components: number of components of the mixture; ``"auto"`` chooses on validation rows.
        hidden: widths of the hidden layers.
        validation_fraction: of the rows, held out; unused with fewer than 2,000 rows.
        discrete: ``"auto"`` detects discrete columns of y, None treats all columns as continuous.
        random_state: seed, RandomState, or None.
        device: device of the training; results are on the CPU.
        verbose: 1 prints the progress.

    Attributes:
        flow_: the fitted :class:`~cnf.Flow` of y with the standardised X as context, in double precision.
        parts_: negative log-likelihood of the validation rows in nats: linear regression, mixture, flow (if there is a
            field), and the calibrated result (of an ensemble, the mean of its networks, which is higher than its own).
        validation_score_: mean validation log-likelihood (nats).
        n_steps_: optimiser steps.
        n_features_in_: number of columns of X.
        feature_names_in_: their names, for a DataFrame.
        n_outputs_: number of columns of y.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(200, 2))
        >>> y = x[:, 0] + 0.1 * np.random.default_rng(1).normal(size=200)
        >>> model = ConditionalDensityEstimator(max_steps=20, random_state=0).fit(x, y)
        >>> model.predict(x[:3]).shape, model.predict_interval(x[:3], 0.9).shape, model.sample(x[:3], 5).shape
        ((3,), (3, 2), (3, 5))
    """

    def __init__(
        self,
        max_minutes: float = 1.0,
        max_steps: int | None = None,
        components: int | str = "auto",
        hidden: Sequence[int] = (64, 64),
        validation_fraction: float = 0.15,
        discrete: str | None = "auto",
        random_state: Any = None,
        device: str = "cpu",
        verbose: int = 0,
    ):
        self.max_minutes = max_minutes
        self.max_steps = max_steps
        self.components = components
        self.hidden = hidden
        self.validation_fraction = validation_fraction
        self.discrete = discrete
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = True  # score is in nats, not R²
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> ConditionalDensityEstimator:
        """Fit p(y | X) to rows.

        Args:
            X: (N, C) numbers, an array or a DataFrame.
            y: (N,) or (N, D) numbers.
            sample_weight: (N,) weights; an integer weight w is the same as w equal rows, others are resampled.

        Raises:
            ValueError: for NaN or infinity, other shapes, fewer than five rows, a constant column of y, or invalid
                parameters.
        """
        check_parameters(self)
        require_numbers(X)
        require_numbers(y, "y")
        names = list(map(str, y.columns)) if hasattr(y, "columns") else None
        given, target = validate_data(
            self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, ensure_min_samples=LEAST_ROWS
        )
        target = np.asarray(target, dtype=np.float64)
        self._flat = target.ndim == 1
        target = target.reshape(len(target), -1)
        width, self.n_outputs_ = given.shape[1], target.shape[1]
        weight, seed = check_weights(sample_weight, given), seed_of(self.random_state)
        rows = prepare_rows(
            np.concatenate([given, target], 1),
            weight,
            self.validation_fraction,
            seed,
            discrete=self.discrete == "auto",
            targets=slice(width, None),
            labels=["y"] if self._flat else [f"column {j} of y" + (f" ({names[j]!r})" if names else "") for j in range(self.n_outputs_)],
        )
        self._steps, self._origins, self._ends = rows.steps[width:], rows.origins[width:], rows.ends[width:]
        x = rows.x[:, :width]
        self._x_mean, std = x.mean(0), spread(x)
        self._x_std = np.where(std > 1e-12 * np.abs(x).max(0), std, 1.0)
        self._units = Units.of(rows.x[:, width:])
        few = len(rows.x) < _CROSS_VALIDATED
        folds = rows.folds(_FOLDS, seed) if few else [(rows.train, rows.validation)]
        found = fit_conditional(
            [self._data(train, held) for train, held in folds],
            minutes=self.max_minutes,
            seed=seed,
            cells=rows.cells(self._units, slice(width, None)),
            names=names,
            components=None if isinstance(self.components, str) else int(self.components),
            hidden=self.hidden,
            steps=self.max_steps,
            device=self.device,
            on_progress=print if self.verbose else None,
        )
        self.flow_, self.parts_ = self._units.undo(found.flow), {name: nll + self._units.volume for name, nll in found.parts.items()}
        self.validation_score_, self.n_steps_ = -found.validation - self._units.volume, found.steps
        return self

    def _data(self, train: Array, held: Array) -> DataSplits:
        width = len(self._x_mean)
        (x, context), (validation, its_context) = [
            (torch.from_numpy(self._units.apply(rows[:, width:])).float(), torch.from_numpy((rows[:, :width] - self._x_mean) / self._x_std).float()) for rows in (train, held)
        ]
        return DataSplits("rows", "table", x, validation, x[:0], context, its_context)

    def _context(self, X: Any) -> Tensor:
        """Return the standardised context (N, C) in double precision."""
        check_is_fitted(self)
        require_numbers(X)
        rows = validate_data(self, X, dtype=np.float64, reset=False)
        return torch.from_numpy((rows - self._x_mean) / self._x_std)

    def _target(self, y: Any, n: int) -> Tensor:
        require_numbers(y, "y")
        values = check_array(y, dtype=np.float64, ensure_2d=False, input_name="y")
        values = values.reshape(-1, 1) if values.ndim == 1 else values
        if values.shape != (n, self.n_outputs_):
            raise DataError(f"y has shape {np.shape(y)}, expected {n} rows of {self.n_outputs_} columns")
        return torch.tensor(values)

    def _drop(self, values: Tensor) -> Array:
        """Return (N, D, ...) as an array, (N, ...) if y was one-dimensional."""
        out: Array = values.numpy()
        return out[:, 0] if self._flat else out

    def log_prob(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log p(y | x) (N,) in nats of tensors (N, C) and (N, D) or (N,), differentiable in both."""
        check_is_fitted(self)
        like = self.flow_.like
        context = (x.to(like) - torch.from_numpy(self._x_mean)) / torch.from_numpy(self._x_std)
        return self.flow_.log_prob(y.to(like).reshape(len(y), -1), context).to(y.dtype if y.is_floating_point() else like.dtype)

    def score_samples(self, X: Any, y: Any) -> Array:
        """Return log p(y | x) (N,) in nats of rows."""
        context = self._context(X)
        value: Array = in_chunks(self.flow_.log_prob, self._target(y, len(context)), context).numpy()
        return value

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the mean log-likelihood in nats per row (not R²: ``sklearn.metrics.r2_score`` of ``predict``)."""
        return float(np.average(self.score_samples(X, y), weights=sample_weight))

    def predict(self, X: Any) -> Array:
        """Return the conditional mean, (N,) or (N, D)."""
        context = self._context(X)
        return self._drop(mean(self.flow_, context))

    def sample(self, X: Any, n_samples: int = 1, random_state: Any = None) -> Array:
        """Draw ``n_samples`` values of y for each row: (N, n_samples), or (N, n_samples, D)."""
        context = self._context(X)
        require_at_least(1, n_samples=n_samples)
        y = self._draw(context, n_samples, seed_of(random_state)).numpy()
        out = to_lattice(y, self._steps, self._origins, self._ends)
        return out[..., 0] if self._flat else out

    def _draw(self, context: Tensor, n: int, seed: int) -> Tensor:
        parts = context.split(max(1, 16384 // n))
        draws = [self.flow_.sample(n, part, noise=Noise(seed, "sample", i)).transpose(0, 1) for i, part in enumerate(parts)]
        return torch.cat(draws)

    def cdf(self, X: Any, y: Any) -> Array:
        """Return the distribution function F(y | x) (N,), uniform on [0, 1] for a calibrated model; for one column of y."""
        context = self._context(X)
        if self.n_outputs_ > 1:
            raise ConfigError(f"cdf is for one column of y, got {self.n_outputs_}: use sample")
        value: Array = in_chunks(lambda a, b: cdf(self.flow_, a, b), self._target(y, len(context)), context).numpy()
        return value

    def predict_quantiles(self, X: Any, q: float | Sequence[float] = (0.05, 0.5, 0.95)) -> Array:
        """Return quantiles at levels ``q``: (N, Q), (N, D, Q) for several columns, without the last axis for a number.

        For one column the distribution function is inverted, to the error of the ODE solver (about 1e-3 of a standard
        deviation at most). For several columns they are the quantiles of 500 draws: near the median of a normal their
        standard error is 0.06 standard deviations.
        """
        levels = np.atleast_1d(np.asarray(q, dtype=np.float64))
        if levels.ndim != 1 or not len(levels) or not ((levels > 0) & (levels < 1)).all():
            raise ConfigError(f"q must be levels inside (0, 1), got {q}")
        context = self._context(X)
        if self.n_outputs_ == 1:
            out = quantiles(self.flow_, context, torch.from_numpy(levels))[:, None]
        else:
            out = torch.quantile(self._draw(context, _DRAWS, 0), torch.from_numpy(levels), dim=1).movedim(0, 2)
        return self._drop(out[..., 0] if np.ndim(q) == 0 else out)

    def predict_interval(self, X: Any, coverage: float = 0.9) -> Array:
        """Return the central interval of a coverage: (N, 2), or (N, D, 2) for several columns."""
        require_inside(0, 1, coverage=coverage)
        return self.predict_quantiles(X, ((1 - coverage) / 2, (1 + coverage) / 2))

    def coverage(self, X: Any, y: Any, coverage: float = 0.9) -> float | Array:
        """Return the share of rows inside :meth:`predict_interval`, for each column of several; ``coverage`` if calibrated."""
        interval = self.predict_interval(X, coverage)
        interval = interval[:, None] if self._flat else interval
        values = self._target(y, len(interval)).numpy()
        inside: Array = ((values >= interval[..., 0]) & (values <= interval[..., 1])).mean(0)
        return float(inside[0]) if self._flat else inside

    def crps(self, X: Any, y: Any) -> Array:
        """Return the continuous ranked probability score in y's units, (N,), or (N, D) for several columns; lower is better.

        From 200 quantiles for one column, and from 500 draws for several.
        """
        context = self._context(X)
        values = self._target(y, len(context))
        if self.n_outputs_ == 1:
            levels = (torch.arange(_LEVELS, dtype=torch.float64) + 0.5) / _LEVELS
            return self._drop(sorted_crps(quantiles(self.flow_, context, levels), values[:, 0])[:, None])
        draws = self._draw(context, _DRAWS, 0).sort(1).values
        return self._drop(torch.stack([sorted_crps(draws[..., j], values[:, j]) for j in range(self.n_outputs_)], 1))
