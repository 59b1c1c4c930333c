"""Gaussian mixtures whose parameters depend on a context: mixture density networks, and ensembles of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cnf._utils.errors import ConfigError, DataError, require_at_least
from cnf.bases.base import Base
from cnf.bases.mixture import GaussianMixture
from cnf.random import Noise, draw

__all__ = ["ConditionalMixture", "ContextMixture", "MixtureEnsemble"]

_LOG_SCALE = 4.0  # bound of the network's change of a log-scale: e^4 either way
_RIDGE = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)


class ContextMixture(Base):
    """Base class of the Gaussian mixtures whose parameters depend on a context: a subclass defines :meth:`parts`."""

    components: int

    @property
    def has_rsample(self) -> bool:
        """Whether samples have a gradient in all trained parameters: with one component, or if none is trained."""
        return self.components == 1 or not any(p.requires_grad for p in self.parameters())

    def parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-weights (N, K), means (N, K, D) and lower triangular A (N, K, D, D) at a context (N, C)."""
        raise NotImplementedError

    def widen(self, change: float) -> None:
        """Multiply the components' standard deviations by e^change."""
        raise NotImplementedError

    def _at(self, context: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return :meth:`parts` in the dtype of ``like``."""
        log_weights, means, a = self.parts(context)
        return log_weights.to(like), means.to(like), a.to(like)

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Return log q(z | c) (N,) in nats for z (N, \\*event)."""
        self._check(z)
        log_weights, means, a = self._at(_rows(context, len(z)), z)
        white = (a @ (z.flatten(1)[:, None] - means)[..., None])[..., 0]
        height = log_weights + a.diagonal(dim1=2, dim2=3).log().sum(2) - 0.5 * means.shape[2] * math.log(2 * math.pi)
        value: Tensor = (height - 0.5 * white.square().sum(2)).logsumexp(1)
        return value

    def cdf(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the distribution function (N,) at z (N, 1) of a one-dimensional latent.

        Raises:
            ConfigError: for latents of several dimensions.
        """
        self._check(z)
        if self.event_shape != (1,):
            raise ConfigError(f"cdf is for one-dimensional latents, got event_shape {self.event_shape}")
        log_weights, means, a = self._at(_rows(context, len(z)), z)
        value: Tensor = (log_weights.exp() * torch.special.ndtr(a[..., 0, 0] * (z - means[..., 0]))).sum(1)
        return value

    def _draw(self, n: int, context: Tensor | None, noise: Noise | None, temperature: float, like: Tensor) -> Tensor:
        log_weights, means, a = self._at(_rows(context, n), like)
        white = draw(noise, "latent", "normal", (n, means.shape[2]), dtype=like.dtype, device=like.device) * temperature
        u = draw(noise, "component", "uniform", (n,), dtype=like.dtype, device=like.device)
        chosen = (u[:, None] > log_weights.exp().cumsum(1)).sum(1).clamp(max=self.components - 1)
        index = torch.arange(n, device=like.device)
        spread = torch.linalg.solve_triangular(a[index, chosen], white[..., None], upper=False)[..., 0]
        z: Tensor = (means[index, chosen] + spread).reshape(n, *self.event_shape).to(like)
        return z

    def extra_repr(self) -> str:
        """Return event shape, components and context size for ``repr``."""
        return f"{super().extra_repr()}, components={self.components}, context_dim={self.context_dim}"


class ConditionalMixture(ContextMixture):
    r"""Mixture :math:`q(z \mid c) = \sum_k w_k(c) N(z; \mu_k(c), (A_k^\top A_k)^{-1}(c))`.

    Weights, means and the triangular A are the sum of constants and of an MLP of the context that starts at zero; the
    means have a linear term too. :meth:`fit` starts from the linear regression of z on the context with a mixture of its
    residuals. (Mixture density networks, Bishop 1994.)

    Args:
        event_shape: shape of one latent; an integer D is (D,).
        components: number K of components.
        context_dim: size C of the context.
        hidden: widths of the MLP.

    Raises:
        ConfigError: for less than one component, an empty context, or no hidden layer.
        DataError: from every method, for a missing context.

    Example:
        >>> context = torch.randn(500, 3)
        >>> z = context[:, :1] + 0.1 * torch.randn(500, 1)
        >>> base = ConditionalMixture.fit(z, context, 2, hidden=(16,))
        >>> base.log_prob(z, context).shape, base.sample(500, context).shape
        (torch.Size([500]), torch.Size([500, 1]))
    """

    log_scale: Tensor

    def __init__(self, event_shape: int | Sequence[int], components: int, context_dim: int, hidden: Sequence[int] = (64, 64)):
        super().__init__(event_shape)
        require_at_least(1, components=components, context_dim=context_dim)
        if not hidden:
            raise ConfigError("hidden is empty, expected the width of at least one hidden layer")
        self.components, self.context_dim = components, context_dim
        dim = math.prod(self.event_shape)
        below = dim * (dim - 1) // 2
        sizes = [context_dim, *hidden]
        layers: list[nn.Module] = []
        for a, b in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(a, b), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(sizes[-1], components * (1 + 2 * dim + below))
        self.linear = nn.Linear(context_dim, dim, bias=False)
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(torch.randn(components, dim))
        self.log_diagonal = nn.Parameter(torch.zeros(components, dim))
        self.lower = nn.Parameter(torch.zeros(components, below))
        self.register_buffer("log_scale", torch.zeros(()))
        for module in (self.head, self.linear):
            for p in module.parameters():
                nn.init.zeros_(p)

    @classmethod
    def fit(
        cls, z: Tensor, context: Tensor, components: int, hidden: Sequence[int] = (64, 64), *, seed: int = 0, min_variance: float = 1e-4
    ) -> ConditionalMixture:
        """Return a mixture that starts at the ridge regression of z (N, \\*event) on the context (N, C).

        The penalty of the regression is chosen by leave-one-out error, the residuals are fitted by
        :meth:`GaussianMixture.fit <cnf.bases.GaussianMixture.fit>`.

        Args:
            z, context: training data.
            components: number of components.
            hidden: widths of the MLP.
            seed: of the initial weights and of the mixture.
            min_variance: added to the variances, in units of z².
        """
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            base = cls(z.shape[1:], components, context.shape[1], hidden)
        base.to(z)
        base.fit_to(z, context, seed=seed, min_variance=min_variance)
        return base

    @torch.no_grad()
    def fit_to(self, z: Tensor, context: Tensor, *, seed: int = 0, min_variance: float = 1e-4) -> None:
        """Set the constant and linear terms as :meth:`fit` does; the network stays as it is, zero in a new mixture."""
        from sklearn.linear_model import RidgeCV

        self._check(z)
        rows, given = z.detach().flatten(1).double().cpu(), context.detach().double().cpu()
        ridge = RidgeCV(_RIDGE).fit(given.numpy(), rows.numpy())
        weight = torch.from_numpy(ridge.coef_).reshape(rows.shape[1], -1)
        rest = rows - given @ weight.T
        mixture = GaussianMixture.fit(rest, self.components, seed=seed, min_variance=min_variance)
        self.linear.weight.copy_(weight)
        self.logits.copy_(mixture.logits)
        self.means.copy_(mixture.means)
        self.log_diagonal.copy_(mixture.log_diagonal)
        if mixture.lower is not None:
            self.lower.copy_(mixture.lower)
        self.fitted = True

    def parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-weights (N, K), means (N, K, D) and lower triangular A (N, K, D, D) at a context (N, C)."""
        if context is None:
            raise DataError(f"context is missing, expected shape (N, {self.context_dim})")
        dim, k = self.means.shape[1], self.components
        below = self.lower.shape[1]
        context = context.to(self.means)  # evaluation is in double precision
        out = self.head(self.trunk(context)).reshape(-1, k, 1 + 2 * dim + below)
        logits, means, scales, lower = out.split((1, dim, dim, below), 2)
        means = self.means + means + self.linear(context)[:, None]
        a = torch.diag_embed((self.log_diagonal + _LOG_SCALE * torch.tanh(scales / _LOG_SCALE)).exp())
        if below:
            row, column = torch.tril_indices(dim, dim, -1, device=a.device)
            flat = a.new_zeros(len(a), k, dim * dim).index_copy(2, row * dim + column, self.lower + lower)
            a = a + flat.reshape(a.shape)
        a = a * (-self.log_scale).exp()
        return (self.logits + logits[..., 0]).log_softmax(1), means, a

    @torch.no_grad()
    def widen(self, change: float) -> None:
        """Multiply the components' standard deviations by e^change."""
        self.log_scale.add_(change)


class MixtureEnsemble(ContextMixture):
    """Mixture, with equal weights, of conditional mixtures of one shape and context size.

    Args:
        members: conditional mixtures, such as those of cross-validation.

    Raises:
        ConfigError: for no member, or members of different shapes or context sizes.

    Example:
        >>> base = MixtureEnsemble([ConditionalMixture(2, 3, 4), ConditionalMixture(2, 1, 4)])
        >>> base.components, base.log_prob(torch.zeros(5, 2), torch.zeros(5, 4)).shape
        (4, torch.Size([5]))
    """

    def __init__(self, members: Sequence[ContextMixture]):
        kinds = {(m.event_shape, m.context_dim) for m in members}
        if len(kinds) != 1:
            raise ConfigError(f"members must be at least one, with one event shape and one context size, got {sorted(kinds)}")
        ((shape, self_context),) = kinds
        super().__init__(shape)
        self.context_dim, self.components = self_context, sum(m.components for m in members)
        self.members = nn.ModuleList(members)
        self.fitted = True

    def parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-weights (N, K), means (N, K, D) and lower triangular A (N, K, D, D) of all members."""
        found = [member.parts(context) for member in self.members]  # type: ignore[operator]
        log_weights, means, a = (torch.cat(each, 1) for each in zip(*found, strict=True))
        return log_weights - math.log(len(self.members)), means, a

    def widen(self, change: float) -> None:
        """Multiply the components' standard deviations by e^change."""
        for member in self.members:
            member.widen(change)  # type: ignore[operator]


def _rows(context: Tensor | None, n: int) -> Tensor | None:
    return context.expand(n, -1) if context is not None and context.ndim == 1 else context
