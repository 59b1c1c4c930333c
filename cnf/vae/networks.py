"""Encoders and decoders of autoencoders, and autoencoders made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor, nn

from cnf._utils.errors import ConfigError, require_at_least
from cnf.ode.divergence import Divergence
from cnf.solvers import Solver
from cnf.vae.model import FlowVAE
from cnf.vae.posterior import posterior_flow

__all__ = ["gated_networks", "mlp_networks", "vae_mlp"]


def vae_mlp(
    event_shape: Sequence[int],
    latent: int = 16,
    hidden: int = 256,
    *,
    posterior: Literal["normal", "cnf", "cnf-rank"] = "cnf-rank",
    flow_hidden: Sequence[int] = (64, 64),
    rank: int = 8,
    blocks: int = 1,
    levels: int = 2,
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
        levels: number of grey levels.
        solver, divergence: of the blocks, see :class:`~cnf.CNF`.

    Raises:
        ConfigError: for sizes below one, or an unknown posterior.
    """
    if posterior not in ("normal", "cnf", "cnf-rank"):
        raise ConfigError(f"posterior={posterior!r} is unknown: expected 'normal', 'cnf' or 'cnf-rank'")
    encoder, decoder, features = mlp_networks(event_shape, latent, (hidden, hidden), levels)
    if posterior == "normal":
        return FlowVAE(encoder, decoder, latent, features, levels=levels)
    flow = posterior_flow(latent, flow_hidden, rank if posterior == "cnf-rank" else 0, blocks, solver, divergence)
    return FlowVAE(encoder, decoder, latent, features, *flow, levels)


def mlp_networks(event_shape: Sequence[int], latent: int, hidden: Sequence[int] = (256, 256), levels: int = 2) -> tuple[nn.Module, nn.Module, int]:
    """Return encoder, decoder and the number of features of perceptrons; ``hidden`` are the encoder's widths, the decoder's in reverse.

    Example:
        >>> import torch
        >>> encoder, decoder, features = mlp_networks((1, 4, 4), latent=2, hidden=(8, 6), levels=3)
        >>> encoder(torch.zeros(5, 1, 4, 4)).shape, decoder(torch.zeros(5, 2)).shape, features
        (torch.Size([5, 6]), torch.Size([5, 3, 1, 4, 4]), 6)
    """
    if not hidden:
        raise ConfigError("hidden=(): expected the width of one hidden layer or more, such as (256, 256)")
    require_at_least(1, latent=latent, **{f"hidden_{i}": h for i, h in enumerate(hidden)})
    shape = tuple(event_shape)
    shaped = shape if levels == 2 else (levels, *shape)
    up: list[nn.Module] = [nn.Flatten()]
    for a, b in pairwise((math.prod(shape), *hidden)):
        up += [nn.Linear(a, b), nn.SiLU()]
    down: list[nn.Module] = []
    for a, b in pairwise((latent, *reversed(hidden))):
        down += [nn.Linear(a, b), nn.SiLU()]
    return nn.Sequential(*up), nn.Sequential(*down, nn.Linear(hidden[0], math.prod(shaped)), nn.Unflatten(1, shaped)), hidden[-1]


class _Gated(nn.Module):
    """A convolution times the sigmoid of another."""

    def __init__(self, kind: type[nn.Conv2d] | type[nn.ConvTranspose2d], *sizes: Any):
        super().__init__()
        self.value, self.gate = kind(*sizes), kind(*sizes)

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = self.value(x) * self.gate(x).sigmoid()
        return gated


def gated_networks(event_shape: Sequence[int], latent: int, levels: int = 2) -> tuple[nn.Module, nn.Module, int]:
    """Return encoder, decoder and the number of features of FFJORD's autoencoders, for images (C, H, W) whose sides are multiples of 4.

    The encoder halves twice and ends in a convolution over all that is left; the decoder mirrors it.

    Raises:
        ConfigError: for events of another shape.
    """
    if len(event_shape) != 3 or event_shape[1] % 4 or event_shape[2] % 4:
        raise ConfigError(f"network='conv' needs images whose sides are multiples of 4, got {tuple(event_shape)}: use network='mlp'")
    require_at_least(1, latent=latent)
    channels, height, width = event_shape
    end, conv, transposed = (height // 4, width // 4), nn.Conv2d, nn.ConvTranspose2d
    down = ((channels, 32, 5, 1, 2), (32, 32, 5, 2, 2), (32, 64, 5, 1, 2), (64, 64, 5, 2, 2), (64, 64, 5, 1, 2), (64, 256, end, 1, 0))
    up = ((latent, 64, end, 1, 0), (64, 64, 5, 1, 2), (64, 32, 5, 2, 2, 1), (32, 32, 5, 1, 2), (32, 32, 5, 2, 2, 1), (32, 32, 5, 1, 2))
    encoder = nn.Sequential(*(_Gated(conv, *sizes) for sizes in down), nn.Flatten())
    last: list[nn.Module] = [nn.Conv2d(32, channels, 1)]
    if levels > 2:
        last = [nn.Conv2d(32, 256, 5, 1, 2), nn.Conv2d(256, levels * channels, 1), nn.Unflatten(1, (levels, channels))]
    return encoder, nn.Sequential(nn.Unflatten(1, (latent, 1, 1)), *(_Gated(transposed, *sizes) for sizes in up), *last), 256
