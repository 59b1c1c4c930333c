"""ANODE's models (1904.01681) of vectors and images; without augmentation plain neural ODEs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cnf.neural_ode.neural_ode import NeuralODE
from cnf.neural_ode.odenet import ODENet, conv_maps, mlp_maps

__all__ = ["anode_conv", "anode_mlp"]


def _layer(time_dependent: bool | None, options: Mapping[str, Any]) -> str:
    """Return the layer type; by default time enters only with adaptive depth, which needs it."""
    return "concat" if (options.get("adaptive_depth", False) if time_dependent is None else time_dependent) else "ignore"


def anode_mlp(
    dim: int,
    hidden: int = 32,
    outputs: int = 1,
    augment: int = 0,
    *,
    time_dependent: bool | None = None,
    nonlinearity: str = "relu",
    **options: Any,
) -> NeuralODE:
    """Build ANODE's model of vectors (1904.01681): three linear layers, time in the first; ``augment=0`` is a NODE.

    Args:
        dim: dimension of the inputs.
        hidden: width of both hidden layers.
        outputs: number of outputs.
        augment: p, number of zero features appended.
        time_dependent: condition the first layer on t, unlike the published runs; by default only with
            ``adaptive_depth``.
        nonlinearity: ``"relu"`` or ``"softplus"`` as published.
        options: keyword arguments of :class:`NeuralODE`.

    Raises:
        ConfigError: as :class:`NeuralODE`.

    Example:
        >>> [sum(p.numel() for p in anode_mlp(1, augment=p, time_dependent=True).parameters()) for p in (0, 5)]
        [1187, 1517]
    """
    maps, layers = mlp_maps(dim + max(0, augment), (hidden, hidden), _layer(time_dependent, options))
    return NeuralODE(ODENet(maps, layers, nonlinearity), (dim,), outputs, augment=augment, **options)


def anode_conv(
    event_shape: tuple[int, int, int],
    filters: int = 64,
    outputs: int = 10,
    augment: int = 0,
    *,
    time_dependent: bool | None = None,
    nonlinearity: str = "relu",
    **options: Any,
) -> NeuralODE:
    """Build ANODE's model of images (1904.01681): 1x1, 3x3 and 1x1 convolutions; ``augment=0`` is a NODE.

    Args:
        event_shape: (C, H, W).
        filters: channels of both hidden layers.
        outputs: number of outputs.
        augment: p, number of zero channels appended.
        time_dependent: append t as a channel in every convolution, unlike the published counts; by default only with
            ``adaptive_depth``.
        nonlinearity: ``"relu"`` or ``"softplus"`` as published.
        options: keyword arguments of :class:`NeuralODE`.

    Raises:
        ConfigError: as :class:`NeuralODE`.

    Example:
        >>> [sum(p.numel() for p in anode_conv((1, 28, 28), k, augment=p).parameters()) for k, p in ((92, 0), (64, 5))]
        [84395, 84816]
    """
    maps, layers = conv_maps(
        event_shape[0] + max(0, augment), (filters, filters), _layer(time_dependent, options), (0, 1, 0)
    )
    return NeuralODE(ODENet(maps, layers, nonlinearity), event_shape, outputs, augment=augment, **options)
