"""How time enters a layer: every layer is affine in x, y = gate * (W x) + shift, with W, gate and shift functions of t.

That one form gives the value, the tangent (gate * (W v)) and the closed-form trace of every layer type alike.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from cnf.errors import ConfigError
from cnf.fields.maps import Conv, Linear

__all__ = ["LAYERS", "Affine", "Constants", "Fixed", "LayerFactory", "TimeLayer", "time_layer"]

Constants = tuple[Tensor, ...]


class Affine(NamedTuple):
    """y = gate * (W x) + shift at one time; ``None`` stands for a gate of one or a shift of zero."""

    weight: Tensor
    gate: Tensor | None
    shift: Tensor | None


class Fixed(NamedTuple):
    """What of a layer is the same at all times, so that a solve computes it once."""

    constants: Constants
    shift: Tensor | None  # what the context adds to the shift
    logits: Tensor | None  # what it adds to the gate's logits


class TimeLayer(nn.Module):
    """Base of the layers: subclasses say in :meth:`moving` what W, gate and shift are at time t, and in :meth:`constants`
    what they take for it that is the same at all times.

    Args:
        map: the linear map, :class:`Linear` or :class:`Conv`.
        context_dim: size C of the context; 0 for none. The context adds V c to the shift and, where ``context_gate``
            and the layer has a gate, to the gate's logits.
        context_gate: whether the context may enter the gate.
    """

    time_weights = False  # whether W itself depends on t
    has_gate = False

    def __init__(self, map: Linear | Conv, context_dim: int = 0, *, context_gate: bool = True):
        super().__init__()
        self.map = map
        self.context_dim = context_dim
        self.context_shift = nn.Linear(context_dim, map.outputs, bias=False) if context_dim else None
        gated = context_dim and context_gate and self.has_gate
        self.context_gate = nn.Linear(context_dim, map.outputs, bias=False) if gated else None

    def constants(self, size: tuple[int, ...]) -> Constants:
        """What :meth:`moving` takes that depends on neither t nor context, for inputs of spatial ``size`` (() for vectors)."""
        return ()

    def moving(self, t: Tensor, constants: Constants, logits: Tensor | None = None) -> Affine:
        """W, gate and shift at time ``t`` (() or (N,)), the context's shift apart; ``logits`` is what it adds to a gate's."""
        raise NotImplementedError

    def fixed(self, size: tuple[int, ...], context: Tensor | None = None) -> Fixed:
        """What is the same at all times, for inputs of spatial ``size``."""
        shift = None if self.context_shift is None else self._spread(self.context_shift(_given(context)))
        return Fixed(self.constants(size), shift, None if self.context_gate is None else self.context_gate(_given(context)))

    def at(self, t: Tensor, fixed: Fixed) -> Affine:
        """W, gate and shift at time ``t`` (() or (N,)), from what :meth:`fixed` gave."""
        weight, gate, shift = self.moving(t, fixed.constants, fixed.logits)
        if fixed.shift is not None:
            shift = fixed.shift if shift is None else shift + fixed.shift
        return Affine(weight, gate, shift)

    def affine(self, t: Tensor, size: tuple[int, ...], context: Tensor | None = None) -> Affine:
        """W, gate and shift at time ``t`` (() or (N,)) for inputs of spatial ``size`` (() for vectors)."""
        return self.at(t, self.fixed(size, context))

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The layer's value at x (N, in) or (N, in, h, w)."""
        weight, gate, shift = self.affine(t, tuple(x.shape[2:]), context)
        y = self.map.apply(weight, x)
        y = y if gate is None else y * gate
        return y if shift is None else y + shift

    def zero_(self) -> None:
        """Make the layer's output zero for every t and x ("zero initialisation")."""
        for p in self.parameters():
            nn.init.zeros_(p)

    def _spread(self, v: Tensor) -> Tensor:
        """(..., out) as a factor for the layer's output."""
        return v[..., None, None] if self.map.spatial else v

    def _gate(self, gate: nn.Linear, t: Tensor, logits: Tensor | None) -> Tensor:
        own = t[..., None] * gate.weight[:, 0] + gate.bias
        return self._spread(torch.sigmoid(own if logits is None else own + logits))


def _given(context: Tensor | None) -> Tensor:
    if context is None:
        raise ConfigError("context=None, but this field was built with context_dim > 0: pass context (N, C) or (C,)")
    return context


def _one_time(t: Tensor, name: str) -> None:
    if t.ndim:
        raise ConfigError(
            f"t has shape {tuple(t.shape)}, but a {name!r} layer generates one set of weights per time: pass a single t"
        )


class Ignore(TimeLayer):
    """W x + b: no time."""

    def __init__(self, map: Linear | Conv, context_dim: int = 0, *, context_gate: bool = True):
        super().__init__(map, context_dim, context_gate=context_gate)
        self.core = map.module()

    def moving(self, t: Tensor, constants: Constants, logits: Tensor | None = None) -> Affine:
        return Affine(_weight(self.core), None, self._spread(_bias(self.core)))


class Concat(TimeLayer):
    """W [t; x] + b, time first; a convolution sees time as plane 0, zero padding included (FFJORD, 1810.01367)."""

    def __init__(self, map: Linear | Conv, context_dim: int = 0, *, context_gate: bool = True):
        super().__init__(map, context_dim, context_gate=context_gate)
        self.core = map.module(extra=1)

    def constants(self, size: tuple[int, ...]) -> Constants:
        time, weight = self.map.split(_weight(self.core), 1)
        # the map of a constant plane t is t times that of ones: one small map for all times, not one per sample
        return weight, self.map.apply(time, time.new_ones(1, 1, *size))[0], self._spread(_bias(self.core))

    def moving(self, t: Tensor, constants: Constants, logits: Tensor | None = None) -> Affine:
        return _moving_plane(t, *constants)


class ConcatCoord(TimeLayer):
    """Convolution of [x; t; row; column], the indices plain integers; for vectors the same as concat."""

    def __init__(self, map: Linear | Conv, context_dim: int = 0, *, context_gate: bool = True):
        super().__init__(map, context_dim, context_gate=context_gate)
        self.core = map.module(extra=3 if map.spatial else 1)

    def constants(self, size: tuple[int, ...]) -> Constants:
        if not self.map.spatial:
            time, weight = self.map.split(_weight(self.core), 1)
            plane = self.map.apply(time, time.new_ones(1, 1))[0]
            rest = _bias(self.core)
        else:
            weight, extra = self.map.split(_weight(self.core), self.map.inputs)
            time, place = self.map.split(extra, 1)
            plane = self.map.apply(time, time.new_ones(1, 1, *size))[0]
            rows = torch.arange(size[0], dtype=place.dtype, device=place.device)
            columns = torch.arange(size[1], dtype=place.dtype, device=place.device)
            grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]
            rest = self.map.apply(place, grid)[0] + self._spread(_bias(self.core))
        return weight, plane, rest

    def moving(self, t: Tensor, constants: Constants, logits: Tensor | None = None) -> Affine:
        return _moving_plane(t, *constants)


class Squash(TimeLayer):
    """(W x + b) sigmoid(a t + c)."""

    has_gate = True

    def __init__(self, map: Linear | Conv, context_dim: int = 0, *, context_gate: bool = True):
        super().__init__(map, context_dim, context_gate=context_gate)
        self.core = map.module()
        self.gate = nn.Linear(1, map.outputs)

    def moving(self, t: Tensor, constants: Constants, logits: Tensor | None = None) -> Affine:
        gate = self._gate(self.gate, t, logits)
        return Affine(_weight(self.core), gate, gate * self._spread(_bias(self.core)))


class ConcatSquash(Squash):
    """(W x + b) sigmoid(a t + c) + u t, FFJORD's layer for vectors (1810.01367)."""

    def __init__(self, map: Linear | Conv, context_dim: int = 0, *, context_gate: bool = True):
        super().__init__(map, context_dim, context_gate=context_gate)
        self.drift = nn.Linear(1, map.outputs, bias=False)

    def moving(self, t: Tensor, constants: Constants, logits: Tensor | None = None) -> Affine:
        squashed = super().moving(t, constants, logits)
        shift = cast(Tensor, squashed.shift) + self._spread(t[..., None] * self.drift.weight[:, 0])
        return squashed._replace(shift=shift)


class Blend(TimeLayer):
    """y0 + (y1 - y0) t: two layers, blended over t in [0, 1]."""

    time_weights = True

    def __init__(self, map: Linear | Conv, context_dim: int = 0, *, context_gate: bool = True):
        super().__init__(map, context_dim, context_gate=context_gate)
        self.core0, self.core1 = map.module(), map.module()

    def moving(self, t: Tensor, constants: Constants, logits: Tensor | None = None) -> Affine:
        _one_time(t, "blend")
        weight = torch.lerp(_weight(self.core0), _weight(self.core1), t)
        shift = torch.lerp(_bias(self.core0), _bias(self.core1), t)
        return Affine(weight, None, self._spread(shift))


class Hyper(TimeLayer):
    """Weights generated from t: by a small tanh net (vectors) or linearly in t (convolutions), as in FFJORD.

    Weight and bias have slices of their own; the released convolution reads its bias from the start of the weight and
    never uses the last entries (reference checkpoints are converted by ``cnf.compat``).
    """

    time_weights = True
    hidden = 8  # width of the published generator

    def __init__(self, map: Linear | Conv, context_dim: int = 0, *, context_gate: bool = True):
        super().__init__(map, context_dim, context_gate=context_gate)
        self.numel = torch.Size(map.weight_shape()).numel()
        total = self.numel + map.outputs
        self.generator: nn.Module
        if map.spatial:
            self.generator = nn.Linear(1, total)
            last = self.generator
        else:
            last = nn.Linear(self.hidden, total)
            self.generator = nn.Sequential(nn.Linear(1, self.hidden), nn.Tanh(), last)
        self._last = (last,)  # in a tuple, so that it is not registered twice
        nn.init.zeros_(last.weight)
        nn.init.normal_(last.bias, 0.0, 0.01)

    def zero_(self) -> None:
        # the generator's first layer keeps its values, or nothing would ever move the weights away from constants
        for p in (*self._last[0].parameters(), *(self.context_shift.parameters() if self.context_shift else ())):
            nn.init.zeros_(p)

    def moving(self, t: Tensor, constants: Constants, logits: Tensor | None = None) -> Affine:
        _one_time(t, "hyper")
        flat = self.generator(t.reshape(1))
        if self.map.spatial:
            weight, bias = flat[: self.numel], flat[self.numel :]
        else:  # the published order for vectors: bias first
            bias, weight = flat[: self.map.outputs], flat[self.map.outputs :]
        return Affine(weight.reshape(self.map.weight_shape()), None, self._spread(bias))


LAYERS: dict[str, type[TimeLayer]] = {
    "ignore": Ignore,
    "concat": Concat,
    "squash": Squash,
    "concatsquash": ConcatSquash,
    "concatcoord": ConcatCoord,
    "blend": Blend,
    "hyper": Hyper,
}


class LayerFactory(Protocol):
    """Makes a layer around a linear map: what a field takes in place of a layer's name."""

    def __call__(self, map: Linear | Conv, context_dim: int = 0, *, context_gate: bool = True) -> TimeLayer:
        """The layer."""


def time_layer(
    kind: str | LayerFactory, map: Linear | Conv, context_dim: int = 0, *, context_gate: bool = True
) -> TimeLayer:
    """The layer of that kind around a linear map; a factory, such as :class:`~cnf.fields.Drive`, makes its own.

    Raises:
        ConfigError: for an unknown kind; the nearest is suggested.

    Example:
        >>> layer = time_layer("concatsquash", Linear(2, 64))
        >>> layer(torch.tensor(0.5), torch.randn(7, 2)).shape
        torch.Size([7, 64])
    """
    if not isinstance(kind, str):
        return kind(map, context_dim, context_gate=context_gate)
    if kind not in LAYERS:
        near = get_close_matches(str(kind), LAYERS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"layer={kind!r} is unknown: expected one of {', '.join(LAYERS)}{hint}")
    return LAYERS[kind](map, context_dim, context_gate=context_gate)


def _moving_plane(t: Tensor, weight: Tensor, plane: Tensor, rest: Tensor) -> Affine:
    """A shift that grows with t."""
    return Affine(weight, None, t.reshape(*t.shape, *(1,) * plane.ndim) * plane + rest)


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight)


def _bias(module: nn.Module) -> Tensor:
    return cast(Tensor, module.bias)
