"""Vector fields of neural ODEs as predictors: stacks of time-dependent layers, optionally with data control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from cnf._utils.errors import ConfigError
from cnf.fields.activations import activation
from cnf.fields.base import VectorField, intact, structure
from cnf.fields.layers import LayerFactory, time_layer
from cnf.fields.maps import Conv, Linear
from cnf.fields.precomputed import PrecomputedField, call_layers
from cnf.fields.time import TimeLayer

__all__ = ["ODENet", "conv_maps", "mlp_maps"]


class ODENet(VectorField):
    """Vector field f(t, x), or f(t, x, x₀) with x₀ concatenated after x: a stack of time-dependent layers.

    Args:
        maps: linear maps in order; the first takes the entries of x and of the control, the last returns those of x.
        layers: time conditioning of each map: a name of :data:`cnf.fields.LAYERS`, or a layer factory.
        nonlinearity: activation between the maps (none after the last).
        zero_init: initialise to f = 0.
    """

    def __init__(
        self,
        maps: Sequence[Linear | Conv],
        layers: Sequence[str | LayerFactory],
        nonlinearity: str = "relu",
        zero_init: bool = False,
    ):
        super().__init__()
        self.layers = nn.ModuleList(time_layer(kind, map) for kind, map in zip(layers, maps, strict=True))
        self.activation = activation(nonlinearity)
        self.built = structure(self)
        if zero_init:
            cast(TimeLayer, self.layers[-1]).zero_()

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt at x (N, \\*state) and t () or (N,); ``context`` is x₀ (N, \\*event) with data control."""
        h = x if context is None else torch.cat([x, context], 1)
        layers = [cast(TimeLayer, layer) for layer in self.layers]
        if not intact(self):
            return call_layers(layers, self.activation, t, h)
        return self._precomputed(h).value(t, h)

    def jvp(
        self, t: Tensor, x: Tensor, v: Tensor, context: Tensor | None = None, *, t_dot: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return f and J v + t_dot ∂f/∂t for K stacked tangents, point and tangents in one batch; see :meth:`VectorField.jvp`.

        With data control, or one time per row, by forward-mode autodiff.
        """
        if context is not None or t.ndim or not intact(self):
            return super().jvp(t, x, v, context, t_dot=t_dot)
        return self._precomputed(x).jvp(t, x, v, t_dot=t_dot)

    def _precomputed(self, h: Tensor) -> PrecomputedField:
        layers = [cast(TimeLayer, layer) for layer in self.layers]
        size = tuple(h.shape[2:]) if layers[0].map.spatial else ()
        return PrecomputedField(layers, self.activation, size, None)


def mlp_maps(
    dim: int, hidden: Sequence[int], layer: str | LayerFactory, control: int = 0
) -> tuple[list[Linear | Conv], list[str | LayerFactory]]:
    """Return linear maps dim + control -> hidden -> dim and their layers: a name for the first map only, or a factory.

    Raises:
        ConfigError: for sizes below one.
    """
    sizes = _sizes(dim, control, hidden)
    maps: list[Linear | Conv] = [Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    rest: str | LayerFactory = "ignore" if isinstance(layer, str) else layer
    return maps, [layer, *[rest] * (len(maps) - 1)]


def conv_maps(
    channels: int, hidden: Sequence[int], layer: str | LayerFactory, strides: Sequence[int], control: int = 0
) -> tuple[list[Linear | Conv], list[str | LayerFactory]]:
    """Return convolutions channels + control -> hidden -> channels, and their layers.

    Raises:
        ConfigError: for sizes below one, or strides of another number or that do not restore the image size.
    """
    sizes = _sizes(channels, control, hidden)
    if len(strides) != len(sizes) - 1:
        raise ConfigError(f"strides={tuple(strides)} has {len(strides)} entries; expected {len(sizes) - 1}, one a layer")
    if strides.count(2) != strides.count(-2):
        raise ConfigError(f"strides={tuple(strides)} does not lead back to the image's size: give as many 2 as -2")
    pairs = zip(sizes, sizes[1:], strides, strict=False)
    maps: list[Linear | Conv] = [Conv.of_stride(a, b, s) for a, b, s in pairs]
    return maps, [layer] * len(maps)


def _sizes(width: int, control: int, hidden: Sequence[int]) -> list[int]:
    if width < 1 or any(h < 1 for h in hidden):
        raise ConfigError(f"hidden={tuple(hidden)} between states of {width}: every size must be at least 1")
    return [width + control, *hidden, width]
