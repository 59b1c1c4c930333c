"""Autoencoders of benchmarks/vae_flows.py, and the flows that CNFs are compared with.

The convolutions are those of FFJORD's autoencoders (1810.01367), which take them from Sylvester flows (1803.05649): without a
flow and with 64 latents they have 3,067,105 parameters on MNIST. IAF is zuko's masked autoregressive transform.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.errors import ConfigError
from cnf.ode.divergence import Divergence, Hutchinson
from cnf.solvers import Adaptive, FixedGrid, Stats
from cnf.transforms import Request, Sequential, Transform, TransformOutput
from cnf.vae import FlowVAE, gated_networks, mlp_networks, posterior_flow

__all__ = ["POSTERIORS", "Design", "Planar", "Sylvester", "build"]

POSTERIORS = ("normal", "planar", "iaf", "sylvester", "cnf", "cnf-rank")


@dataclass(frozen=True)
class Design:
    """Sizes of an autoencoder."""

    network: str = "mlp"
    latent: int = 16
    hidden: int = 256
    flow_hidden: tuple[int, ...] = (64,)
    rank: int = 8
    blocks: int = 1
    flows: int = 4
    """Number of planar, IAF and Sylvester transforms."""


class _Forward(Transform):
    """Transform without an inverse in closed form, whose parameters are the context, the same number for each step."""

    def __init__(self, dim: int, steps: int, size: int):
        super().__init__()
        self.dim, self.steps, self.context_dim = dim, steps, steps * size

    def forward(self, x: Tensor, request: Request, **former: Any) -> TransformOutput:
        """Return z and log|det dz/dx| at x (N, D) and a context (N, steps * size)."""
        context = request.context
        if context is None or context.shape != (len(x), self.context_dim):
            raise ConfigError(f"context has shape {None if context is None else tuple(context.shape)}; expected {(len(x), self.context_dim)}")
        log_det = x.new_zeros(len(x))
        for part in context.chunk(self.steps, 1):
            x, change = self.step(x, part)
            log_det = log_det + change
        return TransformOutput(x, log_det, {}, Stats())

    def step(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Return x after one step and its log-det (N,)."""
        raise NotImplementedError


class Planar(_Forward):
    """Planar flows z + u tanh(w·z + b) (1505.05770), u with the paper's correction that makes w·u > -1."""

    def __init__(self, dim: int, steps: int):
        super().__init__(dim, steps, 2 * dim + 1)

    def step(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Return x after one step and its log-det (N,)."""
        u, w, b = parameters.split([self.dim, self.dim, 1], 1)
        inner = (w * u).sum(1, keepdim=True)
        u = u + (F.softplus(inner) - 1 - inner) * w / w.square().sum(1, keepdim=True).clamp_min(1e-12)
        bent = ((w * x).sum(1, keepdim=True) + b).tanh()
        return x + u * bent, (1 + (1 - bent.square()) * (w * u).sum(1, keepdim=True)).log().squeeze(1)


class Sylvester(_Forward):
    """Sylvester flows z + Q R₁ tanh(R₂ Qᵀ z + b) (1803.05649), Q a product of Householder reflections.

    The triangular R₁ and R₂ have diagonals in (-1, 1), so that each step is invertible. Q has all D columns.

    Args:
        dim: D.
        steps: number of steps.
        reflections: of each Q.
    """

    def __init__(self, dim: int, steps: int, reflections: int = 8):
        self.reflections = reflections
        super().__init__(dim, steps, dim * (dim + 2) + dim * reflections)

    def step(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Return x after one step and its log-det (N,)."""
        d = self.dim
        full, second, b, vectors = parameters.split([d * d, d, d, d * self.reflections], 1)
        full = full.unflatten(1, (d, d))
        first, second = full.diagonal(dim1=1, dim2=2).tanh(), second.tanh()
        r1, r2 = full.triu(1) + first.diag_embed(), full.mT.triu(1) + second.diag_embed()
        normals = F.normalize(vectors.unflatten(1, (self.reflections, d)), dim=2).unbind(1)
        bent = (torch.einsum("nij,nj->ni", r2, _reflect(x, normals)) + b).tanh()
        x = x + _reflect(torch.einsum("nij,nj->ni", r1, bent), normals[::-1])
        return x, (1 + (1 - bent.square()) * first * second).log().sum(1)


def _reflect(x: Tensor, normals: tuple[Tensor, ...]) -> Tensor:
    """Reflect x (N, D) at the hyperplanes of unit normals (N, D), in turn."""
    for v in normals:
        x = x - 2 * (x * v).sum(1, keepdim=True) * v
    return x


def _iaf(dim: int, steps: int, context: int) -> Transform:
    import zuko

    orders = [torch.arange(dim) if k % 2 == 0 else torch.arange(dim - 1, -1, -1) for k in range(steps)]
    return Sequential([
        zuko.flows.MaskedAutoregressiveTransform(dim, context, hidden_features=(128,), activation=nn.ELU, order=order) for order in orders
    ])  # fmt: skip


def build(posterior: str, shape: tuple[int, ...], levels: int, design: Design, divergence: Divergence | None = None) -> FlowVAE:
    """Return the autoencoder of one of :data:`POSTERIORS`."""
    if design.network == "conv":
        encoder, decoder, features = gated_networks(shape, design.latent, levels)
    else:
        encoder, decoder, features = mlp_networks(shape, design.latent, (design.hidden, design.hidden), levels)
    transform: Transform | None = None
    context = 0
    if posterior.startswith("cnf"):
        rank = design.rank if posterior == "cnf-rank" else 0
        divergence = divergence or (Hutchinson() if design.latent > 16 else None)
        transform, context = posterior_flow(design.latent, design.flow_hidden, rank, design.blocks, FixedGrid("rk4", 4), divergence)
    elif posterior == "iaf":
        transform, context = _iaf(design.latent, design.flows, 32), 32
    elif posterior in ("planar", "sylvester"):
        made = (Planar if posterior == "planar" else Sylvester)(design.latent, design.flows)
        transform, context = made, made.context_dim
    model = FlowVAE(encoder, decoder, design.latent, features, transform, context, levels)
    for block in model.blocks:
        block.eval_solver = Adaptive("dopri5", 1e-5, 1e-5)
    if posterior == "planar" and model.amortise is not None:  # w near zero would leave its direction to chance
        nn.init.normal_(model.amortise.bias, std=0.3)
    return model
