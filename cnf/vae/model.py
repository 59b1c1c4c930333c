"""Variational autoencoder with the posterior of a flow."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf._utils.async_checks import deferred
from cnf._utils.errors import ConfigError, DataError, require_at_least
from cnf.ode.continuous import CNF
from cnf.random import Noise, child, draw
from cnf.solvers import Stats
from cnf.solvers.base import SolverOverride
from cnf.transforms import Request, Transform

__all__ = ["ELBOTerms", "FlowVAE"]

SOLVED, DECODED = 4096, 2**27  # most rows of a solve, and numbers of a decoder, for the importance-weighted likelihood


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
        levels: number of grey levels; x holds integers k below it, or k / (levels - 1), and values between 0 and 1 only
            for two of them.

    Raises:
        ConfigError: for sizes below one, fewer than two levels, or a context without a flow.
        DataError: from the methods, for x outside of [0, 1] or of the grey levels, or between more than two of them.

    Example:
        >>> from cnf.vae import vae_mlp
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
    def like(self) -> Tensor:
        """Tensor with the dtype and device of the model's computations."""
        return self.normal.weight

    @property
    def blocks(self) -> list[CNF]:
        """The CNF blocks of the flow."""
        return [] if self.transform is None else [m for m in self.transform.modules() if isinstance(m, CNF)]

    def posterior(self, x: Tensor, *, noise: Noise | None = None, solver: SolverOverride = None) -> tuple[Tensor, Tensor, Stats]:
        """Draw z (N, L) from q(z | x); return it with log q(z | x) (N,) in nats and statistics of the solve."""
        return self._posterior(self._pixels(x), noise, solver)

    def _posterior(self, x: Tensor, noise: Noise | None, solver: SolverOverride = None) -> tuple[Tensor, Tensor, Stats]:
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

    def _pixels(self, x: Tensor) -> Tensor:
        """Return x, or integer grey levels, as floats in [0, 1], NaN where they are not and checks are deferred.

        Raises:
            DataError: for values outside of [0, 1], or between more than two grey levels.
        """
        most = self.levels - 1
        given, x = x, x if x.is_floating_point() else x.to(self.like.dtype) / most
        inside = (x >= 0) & (x <= 1)
        known = inside if self.levels == 2 else inside & ((x * most - (x * most).round()).abs() < 0.2)
        if deferred(x):
            return torch.where(known, x, math.nan)
        if not bool(inside.all()):
            expected = "floats in [0, 1], such as binary images" if given.is_floating_point() else f"grey levels 0 to {most}"
            raise DataError(f"x has values from {float(given.min()):.3g} to {float(given.max()):.3g}; expected {expected}")
        if not bool(known.all()):
            raise DataError(f"x holds values between its {self.levels} grey levels; expected k / {most}: round x, or set levels= to those of the images")
        return x

    def evaluate(self, x: Tensor, *, noise: Noise | None = None, solver: SolverOverride = None) -> ELBOTerms:
        """Return the terms of the evidence lower bound of x (N, \\*event), with one draw of z per row."""
        x = self._pixels(x)
        z, log_q, stats = self._posterior(x, noise, solver)
        log_p = -self._negative_log_likelihood(self.decoder(z), x).flatten(1).sum(1)
        prior = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)
        return ELBOTerms(log_p, log_q - prior, stats)

    def _negative_log_likelihood(self, logits: Tensor, x: Tensor) -> Tensor:
        if self.levels == 2:
            return F.binary_cross_entropy_with_logits(logits, x, reduction="none")
        if logits.shape != (len(x), self.levels, *x.shape[1:]):
            raise ConfigError(f"decoder returns shape {tuple(logits.shape)}; expected (N, levels, *event), {(len(x), self.levels, *x.shape[1:])}")
        return F.cross_entropy(logits, (x.nan_to_num() * (self.levels - 1)).round().long(), reduction="none")

    def forward(self, x: Tensor) -> Tensor:
        """Return the evidence lower bound (N,) in nats, with one draw of z per row."""
        return self.evaluate(x).elbo

    def log_likelihood(self, x: Tensor, samples: int = 5000, *, noise: Noise | None = None) -> Tensor:
        """Return the importance-weighted estimate of log p(x) (N,), a lower bound in expectation that rises with ``samples``."""
        require_at_least(1, samples=samples)
        most = min(SOLVED, DECODED // (x[0].numel() * (self.levels if self.levels > 2 else 1)))
        at_once, found = max(1, most // len(x)), []
        for number, start in enumerate(range(0, samples, at_once)):
            count = min(at_once, samples - start)
            repeated = x.repeat(count, *(1,) * (x.ndim - 1))
            found.append(self.evaluate(repeated, noise=child(noise, number + 1)).elbo.reshape(count, len(x)))
        return torch.cat(found).logsumexp(0) - math.log(samples)

    @torch.no_grad()
    def sample(self, n: int, *, noise: Noise | None = None, temperature: float = 1.0) -> Tensor:
        """Return the expected x (n, \\*event), for binary data the probabilities, at n draws of z from the prior.

        ``temperature`` scales z: below 1 more typical samples, above 1 more varied ones.
        """
        z = draw(noise, "prior", "normal", (n, self.latent), dtype=self.like.dtype, device=self.like.device)
        return self._expected(temperature * z)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, *, noise: Noise | None = None) -> Tensor:
        """Return the expected x (N, \\*event), for binary data the probabilities, at one draw of z given x."""
        return self._expected(self.posterior(x, noise=noise)[0])

    def _expected(self, z: Tensor) -> Tensor:
        logits: Tensor = self.decoder(z)
        if self.levels == 2:
            return logits.sigmoid()
        return torch.einsum("nk...,k->n...", logits.softmax(1), torch.linspace(0, 1, self.levels).to(logits))
