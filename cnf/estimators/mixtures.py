"""Quick fits: Gaussian mixtures of a table, with and without marginal transforms."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cnf._utils.errors import DataError
from cnf.bases import GaussianMixture
from cnf.estimators.budget import Budget
from cnf.transforms import MarginalTransform, Standardize

__all__ = ["COMPONENTS", "FIRST", "ITERATIONS", "ROWS", "ROWS_PER_COMPONENT", "TOLERANCE", "Candidate", "Table", "enough_rows", "first_fit", "fit_mixtures", "log_prob", "normal_nll", "prepare", "some_rows"]

COMPONENTS = (1, 2, 4, 8, 16, 30, 60, 100, 150, 200, 300, 400, 600)
SMALL = 2000  # rows, up to which all kinds of covariance and two regularisations are tried
ROWS_PER_COMPONENT = 8  # at least
WORSE = 2  # numbers of components in a row, after which more are not tried
BEHIND = 1.0  # nats, by which a table is behind another one, after which it gets no more than 4 components
ROWS = 240  # for each component in a minute
STARTED = 10_000  # rows of the initial partition
ITERATIONS = 60  # without a limit of time
FIRST = 10  # iterations with one
TOLERANCE = 1e-3  # nats, gained by one iteration on training rows


@dataclass(frozen=True)
class Table:
    """Rows after a transform, which is applied once.

    Attributes:
        name: of the transform in words.
        transform: fitted to the training rows.
        train, validation: latents (N, D).
        log_det: of the validation rows (M,).
    """

    name: str
    transform: MarginalTransform | Standardize
    train: Tensor
    validation: Tensor
    log_det: Tensor

    def rows(self, log_prob: Tensor) -> Tensor:
        """Return the negative log-likelihood (M,) of the validation rows, given their log-density as latents (M,)."""
        return -(log_prob.double() + self.log_det)

    def nll(self, log_prob: Tensor) -> float:
        """Return its mean."""
        return float(self.rows(log_prob).mean())


@dataclass(frozen=True)
class Candidate:
    """Mixture of Gaussians behind a transform.

    Attributes:
        table: the transformed rows.
        base: the mixture.
        validation: mean negative log-likelihood of the validation rows in nats.
        min_variance: of the fit.
        members: number of mixtures of which ``base`` is the mean.
    """

    table: Table
    base: GaussianMixture
    validation: float
    min_variance: float = 1e-6
    members: int = 1

    @property
    def name(self) -> str:
        """Transform, number of components and covariance in words."""
        count = self.base.components
        pooled = f" of {self.members} mixtures" if self.members > 1 else ""
        return f"{self.table.name}, {count} Gaussian{'s' if count > 1 else ''}{pooled} ({self.base.covariance})"


@torch.no_grad()
def prepare(name: str, transform: MarginalTransform | Standardize, train: Tensor, validation: Tensor) -> Table:
    """Fit a transform to training rows (N, D), and apply it to both parts."""
    if isinstance(transform, MarginalTransform):
        transform.fit(train, validation)
    else:
        transform.fit(train)
    z = torch.cat([transform(part).value for part in train.split(16384)])
    parts = [transform(part)[:2] for part in validation.split(16384)]
    return Table(name, transform, z, torch.cat([v for v, _ in parts]), torch.cat([d for _, d in parts]).double())


def normal_nll(table: Table) -> Tensor:
    """Return the negative log-likelihood (M,) of the validation rows by a standard normal density of the latents."""
    return table.rows(torch.distributions.Normal(0.0, 1.0).log_prob(table.validation.double().cpu()).sum(1).to(table.log_det))


def fit_mixtures(
    tables: Sequence[Table], budget: Budget, seconds: float, components: Sequence[int], seed: int, report: Callable[[Candidate], None]
) -> list[Candidate]:
    """Fit mixtures with a rising number of components to each table, within a time.

    More components are not tried after :data:`WORSE` numbers in a row without a better validation. With a limit of
    time, a fit that would exceed it takes fewer rows.

    Args:
        tables: the transformed rows.
        budget: the clock of the search.
        seconds: when to stop, by that clock.
        components: numbers of components in rising order.
        seed: of the initialisations and of the choice of rows.
        report: called for every mixture.

    Raises:
        DataError: if not a single mixture can be fitted.
    """
    fitted: list[Candidate] = []
    state = {table.name: _Progress() for table in tables}
    error: DataError | None = None
    iterations = FIRST if budget.limited and len(tables[0].train) > SMALL else ITERATIONS
    for count in components:
        for table in tables:
            own = state[table.name]
            rows = own.rows(len(table.train), count, budget, seconds, len(tables))
            far = count > 4 and own.best > BEHIND + min(each.best for each in state.values())
            if far or own.worse >= WORSE or (rows < ROWS_PER_COMPONENT * count and count > 1) or own.skipped:
                own.skipped = True
                continue
            began, before = budget.spent, own.best
            z = some_rows(table.train, rows, seed)
            for covariance, variance in _kinds(len(table.train), table.train.shape[1], count):
                try:
                    base = first_fit(z, count, covariance, variance, seed)
                    base.improve(z, iterations, tolerance=TOLERANCE, min_variance=variance)
                except DataError as failure:
                    error = failure
                    continue
                made = Candidate(table, base, table.nll(log_prob(base, table.validation)), variance)
                fitted.append(made)
                own.best = min(own.best, made.validation)
                report(made)
            own.worse = 0 if own.best < before else own.worse + 1
            own.pace = (budget.spent - began) / (rows * count)
    if not fitted:
        raise error or DataError(f"train has {len(tables[0].train)} rows, too few for {components[0]} components")
    return fitted


def enough_rows(total: int, count: int, seconds: float) -> int:
    """Return how many of ``total`` rows a fit of ``count`` components takes, where all fits take ``seconds``."""
    return min(total, max(5000, int(ROWS * count * max(1.0, seconds / 20))))


def some_rows(z: Tensor, rows: int, seed: int) -> Tensor:
    """Return ``rows`` rows in random order, the same for the same seed."""
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))[:rows]
    return z[order.to(z.device)]


class _Progress:
    """Fits of one table so far."""

    def __init__(self) -> None:
        self.best, self.worse, self.pace, self.skipped = float("inf"), 0, 0.0, False

    def rows(self, total: int, count: int, budget: Budget, seconds: float, tables: int) -> int:
        """Return the number of rows of the next fit."""
        if not budget.limited:
            return total
        most = enough_rows(total, count, seconds)
        allowed = max(0.0, seconds - budget.spent) / tables
        return most if not self.pace else min(most, int(allowed / (self.pace * count)))


def _kinds(rows: int, dim: int, count: int) -> list[tuple[Literal["full", "tied", "diag"], float]]:
    """Return the covariances and regularisations to try."""
    if rows > SMALL:
        return [("full", 1e-6)]
    kinds: list[tuple[Literal["full", "tied", "diag"], float]] = [("full", 1e-6), ("full", 1e-2)]
    if dim == 1:
        return kinds
    if count == 1:  # with fewer rows than columns a covariance is singular
        return [*kinds, ("full", 0.1), ("diag", 1e-6)]
    return [*kinds, ("tied", 1e-6), ("diag", 1e-6), ("diag", 1e-2)]


def first_fit(z: Tensor, count: int, covariance: str, min_variance: float, seed: int) -> GaussianMixture:
    """Return a mixture after scikit-learn's partition of some rows and one iteration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged
        return GaussianMixture.fit(z[:STARTED], count, covariance, seed=seed, max_iter=1, min_variance=min_variance)


@torch.no_grad()
def log_prob(base: GaussianMixture, z: Tensor) -> Tensor:
    """Return the log-density in double precision."""
    return torch.cat([base.log_prob(part.double()) for part in z.split(2048)])
