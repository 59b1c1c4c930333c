"""Architecture of a released state dict, inferred from its names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import Tensor

from cnf._utils.errors import CheckpointError
from cnf.compat.reading import Reference

__all__ = ["Block", "Layout", "layout"]

NET = re.compile(r"(?:odefunc\.)+diffeq\.(?:models\.(\d+)\.)?layers\.(\d+)\.(.+)")
AUGMENTED = re.compile(r"(?:odefunc\.)+diffeq\.aug_cnn\.((?:fc1|fc2|network\.0)\.(?:weight|bias))")
MIXER = re.compile(r"mixer2?\.(?:weight|bias)")  # of AFFJORD, unused
TOY = re.compile(r"(?:hyper_net2?|neunet)\..+")
SCALED, CHAINED = re.compile(r"transforms\.(\d+)\.chain\.(\d+)\.(.+)"), re.compile(r"chain\.(\d+)\.(.+)")


@dataclass
class Block:
    """Released CNF block.

    ``position`` is its index in the chain and, if there are scales, its scale's before, ``root`` the square root of its end time, ``nets`` the parameters of each
    net's layers by released name, and ``path`` those of AFFJORD's augmented time.
    """

    position: tuple[int, ...]
    root: Tensor | None = None
    nets: dict[int, dict[int, dict[str, Tensor]]] = field(default_factory=dict)
    path: dict[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Position in the chain, for messages."""
        return ".".join(map(str, self.position))


@dataclass
class Layout:
    """Architecture of a state dict. ``kind`` is ``"multiscale"``, ``"parallel"`` or ``"stack"``."""

    kind: str
    blocks: list[Block]
    layer: str
    conv: bool
    affjord: bool = False

    @property
    def first(self) -> dict[int, dict[str, Tensor]]:
        """Layers of the first net."""
        return self.blocks[0].nets[0]

    @property
    def images(self) -> bool:
        """True for image models: a logit (without parameters) comes first; AFFJORD's is outside the model."""
        return self.affjord or self.kind != "stack" or self.blocks[0].position != (0,)


def layout(reference: Reference) -> Layout:
    """Infer the architecture from the names of the weights.

    Unsupported are batch normalisation, an autoencoder, Swish's learned factor, spectral norm, a VAE, AFFJORD's parallel
    model and 2-D models.
    """
    blocks: dict[tuple[int, ...], Block] = {}
    unknown = []
    position: tuple[int, ...]
    for name, value in reference.state.items():
        if outer := SCALED.fullmatch(name):
            position, rest = (int(outer[1]), int(outer[2])), outer[3]
        elif outer := CHAINED.fullmatch(name):
            position, rest = (int(outer[1]),), outer[2]
        else:
            unknown.append(name)
            continue
        block = blocks.setdefault(position, Block(position))
        if rest == "sqrt_end_time":
            block.root = value
        elif inner := NET.fullmatch(rest):
            block.nets.setdefault(int(inner[1] or 0), {}).setdefault(int(inner[2]), {})[inner[3]] = value
        elif inner := AUGMENTED.fullmatch(rest):
            block.path[inner[1]] = value
        else:
            unknown.append(name)
    if unknown and all(TOY.fullmatch(name) for name in unknown):
        raise CheckpointError("the checkpoint is one of AFFJORD's 2-D examples: load it with cnf.compat.load_affjord_toy")
    if unknown or not blocks:
        raise CheckpointError(
            f"the checkpoint's architecture has no counterpart here: {len(unknown)} of {len(reference.state)} weights, such as "
            f"{sorted(unknown)[:3]}, belong to none of FFJORD's, RNODE's or AFFJORD's multiscale, parallel, convolutional or vector flows"
        )
    ordered = [blocks[position] for position in sorted(blocks)]
    for block in ordered:
        layers = {j for net in block.nets.values() for j in net}
        complete = all(keys == set(range(len(keys))) for keys in [set(block.nets), *map(set, block.nets.values())])
        if not layers or not complete or len(block.position) != len(ordered[0].position):
            raise CheckpointError(f"the checkpoint's block {block.name} is incomplete")
    nets = {len(block.nets) for block in ordered}
    kind = "parallel" if nets != {1} else "multiscale" if len(ordered[0].position) == 2 else "stack"
    net = ordered[0].nets[0]
    if any(block.path for block in ordered):
        if kind == "parallel":
            raise CheckpointError("the checkpoint is AFFJORD's parallel model, which has no counterpart here")
        for block in ordered:
            for values in block.nets[0].values():
                for name in [name for name in values if MIXER.fullmatch(name)]:
                    del values[name]
        if (layer := _layer(net)) not in ("ignore", "hyper"):
            raise CheckpointError(f"the checkpoint combines an augmented time with layers of type {layer!r}, expected ignore or hyper")
        return Layout(kind, ordered, layer, conv=True, affjord=True)
    return Layout(kind, ordered, _layer(net), _conv(net))


def _layer(net: dict[int, dict[str, Tensor]]) -> str:
    """Infer the layer type from its parameters; FFJORD's multiscale script ignores the --layer_type that it records."""
    names = {name.split(".")[0] for name in net[0]}
    types = {
        frozenset({"_layer", "_hyper_gate", "_hyper_bias"}): "concatsquash",
        frozenset({"_layer", "_hyper"}): "squash",
        frozenset({"_layer0", "_layer1"}): "blend",
        frozenset({"_hypernet"}): "hyper",
    }
    if frozenset(names) in types:
        return types[frozenset(names)]
    after, before = (net.get(i, {}).get(f"_layer.{name}") for i, name in ((1, "weight"), (0, "bias")))
    own = net.get(1, {}).get("_layer.bias")
    if names == {"_layer"} and after is not None and before is not None and own is not None and after.ndim >= 2:
        # extra inputs of the second layer over the first one's outputs; a transposed convolution's inputs come first
        inputs = after.shape[1] if after.shape[0] == own.numel() else after.shape[0]
        kinds = {0: "ignore", 1: "concat", 3: "concatcoord"}
        if (extra := inputs - before.numel()) in kinds:
            return kinds[extra]
    raise CheckpointError(f"a layer has the parameters {sorted(net[0])}, which belong to no layer type that can be loaded")


def _conv(net: dict[int, dict[str, Tensor]]) -> bool:
    weights = [v for name, v in net[0].items() if name.endswith("weight") and name.startswith("_layer")]
    if weights:
        return weights[0].ndim == 4
    return "_hypernet.weight" in net[0]  # a convolution's generator is a linear layer, a linear layer's a small net
