"""Flows from plain settings: what a run folder's config.json describes and rebuilds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from cnf.continuous import CNF
from cnf.divergence import Divergence, Exact, Hutchinson
from cnf.errors import ConfigError
from cnf.fields import MLP, ConvField
from cnf.flow import Flow
from cnf.solvers import Adaptive, FixedGrid, Solver
from cnf.transforms import Dequantize, Logit, Sequential, Standardize, Transform

__all__ = ["ModelConfig", "SolverConfig", "build", "divergence", "eval_solver", "train_solver"]


@dataclass(frozen=True)
class ModelConfig:
    """The flow's architecture."""

    field: Literal["mlp", "conv"] = "mlp"
    """Vector field: fully connected, or convolutional (images only)."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths (or channels) of the hidden layers; one or two give an MLP a closed-form exact trace."""
    blocks: int = 1
    """Number of CNF blocks, one after another."""
    layer: str = "concatsquash"
    """How time enters: ignore, concat, squash, concatsquash, concatcoord, blend, hyper."""
    nonlinearity: str = "tanh"
    """Activation: tanh, softplus, elu, swish, relu."""
    residual: Literal["none", "minus", "linear"] = "none"
    """Added to the field: nothing, -x, or a learned linear map (MLP only)."""
    zero_init: bool = True
    """Start as the identity (f = 0), as RNODE does."""
    end_time: float = 1.0
    """Integration time T of each block."""
    learn_end_time: bool = False
    """Learn T."""
    alpha: float = 0.01
    """Margin of the logit transform of images."""
    standardize: bool = True
    """Images: standardise every pixel in logit space by the training data, so that the flow starts near the data."""
    base_std: float = 1.0
    """Standard deviation of the base distribution."""


@dataclass(frozen=True)
class SolverConfig:
    """How the ODE is solved and the trace taken."""

    method: str = "rk4"
    """Training: a fixed grid (euler, midpoint, heun, rk4, rk4-classic), or an adaptive method with --adaptive."""
    grid_steps: int = 4
    """Training: steps of the fixed grid, per block (the watch may raise it)."""
    adaptive: bool = False
    """Training: solve adaptively (method dopri5, dopri8, bosh3, ...) instead of on a grid."""
    gradient: Literal["direct", "checkpoint", "adjoint"] = "direct"
    """Training gradient: direct; checkpoint (grids); adjoint (adaptive)."""
    rtol: float = 1e-5
    """Training: relative tolerance of an adaptive method."""
    atol: float = 1e-5
    """Training: absolute tolerance of an adaptive method."""
    eval_method: str = "dopri5"
    """Evaluation and sampling: an adaptive method."""
    eval_rtol: float = 1e-5
    """Evaluation: relative tolerance."""
    eval_atol: float = 1e-5
    """Evaluation: absolute tolerance."""
    divergence: Literal["exact", "hutchinson"] = "exact"
    """The trace: exact, or Hutchinson's estimate."""
    probe: Literal["rademacher", "gaussian"] = "rademacher"
    """Hutchinson's probe."""
    mode: Literal["forward", "reverse"] = "forward"
    """Hutchinson's product: J e or eᵀJ."""
    probes: int = 1
    """Hutchinson's number of probes."""
    steer: float = 0.0
    """Half-width of a random end time in training (STEER)."""


def train_solver(config: SolverConfig, grid_steps: int | None = None) -> Solver:
    """The solver that training uses."""
    if config.adaptive:
        gradient = "adjoint" if config.gradient == "adjoint" else "direct"
        method = "dopri5" if config.method == "rk4" else config.method
        return Adaptive(method, config.rtol, config.atol, gradient)
    return FixedGrid(config.method, grid_steps or config.grid_steps, config.gradient)


def eval_solver(config: SolverConfig) -> Solver:
    """The solver that every reported figure uses."""
    return Adaptive(config.eval_method, config.eval_rtol, config.eval_atol, max_steps=10_000)


def divergence(config: SolverConfig) -> Divergence:
    """The trace's estimator."""
    if config.divergence == "exact":
        return Exact()
    return Hutchinson(config.probe, config.mode, config.probes)


def build(
    model: ModelConfig,
    solver: SolverConfig,
    event_shape: tuple[int, ...],
    *,
    levels: int | None = None,
    context_dim: int = 0,
) -> Flow:
    """The flow of these settings for events of one shape: images where ``levels`` is given, vectors otherwise.

    Args:
        model: architecture.
        solver: solvers and trace.
        event_shape: (D,) for vectors, (C, H, W) for images.
        levels: grey levels of images (Dequantize and Logit stand first then); None for vectors (Standardize stands first,
            its statistics set by ``flow.fit_statistics``).
        context_dim: size of the context, 0 for none.

    Raises:
        ConfigError: for settings that do not fit each other.

    Example:
        >>> flow = build(ModelConfig(hidden=(32,)), SolverConfig(), (2,))
        >>> sum(p.numel() for p in flow.parameters())
        298
    """
    if model.blocks < 1:
        raise ConfigError(f"blocks={model.blocks}; expected at least 1")
    first: list[Transform]
    if levels is None:
        first = [Standardize(torch.zeros(event_shape), torch.ones(event_shape))]
    else:
        first = [Dequantize(levels), Logit(model.alpha)]
        if model.standardize:
            first.append(Standardize(torch.zeros(event_shape), torch.ones(event_shape)))
    blocks = []
    for _ in range(model.blocks):
        field: torch.nn.Module
        if model.field == "conv":
            if len(event_shape) != 3:
                raise ConfigError(f"field='conv' needs images, but an event has shape {event_shape}: use field='mlp'")
            field = ConvField(
                event_shape[0], model.hidden, model.layer, model.nonlinearity, None, context_dim, model.residual, model.zero_init
            )
        else:
            field = MLP(
                math.prod(event_shape),
                model.hidden,
                model.layer,
                model.nonlinearity,
                context_dim,
                model.residual,
                model.zero_init,
            )
        blocks.append(
            CNF(
                field,
                divergence(solver),
                train_solver(solver),
                eval_solver(solver),
                end_time=model.end_time,
                learn_end_time=model.learn_end_time,
                steer=solver.steer,
            )
        )
    return Flow(Sequential([*first, *blocks]), event_shape, base_std=model.base_std)
