"""Gaussian mixture, fitted to data or trained with the flow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from cnf._utils.errors import ConfigError, DataError, constant_column, require_at_least, unknown_name
from cnf.bases.base import Base
from cnf.bases.mixture_fit import MixtureParameters, fit, iterate
from cnf.random import Noise, draw

__all__ = ["COVARIANCES", "GaussianMixture"]

COVARIANCES = ("full", "tied", "diag")
DRAWN = 1 << 24  # numbers in the factors of rows that are drawn at a time


class GaussianMixture(Base):
    r"""Mixture :math:`q(z) = \sum_k w_k N(z; \mu_k, \Sigma_k)`.

    The weights are the softmax of ``logits`` (K,). Every covariance is :math:`\Sigma = (A^\top A)^{-1}` with a triangular
    A, of which ``log_diagonal`` (K, D) and the entries below the diagonal, ``lower`` (K, D(D − 1)/2), are parameters: it
    stays positive definite in training, and the density costs one triangular product for each component. A new mixture
    has equal weights, means drawn from N(0, I) by torch's global generator, and unit covariances; :meth:`fit` makes one
    of data.

    With a field that starts at zero, a flow on this base starts at the likelihood of the mixture. The choice of a
    component has no derivative: a mixture that is trained has samples without gradient (``has_rsample`` is False, as in
    ``torch.distributions.MixtureSameFamily``), a frozen one has differentiable samples.

    Args:
        event_shape: shape of one latent; an integer D is (D,).
        components: number K of components.
        covariance: ``"full"``, ``"tied"`` (one for all components; the first dimension of A's parameters is 1), or
            ``"diag"`` (no ``lower``).
        trainable: whether the parameters are trained with the flow.

    Raises:
        ConfigError: for an unknown covariance, or less than one component.
        DataError: from ``log_prob``, for z of another shape.

    Example:
        >>> z = torch.cat([torch.randn(200, 2) - 3, torch.randn(200, 2) + 3])
        >>> base = GaussianMixture.fit(z, 2)
        >>> base.log_prob(z).shape, base.sample(5).shape
        (torch.Size([400]), torch.Size([5, 2]))
    """

    lower: nn.Parameter | None

    def __init__(self, event_shape: int | Sequence[int], components: int, covariance: str = "full", trainable: bool = True):
        super().__init__(event_shape)
        require_at_least(1, components=components)
        if covariance not in COVARIANCES:
            raise unknown_name("covariance", covariance, COVARIANCES)
        self.components, self.covariance = components, covariance
        dim, factors = math.prod(self.event_shape), 1 if covariance == "tied" else components
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(torch.randn(components, dim))
        self.log_diagonal = nn.Parameter(torch.zeros(factors, dim))
        below = dim * (dim - 1) // 2
        self.lower = None if covariance == "diag" or not below else nn.Parameter(torch.zeros(factors, below))
        self.requires_grad_(trainable)

    @classmethod
    def fit(
        cls,
        z: Tensor,
        components: int,
        covariance: str = "full",
        *,
        trainable: bool = True,
        seed: int = 0,
        restarts: int = 1,
        max_iter: int = 200,
        min_variance: float = 1e-6,
    ) -> GaussianMixture:
        """Return a mixture fitted to z (N, \\*event), with its dtype and device; see :meth:`fit_to`.

        z are latents of the training data, such as ``flow.encode(x)`` of a flow whose field starts at zero. Keep the
        statistics of the transforms: fit them first (:meth:`cnf.Flow.fit_statistics`).

        Example:
            >>> from cnf import CNF, Flow
            >>> from cnf.fields import MLP
            >>> from cnf.transforms import Sequential, Standardize
            >>> x = 5 + 2 * torch.randn(500, 2)
            >>> transform = Sequential([Standardize(torch.zeros(2), torch.ones(2)), CNF(MLP(2, zero_init=True))])
            >>> start = Flow(transform, (2,))
            >>> start.fit_statistics(x)
            >>> flow = Flow(transform, (2,), base=GaussianMixture.fit(start.encode(x), 3))
            >>> flow.log_prob(x).shape
            torch.Size([500])
        """
        if not isinstance(z, Tensor):
            raise DataError(f"z is a {type(z).__name__}, expected a torch.Tensor: use torch.as_tensor(z)")
        with torch.random.fork_rng(devices=()):  # the initial means are replaced
            base = cls(z.shape[1:] or 1, components, covariance, trainable)
        base.to(device=z.device, dtype=z.dtype if z.is_floating_point() else None)
        base.fit_to(z, seed=seed, restarts=restarts, max_iter=max_iter, min_variance=min_variance)
        return base

    @classmethod
    def choose(
        cls, z: Tensor, validation: Tensor, candidates: Iterable[int] = (1, 2, 4, 8, 16, 32), covariance: str = "full", *, trainable: bool = True, seed: int = 0
    ) -> tuple[GaussianMixture, dict[int, float]]:
        """Fit a mixture for each number of components; return the best by validation, and the scores.

        Args:
            z: latents (N, \\*event) to fit.
            validation: latents (M, \\*event) to score, not among those of ``z``.
            candidates: numbers of components.
            covariance, trainable, seed: as for :meth:`fit`.

        Returns:
            The mixture, and the mean log-likelihood (nats) of ``validation`` by number of components.

        Raises:
            ConfigError: for no candidates.
            DataError: as :meth:`fit_to`, and for no validation rows.

        Example:
            >>> z = torch.cat([torch.randn(300, 1) - 5, torch.randn(300, 1) + 5])
            >>> base, scores = GaussianMixture.choose(z[::2], z[1::2], (1, 2))
            >>> base.components, sorted(scores)
            (2, [1, 2])
        """
        if not (numbers := list(dict.fromkeys(candidates))):
            raise ConfigError("candidates is empty, expected numbers of components such as (1, 2, 4, 8)")
        if not len(validation):
            raise DataError("validation has no rows, expected at least one")
        scores: dict[int, float] = {}
        best: GaussianMixture | None = None
        for number in numbers:
            base = cls.fit(z, number, covariance, trainable=trainable, seed=seed)
            with torch.no_grad():
                parts = [base.log_prob(part).double().sum() for part in validation.to(z).split(8192)]
            scores[number] = float(torch.stack(parts).sum()) / len(validation)
            if best is None or scores[number] > scores[best.components]:
                best = base
        assert best is not None
        return best, scores

    @classmethod
    @torch.no_grad()
    def mean_of(cls, members: Sequence[GaussianMixture]) -> GaussianMixture:
        """Return the mean of mixtures over one event shape: a mixture of all their components.

        Raises:
            ConfigError: for no member, or members of several event shapes.

        Example:
            >>> mean = GaussianMixture.mean_of([GaussianMixture(2, 3), GaussianMixture(2, 4)])
            >>> mean.components
            7
        """
        shapes = {member.event_shape for member in members}
        if len(shapes) != 1:
            raise ConfigError(f"members must be at least one, over one event shape, got {sorted(shapes)}")
        diagonal = all(member.covariance == "diag" for member in members)
        made = cls(members[0].event_shape, sum(m.components for m in members), "diag" if diagonal else "full", members[0].means.requires_grad)
        made.to(members[0].means)
        parts = [(m.logits.log_softmax(0), m.means, m._triangular().expand(m.components, -1, -1)) for m in members]
        log_weights, means, factors = (torch.cat(each) for each in zip(*parts, strict=True))
        made._put(MixtureParameters(log_weights - math.log(len(members)), means, factors))
        return made

    @torch.no_grad()
    def fit_to(self, z: Tensor, *, seed: int = 0, restarts: int = 1, max_iter: int = 200, min_variance: float = 1e-6) -> None:
        """Set the parameters by expectation maximisation on z (N, \\*event), with scikit-learn in double precision.

        Args:
            z: latents of the training data.
            seed: of the initialisation.
            restarts: number of initialisations, of which the best is kept.
            max_iter: iterations of each; a warning says if they did not suffice.
            min_variance: added to the diagonal of the covariances, in units of z².

        Raises:
            DataError: for another shape, fewer rows than components (or than two), NaN or infinity, or a constant
                dimension.
            ModuleNotFoundError: without scikit-learn (``pip install 'cnf[data]'``).
        """
        self._check(z)
        rows = self._rows(z).cpu()
        self._put(fit(rows, self.components, self.covariance, seed=seed, restarts=restarts, max_iter=max_iter, min_variance=min_variance))

    @torch.no_grad()
    def improve(self, z: Tensor, max_iter: int = 20, *, tolerance: float = 1e-4, min_variance: float = 1e-6) -> list[float]:
        """Continue expectation maximisation from the present parameters, on z (N, \\*event); the likelihood of z rises.

        Also raises the likelihood of a trained flow, with z = ``flow.encode(x)``: log-determinants do not depend on the base.

        Args:
            z: latents of the training data.
            max_iter: iterations.
            tolerance: gain of an iteration in nats per row, below which to stop.
            min_variance: added to the diagonal of the covariances, in units of z².

        Returns:
            The mean log-likelihood (nats) of z before each iteration.

        Raises:
            DataError: as :meth:`fit_to`.

        Example:
            >>> z = torch.cat([torch.randn(200, 2) - 3, torch.randn(200, 2) + 3])
            >>> course = GaussianMixture(2, 2).improve(z, 5)
            >>> course[-1] > course[0]
            True
        """
        self._check(z)
        rows = self._rows(z).to(self.means.device)
        start = MixtureParameters(self.logits.double().log_softmax(0), self.means.double(), self._triangular().double())
        found, course = iterate(rows, start, self.covariance, max_iter, tolerance, min_variance)
        self._put(found)
        return course

    def _rows(self, z: Tensor) -> Tensor:
        """Return z as (N, D) in double precision, checked."""
        rows = z.detach().flatten(1).double()
        if len(rows) < max(2, self.components):
            raise DataError(f"z has {len(rows)} rows, expected at least {max(2, self.components)} for {self.components} components")
        if not bool((finite := rows.isfinite().all(1)).all()):
            raise DataError(f"z holds NaN or infinity, first in row {int((~finite).nonzero()[0])}: remove or replace such rows")
        if bool((constant := rows.amin(0) == rows.amax(0)).any()):
            where = int(constant.nonzero()[0])
            raise constant_column(f"dimension {where} of z", float(rows[0, where]))
        return rows

    def _triangular(self) -> Tensor:
        """Return A as (K, D, D), or (1, D, D) for tied covariances."""
        return torch.diag_embed(self.log_diagonal.exp()) if self.lower is None else self._factors(self.means)

    def _put(self, found: MixtureParameters) -> None:
        """Set the parameters."""
        self.logits.copy_(found.log_weights)
        self.means.copy_(found.means)
        self.log_diagonal.copy_(found.factors.diagonal(dim1=1, dim2=2).log())
        if self.lower is not None:
            row, column = torch.tril_indices(self.means.shape[1], self.means.shape[1], -1, device=found.factors.device)
            self.lower.copy_(found.factors[:, row, column])
        self.fitted = True

    @property
    def covariances(self) -> Tensor:
        """Covariances (K, D, D) of the components."""
        roots: Tensor = torch.linalg.inv(self._triangular())
        covariances: Tensor = roots @ roots.mT
        return covariances.expand(self.components, -1, -1)

    @property
    def has_rsample(self) -> bool:
        """Whether samples have a gradient in all trained parameters: with one component, or if none is trained."""
        return self.components == 1 or not any(p.requires_grad for p in self.parameters())

    def _factors(self, like: Tensor) -> Tensor:
        """Return A: (K, D, D) or (1, D, D) lower triangular, or (K, 1, D), its diagonal, without ``lower``."""
        diagonal = self.log_diagonal.to(like).exp()
        if self.lower is None:
            return diagonal[:, None]
        dim = diagonal.shape[1]
        row, column = torch.tril_indices(dim, dim, -1, device=diagonal.device)
        below = diagonal.new_zeros(len(diagonal), dim * dim).index_copy(1, row * dim + column, self.lower.to(like))
        return below.reshape(-1, dim, dim) + torch.diag_embed(diagonal)

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Return log q(z) (N,) in nats for z (N, \\*event)."""
        self._check(z)
        apart, a = z.flatten(1) - self.means.to(z)[:, None], self._factors(z)
        white = apart * a if self.lower is None else apart @ a.mT
        constant = 0.5 * z.shape[1:].numel() * math.log(2 * math.pi)
        height = self.logits.to(z).log_softmax(0) + self.log_diagonal.to(z).sum(1) - constant
        return (height[:, None] - 0.5 * white.square().sum(2)).logsumexp(0)

    def _draw(self, n: int, context: Tensor | None, noise: Noise | None, temperature: float, like: Tensor) -> Tensor:
        white = draw(noise, "latent", "normal", (n, math.prod(self.event_shape)), dtype=like.dtype, device=like.device) * temperature
        if self.components == 1:
            chosen = torch.zeros(n, dtype=torch.long, device=like.device)
        else:
            share = self.logits.to(like).softmax(0).cumsum(0)
            u = draw(noise, "component", "uniform", (n,), dtype=like.dtype, device=like.device)
            chosen = torch.searchsorted(share, u, right=True).clamp(max=self.components - 1)  # rounding: the last share may be below 1
        a = self._factors(like)
        if self.lower is None:
            spread = white / (a[:, 0] if len(a) == 1 else a[chosen, 0])
        elif len(a) == 1:
            spread = torch.linalg.solve_triangular(a[0], white.T, upper=False).T
        else:
            rows = zip(chosen.split(size := max(1, DRAWN // a[0].numel())), white.split(size), strict=True)
            spread = torch.cat([torch.linalg.solve_triangular(a[k], w[..., None], upper=False)[..., 0] for k, w in rows])
        return (self.means.to(like)[chosen] + spread).reshape(n, *self.event_shape)

    def extra_repr(self) -> str:
        """Return event shape, components and covariance for ``repr``."""
        return f"{super().extra_repr()}, components={self.components}, covariance={self.covariance!r}"
