"""Small U-Net vector field with fused tangents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf._utils.errors import ConfigError
from cnf.fields.base import SolveField, SolveFunctions, VectorField, intact, structure
from cnf.fields.maps import channels_last
from cnf.fields.time import require_context
from cnf.fields.unet_layers import Attention, Dual, GroupNorm, ResidualBlock, convolve, joined, silu

__all__ = ["TimeEmbedding", "UNet"]

FREQUENCIES = 16
FASTEST = 64.0  # fastest rate in radians over t in [0, 1]: few solver steps resolve the field in time


class TimeEmbedding(nn.Module):
    """Embedding of time, as cosines and sines of rates up to ``FASTEST``, and context, by a net with one hidden layer."""

    rates: Tensor

    def __init__(self, size: int, context_dim: int = 0):
        super().__init__()
        rates = torch.exp(torch.linspace(0, math.log(FASTEST), FREQUENCIES))
        self.register_buffer("rates", rates, persistent=False)
        self.first, self.second = nn.Linear(2 * FREQUENCIES, size), nn.Linear(size, size)
        self.context = nn.Linear(context_dim, size, bias=False) if context_dim else None

    def forward(self, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the embedding (1, size), or (N, size) if t is (N,) or the context (N, C)."""
        angles = t.reshape(-1, 1) * self.rates.to(t)
        h = self.first(torch.cat([angles.cos(), angles.sin()], 1))
        if self.context is not None:
            context = require_context(context)
            h = h + self.context(context.reshape(-1, context.shape[-1]))
        return F.silu(self.second(F.silu(h)))


class UNet(VectorField):
    r"""U-Net vector field on images, with residual blocks and skip connections (1505.04597, 2006.11239).

    Blocks are two 3x3 convolutions with group normalisation, modulated by time and context. The tangents of :meth:`jvp`
    share every layer's batch with the point.

    Args:
        channels: channels of the image.
        hidden: channels at each size, full size first; each further entry halves height and width.
        depth: residual blocks at each size, on the way down and again on the way up.
        attention: self-attention at the smallest size.
        context_dim: size of the context, 0 for none.
        zero_init: initialise with f = 0.
        inputs: number of input channels; ``channels`` if None.

    Raises:
        ConfigError: for sizes below 1, or images whose sides are not multiples of 2^(len(hidden) - 1).

    Example:
        >>> field = UNet(1, hidden=(8, 16), depth=1)
        >>> x, v = torch.randn(2, 1, 8, 8), torch.randn(3, 2, 1, 8, 8)
        >>> dx, product = field.jvp(torch.tensor(0.5), x, v)
        >>> dx.shape, product.shape
        (torch.Size([2, 1, 8, 8]), torch.Size([3, 2, 1, 8, 8]))
    """

    time_rows = True  # t may be (N,), one time per row

    def __init__(
        self,
        channels: int,
        hidden: Sequence[int] = (64, 96),
        depth: int = 2,
        attention: bool = False,
        context_dim: int = 0,
        zero_init: bool = True,
        inputs: int | None = None,
    ):
        super().__init__()
        if not hidden or min(channels, depth, *hidden) < 1:
            raise ConfigError(f"channels, depth and all of hidden (one width or more) must be at least 1, got channels={channels}, hidden={tuple(hidden)}, depth={depth}")
        self.context_dim = context_dim
        size = 4 * hidden[0]
        self.embedding = TimeEmbedding(size, context_dim)
        self.enter = nn.Conv2d(inputs or channels, hidden[0], 3, padding=1)

        def blocks(first: int, width: int) -> nn.ModuleList:
            return nn.ModuleList(ResidualBlock(width if i else first, width, size) for i in range(depth))

        pairs = list(zip(hidden, hidden[1:], strict=False))
        self.down = nn.ModuleList(blocks(width, width) for width in hidden)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.attention = Attention(hidden[-1]) if attention else None
        self.grow = nn.ModuleList(nn.Conv2d(b, a, 3, padding=1) for a, b in pairs)
        self.up = nn.ModuleList(blocks(2 * a, a) for a, _ in pairs)
        self.norm, self.leave = GroupNorm(hidden[0]), nn.Conv2d(hidden[0], channels, 3, padding=1)
        self.built = structure(self)
        if zero_init:
            self.zero_()

    def zero_(self) -> None:
        """Set f to zero for all t and x."""
        for p in self.leave.parameters():
            nn.init.zeros_(p)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (N, C, H, W) at x and t (), or t (N,) with one time per row."""
        return self.value(t, x, context)

    def value(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt; subclasses override it together with :meth:`tangents`."""
        return self._run(Dual(channels_last(x)), self.embedding(t, context)).value

    def precompute(self, x: Tensor, context: Tensor | None = None) -> SolveField:
        """Return the field for one solve: hooks and replaced layers are looked for once, not at every evaluation."""
        return SolveFunctions(self.value, self.tangents)

    def jvp(
        self, t: Tensor, x: Tensor, v: Tensor, context: Tensor | None = None, *, t_dot: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return f (N, C, H, W) and J v + t_dot ∂f/∂t (K, N, C, H, W) for K stacked tangents v; f is computed once."""
        if not intact(self):
            return super().jvp(t, x, v, context, t_dot=t_dot)
        return self.tangents(t, x, v, context, t_dot=t_dot)

    def tangents(
        self, t: Tensor, x: Tensor, v: Tensor, context: Tensor | None, *, t_dot: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what :meth:`jvp` returns, for a field whose layers :func:`intact` has checked."""
        out = self._run(Dual(channels_last(x), channels_last(v.flatten(0, 1))), self.embedding(t, context))
        product = cast(Tensor, out.tangent).unflatten(0, v.shape[:2])
        if t_dot is not None:
            product = product + self._drift(t, x, context, t_dot)
        return out.value, product

    def _drift(self, t: Tensor, x: Tensor, context: Tensor | None, t_dot: Tensor) -> Tensor:
        """Return t_dot ∂f/∂t."""
        jvp: Any = torch.func.jvp
        moved: Tensor = jvp(lambda s: self(s, x, context), (t,), (t_dot.to(t).expand_as(t),))[1]
        return moved

    def _run(self, h: Dual, embedding: Tensor) -> Dual:
        unit = 2 ** len(self.shrink)
        if h.value.shape[2] % unit or h.value.shape[3] % unit:
            raise ConfigError(f"height and width of x must be multiples of {unit} (the field halves {len(self.shrink)} times), got shape {tuple(h.value.shape)}")
        h = convolve(self.enter, h)
        skips = []
        for i, level in enumerate(self.down):
            for block in cast(nn.ModuleList, level):
                h = block(h, embedding)
            if i < len(self.shrink):
                skips.append(h)
                h = convolve(cast(nn.Conv2d, self.shrink[i]), h)
        if self.attention is not None:
            h = self.attention(h)
        for i in reversed(range(len(self.up))):
            h = joined(convolve(cast(nn.Conv2d, self.grow[i]), h.map(_twice)), skips[i])
            for block in cast(nn.ModuleList, self.up[i]):
                h = block(h, embedding)
        return convolve(self.leave, silu(self.norm(h)))


def _twice(x: Tensor) -> Tensor:
    """Repeat every pixel two by two."""
    return F.interpolate(x, scale_factor=2, mode="nearest")
