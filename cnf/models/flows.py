"""Flows built from settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from cnf._utils.errors import ConfigError
from cnf.bases import Base, ConditionalMixture, GaussianMixture, StandardNormal
from cnf.config import (
    CenterConfig,
    ConditionalMixtureBaseConfig,
    ConvConfig,
    FlowConfig,
    HypernetConfig,
    MarginalsConfig,
    MixtureBaseConfig,
    MLPConfig,
    SolverConfig,
    UNetConfig,
)
from cnf.fields import MLP, PERIODS, ConvField, Denoiser, Interpolant, SqueezeSum, UNet
from cnf.flow import Flow
from cnf.models.augmented import hyper_mlp, layer, time_path
from cnf.models.solving import autocast, divergence, eval_solver, train_solver
from cnf.ode.continuous import CNF
from cnf.ode.multiscale import multiscale
from cnf.transforms import (
    Dequantize,
    Gaussianize,
    Logit,
    MarginalTransform,
    Rescale,
    Sequential,
    Squeeze,
    Standardize,
    Transform,
)
from cnf.transforms.dequantization import TruncatedNormalDequantize, VariationalDequantize

__all__ = ["build", "count_parameters"]

RANGE = 2.0  # width of the pixels' range [-1, 1] with preprocess="center"
PARALLEL_LEVELS = 4  # most nets in the field of FFJORD's multiscale-parallel model; fewer if the size is odd earlier


def _dequantize(model: FlowConfig, levels: int, event_shape: tuple[int, ...]) -> Dequantize:
    """Return the dequantisation of these settings."""
    if model.dequantize == "uniform":
        return Dequantize(levels)
    if len(event_shape) != 3:
        raise ConfigError(f"dequantize={model.dequantize!r} needs images (C, H, W), but an event has shape {event_shape}")
    if model.dequantize == "truncated-normal":
        return TruncatedNormalDequantize(levels)
    return VariationalDequantize(levels, event_shape[0])


def _unet(model: FlowConfig, field: UNetConfig, shape: tuple[int, ...], context_dim: int, levels: int | None) -> UNet:
    """Build the U-Net of one block: a denoiser if the images are dequantised with truncated normal noise."""
    if model.architecture == "parallel":
        raise ConfigError("architecture='parallel' sums plain nets at four sizes: use field='conv', or 'unet' with architecture='stack'")
    if not field.hidden:
        raise ConfigError("hidden=(): a U-Net needs the channels of one size or more, such as (64, 96)")
    unit = 2 ** (len(field.hidden) - 1)
    if shape[1] % unit or shape[2] % unit:
        raise ConfigError(
            f"hidden={field.hidden} halves {shape[1]}x{shape[2]} {len(field.hidden) - 1} times, which it does not survive: give "
            "fewer entries, or sizes that are multiples of " + str(unit)
        )
    sizes = field.hidden, field.unet_depth, field.attention, context_dim, field.zero_init
    if model.dequantize != "truncated-normal":
        return UNet(shape[0], *sizes)
    if model.preprocess.kind != "center" or model.blocks != 1 or model.architecture != "stack":
        raise ConfigError(
            "field='unet' with dequantize='truncated-normal' is one block from the pixels to the noise: give preprocess='center', "
            "architecture='stack' and blocks=1"
        )
    base_std = getattr(model.base, "base_std", None)
    for name, value, idle in (("base_std", base_std, 1.0), ("end_time", model.end_time, 1.0), ("learn_end_time", model.learn_end_time, False)):
        if value != idle:
            raise ConfigError(
                f"{name}={value!r}: a denoiser (field='unet' with dequantize='truncated-normal') runs through a path of "
                f"its own, from its data's noise to N(0, 1) in unit time: leave it at {idle!r}"
            )
    assert levels is not None
    noise = RANGE * TruncatedNormalDequantize(levels).scale
    return Denoiser(shape[0], Interpolant(noise), RANGE / levels, PERIODS, *sizes)


def _field(model: FlowConfig, shape: tuple[int, ...], context_dim: int, levels: int | None) -> torch.nn.Module:
    """Build the vector field of one block for event_shape ``shape``."""
    field = model.field
    if isinstance(field, MLPConfig | HypernetConfig):
        if model.architecture != "stack":
            raise ConfigError(f"architecture={model.architecture!r} is for convolutions: use field='conv' or 'unet'")
        dim = math.prod(shape)
        if isinstance(field, HypernetConfig):
            return hyper_mlp(field, dim, context_dim)
        return MLP(dim, field.hidden, layer(field), field.nonlinearity, context_dim, field.residual, field.zero_init)
    if len(shape) != 3:
        raise ConfigError(f"field={field.kind!r} needs images, but an event has shape {shape}: use field='mlp'")
    if isinstance(field, UNetConfig):
        return _unet(model, field, shape, context_dim, levels)

    def conv(part: tuple[int, ...]) -> ConvField:
        return ConvField(
            part[0],
            field.hidden,
            layer(field),
            field.nonlinearity,
            _strides(field, part),
            context_dim,
            field.residual,
            field.zero_init,
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


def _strides(field: ConvConfig, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the strides, or None if not given, after checking that the image size can be halved as often."""
    size = shape[1:]
    for stride in field.strides:
        if stride == 2 and any(n % 2 for n in size):
            raise ConfigError(
                f"strides={field.strides} halves {size[0]}x{size[1]} on the way through a block on events {shape}: give "
                "sizes that can be halved so often, or fewer strides of 2"
            )
        size = tuple(n // 2 if stride == 2 else 2 * n if stride == -2 else n for n in size)
    return field.strides or None


def _base(model: FlowConfig, shape: tuple[int, ...], context_dim: int) -> Base:
    """Return the base density for latents of this shape."""
    if isinstance(model.base, ConditionalMixtureBaseConfig):
        if not context_dim:
            raise ConfigError("base='conditional-mixture' depends on a condition, and there is none: give --condition, or take base='mixture'")
        return ConditionalMixture(shape, model.base.components, context_dim, model.base.base_hidden)
    if isinstance(model.base, MixtureBaseConfig):
        return GaussianMixture(shape, model.base.components, model.base.covariance, model.base.train_base)
    return StandardNormal(shape, model.base.base_std)


def build(
    model: FlowConfig,
    solver: SolverConfig,
    event_shape: tuple[int, ...],
    *,
    levels: int | None = None,
    context_dim: int = 0,
    field: Callable[[tuple[int, ...], int], torch.nn.Module] | None = None,
    cells: Sequence[tuple[float, float] | None] | None = None,
) -> Flow:
    """Build the flow of these settings, for images if ``levels`` is given, otherwise for vectors.

    Args:
        model: architecture.
        solver: solvers and divergence.
        event_shape: (D,) for vectors, (C, H, W) for images.
        levels: grey levels of images, dequantised and mapped according to ``model.preprocess`` first; None for vectors,
            which are standardised first, with statistics set by ``flow.fit_statistics``.
        context_dim: size of the context, 0 for none.
        cells: (origin, step) of each dequantised column, or None for a continuous one, for ``preprocess="marginals"``.
        field: makes the vector field of a block from its event_shape and context_dim, in place of ``model.field``.

    Raises:
        ConfigError: for inconsistent settings, or images whose size cannot be squeezed as requested.

    Example:
        >>> flow = build(FlowConfig(field=MLPConfig((32,))), SolverConfig(), (2,))
        >>> sum(p.numel() for p in flow.parameters())
        264
        >>> ffjord = FlowConfig.of(architecture="multiscale", field="conv", hidden=(64, 64, 64), time_conditioning="concat",
        ...     nonlinearity="softplus", zero_init=False, learn_end_time=True, preprocess="logit", alpha=1e-6)
        >>> flow = build(ffjord, SolverConfig(), (1, 28, 28), levels=256)
        >>> sum(p.numel() for p in flow.parameters()), flow.latent_shape
        (400323, (784,))
    """
    if not isinstance(model, FlowConfig):
        raise ConfigError(f"architecture={getattr(model, 'architecture', model)!r} predicts and has no density: objective 'classification' or 'regression'")
    if levels is None and model.dequantize != "uniform":
        raise ConfigError(f"dequantize={model.dequantize!r} is for images; these data are vectors")
    first: list[Transform]
    if levels is None and isinstance(model.preprocess, MarginalsConfig):
        first = [MarginalTransform(math.prod(event_shape), knots=model.preprocess.knots, cells=cells)]
    elif levels is None:
        first = [Standardize(torch.zeros(event_shape), torch.ones(event_shape))]
    elif isinstance(model.preprocess, MarginalsConfig):
        raise ConfigError("preprocess='marginals' is for tables, and these data are images: 'gaussianize' maps each pixel's distribution")
    else:
        first = [_dequantize(model, levels, event_shape)]
        if isinstance(model.preprocess, CenterConfig):
            first.append(Rescale(RANGE))
        elif model.preprocess.kind == "gaussianize":
            first.append(Gaussianize(event_shape, levels, model.preprocess.alpha))
        else:
            first.append(Logit(model.preprocess.alpha))
        if model.preprocess.kind == "standardize":
            first.append(Standardize(torch.zeros(event_shape), torch.ones(event_shape)))
    shape = event_shape
    if isinstance(model.field, ConvConfig | UNetConfig) and model.field.squeeze_first:
        first.append(Squeeze())
        shape = first[-1].latent_shape(shape)

    lower = autocast(solver)

    def block(shape: tuple[int, ...]) -> CNF:
        return CNF(
            _field(model, shape, context_dim, levels) if field is None else field(shape, context_dim),
            divergence(solver),
            train_solver(solver),
            end_time=model.end_time,
            learn_end_time=model.learn_end_time,
            steer=solver.steer,
            path=time_path(model.field),
            autocast=lower,
            compile="solve" if solver.compile and solver.compile_unit == "solve" else solver.compile,
        )

    if model.architecture == "multiscale":
        blocks: list[Transform] = [multiscale(shape, block, model.blocks)]
    else:
        blocks = [block(shape) for _ in range(model.blocks)]
    whole = Sequential([*first, *blocks])
    flow = Flow(whole, event_shape, base=_base(model, whole.latent_shape(event_shape), context_dim))
    if solver.steer and any(isinstance(each.field, Denoiser) for each in flow.blocks):
        raise ConfigError(f"steer={solver.steer}: a denoiser's path ends at t = 1: leave it at 0")
    for each in flow.blocks:
        each.eval_solver = eval_solver(solver, flow)
    # by which cnf.save records it
    if field is None:
        flow.__dict__["built"] = {"model": model, "solver": solver, "event_shape": tuple(event_shape), "levels": levels, "width": context_dim, "predicts": False}
    return flow.double() if solver.precision == "fp64" else flow


def count_parameters(model: FlowConfig, shape: tuple[int, ...], levels: int | None = 256) -> int:
    """Return the number of parameters of a flow, without allocating them.

    Example:
        >>> from cnf.config import FFJORD
        >>> count_parameters(FFJORD, (1, 28, 28))
        800646
    """
    with torch.device("meta"):
        return sum(p.numel() for p in build(model, SolverConfig(), shape, levels=levels).parameters())
