"""Closed-form traces tr ∂f/∂x of nets with at most two hidden layers, from weights and activation derivatives.

With s the activations' derivatives times the layers' gates and g the last gate, the trace of
:math:`f = g \\circ W_3 \\sigma(W_2 \\sigma(W_1 x))` is bilinear in s₁ and s₂. Its kernel does not depend on x: it is
computed once per set of weights and gates (:func:`dense_kernel`, :func:`conv_kernel`) and shared by all points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cnf._utils.errors import ConfigError

__all__ = ["ConvKernel", "conv_kernel", "conv_trace", "dense_kernel", "dense_trace"]

Parts = Sequence[tuple[Tensor, Tensor | None]]  # weight and gate of each layer


def dense_kernel(parts: Parts) -> Tensor:
    r"""Return the kernel of the trace of fully connected layers.

    Two hidden layers: :math:`M = W_2 \circ (W_1 G_3 W_3)^\top` (H₂, H₁); one: the diagonal of :math:`W_1 G_2 W_2` (H,);
    none: the trace itself (). If the last gate differs by row (N, D), so does the kernel, with a leading dimension N.

    Args:
        parts: weight (out, in) and gate of each layer, the last gate (D,), (N, D) or None.
    """
    first, (last, gate) = parts[0][0], parts[-1]
    if len(parts) == 1:
        diagonal = last.diagonal()
        return (diagonal if gate is None else diagonal * gate).sum(-1)
    if len(parts) == 2:
        through = last * first.T  # (D, H)
        return through.sum(0) if gate is None else gate @ through
    if gate is not None and gate.ndim == 2:
        return parts[1][0] * torch.einsum("bd,nd,da->nab", first, gate, last)
    return parts[1][0] * (first @ (last if gate is None else gate[:, None] * last)).T


def dense_trace(slopes: Sequence[Tensor], kernel: Tensor, n: int) -> Tensor:
    r"""Return tr J (N,) of fully connected layers: :math:`s_2^\top M s_1`.

    Args:
        slopes: derivative of each hidden layer's activation times its gate, (N, H).
        kernel: result of :func:`dense_kernel`.
        n: number of rows.

    Example:
        >>> w, v = torch.randn(5, 2), torch.randn(2, 5)
        >>> slopes = torch.rand(3, 5)
        >>> truth = torch.stack([(v @ (s[:, None] * w)).trace() for s in slopes])
        >>> bool(torch.allclose(dense_trace([slopes], dense_kernel([(w, None), (v, None)]), 3), truth, atol=1e-5))
        True
    """
    if not slopes:
        return kernel.expand(n)
    if len(slopes) == 1:
        return (slopes[0] * kernel).sum(1) if kernel.ndim == 2 else slopes[0] @ kernel
    reached = torch.einsum("na,nab->nb", slopes[1], kernel) if kernel.ndim == 3 else slopes[1] @ kernel
    return (reached * slopes[0]).sum(1)


class ConvKernel(NamedTuple):
    """Kernel of the trace of convolutions: one for all pixels and, for two hidden layers, border corrections.

    Pixel q of the last hidden layer depends on, and contributes to, output pixel q + τ, |τ| ≤ 1. Terms outside the
    image are missing, so the kernel differs at the border. One convolution covers all pixels,

    .. math:: M[i,j,\\delta] = W_2[i,j,\\delta] \\sum_\\tau \\sum_c W_1[j,c,\\tau-\\delta]\\, g_3[c]\\, W_3[c,i,-\\tau],

    then the terms of τ that leave the image are subtracted on the border lines, and terms subtracted twice are added
    back at the corners. On the first row a τ that points up combines only with δ along the row (nothing lies above it,
    and |τ - δ| > 1 below it), so that a line needs one 1-D convolution and a corner one matrix.
    """

    whole: Tensor
    """(H₂, H₁, 3, 3) for two hidden layers, (H, 3, 3) over τ for one, () for none."""
    rows: Tensor | None = None
    """(2 H₂, H₁, 1, 3): terms that leave the image above the first and below the last row."""
    columns: Tensor | None = None
    """(2 H₂, H₁, 3, 1): terms that leave it to the left and to the right."""
    corners: Tensor | None = None
    """(4, H₁, H₂): first row and column, first row and last column, last row and first column, last row and column."""


def conv_kernel(parts: Parts) -> ConvKernel:
    """Return the kernel of 3x3 (or 1x1) convolutions with zero padding.

    Args:
        parts: weight (out, in, k, k) and gate of each layer, the last gate (C, 1, 1) or None.

    Raises:
        ConfigError: for gates that differ by row, which have no common kernel.
    """
    weights = [F.pad(w, (1, 1, 1, 1)) if w.shape[-1] == 1 else w for w, _ in parts]
    gate = parts[-1][1]
    if gate is not None and gate.ndim == 4:
        raise ConfigError("the closed-form trace of convolutions takes one time for all rows: pass a single t")
    last = weights[-1] if gate is None else weights[-1] * gate[:, None]
    if len(parts) == 1:
        return ConvKernel(last.diagonal()[1, 1].sum())
    back = last.flip(2, 3)  # W3[c, i, -τ], with τ counted from the upper left
    if len(parts) == 2:
        return ConvKernel(torch.einsum("icyx,ciyx->iyx", weights[0], back))
    first, middle = weights[0].flip(2, 3), weights[1]
    # W1[j, c, τ - δ], zero for |τ - δ| > 1: after the flip the kernel's centre moves with τ
    reach = F.pad(first, (2, 2, 2, 2)).unfold(2, 3, 1).unfold(3, 3, 1).flip(2, 3)[:, :, 1:4, 1:4]  # j, c, τ, δ
    moved = torch.einsum("jcyxab,ciyx->yxijab", reach, back) * middle
    pair = (0, 2)  # τ pointing up (left), down (right)
    rows = torch.cat([moved[y].sum(0)[:, :, 1:2] for y in pair])
    columns = torch.cat([moved[:, x].sum(0)[..., 1:2] for x in pair])
    corners = torch.stack([moved[y, x, :, :, 1, 1].T for y in pair for x in pair])
    return ConvKernel(moved.sum((0, 1)), rows, columns, corners)


def conv_trace(slopes: Sequence[Tensor], kernel: ConvKernel, x: Tensor) -> Tensor:
    r"""Return tr J (N,) of 3x3 (or 1x1) convolutions with zero padding.

    :math:`\sum_{p,i} s_2[i,p] (M \star s_1)[i,p]`, corrected at the border.

    Args:
        slopes: derivative of each hidden layer's activation times its gate, (N, H, h, w).
        kernel: result of :func:`conv_kernel`.
        x: the point (N, C, h, w), used for its shape.
    """
    height, width = x.shape[2:]
    if not slopes:
        return (kernel.whole * (height * width)).expand(len(x))
    if len(slopes) == 1:
        return torch.einsum("nihw,ihw->n", slopes[0], _inside(kernel.whole, height, width))
    first, second = slopes
    assert kernel.rows is not None and kernel.columns is not None and kernel.corners is not None
    total = _sum(second * F.conv2d(first, kernel.whole, padding=1))
    ends = (slice(0, 1), slice(-1, None))
    over, under = (torch.cat([s[:, :, end] for end in ends], 1) for s in (first, second))  # (N, 2 H, 1, w)
    total = total - _sum(under * F.conv2d(over, kernel.rows, padding=(0, 1), groups=2))
    over, under = (torch.cat([s[..., end] for end in ends], 1) for s in (first, second))
    total = total - _sum(under * F.conv2d(over, kernel.columns, padding=(1, 0), groups=2))
    at, to = (torch.stack([s[:, :, y, z] for y in (0, -1) for z in (0, -1)]) for s in (first, second))  # (4, N, H)
    return total + (to * torch.bmm(at, kernel.corners)).sum((0, 2))


def _sum(v: Tensor) -> Tensor:
    """Sum over all dimensions but the rows."""
    return v.sum((1, 2, 3))


def _inside(seen: Tensor, height: int, width: int) -> Tensor:
    """Sum (..., 3, 3) over those τ that stay inside the image, for every pixel: (..., h, w)."""

    def stays(size: int) -> Tensor:
        at = torch.arange(size, device=seen.device)[None] + torch.arange(-1, 2, device=seen.device)[:, None]
        return ((at >= 0) & (at < size)).to(seen.dtype)

    return torch.einsum("...yx,yh,xw->...hw", seen, stays(height), stays(width))
