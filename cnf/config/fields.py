"""Settings of vector fields, one class for each family, and of AFFJORD's augmented time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cnf.config.rules import NONNEGATIVE, POSITIVE, Family, setting, tag
from cnf.config.tagged import Settings

__all__ = [
    "AugmentedTimeConfig",
    "ConvConfig",
    "FieldConfig",
    "GeneratingTimeConfig",
    "HypernetConfig",
    "MLPConfig",
    "PlainTimeConfig",
    "PredictorConvConfig",
    "PredictorMLPConfig",
    "UNetConfig",
]

PLAIN = Family("augmented_time", ("none",), "time itself; an augmented time stands in its place")


@dataclass(frozen=True)
class PlainTimeConfig(Settings):
    """Time t itself enters the field."""

    kind: Literal["none"] = tag("none")


@dataclass(frozen=True)
class AugmentedTimeConfig(Settings):
    """AFFJORD's augmented time (2306.02731), whose entries are features next to x."""

    kind: Literal["concat"] = tag("concat")
    augmented_time_dim: int = setting(20, POSITIVE)
    """Augmented time: size k of a."""
    augmented_time_start: Literal["zero", "learned"] = "zero"
    """Augmented time: initial value a(0)."""
    augmented_time_hidden: int = setting(0, NONNEGATIVE, later=True)
    """Augmented time: width of the hidden layer of g in da/dt = g(a); 0 takes that of a."""
    augmented_time_nonlinearity: Literal["tanh", "softplus", "elu", "swish", "relu"] = setting("tanh", later=True)
    """Augmented time: activation of g."""


@dataclass(frozen=True)
class GeneratingTimeConfig(AugmentedTimeConfig):
    """AFFJORD's augmented time that generates the weights of the field."""

    kind: Literal["hyper", "both"] = tag("both")  # type: ignore[assignment]
    augmented_time_entries: int = setting(10, POSITIVE)
    """Augmented time, hyper and both: entries m of a that generate weights."""
    augmented_time_rank: int = setting(0, NONNEGATIVE)
    """Augmented time, hyper and both: rank of the generator; 0 is a full one (m + 1 times the weights)."""


TimeConfig = PlainTimeConfig | AugmentedTimeConfig | GeneratingTimeConfig


@dataclass(frozen=True)
class _Timed(Settings):
    augmented_time: TimeConfig = PlainTimeConfig()
    """AFFJORD: learned augmented time a(t) in place of t. none; concat: features next to x; hyper: generates all
    weights; both: as in the paper."""


@dataclass(frozen=True)
class _Hidden(Settings):
    hidden: tuple[int, ...] = (64, 64)
    """Widths (or channels) of the hidden layers; one or two give an MLP a closed-form exact trace. U-Net: channels at
    each size."""
    zero_init: bool = True
    """Start as the identity (f = 0), as in RNODE."""


@dataclass(frozen=True)
class _Layered(_Hidden):
    time_conditioning: str = setting("concatsquash", given=(PLAIN,))
    """Time conditioning: ignore, concat, squash, concatsquash, concatcoord, blend, hyper."""
    nonlinearity: str = "tanh"
    """Activation: tanh, softplus, elu, swish, relu."""


@dataclass(frozen=True)
class PredictorMLPConfig(_Layered):
    """Perceptron as the field of a neural ODE that predicts."""

    kind: Literal["mlp"] = tag("mlp")


@dataclass(frozen=True)
class PredictorConvConfig(_Layered):
    """Convolutions as the field of a neural ODE that predicts."""

    kind: Literal["conv"] = tag("conv")
    strides: tuple[int, ...] = ()
    """Conv: one number for each layer (one more than --hidden): 1 = 3x3, 0 = 1x1, 2 = down, -2 = up; empty: all 1."""


@dataclass(frozen=True)
class MLPConfig(_Timed, _Layered):
    """Perceptron as vector field, for vectors or flattened images."""

    kind: Literal["mlp"] = tag("mlp")
    residual: Literal["none", "minus", "linear"] = "none"
    """Term added to the field: none, -x (minus), or a learned linear map (MLP only)."""


@dataclass(frozen=True)
class ConvConfig(_Timed, _Layered):
    """Convolutions as vector field, for images."""

    kind: Literal["conv"] = tag("conv")
    strides: tuple[int, ...] = ()
    """Conv: one number for each layer (one more than --hidden): 1 = 3x3, 0 = 1x1, 2 = down, -2 = up; empty: all 1."""
    squeeze_first: bool = False
    """Images: squeeze 2x2 before the first block."""
    residual: Literal["none", "minus"] = "none"
    """Term added to the field: none, or -x (minus)."""


@dataclass(frozen=True)
class UNetConfig(_Hidden):
    """U-Net as vector field, for images."""

    kind: Literal["unet"] = tag("unet")
    unet_depth: int = setting(2, POSITIVE)
    """U-Net: residual blocks at each size, down and up."""
    attention: bool = False
    """U-Net: self-attention at the smallest size."""
    squeeze_first: bool = False
    """Images: squeeze 2x2 before the first block."""


@dataclass(frozen=True)
class HypernetConfig(_Timed, _Hidden):
    """Perceptron as vector field whose weights a small net generates from time."""

    kind: Literal["hypernet"] = tag("hypernet")
    generator: tuple[int, ...] = setting((32, 32), later=True)
    """Hypernet: widths of the generator's tanh layers."""
    nonlinearity: str = "tanh"
    """Activation: tanh, softplus, elu, swish, relu."""
    residual: Literal["none", "minus", "linear"] = "none"
    """Term added to the field: none, -x (minus), or a learned linear map (MLP only)."""


FieldConfig = MLPConfig | ConvConfig | UNetConfig | HypernetConfig
PredictorFieldConfig = PredictorMLPConfig | PredictorConvConfig
