"""MLP and convolutional vector fields f(t, x) of time layers, with fused tangents and closed-form traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from cnf._utils.errors import ConfigError, unknown_name
from cnf.fields.activations import activation
from cnf.fields.base import FusedField, intact, structure
from cnf.fields.layers import LayerFactory, time_layer
from cnf.fields.maps import Conv, Linear
from cnf.fields.precomputed import PrecomputedField, call_layers, closed_form
from cnf.fields.time import TimeLayer
from cnf.fields.timed import skip

__all__ = ["MLP", "ConvField", "Stack", "layer_sizes"]


class Stack(FusedField):
    r"""Vector field :math:`f(t, x) = L_n(\sigma(L_{n-1}(\dots)))` of time layers.

    Args:
        layers: the time layers in order.
        nonlinearity: name of the activation between layers (none after the last).
        residual: ``"none"``; ``"minus"`` for f - x (FFJORD's ``residual``); ``"linear"`` for f + A x with a learned A,
            zero at initialisation (vectors only).

    Raises:
        ConfigError: for an unknown nonlinearity or residual, or ``"linear"`` with convolutions.
    """

    def __init__(self, layers: Sequence[TimeLayer], nonlinearity: str, residual: str = "none"):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.activation = activation(nonlinearity)
        if residual not in ("none", "minus", "linear"):
            raise unknown_name("residual", residual, ("none", "minus", "linear"))
        if residual == "linear" and layers[0].map.spatial:
            raise ConfigError("residual='linear' is for vector fields; a convolutional field takes 'none' or 'minus'")
        self.residual = residual
        dim = layers[0].map.inputs
        self.linear = nn.Parameter(torch.zeros(dim, dim)) if residual == "linear" else None
        self.context_dim = max(layer.context_dim for layer in layers)
        self.time_rows = not any(layer.time_weights for layer in layers)
        self.built = structure(self)

    @property
    def time_layers(self) -> list[TimeLayer]:
        """The time layers in order."""
        return [cast(TimeLayer, layer) for layer in self.layers]

    def zero_(self) -> None:
        """Set the last layer's output, and so f without a residual term, to zero (RNODE, 2002.02798)."""
        self.time_layers[-1].zero_()

    def precompute(self, x: Tensor, context: Tensor | None = None) -> PrecomputedField:
        """Return this field for one solve at points like x (N, \\*event), with t-independent parts precomputed."""
        size = tuple(x.shape[2:]) if self.time_layers[0].map.spatial else ()
        return PrecomputedField(self.time_layers, self.activation, size, context, self.residual, self.linear)

    def called(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """Return dx/dt by calling the layers as modules."""
        entered = x if self.time_layers[0].map.spatial else x.flatten(1)
        h = call_layers(self.layers, self.activation, t, entered, context)
        return skip(self.residual, self.linear, h, entered).reshape(x.shape)

    @property
    def closed_form(self) -> bool:
        """Whether :meth:`divergence` is available: at most two hidden layers, convolutions of stride 1, a last
        gate without context, and no hook, parametrisation or replaced layer."""
        return closed_form(self.time_layers) and intact(self)

    def divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return f (N, \\*event) and its exact divergence (N,) in closed form (see :mod:`cnf.fields.trace`).

        Raises:
            ConfigError: if no closed form exists.
        """
        if not intact(self):
            raise ConfigError("divergence has no closed form for a field with hooks, parametrised or replaced layers: use Exact(), by autodiff")
        return self.precompute(x, context).divergence(t, x)


class MLP(Stack):
    r"""Fully connected vector field for any event shape (flattened internally), with a closed-form exact trace.

    With one or two hidden layers :meth:`divergence` is exact and costs one H x H product:
    :math:`\mathrm{tr} J = s_2^\top (W_2 \circ (W_1 G_3 W_3)^\top) s_1`, with s the activations' derivatives times their
    gates. The context enters every shift and every hidden gate, but not the last gate, so that conditional fields keep
    their closed form.

    Args:
        dim: number of dimensions D of a row.
        hidden: widths of the hidden layers.
        layer: time conditioning: a name in :data:`cnf.fields.LAYERS`, or a factory such as :class:`~cnf.fields.AugmentedTimeConditioning`.
        nonlinearity: tanh, softplus, elu, swish or relu.
        context_dim: size of the context, 0 for none.
        residual: ``"none"``, ``"minus"`` or ``"linear"`` (see :class:`Stack`).
        zero_init: initialise with f = 0.

    Raises:
        ConfigError: for sizes below 1 or unknown names.

    Example:
        >>> field = MLP(2, hidden=(64, 64))
        >>> x = torch.randn(5, 2)
        >>> dx, div = field.divergence(torch.tensor(0.0), x)
        >>> dx.shape, div.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (64, 64),
        layer: str | LayerFactory = "concatsquash",
        nonlinearity: str = "tanh",
        context_dim: int = 0,
        residual: str = "none",
        zero_init: bool = False,
    ):
        sizes = layer_sizes("dim", dim, hidden)
        layers = [
            time_layer(_kind(layer, i), Linear(a, b), context_dim, context_gate=i + 2 < len(sizes))
            for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))
        ]
        super().__init__(layers, nonlinearity, residual)
        self.dim = dim
        if zero_init:
            self.zero_()

    def precompute(self, x: Tensor, context: Tensor | None = None) -> PrecomputedField:
        if x.shape[1:].numel() != self.dim:
            raise ConfigError(f"x must have dim={self.dim} entries per row for this {type(self).__name__}, got shape {tuple(x.shape)}")
        return super().precompute(x, context)


class ConvField(Stack):
    """Convolutional vector field on images (N, C, H, W), as in FFJORD (1810.01367) and RNODE (2002.02798).

    With one or two hidden layers of stride 1, :meth:`divergence` is exact and costs about one more H to H convolution.

    Args:
        channels: channels of the image.
        hidden: channels of the hidden layers.
        layer: time conditioning: a name in :data:`cnf.fields.LAYERS`, or a factory such as :class:`~cnf.fields.AugmentedTimeConditioning`.
        nonlinearity: tanh, softplus, elu, swish or relu.
        strides: one entry per layer (len(hidden) + 1): 1 = 3x3, 0 = 1x1, 2 = down, -2 = up; all 1 if None.
        context_dim: size of the context, 0 for none.
        residual: ``"none"`` or ``"minus"``.
        zero_init: initialise with f = 0.

    Raises:
        ConfigError: for sizes below 1, unknown names, or strides whose output size differs from the input size.

    Example:
        >>> field = ConvField(1, hidden=(8, 8))
        >>> field(torch.tensor(0.0), torch.randn(2, 1, 6, 4)).shape
        torch.Size([2, 1, 6, 4])
    """

    def __init__(
        self,
        channels: int,
        hidden: Sequence[int] = (64, 64, 64),
        layer: str | LayerFactory = "concat",
        nonlinearity: str = "softplus",
        strides: Sequence[int] | None = None,
        context_dim: int = 0,
        residual: str = "none",
        zero_init: bool = False,
    ):
        sizes = layer_sizes("channels", channels, hidden)
        steps = tuple(strides) if strides is not None else (1,) * (len(sizes) - 1)
        if len(steps) != len(sizes) - 1:
            raise ConfigError(f"strides must have {len(sizes) - 1} entries, one per layer, got {steps}")
        if steps.count(2) != steps.count(-2):
            raise ConfigError(f"strides must restore the image's size, with as many 2 as -2, got {steps}")
        layers = [
            time_layer(_kind(layer, i), Conv.of_stride(a, b, s), context_dim)
            for i, (a, b, s) in enumerate(zip(sizes, sizes[1:], steps, strict=False))
        ]
        super().__init__(layers, nonlinearity, residual)
        if zero_init:
            self.zero_()


def _kind(layer: str | LayerFactory, i: int) -> str | LayerFactory:
    """Return the kind of layer i; a factory may change after the first layer (``after_first``)."""
    return cast("str | LayerFactory", getattr(layer, "after_first", layer)) if i else layer


def layer_sizes(name: str, outer: int, hidden: Sequence[int]) -> list[int]:
    """Return the widths of all layers, from ``outer`` to ``outer``; raise a ConfigError unless they are whole numbers from 1."""
    sizes = [outer, *hidden, outer]
    if any(not isinstance(s, int) or s < 1 for s in sizes):
        raise ConfigError(f"{name} and hidden must be whole numbers of at least 1, got {name}={outer}, hidden={tuple(hidden)}")
    return sizes
