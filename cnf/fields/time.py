"""Base class of the time layers y = gate * (W x) + shift, affine in x, with W, gate and shift functions of t.

This form gives the value, the tangent gate * (W v) and the closed-form trace of every layer type.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from cnf._utils.errors import ConfigError
from cnf.fields.maps import Conv, Linear

__all__ = ["Affine", "Constants", "LayerConstants", "LayerFactory", "TimeLayer", "planes", "require_context", "require_one_time"]

Constants = tuple[Tensor, ...]


class Affine(NamedTuple):
    """y = gate * (W x) + shift at one time; ``None`` means a gate of 1 or a shift of 0."""

    weight: Tensor
    gate: Tensor | None
    shift: Tensor | None


class LayerConstants(NamedTuple):
    """Parts of a layer that do not depend on t, computed once per solve."""

    constants: Constants
    shift: Tensor | None  # the context's term in the shift
    logits: Tensor | None  # the context's term in the gate's logits


class TimeLayer(nn.Module):
    """Base class of the time layers.

    Subclasses implement :meth:`params_at` (W, gate and shift at time t) and :meth:`constants` (its t-independent inputs).

    Args:
        map: the linear map, :class:`Linear` or :class:`Conv`.
        context_dim: size C of the context; 0 for none. The context adds V c to the shift and, if ``context_gate`` is
            true and the layer has a gate, to the gate's logits.
        context_gate: whether the context may enter the gate.
    """

    time_weights = False  # whether W itself depends on t
    time_dependent = True  # whether anything does
    has_gate = False
    augmented_time = 0  # size k of the augmented time a (k,) that the layer takes in place of t; 0 for t

    def __init__(self, map: Linear | Conv, context_dim: int = 0, *, context_gate: bool = True):
        super().__init__()
        self.map = map
        self.context_dim = context_dim
        self.context_shift = nn.Linear(context_dim, map.outputs, bias=False) if context_dim else None
        gated = context_dim and context_gate and self.has_gate
        self.context_gate = nn.Linear(context_dim, map.outputs, bias=False) if gated else None
        self.build(map)

    def build(self, map: Linear | Conv) -> None:
        """Create the layer's own modules and parameters; nothing by default."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "moving" in vars(cls):
            warnings.warn(f"{cls.__name__}.moving is called params_at", DeprecationWarning, stacklevel=2)
            setattr(cls, "params_at", vars(cls)["moving"])  # noqa: B010 (mypy takes no assignment to a method)

    def constants(self, size: tuple[int, ...]) -> Constants:
        """Return the inputs of :meth:`params_at` that depend on neither t nor context, for ``size`` (() for vectors)."""
        return ()

    def params_at(self, t: Tensor, constants: Constants, logits: Tensor | None = None) -> Affine:
        """Return W, gate and shift at ``t`` (() or (N,)) without the context's shift; ``logits``: its gate term."""
        raise NotImplementedError

    def precompute(self, size: tuple[int, ...], context: Tensor | None = None) -> LayerConstants:
        """Return the parts that do not depend on t, for inputs of spatial ``size`` (() for vectors)."""
        shift = None if self.context_shift is None else self._spread(self.context_shift(require_context(context)))
        return LayerConstants(self.constants(size), shift, None if self.context_gate is None else self.context_gate(require_context(context)))

    def affine_at(self, t: Tensor, known: LayerConstants) -> Affine:
        """Return W, gate and shift at time ``t`` (() or (N,)) from the result of :meth:`precompute`."""
        weight, gate, shift = self.params_at(t, known.constants, known.logits)
        if known.shift is not None:
            shift = known.shift if shift is None else shift + known.shift
        return Affine(weight, gate, shift)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the layer's value at x (N, in) or (N, in, h, w) by calling its modules, so that hooks apply."""
        y = self.called(t, x, None if self.context_gate is None else self.context_gate(require_context(context)))
        return y if self.context_shift is None else y + self._spread(self.context_shift(require_context(context)))

    def called(self, t: Tensor, x: Tensor, logits: Tensor | None) -> Tensor:
        """Return the value at time ``t`` (() or (N,)) without the context's shift; overridden to call modules."""
        weight, gate, shift = self.params_at(t, self.constants(tuple(x.shape[2:])), logits)
        y = self.map.apply(weight, x)
        y = y if gate is None else y * gate
        return y if shift is None else y + shift

    def zero_(self) -> None:
        """Set the layer's output to zero for every t and x."""
        for p in self.parameters():
            nn.init.zeros_(p)

    def _spread(self, v: Tensor) -> Tensor:
        """Reshape (..., out) to broadcast with the layer's output."""
        return v[..., None, None] if self.map.spatial else v



class LayerFactory(Protocol):
    """Factory of layers around a linear map; a field takes one in place of a layer's name."""

    def __call__(self, map: Linear | Conv, context_dim: int = 0, *, context_gate: bool = True) -> TimeLayer:
        """Return the layer."""


def require_context(context: Tensor | None) -> Tensor:
    """Return the context; raise a ConfigError if there is none."""
    if context is None:
        raise ConfigError("context=None, but this field was built with context_dim > 0: pass context (N, C) or (C,)")
    return context


def require_one_time(t: Tensor, name: str) -> None:
    """Raise a ConfigError for times that differ by row, which the layer called ``name`` does not support."""
    if t.ndim:
        raise ConfigError(f"t must be a single time (), got shape {tuple(t.shape)}: a {name!r} layer has one set of weights per time")


def planes(features: Tensor, x: Tensor) -> Tensor:
    """Expand features (k,) or (N, k) to channels for x (N, C, ...)."""
    shape = (*features.shape, *(1,) * (x.ndim - 2))
    return features.reshape(shape).expand(len(x), features.shape[-1], *x.shape[2:])
