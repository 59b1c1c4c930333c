"""Layers of a U-Net on dual numbers (a point with its tangents): convolutions, norms, residual blocks, attention.

Each maps a :class:`Dual`. The derivatives are hand-written and reuse what the point has computed, so that a Jacobian
product costs one forward pass on a batch of 1 + K; it is itself differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf._utils.async_checks import vectorized
from cnf._utils.errors import ConfigError

__all__ = ["Attention", "Dual", "GroupNorm", "ResidualBlock", "convolve", "joined", "silu"]


class Dual(NamedTuple):
    """Point (N, C, H, W) with K stacked tangents (K N, C, H, W), or without tangents."""

    value: Tensor
    tangent: Tensor | None = None

    def map(self, linear: Callable[[Tensor], Tensor]) -> Dual:
        """Apply a linear function without bias to point and tangents."""
        return Dual(linear(self.value), None if self.tangent is None else linear(self.tangent))

    def __add__(self, other: Dual) -> Dual:  # type: ignore[override]
        tangent = None if self.tangent is None or other.tangent is None else self.tangent + other.tangent
        return Dual(self.value + other.value, tangent)


def joined(first: Dual, second: Dual) -> Dual:
    """Concatenate the channels of both."""
    value = torch.cat([first.value, second.value], 1)
    if first.tangent is None or second.tangent is None:
        return Dual(value)
    return Dual(value, torch.cat([first.tangent, second.tangent], 1))


def convolve(layer: nn.Conv2d, h: Dual) -> Dual:
    """Apply a convolution; the bias applies to the point only."""
    value = layer(h.value)
    if h.tangent is None:
        return Dual(value)
    # not one batch of both: copying them together costs more than a second call saves
    return Dual(value, F.conv2d(h.tangent, layer.weight, None, layer.stride, layer.padding))


def silu(h: Dual) -> Dual:
    """Apply x σ(x)."""
    if h.tangent is None:
        return Dual(F.silu(h.value))
    v = _stacked(h.tangent, h.value)
    if not torch.is_grad_enabled() and not vectorized() and not torch.compiler.is_compiling():
        # one pass instead of five, without a derivative of its own
        return Dual(F.silu(h.value), torch.ops.aten.silu_backward(v, h.value.expand_as(v)).flatten(0, 1))
    s = torch.sigmoid(h.value)
    y = h.value * s
    return Dual(y, (v * (s + y * (1 - s))).flatten(0, 1))


def _stacked(tangent: Tensor, value: Tensor) -> Tensor:
    """Reshape (K N, ...) to (K, N, ...)."""
    return cast(Tensor, tangent.unflatten(0, (-1, len(value))))


class GroupNorm(nn.Module):
    """Group normalisation (1803.08494) with gain and shift, modulated by (B, 2 C) from time and context, B = N or 1.

    The number of groups is gcd(channels, groups); each is normalised over its channels and all positions.
    """

    def __init__(self, channels: int, groups: int = 8):
        super().__init__()
        self.groups = math.gcd(channels, groups)
        self.gain = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.eps = 1e-5

    def forward(self, h: Dual, modulation: Tensor | None = None) -> Dual:
        gain: Tensor = self.gain
        shift: Tensor = self.shift
        if modulation is not None:
            scale, move = modulation.chunk(2, 1)
            gain, shift = gain * (1 + scale), shift * (1 + scale) + move
            if h.tangent is None:
                plain = F.group_norm(h.value, self.groups, None, None, self.eps)
                return Dual(torch.addcmul(shift[:, :, None, None], plain, gain[:, :, None, None]))
        elif h.tangent is None:
            return Dual(F.group_norm(h.value, self.groups, gain, shift, self.eps))
        x = self._positions(h.value)
        x = x - self._mean(x)
        spread = torch.rsqrt(self._mean(x.square()) + self.eps)
        x = x * spread
        gain, shift = gain.reshape(-1, 1, x.shape[-1]), shift.reshape(-1, 1, x.shape[-1])
        v = _stacked(self._positions(h.tangent), h.value)
        # gain spread (v - mean(v) - x mean(x v)), with one number per row and channel in each product
        scaled = gain * spread
        v, along = torch.addcmul(-scaled * self._mean(v), v, scaled), -scaled * self._mean(x * v)
        v = torch.addcmul(v, x, along)
        return Dual(self._images(torch.addcmul(shift, x, gain), h.value), self._images(v.flatten(0, 1), h.value))

    def _positions(self, x: Tensor) -> Tensor:
        """Reshape (N, C, H, W) to (N, H W, C) in float32 or better, without a copy if channels-last."""
        x = x.permute(0, 2, 3, 1).flatten(1, 2)
        return x.float() if x.dtype == torch.bfloat16 else x

    def _mean(self, x: Tensor) -> Tensor:
        """Return the mean over positions and each group's channels of x (..., H W, C), repeated to (..., 1, C)."""
        # positions first: a sum over the first and last of three axes takes twelve times as long on a CPU
        groups = cast(Tensor, x.mean(-2, keepdim=True).unflatten(-1, (self.groups, -1)))
        return groups.mean(-1, keepdim=True).expand_as(groups).flatten(-2)

    def _images(self, x: Tensor, like: Tensor) -> Tensor:
        """Reshape (N, H W, C) back to (N, C, H, W), channels-last, in the dtype of ``like``."""
        return cast(Tensor, x.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2).to(like.dtype))


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with the second norm modulated by time and context.

    The last convolution is zero at initialisation; where inputs and outputs differ, a 1x1 convolution maps x.
    """

    def __init__(self, inputs: int, outputs: int, embedding: int):
        super().__init__()
        self.norm1, self.norm2 = GroupNorm(inputs), GroupNorm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None
        for p in (*self.conv2.parameters(), *self.modulate.parameters()):
            nn.init.zeros_(p)

    def forward(self, h: Dual, embedding: Tensor) -> Dual:
        inner: Dual = convolve(self.conv1, silu(self.norm1(h)))
        inner = convolve(self.conv2, silu(self.norm2(inner, self.modulate(embedding))))
        return inner + (h if self.skip is None else convolve(self.skip, h))


class Attention(nn.Module):
    """x + projected self-attention over all positions (1706.03762), with the projection zero at initialisation."""

    def __init__(self, channels: int, heads: int = 4):
        super().__init__()
        if channels % heads:
            raise ConfigError(f"channels must be a multiple of the {heads} attention heads, got {channels}")
        self.heads = heads
        self.norm = GroupNorm(channels)
        self.qkv, self.project = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        for p in self.project.parameters():
            nn.init.zeros_(p)

    def forward(self, h: Dual) -> Dual:
        mixed = convolve(self.qkv, self.norm(h))
        q, k, v = self._heads(mixed.value)
        scale = 1 / math.sqrt(q.shape[-1])
        share = torch.softmax(q @ k.mT * scale, -1)
        out, moved = share @ v, None
        if mixed.tangent is not None:
            dq, dk, dv = (_stacked(part, h.value) for part in self._heads(mixed.tangent))
            slope = share * (dq @ k.mT + q @ dk.mT) * scale
            dshare = slope - share * slope.sum(-1, keepdim=True)
            moved = self._images((dshare @ v + share @ dv).flatten(0, 1), h.value)
        return h + convolve(self.project, Dual(self._images(out, h.value), moved))

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Split (N, 3 C, H, W) into q, k and v (N, heads, H W, C/heads)."""
        return tuple(x.flatten(2).unflatten(1, (3, self.heads, -1)).transpose(3, 4).unbind(1))

    @staticmethod
    def _images(x: Tensor, like: Tensor) -> Tensor:
        """Reshape (N, heads, H W, C/heads) to (N, C, H, W)."""
        x = x.transpose(2, 3).flatten(1, 2).unflatten(2, like.shape[2:])
        return x.contiguous(memory_format=torch.channels_last)
