"""Stack of time layers with t-independent parts precomputed for one solve."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cnf._utils.errors import ConfigError
from cnf.fields.activations import Activation
from cnf.fields.base import SolveField
from cnf.fields.maps import Linear, channels_last
from cnf.fields.time import Affine, LayerConstants, TimeLayer
from cnf.fields.timed import FieldAtTime, elements, layers_at, skip, stage_kernels
from cnf.fields.trace import ConvKernel, conv_kernel, conv_trace, dense_kernel, dense_trace

__all__ = ["PrecomputedField", "call_layers", "closed_form"]


LARGEST = 2**24  # elements of all weights and kernels kept for known times, 64 MB in float32


def closed_form(layers: Sequence[TimeLayer]) -> bool:
    """Return whether a closed form exists: at most two hidden layers, stride 1, last gate without context."""
    maps = [layer.map for layer in layers]
    square = {(3, 1), (1, 0)}  # kernel and padding
    plain = all(isinstance(m, Linear) or (m.stride == 1 and (m.kernel, m.padding) in square) for m in maps)
    return len(maps) <= 3 and plain and layers[-1].context_gate is None


class PrecomputedField(SolveField):
    """f, its tangents and its divergence for points of one size and one context, with the call signature of a field.

    The maps of time planes and the context's terms are computed once, the trace's kernel on first use if it does not
    depend on t; all are kept with their graph for the object's lifetime. Convolutions run channels-last, which takes
    less than half the time on CPUs.
    ``size`` is the spatial size of the points, () for vectors; ``residual`` and ``linear`` are those of
    :class:`~cnf.fields.Stack`.
    """

    own_jvp = True

    def __init__(
        self,
        layers: Sequence[TimeLayer],
        activation: Activation,
        size: tuple[int, ...],
        context: Tensor | None,
        residual: str = "none",
        linear: Tensor | None = None,
    ):
        self.layers, self.activation, self.residual, self.linear = tuple(layers), activation, residual, linear
        self.spatial = bool(self.layers[0].map.spatial)
        self.known: list[LayerConstants] = []
        for layer in self.layers:
            constants, shift, logits = layer.precompute(size, context)
            if self.spatial:
                constants = tuple(channels_last(c) if c.ndim > 2 else c for c in constants)
            self.known.append(LayerConstants(constants, shift, logits))
            size = layer.map.size(size)
        self.closed_form = closed_form(self.layers)
        # one kernel with graph, one without: a checkpointing solver evaluates without gradients first, then with them
        self.kernels: dict[bool, Tensor | ConvKernel] = {}
        self.keeps_kernel = not any(layer.time_weights for layer in self.layers)

    def __call__(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (N, \\*event) at x (N, \\*event) and t (), or t (N,); ``context`` is ignored."""
        entered = self._enter(x)
        return skip(self.residual, self.linear, self.value(t, entered), entered).reshape(x.shape)

    def value(self, t: Tensor, h: Tensor) -> Tensor:
        """Return the last layer's output (N, out) for inputs (N, in), channels-last, without the residual term."""
        for i in range(len(self.layers)):
            h = self._layer(i, t, h)[0]
            if i + 1 < len(self.layers):
                h = self.activation.value(h)
        return h

    def jvp(
        self, t: Tensor, x: Tensor, v: Tensor, context: Tensor | None = None, *, t_dot: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return f (N, \\*event) and J v + t_dot ∂f/∂t (K, N, \\*event); see :meth:`cnf.fields.Stack.jvp`."""
        k, n = v.shape[0], x.shape[0]
        h = entered = torch.cat([self._enter(x), self._enter(v.reshape(k * n, *x.shape[1:]))])
        for i, layer in enumerate(self.layers):
            weight, gate, shift = layer.affine_at(t, self.known[i])
            # point and tangents share one batch of (1 + K) N; the shift applies to the point only
            mapped = layer.map.apply(weight, h)
            point, tangent = (channels_last(mapped) if self.spatial else mapped).split((n, k * n))
            tangent = tangent.unflatten(0, (k, n))
            pre, dpre = (point, tangent) if gate is None else (point * gate, tangent * gate)
            if shift is not None:
                pre = pre + shift
            if t_dot is not None and layer.time_dependent:
                dpre = dpre + self._time_derivative(i, t, t_dot, h[:n], point, gate)
            if i + 1 < len(self.layers):
                pre, slope = self.activation.pair(pre)
                dpre = slope * dpre
            h = torch.cat([pre, dpre.flatten(0, 1)])
        h = skip(self.residual, self.linear, h, entered)
        return h[:n].reshape(x.shape), h[n:].reshape(v.shape)

    def divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return f (N, \\*event) and its exact divergence (N,); see :meth:`cnf.fields.Stack.divergence`."""
        if not self.closed_form:
            raise ConfigError(
                f"divergence has a closed form for at most two hidden layers (got {len(self.layers) - 1}), convolutions of "
                "stride 1, and a last gate without context: use Exact(), which falls back to autodiff, or Hutchinson()"
            )
        h = entered = self._enter(x)
        slopes, parts = [], []
        for i in range(len(self.layers)):
            h, weight, gate = self._layer(i, t, h)
            parts.append((weight, gate))
            if i + 1 < len(self.layers):
                h, slope = self.activation.pair(h)
                slopes.append(slope if gate is None else slope * gate)
        kernel = self._kernel(parts)
        if isinstance(kernel, ConvKernel):
            div = conv_trace(slopes, kernel, x)
        else:
            div = dense_trace(slopes, kernel, x.shape[0])
        if self.residual == "minus":
            div = div - x.shape[1:].numel()
        elif self.linear is not None:
            div = div + self.linear.diagonal().sum()
        return skip(self.residual, self.linear, h, entered).reshape(x.shape), div

    def at_times(self, t: Tensor, *, divergence: bool) -> list[SolveField] | None:
        """Return the field at each of the times t (S,); see :meth:`SolveField.at_times`.

        None for convolutions, weights that depend on t, and above :data:`LARGEST` elements.
        """
        if self.spatial or t.ndim != 1 or any(layer.time_weights or layer.augmented_time for layer in self.layers):
            return None
        # sizes may be symbolic while a graph is traced
        if not torch.compiler.is_compiling() and len(t) * elements(self.layers, self.known) > LARGEST:
            return None
        if (found := layers_at(self.layers, self.known, t)) is None:
            return None
        stages, weights = found
        kernels = stage_kernels(weights, len(t)) if divergence and self.closed_form else [None] * len(t)
        return [FieldAtTime(layers, kernel, self.activation, self.residual, self.linear, self) for layers, kernel in zip(stages, kernels, strict=True)]

    def keep_kernel(self, t: Tensor) -> None:
        """Compute the trace's kernel now if it does not depend on t."""
        if self.closed_form and self.keeps_kernel:
            self._kernel([layer.affine_at(t, known)[:2] for layer, known in zip(self.layers, self.known, strict=True)])

    def _kernel(self, parts: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor | ConvKernel:
        """Return the trace's kernel from each layer's weight and gate, cached if it does not depend on t."""
        recording = torch.is_grad_enabled()
        for graph in (True,) if recording else (True, False):  # a kernel with graph serves without gradients too
            if (kept := self.kernels.get(graph)) is not None:
                return kept
        kernel: Tensor | ConvKernel = conv_kernel(parts) if self.spatial else dense_kernel(parts)
        if self.keeps_kernel and parts[-1][1] is None:  # a gate depends on t
            self.kernels[recording] = kernel
        return kernel

    def _layer(self, i: int, t: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return layer i's value, weight and gate."""
        weight, gate, shift = self.layers[i].affine_at(t, self.known[i])
        h = self.layers[i].map.apply(weight, h)
        h = channels_last(h) if self.spatial else h
        h = h if gate is None else h * gate
        return h if shift is None else h + shift, weight, gate

    def _time_derivative(self, i: int, t: Tensor, t_dot: Tensor, h: Tensor, point: Tensor, gate: Tensor | None) -> Tensor:
        """Return the derivative of gate * (W h) + shift of layer i along t_dot at fixed h; ``point`` is W h."""
        layer = self.layers[i]

        def parts(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            a: Affine = layer.affine_at(s, self.known[i])
            none = s.new_zeros(())
            return a.weight, none if a.gate is None else a.gate, none if a.shift is None else a.shift

        jvp: Any = torch.func.jvp
        _, (dweight, dgate, dshift) = jvp(parts, (t,), (t_dot.to(t).expand_as(t),))
        out = dshift if gate is None else dgate * point + dshift
        if layer.time_weights:
            moved = layer.map.apply(dweight, h)
            out = out + (moved if gate is None else moved * gate)
        return cast(Tensor, out)

    def _enter(self, x: Tensor) -> Tensor:
        return channels_last(x) if self.spatial else x.flatten(1)


def call_layers(layers: Iterable[nn.Module], activation: Activation, t: Tensor, h: Tensor, context: Tensor | None = None) -> Tensor:
    """Call layers as modules, one after another, so that hooks and replaced modules apply; nothing is fused."""
    for i, layer in enumerate(layers):
        h = layer(t, activation.value(h) if i else h, context)
    return h
