"""AFFJORD's released image model on the library's fields and blocks (2306.02731's code)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cnf._utils.errors import ConfigError
from cnf.compat.reading import check_shapes
from cnf.fields import Conv, TimePath
from cnf.flow import Flow
from cnf.ode.multiscale import SharedAugmentedTime, scale_shapes
from cnf.transforms import Squeeze, Transform

__all__ = ["ENTRIES", "GENERATING", "ReleasedScale", "check_path", "fill_path", "released_layer", "squeeze_paths"]

ENTRIES = 20
"""Entries of z*, flattened, that evolve and are read."""
GENERATING = 10
"""The first of those entries, which generate weights."""

PATH = {"net.0.weight": "fc1.weight", "net.0.bias": "fc1.bias", "net.2.weight": "fc2.weight", "net.2.bias": "fc2.bias"}


class ReleasedScale(SharedAugmentedTime):
    """Blocks of one scale whose augmented time is squeezed along with the image, as released.

    The released state of a block is [z*; z]. z* has an image's shape, but is initially zero and has zero derivative
    beyond its first 20 entries, the only ones read. These are the augmented time a (1, 20) of a :class:`~cnf.CNF`; a
    squeeze permutes them like the image.

    Args:
        transforms: blocks and at most one squeeze.
        shape: (C, H, W) of z, and hence of z*, at the start of the scale.

    Raises:
        ConfigError: for an image of fewer than 20 entries, which the released code does not support.

    Example:
        >>> from cnf.ode.continuous import CNF
        >>> from cnf.fields import ConvField, AugmentedTimeConditioning
        >>> field = ConvField(1, (2,), AugmentedTimeConditioning("hyper", ENTRIES, GENERATING))
        >>> scale = ReleasedScale([CNF(field, path=TimePath(ENTRIES)), Squeeze()], (1, 28, 28))
        >>> u = torch.arange(20.0)[None]
        >>> scale.between(Squeeze(), u)[0, :12].int().tolist()
        [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 0, 0]
    """

    def __init__(self, transforms: Iterable[Transform], shape: tuple[int, ...]):
        super().__init__(transforms)
        if math.prod(shape) < ENTRIES:
            raise ConfigError(f"images must have at least {ENTRIES} entries, which z* needs, got shape {tuple(shape)}")
        self.shape = tuple(shape)

    def between(self, transform: Transform, a: Tensor) -> Tensor:
        """Return the first 20 entries of z* after ``transform``; a squeeze keeps the even entries of a row."""
        if not isinstance(transform, Squeeze):
            return a
        image = F.pad(a, (0, math.prod(self.shape) - ENTRIES)).reshape(1, *self.shape)
        squeezed: Tensor = transform(image).value
        return squeezed.flatten(1)[:, :ENTRIES]


def released_layer(
    given: Mapping[str, Tensor], conv: Conv, *, first: bool = False, last: bool = False, where: str = "the layer"
) -> dict[str, Tensor]:
    """Convert the parameters of a released ConcatConv2d or HyperConv2d to those of one of our layers.

    The released convolutions see [zeros; z] and return twice the channels, half of which are dropped. Only the parts
    that can reach z are kept, so that the function is exactly the released one: weights on zeros, dropped outputs, the
    unused mixers and the unused 1x1 convolution are omitted. "concat" concatenates neither z* nor time: its field is
    autonomous, and z* is dropped.

    Args:
        given: by the released names, ``_layer.*`` or ``_hypernet.*``.
        conv: the convolution of our layer.
        first: the released layer takes as many zeros before its inputs, whose weights are omitted.
        last: the released layer has twice the outputs, of which the first half is used (of two channels the second).
        where: name of the layer in messages.

    Returns:
        ``core.weight`` and ``core.bias`` of an :class:`~cnf.fields.time.Ignore`, or ``weight``, ``bias``, ``move`` and
        ``move_bias`` of a layer with :class:`~cnf.fields.AugmentedTimeConditioning` ``("hyper", 20, 10)``. The released hyper layer reads
        its bias from the start of the weight; here it is a copy.

    Raises:
        CheckpointError: for other names or shapes.

    Example:
        >>> given = {"_layer.weight": torch.randn(8, 6, 3, 3), "_layer.bias": torch.randn(8)}
        >>> released_layer(given, Conv(3, 8), first=True)["core.weight"].shape
        torch.Size([8, 3, 3, 3])
    """
    whole = replace(conv, inputs=conv.inputs * (1 + first), outputs=conv.outputs * (1 + last))
    shape = whole.weight_shape()
    numel, out = math.prod(shape), whole.outputs
    own: dict[str, Tensor]
    if "_hypernet.weight" in given:
        check_shapes(given, {"_hypernet.weight": (numel + out, GENERATING), "_hypernet.bias": (numel + out,)}, where)
        constant, linear = given["_hypernet.bias"], given["_hypernet.weight"]
        own = {
            "weight": constant[:numel].reshape(shape),
            "bias": constant[:out],
            "move": linear[:numel].reshape(*shape, GENERATING),
            "move_bias": linear[:out],
        }
    else:
        check_shapes(given, {"_layer.weight": shape, "_layer.bias": (out,)}, where)
        own = {"core.weight": given["_layer.weight"], "core.bias": given["_layer.bias"]}
    rows, columns = (1, 0) if conv.transposed else (0, 1)
    for name, value in own.items():
        bias = name.endswith("bias")
        if first and not bias:
            value = value.narrow(columns, conv.inputs, conv.inputs)
        if last:
            # the released code uses the other half for a single channel
            value = value.narrow(0 if bias else rows, conv.outputs if conv.outputs == 1 else 0, conv.outputs)
        own[name] = value
    return own


def check_path(given: Mapping[str, Tensor], where: str) -> None:
    """Validate the parameters of the released Aug_Cnn (``fc1.*``, ``fc2.*``)."""
    shapes: dict[str, tuple[int, ...]] = {"weight": (ENTRIES, ENTRIES), "bias": (ENTRIES,)}
    wanted = {f"fc{i}.{name}": shape for i in (1, 2) for name, shape in shapes.items()}
    check_shapes({name: value for name, value in given.items() if name.startswith("fc")}, wanted, f"{where}, aug_cnn")


@torch.no_grad()
def fill_path(path: TimePath, given: Mapping[str, Tensor]) -> None:
    """Copy the released Aug_Cnn's parameters into an augmented time of 20 entries."""
    for name, parameter in path.named_parameters():
        parameter.copy_(given[PATH[name]])


def squeeze_paths(flow: Flow) -> None:
    """Squeeze the augmented time of every scale of a multiscale flow along with the image, as released."""
    scales = [(path, m) for path, m in flow.named_modules() if isinstance(m, SharedAugmentedTime)]
    if not scales and flow.dim < ENTRIES:
        raise ConfigError(f"images must have at least {ENTRIES} entries, which z* needs, got shape {flow.event_shape}")
    for (path, scale), shape in zip(scales, scale_shapes(flow.event_shape) if scales else (), strict=True):
        flow.set_submodule(path, ReleasedScale((part for part, _ in scale.steps()), shape))
