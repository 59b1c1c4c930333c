"""Variational autoencoders with a continuous normalizing flow as posterior (FFJORD, 1810.01367)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf._utils.errors import ConfigError, DataError, require_at_least
from cnf.fields.base import VectorField, intact
from cnf.fields.low_rank import LowRankMLP
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Divergence
from cnf.random import Noise, child, draw
from cnf.solvers import Solver, Stats
from cnf.solvers.base import SolverOverride
from cnf.transforms import Request, Sequential, Transform

__all__ = ["ELBOTerms", "FlowVAE", "vae_mlp"]


SOLVED = 4096  # rows of a solve for the importance-weighted likelihood


class ELBOTerms(NamedTuple):
    """log p(x | z), log q(z | x) − log p(z) at one z per row, (N,) each in nats, and statistics of the solve."""

    log_likelihood: Tensor
    kl: Tensor
    stats: Stats

    @property
    def elbo(self) -> Tensor:
        """Evidence lower bound (N,) in nats, one sample of z per row."""
        return self.log_likelihood - self.kl


class FlowVAE(nn.Module):
    r"""Variational autoencoder of binary data, or grey levels, with the posterior of a flow.

    An encoder gives features h(x), mean and scale of a normal z₀, and the context of a flow that takes z₀ to z. Then
    :math:`\log q(z | x) = \log N(z_0) - \log |\det \partial z / \partial z_0|`; the prior of z is standard normal, and
    the decoder gives Bernoulli logits, or the logits of all grey levels of a pixel.

    Args:
        encoder: module from x (N, \*event) to features (N, H).
        decoder: module from z (N, L) to logits (N, \*event), or (N, levels, \*event) for more than two levels.
        latent: L.
        features: H.
        transform: flow on (L,), from z₀ to z, such as a :class:`~cnf.CNF`; None for a normal posterior.
        context_dim: width C of the flow's context, a linear map of the features; 0 for a flow that is the same for all x.
        levels: number of grey levels; x holds k / (levels - 1), and values between 0 and 1 only for two of them.

    Raises:
        ConfigError: for sizes below one, fewer than two levels, or a context without a flow.
        DataError: from the methods, for x outside of [0, 1], or between more than two grey levels.

    Example:
        >>> model = vae_mlp((4,), latent=2, hidden=8, flow_hidden=(8,))
        >>> x = (torch.rand(5, 4) < 0.5).float()
        >>> terms = model.evaluate(x)
        >>> terms.elbo.shape, model.sample(3).shape
        (torch.Size([5]), torch.Size([3, 4]))
    """

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, latent: int, features: int, transform: Transform | None = None,
        context_dim: int = 0, levels: int = 2,
    ):  # fmt: skip
        super().__init__()
        require_at_least(1, latent=latent, features=features)
        require_at_least(2, levels=levels)
        if context_dim and transform is None:
            raise ConfigError(f"context_dim={context_dim} is of a flow, and transform=None: leave it at 0")
        self.encoder, self.decoder, self.latent, self.transform, self.levels = encoder, decoder, latent, transform, levels
        self.normal = nn.Linear(features, 2 * latent)
        self.amortise = nn.Linear(features, context_dim) if context_dim else None
        if self.amortise is not None:  # at the start the flow hardly depends on x
            nn.init.normal_(self.amortise.weight, std=0.01 / math.sqrt(features))
            nn.init.normal_(self.amortise.bias, std=0.01)

    @property
    def blocks(self) -> list[CNF]:
        """The CNF blocks of the flow."""
        return [] if self.transform is None else [m for m in self.transform.modules() if isinstance(m, CNF)]

    def posterior(self, x: Tensor, *, noise: Noise | None = None, solver: SolverOverride = None) -> tuple[Tensor, Tensor, Stats]:
        """Draw z (N, L) from q(z | x); return it with log q(z | x) (N,) in nats and statistics of the solve."""
        self._require_levels(x)
        h = self.encoder(x)
        mean, log_std = self.normal(h).chunk(2, 1)
        e = draw(noise, "posterior", "normal", tuple(mean.shape), dtype=mean.dtype, device=mean.device)
        z = mean + log_std.exp() * e
        log_q = -(0.5 * e.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(1)
        if self.transform is None:
            return z, log_q, Stats()
        context = None if self.amortise is None else self.amortise(h)
        out = self.transform(z, Request(context, child(noise, 0), solver=solver))
        return out.value, log_q - out.log_det, out.stats

    def _require_levels(self, x: Tensor) -> None:
        if not x.is_floating_point() or not bool(((x >= 0) & (x <= 1)).all()):
            held = f"type {x.dtype}" if not x.is_floating_point() else f"values from {float(x.min()):.3g} to {float(x.max()):.3g}"
            raise DataError(f"x has {held}; expected floats in [0, 1], such as binary images")
        scaled = x.detach() * (self.levels - 1)
        if self.levels > 2 and not bool(((scaled - scaled.round()).abs() < 0.2).all()):
            raise DataError(f"x holds values between its {self.levels} grey levels; expected k / {self.levels - 1}: round x, or set levels= to those of the images")

    def evaluate(self, x: Tensor, *, noise: Noise | None = None, solver: SolverOverride = None) -> ELBOTerms:
        """Return the terms of the evidence lower bound of x (N, \\*event), with one draw of z per row."""
        z, log_q, stats = self.posterior(x, noise=noise, solver=solver)
        log_p = -self._negative_log_likelihood(self.decoder(z), x).flatten(1).sum(1)
        prior = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)
        return ELBOTerms(log_p, log_q - prior, stats)

    def _negative_log_likelihood(self, logits: Tensor, x: Tensor) -> Tensor:
        if self.levels == 2:
            return F.binary_cross_entropy_with_logits(logits, x, reduction="none")
        if logits.shape != (len(x), self.levels, *x.shape[1:]):
            raise ConfigError(f"decoder returns shape {tuple(logits.shape)}; expected (N, levels, *event), {(len(x), self.levels, *x.shape[1:])}")
        return F.cross_entropy(logits, (x * (self.levels - 1)).round().long(), reduction="none")

    def forward(self, x: Tensor) -> Tensor:
        """Return the evidence lower bound (N,) in nats, with one draw of z per row."""
        return self.evaluate(x).elbo

    def log_likelihood(self, x: Tensor, samples: int = 5000, *, noise: Noise | None = None) -> Tensor:
        """Return the importance-weighted estimate of log p(x) (N,), a lower bound in expectation that rises with ``samples``."""
        require_at_least(1, samples=samples)
        at_once, found = max(1, SOLVED // len(x)), []
        for number, start in enumerate(range(0, samples, at_once)):
            count = min(at_once, samples - start)
            repeated = x.repeat(count, *(1,) * (x.ndim - 1))
            found.append(self.evaluate(repeated, noise=child(noise, number + 1)).elbo.reshape(count, len(x)))
        return torch.cat(found).logsumexp(0) - math.log(samples)

    @torch.no_grad()
    def sample(self, n: int, *, noise: Noise | None = None) -> Tensor:
        """Return the expected x (n, \\*event), for binary data the probabilities, at n draws of z from the prior."""
        like = self.normal.weight
        return self._expected(draw(noise, "prior", "normal", (n, self.latent), dtype=like.dtype, device=like.device))

    @torch.no_grad()
    def reconstruct(self, x: Tensor, *, noise: Noise | None = None) -> Tensor:
        """Return the expected x (N, \\*event), for binary data the probabilities, at one draw of z given x."""
        return self._expected(self.posterior(x, noise=noise)[0])

    def _expected(self, z: Tensor) -> Tensor:
        logits: Tensor = self.decoder(z)
        if self.levels == 2:
            return logits.sigmoid()
        return torch.einsum("nk...,k->n...", logits.softmax(1), torch.linspace(0, 1, self.levels).to(logits))


def vae_mlp(
    event_shape: Sequence[int],
    latent: int = 16,
    hidden: int = 256,
    *,
    posterior: Literal["normal", "cnf", "cnf-rank"] = "cnf-rank",
    flow_hidden: Sequence[int] = (64, 64),
    rank: int = 8,
    blocks: int = 1,
    solver: Solver | None = None,
    divergence: Divergence | None = None,
) -> FlowVAE:
    """Build an autoencoder of two hidden layers on each side, with one of three posteriors.

    Args:
        event_shape: of the data, flattened.
        latent: dimension of z.
        hidden: width of the hidden layers, and number of features.
        posterior: ``"normal"``; ``"cnf"``, a flow that is the same for all x; ``"cnf-rank"``, the amortised flow of
            FFJORD, with an update of rank ``rank`` of each layer's weights.
        flow_hidden: widths of the field's hidden layers.
        rank: of the updates.
        blocks: number of CNF blocks, each with updates of its own.
        solver, divergence: of the blocks, see :class:`~cnf.CNF`.

    Raises:
        ConfigError: for sizes below one, or an unknown posterior.
    """
    if posterior not in ("normal", "cnf", "cnf-rank"):
        raise ConfigError(f"posterior={posterior!r} is unknown: expected 'normal', 'cnf' or 'cnf-rank'")
    require_at_least(1, blocks=blocks)
    shape = tuple(event_shape)
    size = math.prod(shape)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(size, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
    decoder = nn.Sequential(nn.Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, size), nn.Unflatten(1, shape))
    if posterior == "normal":
        return FlowVAE(encoder, decoder, latent, hidden)
    fields = [_Amortised(latent, flow_hidden, rank, i, blocks, posterior == "cnf-rank") for i in range(blocks)]
    transform = Sequential([CNF(field, divergence, solver) for field in fields])
    return FlowVAE(encoder, decoder, latent, hidden, transform, fields[0].context_dim or 0)


class _Amortised(LowRankMLP):
    """Field of block ``place`` of ``blocks``: takes its part of the context, or none at all."""

    def __init__(self, dim: int, hidden: Sequence[int], rank: int, place: int, blocks: int, amortised: bool):
        super().__init__(dim, hidden, rank)
        self.place, self.blocks, self.amortised = place, blocks, amortised
        self.context_dim = self.updates * blocks if amortised else 0

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (N, D)."""
        return super().forward(t, x, self._own(x, context))

    def jvp(
        self, t: Tensor, x: Tensor, v: Tensor, context: Tensor | None = None, *, t_dot: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return dx/dt (N, D) and its tangents (K, N, D)."""
        if not intact(self):
            return VectorField.jvp(self, t, x, v, context, t_dot=t_dot)
        return super().jvp(t, x, v, self._own(x, context), t_dot=t_dot)

    def _own(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return this block's part of the context."""
        if not self.amortised:
            return x.new_zeros(self.updates)
        if context is None:
            raise ConfigError("context is missing: an amortised field takes that of the encoder")
        return context.chunk(self.blocks, -1)[self.place]
