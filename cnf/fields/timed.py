"""Fully connected stacks at times known in advance: what depends on t alone is computed once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cnf.fields.activations import Activation
from cnf.fields.base import SolveField
from cnf.fields.time import LayerConstants, TimeLayer
from cnf.fields.trace import dense_trace

__all__ = ["FieldAtTime", "FixedLayer", "elements", "layers_at", "skip", "stage_kernels"]


class FixedLayer(NamedTuple):
    """y = gate * (x W) + shift at one time, with the gate multiplied into W unless it differs by row."""

    weight: Tensor
    """(in, out)."""
    gate: Tensor | None
    """(N, out), of a context with one row per point; None otherwise."""
    shift: Tensor | None
    """(out,) or (N, out)."""

    def __call__(self, h: Tensor) -> Tensor:
        """Return the layer's value (N, out) at h (N, in)."""
        if self.gate is None:
            return h @ self.weight if self.shift is None else torch.addmm(self.shift, h, self.weight)
        y = h @ self.weight
        return y * self.gate if self.shift is None else torch.addcmul(self.shift, y, self.gate)

    def tangent(self, v: Tensor) -> Tensor:
        """Return the derivative (K, N, out) along v (K, N, in)."""
        product = v @ self.weight
        return product if self.gate is None else product * self.gate


class FieldAtTime(SolveField):
    """Field of fully connected layers at one time; the time and context of its calls are ignored.

    ``moving`` is the same field at any time, which has the derivative in t; ``kernel`` that of the trace
    (:func:`~cnf.fields.trace.dense_kernel`), None if no divergence is needed.
    """

    own_jvp = True

    def __init__(
        self, layers: Sequence[FixedLayer], kernel: Tensor | None, activation: Activation, residual: str, linear: Tensor | None, moving: SolveField
    ):
        self.layers, self.kernel, self.activation, self.residual, self.linear = tuple(layers), kernel, activation, residual, linear
        self.moving, self.closed_form = moving, kernel is not None

    def __call__(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (N, \\*event)."""
        h = entered = x.flatten(1)
        for layer in self.layers[:-1]:
            h = self.activation.value(layer(h))
        return self._leave(self.layers[-1](h), entered, x)

    def jvp(
        self, t: Tensor, x: Tensor, v: Tensor, context: Tensor | None = None, *, t_dot: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return f and J v + t_dot ∂f/∂t (K, N, \\*event)."""
        if t_dot is not None:
            return self.moving.jvp(t, x, v, context, t_dot=t_dot)
        h = entered = x.flatten(1)
        dh = tangent = v.flatten(2)
        for layer in self.layers[:-1]:
            h, slope = self.activation.pair(layer(h))
            dh = slope * layer.tangent(dh)
        h, dh = self.layers[-1](h), self.layers[-1].tangent(dh)
        return self._leave(h, entered, x), self._leave(dh, tangent, v)

    def _leave(self, h: Tensor, entered: Tensor, like: Tensor) -> Tensor:
        """Add the residual term and restore the shape."""
        h = skip(self.residual, self.linear, h, entered)
        return h if h.ndim == like.ndim else h.reshape(like.shape)

    def divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return f (N, \\*event) and its exact divergence (N,)."""
        if self.kernel is None:
            return super().divergence(t, x, context)
        h = entered = x.flatten(1)
        slopes = []
        for layer in self.layers[:-1]:
            h, slope = self.activation.pair(layer(h))
            slopes.append(slope if layer.gate is None else slope * layer.gate)
        div = dense_trace(slopes, self.kernel, x.shape[0])
        if self.residual == "minus":
            div = div - x.shape[1:].numel()
        elif self.linear is not None:
            div = div + self.linear.diagonal().sum()
        return self._leave(self.layers[-1](h), entered, x), div


class _AtTimes(NamedTuple):
    """A tensor at S times, (S, ...), or the same for all of them."""

    value: Tensor | None
    moving: bool

    def unbind(self, count: int) -> Sequence[Tensor | None]:
        return self.value.unbind() if self.moving and self.value is not None else [self.value] * count


def layers_at(layers: Sequence[TimeLayer], known: Sequence[LayerConstants], t: Tensor) -> tuple[list[list[FixedLayer]], list[_AtTimes]] | None:
    """Return the layers at each of the times t (S,), and their weights with gates (in, out).

    None for layers whose gates or shifts do not have the shape expected of a vector's layer.
    """
    count, fixed, weights = len(t), [], []
    for layer, constants in zip(layers, known, strict=True):
        by_row = constants.logits is not None and constants.logits.ndim == 2
        weight, gate, shift = layer.params_at(t[:, None] if by_row else t, constants.constants, constants.logits)
        out = layer.map.outputs
        if weight.ndim != 2 or any(v is not None and v.shape[-1:] != (out,) for v in (gate, shift)):
            return None
        if gate is not None and (gate.ndim != 2 + by_row or gate.shape[0] != count):
            return None
        if shift is not None and shift.ndim > 1 and (shift.ndim != 2 + by_row or shift.shape[0] != count):
            return None
        moving = shift is not None and shift.ndim > 1
        if constants.shift is not None:
            if moving and not by_row and constants.shift.ndim == 2 and shift is not None:
                shift = shift[:, None]
            shift = constants.shift if shift is None else shift + constants.shift
        folded = gate is not None and not by_row
        product = weight.T * gate[:, None] if folded and gate is not None else weight.T
        weights.append(_AtTimes(product, folded))
        parts = (weights[-1], _AtTimes(None if folded else gate, True), _AtTimes(shift, moving))
        fixed.append([FixedLayer(*values) for values in zip(*(part.unbind(count) for part in parts), strict=True)])  # type: ignore[arg-type]
    return [list(stage) for stage in zip(*fixed, strict=True)], weights


def stage_kernels(weights: Sequence[_AtTimes], count: int) -> Sequence[Tensor | None]:
    """Return the trace's kernel at each of ``count`` times (see :func:`~cnf.fields.trace.dense_kernel`), all in one product."""
    first, last = weights[0].value, weights[-1].value
    assert first is not None and last is not None
    if len(weights) == 1:
        kernel = last.diagonal(dim1=-2, dim2=-1).sum(-1)
    elif len(weights) == 2:
        kernel = (first * last.mT).sum(-2)
    else:
        middle = weights[1].value
        assert middle is not None
        kernel = middle.mT * (last @ first)
    return _AtTimes(kernel, any(weight.moving for weight in weights)).unbind(count)


def elements(layers: Iterable[TimeLayer], known: Iterable[LayerConstants]) -> int:
    """Return an upper bound of the number of elements that :func:`layers_at` and the kernel take for one time."""
    total = 0
    for layer, constants in zip(layers, known, strict=True):
        rows = max([v.shape[0] for v in (constants.shift, constants.logits) if v is not None and v.ndim == 2], default=1)
        total += 2 * layer.map.inputs * layer.map.outputs + 2 * rows * layer.map.outputs
    return total


def skip(residual: str, linear: Tensor | None, h: Tensor, x: Tensor) -> Tensor:
    """Add a stack's residual term (see :class:`~cnf.fields.Stack`) to its output h at the input x."""
    if residual == "minus":
        return h - x
    return h if linear is None else h + x @ linear.T
