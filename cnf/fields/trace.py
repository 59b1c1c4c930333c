"""Closed-form traces: tr ∂f/∂x of a net with at most two hidden layers, from its weights and the activations' slopes.

With s the activations' derivatives times the layers' gates and g the last gate, the trace of
:math:`f = g \\circ W_3 \\sigma(W_2 \\sigma(W_1 x))` is bilinear in s₁ and s₂ with a kernel that is free of x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cnf.errors import ConfigError

__all__ = ["conv_trace", "dense_trace"]

Parts = Sequence[tuple[Tensor, Tensor | None]]  # weight and gate of each layer


def dense_trace(slopes: Sequence[Tensor], parts: Parts, n: int) -> Tensor:
    r"""tr J (N,) of fully connected layers: :math:`s_2^\top (W_2 \circ (W_1 G_3 W_3)^\top) s_1`.

    Args:
        slopes: of each hidden layer, (N, H).
        parts: weight (out, in) and gate of each layer, the last gate (D,), or (N, D) where times differ by row.
        n: number of rows.

    Example:
        >>> w, v = torch.randn(5, 2), torch.randn(2, 5)
        >>> slopes = torch.rand(3, 5)
        >>> truth = torch.stack([(v @ (s[:, None] * w)).trace() for s in slopes])
        >>> bool(torch.allclose(dense_trace([slopes], [(w, None), (v, None)], 3), truth, atol=1e-5))
        True
    """
    first = parts[0][0]
    last, gate = parts[-1]
    if not slopes:
        diagonal = last.diagonal()
        return (diagonal if gate is None else diagonal * gate).sum(-1).expand(n)
    if gate is not None and gate.ndim == 2:  # times that differ by row: gate (N, D)
        if len(slopes) == 1:
            return torch.einsum("nh,nh->n", slopes[0], gate @ (last * first.T))
        lifted = torch.einsum("bd,nd,da->nba", first, gate, last)
        return torch.einsum("na,ab,nba,nb->n", slopes[1], parts[1][0], lifted, slopes[0])
    gated = last if gate is None else gate[:, None] * last
    if len(slopes) == 1:
        return slopes[0] @ (first * gated.T).sum(1)
    kernel = parts[1][0] * (first @ gated).T  # M = W2 * (W1 G3 W3)^T, free of x
    return ((slopes[1] @ kernel) * slopes[0]).sum(1)


def conv_trace(slopes: Sequence[Tensor], parts: Parts, x: Tensor) -> Tensor:
    r"""tr J (N,) of 3x3 (or 1x1) convolutions with zero padding.

    Pixel q of the last hidden layer is reached from, and reaches, output pixel q + τ, |τ| ≤ 1; what would lie outside the
    image is missing, so the kernel differs at the border. One convolution serves the interior,

    .. math:: M[i,j,\delta] = W_2[i,j,\delta] \sum_\tau \sum_c W_1[j,c,\tau-\delta]\, g_3[c]\, W_3[c,i,-\tau],

    and the four border lines and four corners are corrected for the τ that leave the image there.

    Args:
        slopes: of each hidden layer, (N, H, h, w).
        parts: weight (out, in, k, k) and gate of each layer, the last gate (C, 1, 1) or None.
        x: the point (N, C, h, w), for its shape.

    Raises:
        ConfigError: for gates that differ by row, which have no kernel in common.
    """
    weights = [F.pad(w, (1, 1, 1, 1)) if w.shape[-1] == 1 else w for w, _ in parts]
    gate = parts[-1][1]
    if gate is not None and gate.ndim == 4:
        raise ConfigError("the closed-form trace of convolutions takes one time for all rows: pass a single t")
    last = weights[-1] if gate is None else weights[-1] * gate[:, None]
    height, width = x.shape[2:]
    if not slopes:
        return (last.diagonal()[1, 1].sum() * (height * width)).expand(len(x))
    back = last.flip(2, 3)  # W3[c, i, -τ], τ counted from the upper left
    if len(slopes) == 1:
        seen = torch.einsum("icyx,ciyx->iyx", weights[0], back)
        return torch.einsum("nihw,ihw->n", slopes[0], _inside(seen, height, width))
    kernels = _kernels(weights[0], back, weights[1])
    total = _pair(slopes[1], slopes[0], kernels[1, 1])
    # lines and corners, each less what leaves the image there, the corners given back what was taken twice
    rows, columns = _lines(height), _lines(width)
    for y in rows:
        total = total - _pair(*_border(slopes, y, None), kernels[y[0], 1])
    for z in columns:
        total = total - _pair(*_border(slopes, None, z), kernels[1, z[0]])
    for y in rows:
        for z in columns:
            total = total + _pair(*_border(slopes, y, z), kernels[y[0], z[0]])
    return total


def _inside(seen: Tensor, height: int, width: int) -> Tensor:
    """(..., 3, 3) over τ to the sum over those τ that stay inside, for every pixel: (..., h, w)."""

    def stays(size: int) -> Tensor:
        at = torch.arange(size, device=seen.device)[None] + torch.arange(-1, 2, device=seen.device)[:, None]
        return ((at >= 0) & (at < size)).to(seen.dtype)

    return torch.einsum("...yx,yh,xw->...hw", seen, stays(height), stays(width))


def _kernels(first: Tensor, back: Tensor, middle: Tensor) -> dict[tuple[int, int], Tensor]:
    """M, and its parts from the τ that point up (0), anywhere (1) or down (2), likewise left to right."""
    # W1[j, c, τ - δ], zero where |τ - δ| > 1
    reach = first.new_zeros(*first.shape[:2], 3, 3, 3, 3)  # j, c, τ, δ
    for ty in range(3):
        for tx in range(3):
            ys, xs = (range(max(0, t - 1), min(3, t + 2)) for t in (ty, tx))
            flipped = first.flip(2, 3)[:, :, 2 - ty + ys[0] - 1 : 2 - ty + ys[-1], 2 - tx + xs[0] - 1 : 2 - tx + xs[-1]]
            reach[:, :, ty, tx, ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1] = flipped
    moved = torch.einsum("jcyxab,ciyx->yxijab", reach, back)
    among = {0: slice(0, 1), 1: slice(0, 3), 2: slice(2, 3)}
    return {(a, b): middle * moved[among[a], among[b]].sum((0, 1)) for a in among for b in among}


def _lines(size: int) -> list[tuple[int, int]]:
    """Which τ leave the image (0: up, 2: down) from which line."""
    return [(0, 0), (2, size - 1)]


def _border(slopes: Sequence[Tensor], y: tuple[int, int] | None, z: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """The border's slopes of the second layer, and those of the first around them."""
    second, first = slopes[1], slopes[0]
    if y is not None:
        second, first = second[:, :, y[1] : y[1] + 1], _around(first, y[1], 2)
    if z is not None:
        second, first = second[..., z[1] : z[1] + 1], _around(first, z[1], 3)
    return second, first


def _around(first: Tensor, at: int, dim: int) -> Tensor:
    """The line and its neighbours along ``dim``, zero outside."""
    size = first.shape[dim]
    part = first.narrow(dim, max(0, at - 1), min(size, at + 2) - max(0, at - 1))
    before, after = int(at == 0), int(at == size - 1)
    return F.pad(part, (0, 0, before, after) if dim == 2 else (before, after))


def _pair(second: Tensor, first: Tensor, kernel: Tensor) -> Tensor:
    """Σ s₂[i, p] (M * s₁)[i, p], (N,)."""
    padding = tuple((s - f + 2) // 2 for s, f in zip(second.shape[2:], first.shape[2:], strict=True))
    return (second * F.conv2d(first, kernel, padding=padding)).flatten(1).sum(1)
