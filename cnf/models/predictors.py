"""Predictors built from settings."""

from __future__ import annotations

import math

from torch import nn

from cnf._utils.errors import ConfigError
from cnf.config import PREDICTIVE, ModelConfig, SolverConfig
from cnf.fields.depth import galerkin
from cnf.fields.layers import LayerFactory
from cnf.models.solving import eval_solver, train_solver
from cnf.neural_ode.neural_ode import NeuralODE
from cnf.neural_ode.odenet import ODENet, conv_maps, mlp_maps
from cnf.neural_ode.predictor import Predictor
from cnf.neural_ode.residual import ResidualNet

__all__ = ["build_predictor"]

_ONE_TIME = ("blend", "hyper")  # layers with one set of weights per time


def build_predictor(
    model: ModelConfig, solver: SolverConfig, event_shape: tuple[int, ...], *, outputs: int, levels: int | None = None
) -> Predictor:
    """Build the predictor of these settings, with ``outputs`` outputs for inputs of one shape.

    Args:
        model: architecture ``"node"`` or ``"resnet"``.
        solver: solvers.
        event_shape: (D,) for vectors, (C, H, W) for images.
        outputs: number of classes or of regression targets.
        levels: grey levels of images; None for vectors.

    Raises:
        ConfigError: for inconsistent settings, or settings without effect.

    Example:
        >>> anode = ModelConfig("node", "conv", (64, 64), strides=(0, 1, 0), layer="ignore", nonlinearity="relu",
        ...                     zero_init=False, augment=5)
        >>> model = build_predictor(anode, SolverConfig(), (1, 28, 28), outputs=10, levels=256)
        >>> sum(p.numel() for p in model.parameters())
        84816
    """
    if model.architecture not in PREDICTIVE:
        raise ConfigError(f"architecture={model.architecture!r} is a density; to predict takes {' or '.join(map(repr, PREDICTIVE))}")
    if model.field not in ("mlp", "conv"):
        raise ConfigError(f"field={model.field!r} is for densities: architecture={model.architecture!r} takes 'mlp' or 'conv'")
    if model.architecture == "resnet":
        made: Predictor = _resnet(model, event_shape, outputs, levels)
    else:
        made = _node(model, solver, event_shape, outputs, levels)
    made.__dict__["built"] = {
        "model": model, "solver": solver, "event_shape": tuple(event_shape), "levels": levels, "width": outputs, "predicts": True,
    }  # fmt: skip
    return made


def _resnet(model: ModelConfig, event_shape: tuple[int, ...], outputs: int, levels: int | None) -> ResidualNet:
    for name, value in {"field": "mlp", "layer": "ignore"}.items():
        if getattr(model, name) != value:
            raise ConfigError(f"{name}={getattr(model, name)!r}: architecture='resnet' takes {name}={value!r} alone")
    return ResidualNet(
        event_shape,
        outputs,
        model.hidden,
        model.blocks,
        nonlinearity=model.nonlinearity,
        zero_init=model.zero_init,
        head=model.head,
        levels=levels,
    )


def _node(
    model: ModelConfig, solver: SolverConfig, event_shape: tuple[int, ...], outputs: int, levels: int | None
) -> NeuralODE:
    pieces, layer = 1, _layer(model)
    if model.depth == "stacked":
        pieces = model.depth_terms
    if model.adaptive_depth and (isinstance(layer, str) is False or layer in _ONE_TIME):
        what = f"depth={model.depth!r}" if model.depth in ("chebyshev", "fourier") else f"layer={model.layer!r}"
        raise ConfigError(f"{what} has one set of weights per time, and adaptive_depth gives every sample its own: leave one out")
    shape = event_shape if model.field == "conv" else (math.prod(event_shape),)
    if model.field == "conv" and len(shape) != 3:
        raise ConfigError(f"field='conv' needs images, but an event has shape {event_shape}: use field='mlp'")
    control = shape[0] if model.data_control else 0
    width = shape[0] + model.augment

    def field() -> nn.Module:
        if model.field == "mlp":
            maps, layers = mlp_maps(width, model.hidden, layer, control)
        else:
            strides = model.strides or (1,) * (len(model.hidden) + 1)
            maps, layers = conv_maps(width, model.hidden, layer, strides, control)
        return ODENet(maps, layers, model.nonlinearity, model.zero_init)

    return NeuralODE(
        [field() for _ in range(pieces)],
        event_shape,
        outputs,
        flatten=model.field == "mlp",
        augment=model.augment,
        input_layer=model.input_layer,
        data_control=model.data_control,
        adaptive_depth=model.adaptive_depth,
        head=model.head,
        solver=train_solver(solver),
        eval_solver=eval_solver(solver),
        end_time=model.end_time,
        learn_end_time=model.learn_end_time,
        levels=levels,
    )


def _layer(model: ModelConfig) -> str | LayerFactory:
    """Return the layer type, or the layer factory of a depth basis."""
    if model.depth == "constant":
        return model.layer
    if model.depth_terms < 2:
        raise ConfigError(f"depth_terms={model.depth_terms}: depth={model.depth!r} takes at least 2, else weights are constant")
    if model.depth == "stacked":
        return model.layer
    if model.layer != "ignore":
        raise ConfigError(f"layer={model.layer!r}: with depth={model.depth!r} time enters by the weights; use layer='ignore'")
    if model.learn_end_time:
        raise ConfigError(f"learn_end_time=True: the basis of depth={model.depth!r} lives on [0, end_time]; leave it False")
    return galerkin(model.depth, model.depth_terms, model.end_time)
