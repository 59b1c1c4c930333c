"""Time layers by name."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from cnf._utils.errors import unknown_name
from cnf.fields.maps import Conv, Linear
from cnf.fields.time import Affine, Constants, LayerFactory, TimeLayer, planes, require_one_time

__all__ = ["LAYERS", "Hyper", "LayerFactory", "time_layer"]


class Ignore(TimeLayer):
    """W x + b, independent of t."""

    time_dependent = False

    def build(self, map: Linear | Conv) -> None:
        self.core = map.module()

    def params_at(self, t: Tensor, constants: Constants, logits: Tensor | None = None) -> Affine:
        return Affine(self.core.weight, None, self._spread(self.core.bias))

    def called(self, t: Tensor, x: Tensor, logits: Tensor | None) -> Tensor:
        return cast(Tensor, self.core(x))


class Concat(TimeLayer):
    """W [t; x] + b with time first; in a convolution t is plane 0, zero-padded like x (FFJORD, 1810.01367)."""

    def build(self, map: Linear | Conv) -> None:
        self.core = map.module(extra=1)

    def constants(self, size: tuple[int, ...]) -> Constants:
        time, weight = self.map.split(self.core.weight, 1)
        # the map of a constant plane t is t times that of ones: one small map for all times, not one per row
        return weight, self.map.apply(time, time.new_ones(1, 1, *size))[0], self._spread(self.core.bias)

    def params_at(self, t: Tensor, constants: Constants, logits: Tensor | None = None) -> Affine:
        weight, plane, rest = constants
        return Affine(weight, None, t.reshape(*t.shape, *(1,) * plane.ndim) * plane + rest)

    def called(self, t: Tensor, x: Tensor, logits: Tensor | None) -> Tensor:
        return cast(Tensor, self.core(torch.cat([planes(t[..., None], x), x], 1)))


class ConcatCoord(Concat):
    """Convolution of [x; t; row; column] with integer pixel indices; for vectors the same as concat."""

    def build(self, map: Linear | Conv) -> None:
        self.core = map.module(extra=3 if map.spatial else 1)

    def constants(self, size: tuple[int, ...]) -> Constants:
        if not self.map.spatial:
            return super().constants(size)
        weight, extra = self.map.split(self.core.weight, self.map.inputs)
        time, coordinates = self.map.split(extra, 1)
        plane = self.map.apply(time, time.new_ones(1, 1, *size))[0]
        return weight, plane, self.map.apply(coordinates, _pixels(size, time))[0] + self._spread(self.core.bias)

    def called(self, t: Tensor, x: Tensor, logits: Tensor | None) -> Tensor:
        if not self.map.spatial:
            return super().called(t, x, logits)
        pixels = _pixels(tuple(x.shape[2:]), x).expand(len(x), -1, -1, -1)
        return cast(Tensor, self.core(torch.cat([x, planes(t[..., None], x), pixels], 1)))


class Squash(TimeLayer):
    """(W x + b) sigmoid(a t + c), and in subclasses with a drift + u t."""

    has_gate = True

    def build(self, map: Linear | Conv) -> None:
        self.core = map.module()
        self.gate = nn.Linear(1, map.outputs)
        self.drift: nn.Linear | None = None

    def params_at(self, t: Tensor, constants: Constants, logits: Tensor | None = None) -> Affine:
        slope = self.gate.weight[:, 0]
        own = t[..., None] * slope + self.gate.bias
        gate = self._spread(torch.sigmoid(own if logits is None else own + logits))
        shift = gate * self._spread(self.core.bias)
        if self.drift is not None:
            shift = shift + self._spread(t[..., None] * self.drift.weight[:, 0])
        return Affine(self.core.weight, gate, shift)

    def called(self, t: Tensor, x: Tensor, logits: Tensor | None) -> Tensor:
        own = self.gate(t[..., None])
        y = cast(Tensor, self.core(x) * self._spread(torch.sigmoid(own if logits is None else own + logits)))
        return y if self.drift is None else y + self._spread(self.drift(t[..., None]))


class ConcatSquash(Squash):
    """(W x + b) sigmoid(a t + c) + u t: FFJORD's layer for vectors (1810.01367)."""

    def build(self, map: Linear | Conv) -> None:
        super().build(map)
        self.drift = nn.Linear(1, map.outputs, bias=False)


class Blend(TimeLayer):
    """y0 + (y1 - y0) t: linear interpolation between two layers over t in [0, 1]."""

    time_weights = True

    def build(self, map: Linear | Conv) -> None:
        self.core0, self.core1 = map.module(), map.module()

    def params_at(self, t: Tensor, constants: Constants, logits: Tensor | None = None) -> Affine:
        require_one_time(t, "blend")
        weight = torch.lerp(self.core0.weight, self.core1.weight, t)
        shift = torch.lerp(self.core0.bias, self.core1.bias, t)
        return Affine(weight, None, self._spread(shift))

    def called(self, t: Tensor, x: Tensor, logits: Tensor | None) -> Tensor:
        require_one_time(t, "blend")
        return torch.lerp(self.core0(x), self.core1(x), t)


class Hyper(TimeLayer):
    """Weights generated from t: by a small tanh net for vectors, linearly in t for convolutions (FFJORD, 1810.01367).

    Weight and bias use separate slices of the output; the released convolution reads its bias from the start of the
    weight and never uses the last entries (``cnf.compat`` converts reference checkpoints).
    """

    time_weights = True
    hidden = 8  # width of the published generator

    def build(self, map: Linear | Conv) -> None:
        self.numel = torch.Size(map.weight_shape()).numel()
        total = self.numel + map.outputs
        self.generator: nn.Module
        if map.spatial:
            self.generator = nn.Linear(1, total)
            last = self.generator
        else:
            last = nn.Linear(self.hidden, total)
            self.generator = nn.Sequential(nn.Linear(1, self.hidden), nn.Tanh(), last)
        self._last = (last,)  # in a tuple: not registered twice
        nn.init.zeros_(last.weight)
        nn.init.normal_(last.bias, 0.0, 0.01)

    def zero_(self) -> None:
        # the generator's first layer keeps its values: with all zero, its gradients would stay zero
        for p in (*self._last[0].parameters(), *(self.context_shift.parameters() if self.context_shift else ())):
            nn.init.zeros_(p)

    def params_at(self, t: Tensor, constants: Constants, logits: Tensor | None = None) -> Affine:
        require_one_time(t, "hyper")
        flat = self.generator(t.reshape(1))
        if self.map.spatial:
            weight, bias = flat[: self.numel], flat[self.numel :]
        else:  # published order for vectors: bias first
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


def time_layer(
    kind: str | LayerFactory, map: Linear | Conv, context_dim: int = 0, *, context_gate: bool = True
) -> TimeLayer:
    """Return the layer of that kind around a linear map; a factory, such as :class:`~cnf.fields.AugmentedTimeConditioning`, is called.

    Raises:
        ConfigError: for an unknown kind; the message suggests the nearest one.

    Example:
        >>> layer = time_layer("concatsquash", Linear(2, 64))
        >>> layer(torch.tensor(0.5), torch.randn(7, 2)).shape
        torch.Size([7, 64])
    """
    if not isinstance(kind, str):
        return kind(map, context_dim, context_gate=context_gate)
    if kind not in LAYERS:
        raise unknown_name("layer", kind, LAYERS)
    return LAYERS[kind](map, context_dim, context_gate=context_gate)


def _pixels(size: tuple[int, ...], like: Tensor) -> Tensor:
    """Return row and column indices (1, 2, h, w) of an image's pixels."""
    rows, columns = (torch.arange(n, dtype=like.dtype, device=like.device) for n in size)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]
