"""Predictors built from settings."""

from __future__ import annotations

import math

from torch import nn

from cnf._utils.errors import ConfigError
from cnf.config import NeuralODEConfig, PredictorConvConfig, ResNetConfig, SolverConfig, VaryingDepthConfig
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
    model: NeuralODEConfig | ResNetConfig, solver: SolverConfig, event_shape: tuple[int, ...], *, outputs: int, levels: int | None = None
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
        >>> anode = NeuralODEConfig.of(field="conv", hidden=(64, 64), strides=(0, 1, 0), time_conditioning="ignore",
        ...                            nonlinearity="relu", zero_init=False, augment=5)
        >>> model = build_predictor(anode, SolverConfig(), (1, 28, 28), outputs=10, levels=256)
        >>> sum(p.numel() for p in model.parameters())
        84816
    """
    if not isinstance(model, NeuralODEConfig | ResNetConfig):
        raise ConfigError(f"architecture={getattr(model, 'architecture', model)!r} is a density; to predict takes NeuralODEConfig or ResNetConfig")
    if isinstance(model, ResNetConfig):
        made: Predictor = _resnet(model, event_shape, outputs, levels)
    else:
        made = _node(model, solver, event_shape, outputs, levels)
    made.__dict__["built"] = {
        "model": model, "solver": solver, "event_shape": tuple(event_shape), "levels": levels, "width": outputs, "predicts": True,
    }  # fmt: skip
    return made


def _resnet(model: ResNetConfig, event_shape: tuple[int, ...], outputs: int, levels: int | None) -> ResidualNet:
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
    model: NeuralODEConfig, solver: SolverConfig, event_shape: tuple[int, ...], outputs: int, levels: int | None
) -> NeuralODE:
    settings, depth, layer = model.field, model.depth, _layer(model)
    pieces = depth.depth_terms if isinstance(depth, VaryingDepthConfig) and depth.kind == "stacked" else 1
    if model.adaptive_depth and (isinstance(layer, str) is False or layer in _ONE_TIME):
        what = f"depth={depth.kind!r}" if depth.kind in ("chebyshev", "fourier") else f"time_conditioning={settings.time_conditioning!r}"
        raise ConfigError(f"{what} has one set of weights per time, and adaptive_depth gives every sample its own: leave one out")
    conv = isinstance(settings, PredictorConvConfig)
    shape = event_shape if conv else (math.prod(event_shape),)
    if conv and len(shape) != 3:
        raise ConfigError(f"field='conv' needs images, but an event has shape {event_shape}: use field='mlp'")
    control = shape[0] if model.data_control else 0
    width = shape[0] + model.augment

    def field() -> nn.Module:
        if isinstance(settings, PredictorConvConfig):
            strides = settings.strides or (1,) * (len(settings.hidden) + 1)
            maps, layers = conv_maps(width, settings.hidden, layer, strides, control)
        else:
            maps, layers = mlp_maps(width, settings.hidden, layer, control)
        return ODENet(maps, layers, settings.nonlinearity, settings.zero_init)

    return NeuralODE(
        [field() for _ in range(pieces)],
        event_shape,
        outputs,
        flatten=not conv,
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


def _layer(model: NeuralODEConfig) -> str | LayerFactory:
    """Return the layer type, or the layer factory of a depth basis."""
    depth, layer = model.depth, model.field.time_conditioning
    if not isinstance(depth, VaryingDepthConfig):
        return layer
    if depth.depth_terms < 2:
        raise ConfigError(f"depth_terms={depth.depth_terms}: depth={depth.kind!r} takes at least 2, else weights are constant")
    if depth.kind == "stacked":
        return layer
    if layer != "ignore":
        raise ConfigError(f"time_conditioning={layer!r}: with depth={depth.kind!r} time enters by the weights; use time_conditioning='ignore'")
    if model.learn_end_time:
        raise ConfigError(f"learn_end_time=True: the basis of depth={depth.kind!r} lives on [0, end_time]; leave it False")
    return galerkin(depth.kind, depth.depth_terms, model.end_time)
