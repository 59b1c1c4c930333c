"""Flows from plain settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro

from cnf.continuous import CNF
from cnf.dequantization import TruncatedNormalDequantize, VariationalDequantize
from cnf.errors import ConfigError
from cnf.fields import MLP, PERIODS, ConvField, Denoiser, Drive, Schedule, SqueezeSum, TimePath, UNet
from cnf.flow import Flow
from cnf.models.solving import SolverConfig, autocast, divergence, eval_solver, train_solver
from cnf.multiscale import multiscale
from cnf.transforms import CenterShift, Dequantize, Gaussianize, Logit, Sequential, Squeeze, Standardize, Transform

__all__ = ["ModelConfig", "build"]

PREDICTIVE = ("node", "resnet")  # architectures that predict, built by cnf.models.predictors
# what they alone read
PREDICTIVE_FIELDS = ("augment", "input_layer", "data_control", "adaptive_depth", "depth", "depth_terms", "head")
RANGE = 2.0  # of pixels with marginals="center": from -1 to 1
PARALLEL_LEVELS = 4  # nets in the field of FFJORD's multiscale-parallel model, where the size can be squeezed so often


@dataclass(frozen=True)
class ModelConfig:
    """The flow's architecture."""

    architecture: Literal["stack", "multiscale", "parallel", "node", "resnet"] = "stack"
    """Blocks one after another; FFJORD's and RNODE's multiscale chain; blocks whose fields sum nets at 4 sizes. To predict: a
    neural ODE with a linear head (--augment makes it an ANODE), or a residual net (--blocks of them)."""
    field: Literal["mlp", "conv", "unet"] = "mlp"
    """Vector field: fully connected; of images also convolutional, or a U-Net (with --dequantize truncated-normal a denoiser)."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths (or channels) of the hidden layers; one or two give an MLP a closed-form exact trace. U-Net: channels at each size."""
    blocks: Annotated[int, tyro.conf.arg(aliases=("--num-blocks",))] = 1
    """Number of CNF blocks, one after another; in a multiscale chain before and after every squeeze."""
    strides: tuple[int, ...] = ()
    """Conv: a number for each layer (one more than --hidden): 1 = 3x3, 0 = 1x1, 2 = down, -2 = up; all 1 if empty."""
    squeeze_first: bool = False
    """Images: squeeze 2x2 before the first block."""
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
    """Margin of the logit (or of the pixels' distributions), which keeps black and white finite."""
    dequantize: Literal["uniform", "variational", "truncated-normal"] = "uniform"
    """Images: noise that spreads the grey levels: uniform; learned with the model (Flow++), a tighter bound; or normal, cut off
    at the level's edges, which suits flow matching."""
    marginals: Literal["logit", "standardize", "gaussianize", "center"] = "standardize"
    """Images, before the first block: the logit alone, as published; then each pixel standardised by the training data; or in
    its place each pixel's own distribution made normal, exactly; or [0, 1] moved to [-1, 1], all pixels alike."""
    base_std: float = 1.0
    """Standard deviation of the base distribution."""
    unet_depth: int = 2
    """U-Net: residual blocks at each size, down and up."""
    attention: bool = False
    """U-Net: self-attention at the smallest size."""
    drive: Literal["none", "concat", "hyper"] = "none"
    """AFFJORD: what a learned time a(t) drives in place of t: features beside x, or a hypernetwork of all weights."""
    drive_dim: int = 20
    """--drive: size k of a."""
    drive_entries: int = 10
    """--drive hyper: entries m of a from which weights are generated."""
    drive_rank: int = 0
    """--drive hyper: 0 for a full generator (m + 1 times the weights), or the rank of a small one."""
    drive_start: Literal["zero", "learned"] = "zero"
    """--drive: a(0)."""
    augment: int = 0
    """node: zero features (channels) appended to the event."""
    input_layer: bool = False
    """node: a learned linear layer makes the first state, in place of zeros appended (IL-NODE)."""
    data_control: bool = False
    """node: the field also sees the event itself, f(t, x, x0)."""
    adaptive_depth: bool = False
    """node: each event has a learned end time T(x) > 0, --end-time at the start; time then enters the field (--layer concat,
    unless another layer is given), without which no depth can reflect a line."""
    depth: Literal["constant", "chebyshev", "fourier", "stacked"] = "constant"
    """node: weights over depth: constant (but for --layer), in a basis, or piecewise constant."""
    depth_terms: int = 1
    """node: terms of --depth's basis, or pieces if stacked."""
    head: Literal["linear", "state"] = "linear"
    """node, resnet: outputs by a linear layer on the final state, or its first entries themselves."""


def _dequantize(model: ModelConfig, levels: int, event_shape: tuple[int, ...]) -> Dequantize:
    """How grey levels become numbers."""
    if model.dequantize == "uniform":
        return Dequantize(levels)
    if len(event_shape) != 3:
        raise ConfigError(f"dequantize={model.dequantize!r} needs images (C, H, W), but an event has shape {event_shape}")
    if model.dequantize == "truncated-normal":
        return TruncatedNormalDequantize(levels)
    return VariationalDequantize(levels, event_shape[0])


def _layer(model: ModelConfig) -> str | Drive:
    """How time, or the learned time, enters the layers."""
    plain = ModelConfig()
    for name in ("drive_dim", "drive_start", "drive_entries", "drive_rank"):
        only = "hyper" if name in ("drive_entries", "drive_rank") else "concat' or 'hyper"
        if model.drive not in only.split("' or '") and getattr(model, name) != getattr(plain, name):
            raise ConfigError(f"{name}={getattr(model, name)!r} is for drive='{only}': leave it at {getattr(plain, name)!r}")
    if model.drive == "none":
        return model.layer
    entries = model.drive_entries if model.drive == "hyper" else 1
    return Drive(model.drive, model.drive_dim, entries, model.drive_rank)


def _unet(model: ModelConfig, shape: tuple[int, ...], context_dim: int, levels: int | None) -> UNet:
    """The U-Net of one block; where the images have normal noise, a denoiser on the path that begins with it."""
    plain = ModelConfig()
    for name in ("strides", "residual", "layer", "nonlinearity", "drive", "drive_dim", "drive_start", "drive_entries", "drive_rank"):
        if getattr(model, name) != getattr(plain, name):
            raise ConfigError(f"{name}={getattr(model, name)!r} is not for field='unet': leave it at {getattr(plain, name)!r}")
    if model.architecture == "parallel":
        raise ConfigError("architecture='parallel' sums plain nets at four sizes: use field='conv', or 'unet' with architecture='stack'")
    if not model.hidden:
        raise ConfigError("hidden=(): a U-Net needs the channels of one size or more, such as (64, 96)")
    unit = 2 ** (len(model.hidden) - 1)
    if shape[1] % unit or shape[2] % unit:
        raise ConfigError(
            f"hidden={model.hidden} halves {shape[1]}x{shape[2]} {len(model.hidden) - 1} times, which it does not survive: give "
            "fewer entries, or sizes that are multiples of " + str(unit)
        )
    sizes = model.hidden, model.unet_depth, model.attention, context_dim, model.zero_init
    if model.dequantize != "truncated-normal":
        return UNet(shape[0], *sizes)
    if model.marginals != "center" or model.blocks != 1 or model.architecture != "stack":
        raise ConfigError(
            "field='unet' with dequantize='truncated-normal' is one block from the pixels to the noise: give marginals='center', "
            "architecture='stack' and blocks=1"
        )
    for name in ("base_std", "end_time", "learn_end_time"):
        if getattr(model, name) != getattr(plain, name):
            raise ConfigError(
                f"{name}={getattr(model, name)!r}: a denoiser (field='unet' with dequantize='truncated-normal') runs through a path of "
                f"its own, from its data's noise to N(0, 1) in unit time: leave it at {getattr(plain, name)!r}"
            )
    assert levels is not None
    noise = RANGE * TruncatedNormalDequantize(levels).scale
    return Denoiser(shape[0], Schedule(noise), RANGE / levels, PERIODS, *sizes)


def _field(model: ModelConfig, shape: tuple[int, ...], context_dim: int, levels: int | None) -> torch.nn.Module:
    """The vector field of one block for events of ``shape``."""
    for name in ("unet_depth", "attention"):
        if model.field != "unet" and getattr(model, name) != (idle := getattr(ModelConfig(), name)):
            raise ConfigError(f"{name}={getattr(model, name)!r} is for field='unet': leave it at {idle!r}")
    if model.field == "mlp":
        for name, value, idle in (
            ("architecture", model.architecture, "stack"),
            ("strides", model.strides, ()),
            ("squeeze_first", model.squeeze_first, False),
        ):
            if value != idle:
                raise ConfigError(f"{name}={value!r} is for convolutions: use field='conv' or 'unet'")
        dim = math.prod(shape)
        return MLP(dim, model.hidden, _layer(model), model.nonlinearity, context_dim, model.residual, model.zero_init)
    if len(shape) != 3:
        raise ConfigError(f"field={model.field!r} needs images, but an event has shape {shape}: use field='mlp'")
    if model.field == "unet":
        return _unet(model, shape, context_dim, levels)

    def conv(part: tuple[int, ...]) -> ConvField:
        return ConvField(
            part[0],
            model.hidden,
            _layer(model),
            model.nonlinearity,
            _strides(model, part),
            context_dim,
            model.residual,
            model.zero_init,
        )

    if model.architecture != "parallel":
        return conv(shape)
    levels = 1
    while levels < PARALLEL_LEVELS and not any(n % 2**levels for n in shape[1:]):
        levels += 1
    if levels == 1:
        raise ConfigError(
            f"architecture='parallel' squeezes images, but {shape[1]}x{shape[2]} is odd: give even sizes, or use "
            "architecture='stack'"
        )
    return SqueezeSum([conv((4**s * shape[0], shape[1] >> s, shape[2] >> s)) for s in range(levels)])


def _strides(model: ModelConfig, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides, once the size of ``shape`` is known to survive them."""
    size = shape[1:]
    for stride in model.strides:
        if stride == 2 and any(n % 2 for n in size):
            raise ConfigError(
                f"strides={model.strides} halves {size[0]}x{size[1]} on the way through a block on events {shape}: give "
                "sizes that can be halved so often, or fewer strides of 2"
            )
        size = tuple(n // 2 if stride == 2 else 2 * n if stride == -2 else n for n in size)
    return model.strides or None


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
        ConfigError: for settings that do not fit each other, or images whose size cannot be squeezed as they ask.

    Example:
        >>> flow = build(ModelConfig(hidden=(32,)), SolverConfig(), (2,))
        >>> sum(p.numel() for p in flow.parameters())
        264
        >>> ffjord = ModelConfig("multiscale", "conv", (64, 64, 64), 1, layer="concat", nonlinearity="softplus",
        ...                      zero_init=False, learn_end_time=True, alpha=1e-6, marginals="logit")
        >>> flow = build(ffjord, SolverConfig(), (1, 28, 28), levels=256)
        >>> sum(p.numel() for p in flow.parameters()), flow.latent_shape
        (400323, (784,))
    """
    if model.architecture in PREDICTIVE:
        raise ConfigError(f"architecture={model.architecture!r} predicts and has no density: objective 'classification' or 'regression'")
    for name in PREDICTIVE_FIELDS:
        if getattr(model, name) != (idle := getattr(ModelConfig(), name)):
            raise ConfigError(f"{name}={getattr(model, name)!r} is for architecture='node': leave it at {idle!r}")
    if model.blocks < 1:
        raise ConfigError(f"blocks={model.blocks}; expected at least 1")
    if levels is None and model.dequantize != "uniform":
        raise ConfigError(f"dequantize={model.dequantize!r} is for images; these data are vectors")
    first: list[Transform]
    if levels is None:
        first = [Standardize(torch.zeros(event_shape), torch.ones(event_shape))]
    else:
        first = [_dequantize(model, levels, event_shape)]
        if model.marginals == "gaussianize":
            first.append(Gaussianize(event_shape, levels, model.alpha))
        elif model.marginals == "center":
            first.append(CenterShift(RANGE))
        else:
            first.append(Logit(model.alpha))
        if model.marginals == "standardize":
            first.append(Standardize(torch.zeros(event_shape), torch.ones(event_shape)))
    shape = event_shape
    if model.squeeze_first:
        first.append(Squeeze())
        shape = first[-1].latent_shape(shape)

    lower = autocast(solver)

    def block(shape: tuple[int, ...]) -> CNF:
        return CNF(
            _field(model, shape, context_dim, levels),
            divergence(solver),
            train_solver(solver),
            end_time=model.end_time,
            learn_end_time=model.learn_end_time,
            steer=solver.steer,
            path=None if model.drive == "none" else TimePath(model.drive_dim, learn_start=model.drive_start == "learned"),
            autocast=lower,
            compile=solver.compile,
        )

    if model.architecture == "multiscale":
        blocks: list[Transform] = [multiscale(shape, block, model.blocks)]
    else:
        blocks = [block(shape) for _ in range(model.blocks)]
    flow = Flow(Sequential([*first, *blocks]), event_shape, base_std=model.base_std)
    if solver.steer and any(hasattr(each.field, "schedule") for each in flow.blocks):
        raise ConfigError(f"steer={solver.steer}: a denoiser's path ends at t = 1: leave it at 0")
    for each in flow.blocks:
        each.eval_solver = eval_solver(solver, flow)
    return flow.double() if solver.precision == "fp64" else flow
