"""Parts of the autoencoders of benchmarks/vae_flows.py: gated convolutions, and the flows that CNFs are compared with.

The networks are those of FFJORD's autoencoders (1810.01367), which take them from Sylvester flows (1803.05649): without a
flow and with 64 latents they have 3,067,105 parameters on MNIST. IAF is zuko's masked autoregressive transform.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.errors import ConfigError
from cnf.ode.divergence import Divergence, Hutchinson
from cnf.solvers import Adaptive, FixedGrid, Stats
from cnf.transforms import Request, Sequential, Transform, TransformOutput
from cnf.vae import FlowVAE, vae_mlp

__all__ = ["POSTERIORS", "Design", "Planar", "Sylvester", "build", "gated_networks"]

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


class _Gated(nn.Module):
    """A convolution times the sigmoid of another."""

    def __init__(self, kind: type[nn.Conv2d] | type[nn.ConvTranspose2d], *sizes: Any):
        super().__init__()
        self.value, self.gate = kind(*sizes), kind(*sizes)

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.value(x)
        return value * self.gate(x).sigmoid()


def gated_networks(shape: tuple[int, ...], latent: int, levels: int = 2) -> tuple[nn.Module, nn.Module, int]:
    """Return encoder, decoder and the number of features, for images (C, H, W) whose sides are multiples of 4.

    The encoder halves twice and ends in a convolution over all that is left; the decoder mirrors it.
    """
    channels, height, width = shape
    if height % 4 or width % 4:
        raise ConfigError(f"gated convolutions need sides that are multiples of 4, got {height}x{width}: choose --network mlp")
    end, conv, transposed = (height // 4, width // 4), nn.Conv2d, nn.ConvTranspose2d
    down = ((channels, 32, 5, 1, 2), (32, 32, 5, 2, 2), (32, 64, 5, 1, 2), (64, 64, 5, 2, 2), (64, 64, 5, 1, 2), (64, 256, end, 1, 0))
    up = ((latent, 64, end, 1, 0), (64, 64, 5, 1, 2), (64, 32, 5, 2, 2, 1), (32, 32, 5, 1, 2), (32, 32, 5, 2, 2, 1), (32, 32, 5, 1, 2))
    encoder = nn.Sequential(*(_Gated(conv, *sizes) for sizes in down), nn.Flatten())
    last: list[nn.Module] = [nn.Conv2d(32, channels, 1)]
    if levels > 2:
        last = [nn.Conv2d(32, 256, 5, 1, 2), nn.Conv2d(256, levels * channels, 1), nn.Unflatten(1, (levels, channels))]
    return encoder, nn.Sequential(nn.Unflatten(1, (latent, 1, 1)), *(_Gated(transposed, *sizes) for sizes in up), *last), 256


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
    flow: Any = posterior if posterior.startswith("cnf") else "normal"
    base = vae_mlp(
        shape, design.latent, design.hidden, posterior=flow, flow_hidden=design.flow_hidden, rank=design.rank, blocks=design.blocks,
        solver=FixedGrid("rk4", 4), divergence=divergence or (Hutchinson() if design.latent > 16 else None),
    )  # fmt: skip
    for block in base.blocks:
        block.eval_solver = Adaptive("dopri5", 1e-5, 1e-5)
    encoder, decoder, features = base.encoder, base.decoder, design.hidden
    if design.network == "conv":
        encoder, decoder, features = gated_networks(shape, design.latent, levels)
    elif levels > 2:
        size = math.prod(shape) * levels
        decoder = nn.Sequential(*list(base.decoder)[:-2], nn.Linear(design.hidden, size), nn.Unflatten(1, (levels, *shape)))  # type: ignore[call-overload]
    transform, context = base.transform, 0 if base.amortise is None else base.amortise.out_features
    if posterior == "iaf":
        transform, context = _iaf(design.latent, design.flows, 32), 32
    elif posterior in ("planar", "sylvester"):
        made = (Planar if posterior == "planar" else Sylvester)(design.latent, design.flows)
        transform, context = made, made.context_dim
    model = FlowVAE(encoder, decoder, design.latent, features, transform, context, levels)
    if posterior == "planar" and model.amortise is not None:  # w near zero would leave its direction to chance
        nn.init.normal_(model.amortise.bias, std=0.3)
    return model
