"""Density of a table as a scikit-learn estimator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from cnf._utils.errors import require_at_least
from cnf.data.checks import column_name
from cnf.data.lattice import to_lattice
from cnf.estimators.mixtures import COMPONENTS
from cnf.estimators.rows import (
    LEAST_ROWS,
    Layout,
    check_parameters,
    check_weights,
    in_chunks,
    prepare_rows,
    seed_of,
)
from cnf.estimators.search import DensityFit, fit_density
from cnf.estimators.units import Units, require_numbers
from cnf.random import Noise

__all__ = ["DensityEstimator"]

Array = NDArray[np.float64]

_CELL_NODES = 16


class DensityEstimator(DensityMixin, BaseEstimator):  # type: ignore[misc]
    """Density of the rows of a table: a mixture of Gaussians that a continuous normalizing flow refines.

    The mixture and the transforms of the columns are chosen on validation rows. The flow starts at the mixture's
    likelihood, and the weights of the best validation are kept, so that it is never worse than the mixture on them.

    Columns whose values lie on a lattice and repeat (integers, for example) are dequantised: the density is then that of
    x + u, u uniform over one step around 0, samples lie on the lattice and within the values seen, and density x step
    estimates a value's probability.

    Args:
        max_minutes: limit of the fit.
        max_steps: optimiser steps of the training in place of the time, with which the result is reproducible.
        components: number of components of the mixture; ``"auto"`` chooses on validation rows.
        hidden: widths of the field's hidden layers.
        validation_fraction: of the rows, held out.
        discrete: ``"auto"`` detects discrete columns, None treats all columns as continuous.
        random_state: seed, RandomState, or None.
        device: device of the training; results are on the CPU.
        verbose: 1 prints the progress.

    Attributes:
        flow_: the fitted :class:`~cnf.Flow`, in double precision and evaluation mode.
        parts_: negative log-likelihood of the validation rows in nats: uniform, standard normal, marginals, mixture,
            flow.
        validation_score_: mean validation log-likelihood (nats).
        n_steps_: optimiser steps.
        n_features_in_: number of columns.
        feature_names_in_: their names, for a DataFrame.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(200, 2))
        >>> model = DensityEstimator(max_steps=20, random_state=0).fit(x)
        >>> model.score_samples(x[:3]).shape, model.sample(4).shape
        ((3,), (4, 2))
    """

    def __init__(
        self,
        max_minutes: float = 1.0,
        max_steps: int | None = None,
        components: int | str = "auto",
        hidden: Sequence[int] = (64, 64),
        validation_fraction: float = 0.1,
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

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> DensityEstimator:
        """Fit the density to rows.

        Args:
            X: (N, D) numbers, an array or a DataFrame.
            y: ignored.
            sample_weight: (N,) weights; an integer weight w is the same as w equal rows, others are resampled.

        Raises:
            ValueError: for NaN or infinity, text, other shapes, fewer than five rows, a constant column, columns that
                determine one another, or invalid parameters.
        """
        check_parameters(self)
        require_numbers(X)
        rows = validate_data(self, X, dtype=np.float64, ensure_min_samples=LEAST_ROWS)
        self._layout = Layout.of(X, getattr(self, "feature_names_in_", None))
        seed = seed_of(self.random_state)
        names = self._layout.names
        weight = check_weights(sample_weight, rows)
        labels = None if names is None else [column_name(names, j) for j in range(len(names))]
        data = prepare_rows(rows, weight, self.validation_fraction, seed, discrete=self.discrete == "auto", labels=labels)
        self._steps, self._origins, self._ends = data.steps, data.origins, data.ends
        units = Units.of(data.train)
        found = self._fit(units.apply(data.train), units.apply(data.validation), seed, data.cells(units), names)
        self.flow_, self.parts_ = units.undo(found.flow.cpu().double()), {name: nll + units.volume for name, nll in found.parts.items()}
        self.validation_score_, self.n_steps_ = -found.validation - units.volume, found.steps
        return self

    def _fit(
        self, train: Array, validation: Array, seed: int, cells: Sequence[tuple[float, float] | None] | None, names: Sequence[str] | None
    ) -> DensityFit:
        return fit_density(
            torch.from_numpy(train).float(),
            torch.from_numpy(validation).float(),
            minutes=self.max_minutes,
            seed=seed,
            cells=cells,
            names=names,
            hidden=self.hidden,
            device=self.device,
            on_progress=print if self.verbose else None,
            components=COMPONENTS if isinstance(self.components, str) else (int(self.components),),
            steps=self.max_steps,
        )

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log p(x) (N,) in nats of a tensor (N, D), differentiable in x."""
        check_is_fitted(self)
        return self.flow_.log_prob(x.to(self.flow_.like)).to(x.dtype if x.is_floating_point() else torch.float64)

    def score_samples(self, X: Any) -> Array:
        """Return log p(x) (N,) in nats of rows (N, D); of discrete columns the mean density over a value's cell."""
        check_is_fitted(self)
        require_numbers(X)
        x = torch.tensor(validate_data(self, X, dtype=np.float64, reset=False))  # a copy: frames are read-only
        offsets = _cell_nodes(self._steps)
        values = torch.stack([in_chunks(self.flow_.log_prob, x + offset) for offset in offsets])
        value: Array = (values.logsumexp(0) - math.log(len(offsets))).numpy()
        return value

    def score(self, X: Any, y: Any = None) -> float:
        """Return the mean log-likelihood in nats per row, as ``sklearn.mixture.GaussianMixture`` does."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state: Any = None) -> Any:
        """Draw rows (n_samples, D): a DataFrame if the estimator was fitted to one, otherwise an array.

        Args:
            n_samples: number of rows.
            random_state: seed, RandomState, or None.
        """
        check_is_fitted(self)
        require_at_least(1, n_samples=n_samples)
        x = self.flow_.sample(n_samples, noise=Noise(seed_of(random_state), "sample")).numpy()
        return self._layout.restore(to_lattice(x, self._steps, self._origins, self._ends))


def _cell_nodes(steps: Array) -> Tensor:
    """Return quasi-random points (J, D) of the cell around 0: one point, 0, if all columns are continuous."""
    discrete = np.flatnonzero(~np.isnan(steps))
    if not len(discrete):
        return torch.zeros(1, len(steps), dtype=torch.float64)
    out = torch.zeros(_CELL_NODES, len(steps), dtype=torch.float64)
    if len(discrete) == 1:
        u = ((torch.arange(_CELL_NODES, dtype=torch.float64) + 0.5) / _CELL_NODES)[:, None]
    else:
        u = torch.quasirandom.SobolEngine(len(discrete), scramble=True, seed=0).draw(_CELL_NODES, dtype=torch.float64)
    out[:, discrete] = (u - 0.5) * torch.from_numpy(steps[discrete])
    return out
