"""Released checkpoints of FFJORD, RNODE and AFFJORD as flows with the same function."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from cnf._utils.errors import CheckpointError, ConfigError
from cnf.compat.affjord import ENTRIES, GENERATING, check_path, fill_path, released_layer, squeeze_paths
from cnf.compat.layout import Block, Layout, layout
from cnf.compat.reading import Arguments, Reference, check_shapes, read_reference
from cnf.config import AdaptiveConfig, ExactConfig, FlowConfig, GridConfig, HutchinsonConfig, SolverConfig
from cnf.config.fields import UNetConfig
from cnf.fields import Conv, SqueezeSum, Stack, TimeLayer
from cnf.fields.layers import Hyper
from cnf.flow import Flow
from cnf.models import build
from cnf.solvers import TABLEAUS, Adaptive
from cnf.transforms import Logit, Rescale

__all__ = ["Reference", "load_reference", "read_reference"]

# channels and size of the data sets known to the released scripts
IMAGES = {
    "mnist": (1, 28),
    "svhn": (3, 32),
    "cifar10": (3, 32),
    "celeba": (3, 64),
    "lsun_church": (3, 64),
    "imagenet64": (3, 64),
    "celebahq": (3, 256),
}
LARGEST = 4096  # largest image side that a checkpoint may request
LONGEST = 100_000  # most grid steps that a checkpoint may request
# our parameter names -> the released ones
NAMES = {
    "core.": "_layer.",
    "core0.": "_layer0.",
    "core1.": "_layer1.",
    "gate.": "_hyper_gate.",
    "drift.": "_hyper_bias.",
    "generator.": "_hypernet.",
}


def load_reference(
    source: str | Path | Mapping[str, Any],
    args: argparse.Namespace | Mapping[str, Any] | None = None,
    *,
    event_shape: tuple[int, ...] | None = None,
) -> Flow:
    """Load a checkpoint of FFJORD's, RNODE's or AFFJORD's code (1810.01367, 2002.02798, 2306.02731) as a flow.

    Multiscale, multiscale-parallel and stacked image models and stacks on vectors are supported, with every layer type
    that runs in the released code. A hyper convolution's bias, which the released code reads from the start of the
    weight, is copied into its own slice. The flow takes uint8 images and floats in [0, 1]. The trace is estimated in
    reverse mode, as released (exact for vectors, as in the released evaluation, and for stacks recorded with
    ``brute_force``). Evaluation uses the recorded test solver and tolerances, or dopri5 if that solver is not adaptive.
    Of AFFJORD's image models only the parts that can reach the image are kept (:mod:`cnf.compat.affjord`); a newly
    loaded one can sample, which the released code cannot.

    Args:
        source: a file, its content ``{"args": ..., "state_dict": ...}``, or a bare state dict.
        args: arguments that the file lacks, or that override its own, such as ``{"dims": "64,64,64"}``.
        event_shape: (C, H, W) or (D,), if the arguments do not determine it by the name of their data set.

    Returns:
        The flow, in evaluation mode and with the dtype of the weights.

    Raises:
        CheckpointError: for a missing or damaged file, one that holds more than weights and plain arguments (nothing in
            it is executed), another architecture, or arguments that do not match the weights.

    Example:
        >>> flow = load_reference("experiments/cnf/checkpt.pth")  # doctest: +SKIP
        >>> flow.bits_per_dim(images).mean()  # doctest: +SKIP
    """
    reference = read_reference(source, args)
    arch = layout(reference)
    shape = _event_shape(arch, reference.args, event_shape)
    nbits = reference.args.get("nbits", int, 8)
    if not 1 <= nbits <= 8:
        raise CheckpointError(f"args.nbits must be between 1 and 8, got {nbits}")
    levels = 2**nbits if arch.images else None
    try:
        model = _model(arch, reference.args)
        solver = _solver(arch, reference.args, model)
        if model.blocks > len(arch.blocks):
            raise CheckpointError(f"args.num_blocks is {model.blocks}, but the checkpoint has only {len(arch.blocks)} blocks")
        # first on the meta device: arguments that request more than the file holds must not allocate memory (with
        # levels, so that no statistics of vectors are inspected)
        with torch.device("meta"):
            _check(build(model, solver, shape, levels=256), arch)
        flow = build(model, solver, shape, levels=levels)
        if not isinstance(model.field, UNetConfig) and model.field.augmented_time.kind != "none":
            squeeze_paths(flow)
    except CheckpointError:
        raise
    except (ConfigError, RuntimeError, OverflowError, TypeError) as error:  # torch's, for absurd sizes
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"no flow can be built from the checkpoint's args: {reason[:300]}") from None
    flow = flow.to(next(iter(arch.first[0].values())).dtype)
    if arch.images and reference.args.get("alpha", float, 1e-6) <= 0:  # the released code shifts by 1/2 instead
        path = next(path for path, m in flow.named_modules() if isinstance(m, Logit))
        flow.set_submodule(path, Rescale())
    _fill(flow, arch)
    return flow.eval()


def _event_shape(arch: Layout, args: Arguments, given: tuple[int, ...] | None) -> tuple[int, ...]:
    if given is not None:
        return tuple(given)
    if not arch.images:
        last = arch.first[max(arch.first)]
        for name in ("_layer.bias", "_layer0.bias"):
            if name in last:
                return (last[name].numel(),)
        # a generator returns (in + 1) out numbers
        numbers = max(value.shape[0] for value in last.values())
        return (numbers // (args.sizes("dims")[-1] + 1),)
    data = args.get("data", str)
    if data not in IMAGES:
        raise CheckpointError(f"args.data is {data!r}, whose image size is not known: pass event_shape=(C, H, W)")
    channels, size = IMAGES[data]
    size = args.get("imagesize", int, size) if data != "imagenet64" else size
    if not 1 <= size <= LARGEST:
        raise CheckpointError(f"args.imagesize must be between 1 and {LARGEST}, got {size}")
    return (channels, size, size)


def _model(arch: Layout, args: Arguments) -> FlowConfig:
    hidden = args.sizes("dims")
    if arch.affjord and args.get("residual", bool, False):
        raise CheckpointError("args.residual is True, which AFFJORD's released code does not support")
    driven: dict[str, Any] = {"augmented_time": "hyper", "augmented_time_dim": ENTRIES, "augmented_time_entries": GENERATING}
    rnode = "zero_last" in args or "div_samples" in args
    strides: tuple[int, ...] = ()
    # FFJORD's multiscale script records --strides but ignores it
    if arch.conv and arch.kind != "parallel" and (arch.kind == "stack" or rnode):
        strides = args.sizes("strides") if "strides" in args else ()
    alpha = args.get("alpha", float, 1e-6)
    return FlowConfig.of(
        architecture=cast(Any, arch.kind),
        field="conv" if arch.conv else "mlp",
        hidden=hidden,
        blocks=args.get("num_blocks", int, 2 if rnode else 1),
        strides=() if set(strides) == {1} else strides,
        squeeze_first=args.get("squeeze_first", bool, False),
        time_conditioning=arch.layer,
        nonlinearity="softplus" if arch.kind == "parallel" else args.get("nonlinearity", str, "softplus"),
        residual="minus" if args.get("residual", bool, False) else "none",
        zero_init=False,
        end_time=_end_time(arch, args),
        learn_end_time=args.get("train_T", bool, False),
        alpha=alpha if alpha > 0 else 0.25,  # a shift replaces the logit later
        preprocess="logit",
        **(driven if arch.affjord and arch.layer == "hyper" else {}),
    )


def _end_time(arch: Layout, args: Arguments) -> float:
    """Return T as recorded, since the weights hold its rounded root, or that of the weights if T was trained."""
    roots = [float(block.root) for block in arch.blocks if block.root is not None and block.root.numel() == 1]
    if len(roots) != len(arch.blocks):
        raise CheckpointError("the checkpoint lacks a block's end time (sqrt_end_time)")
    squares = [root * root for root in roots]
    wanted: float = args.get("time_length", float, squares[0])
    if all(math.isclose(square, wanted, rel_tol=1e-5) for square in squares):
        return wanted
    if not args.get("train_T", bool, False):
        raise CheckpointError(f"args.time_length is {wanted}, but the blocks' end times are {sorted(set(squares))[:4]}")
    return squares[0]


def _solver(arch: Layout, args: Arguments, model: FlowConfig) -> SolverConfig:
    method = args.get("solver", str, "dopri5")
    rtol, atol = (args.get(name, float, 1e-5) for name in ("rtol", "atol"))
    test = args.get("test_solver", str, method)
    known = method in TABLEAUS and method != "dopri5"
    step = args.get("step_size", float, model.end_time)
    if not step > 0:
        raise CheckpointError(f"args.step_size must be positive, got {step}")
    if known and model.end_time / step > LONGEST:
        raise CheckpointError(f"args.step_size must be at least {model.end_time / LONGEST:g}, got {step}")
    # the multiscale script records --divergence_fn but ignores it; vectors are evaluated with the exact trace
    exact = not arch.images or (arch.kind == "stack" and args.get("divergence_fn", str, "approximate") == "brute_force")
    train: GridConfig | AdaptiveConfig
    if known:
        train = GridConfig(method=cast(Any, method), grid_steps=max(1, math.ceil(model.end_time / step - 1e-9)))
    else:
        train = AdaptiveConfig(method=cast(Any, method if method in Adaptive.METHODS else "dopri5"), rtol=rtol, atol=atol)
    noise: Any = "rademacher" if args.get("rademacher", bool, False) else "gaussian"
    estimate = HutchinsonConfig(hutchinson_noise=noise, hutchinson_mode="reverse", probes=args.get("div_samples", int, 1))
    return SolverConfig(
        train_solver=train,
        eval_method=cast(Any, test if test in Adaptive.METHODS else "dopri5"),
        # the released scripts treat zero as not given
        eval_rtol=args.get("test_rtol", float, rtol) or rtol,
        eval_atol=args.get("test_atol", float, atol) or atol,
        divergence=ExactConfig() if exact else estimate,
    )


def _nets(field: nn.Module) -> list[Stack]:
    return [cast(Stack, net) for net in field.nets] if isinstance(field, SqueezeSum) else [cast(Stack, field)]


def _pairs(flow: Flow, arch: Layout) -> Iterable[tuple[Block, TimeLayer, dict[str, Tensor]]]:
    """Yield every layer of the flow with its released block and parameters."""
    if len(flow.blocks) != len(arch.blocks):
        raise CheckpointError(
            f"args and image size give {len(flow.blocks)} blocks, but the checkpoint has {len(arch.blocks)}: check args.num_blocks "
            "and event_shape"
        )
    for ours, block in zip(flow.blocks, arch.blocks, strict=True):
        nets = _nets(ours.field)
        if len(nets) != len(block.nets):
            raise CheckpointError(f"the checkpoint's fields sum {len(block.nets)} nets, but images of this size take {len(nets)}")
        for k, net in enumerate(nets):
            if len(net.time_layers) != len(block.nets[k]):
                raise CheckpointError(
                    f"args.dims gives {len(net.time_layers)} layers, but the checkpoint's block {block.name} has {len(block.nets[k])}"
                )
            for j, layer in enumerate(net.time_layers):
                weights = block.nets[k][j]
                if arch.affjord:
                    where = f"the checkpoint's block {block.name}, layer {j}"
                    check_path(block.path, where)
                    last = j + 1 == len(block.nets[0])
                    weights = released_layer(weights, cast(Conv, layer.map), first=j == 0, last=last, where=where)
                yield block, layer, weights


def _check(flow: Flow, arch: Layout) -> None:
    """Validate the names and shapes of the weights."""
    for block, layer, weights in _pairs(flow, arch):
        shapes = {_name(name, weights): tuple(p.shape) for name, p in layer.named_parameters()}
        advice = ": the architecture differs, or args.dims, args.strides or event_shape is wrong"
        check_shapes(weights, shapes, f"the checkpoint's block {block.name}", advice)


def _name(ours: str, given: Mapping[str, Tensor]) -> str:
    if ours in given:
        return ours
    start = ours.split(".", 1)[0] + "."
    name = NAMES[start] + ours.removeprefix(start)
    # squash has a single generator, which the released code does not call a gate
    return name if name in given or start != "gate." else name.replace("_hyper_gate", "_hyper")


@torch.no_grad()
def _fill(flow: Flow, arch: Layout) -> None:
    """Copy the released weights into the flow."""
    for _, layer, weights in _pairs(flow, arch):
        for name, parameter in layer.named_parameters():
            parameter.copy_(weights[_name(name, weights)])
        if isinstance(layer, Hyper) and layer.map.spatial:
            # the released bias is the generator's first entries, the start of the weight; ours are the last ones
            out = layer.map.outputs
            for parameter in layer.generator.parameters():
                parameter[-out:] = parameter[:out].clone()
    for ours, block in zip(flow.blocks, arch.blocks, strict=True):
        if ours.path is not None:
            fill_path(ours.path, block.path)
        if ours.learn_end_time:
            ours.sqrt_end_time.copy_(cast(Tensor, block.root).reshape(()))
