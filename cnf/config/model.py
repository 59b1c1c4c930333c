"""Settings of the architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cnf.config.rules import NONNEGATIVE, POSITIVE, Family, check_settings, setting

__all__ = ["PREDICTIVE", "ModelConfig"]

PREDICTIVE = ("node", "resnet")  # architectures of predictors, see cnf.models.predictors

FLOW = Family("architecture", ("stack", "multiscale", "parallel"), "densities (architecture='stack', 'multiscale' or 'parallel')")
NODE = Family("architecture", ("node",), "architecture='node'")
ODE = Family("architecture", (*FLOW.values, "node"), "models that solve an ODE")
BLOCKS = Family("architecture", (*FLOW.values, "resnet"), "models of several blocks")
PREDICTOR = Family("architecture", PREDICTIVE, "architecture='node' or 'resnet'")
CONV = Family("field", ("conv",), "convolutions (field='conv')")
CONVOLUTIONAL = Family("field", ("conv", "unet"), "convolutions (field='conv' or 'unet')")
UNET = Family("field", ("unet",), "field='unet'")
HYPERNET = Family("field", ("hypernet",), "field='hypernet'")
LAYERED = Family("field", ("mlp", "conv"), "field='mlp' or 'conv'")
ACTIVATED = Family("field", ("mlp", "conv", "hypernet"), "field='mlp', 'conv' or 'hypernet'")
DRIVEN = Family("drive", ("concat", "hyper", "both"), "an augmented time (drive='concat', 'hyper' or 'both')")
GENERATING = Family("drive", ("hyper", "both"), "an augmented time that generates weights (drive='hyper' or 'both')")
UNDRIVEN = Family("drive", ("none",), "time itself; an augmented time stands in its place")
BASIS = Family("depth", ("chebyshev", "fourier", "stacked"), "a basis of depth or stacked pieces")
IMAGES = Family("events", ("images",), "images")
LOGIT = Family("marginals", ("logit", "standardize", "gaussianize"), "the logit; marginals='center' has none")


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a flow or predictor."""

    architecture: Literal["stack", "multiscale", "parallel", "node", "resnet"] = "stack"
    """stack: CNF blocks in sequence; multiscale: FFJORD's and RNODE's multiscale chain; parallel: blocks whose fields
    sum nets at 4 sizes. Predictors: node, a neural ODE with a linear head (--augment makes it an ANODE); resnet, a
    residual net of --blocks blocks."""
    field: Literal["mlp", "conv", "unet", "hypernet"] = "mlp"
    """Vector field: mlp; for images also conv or unet; hypernet: weights generated from t (from a with --augmented-
    time). FILE.py:CLASS: a custom field, whose code is run; give it again to resume, evaluate and sample."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths (or channels) of the hidden layers; one or two give an MLP a closed-form exact trace. U-Net: channels at
    each size."""
    blocks: int = setting(1, POSITIVE, when=(BLOCKS,))
    """CNF blocks in sequence; in a multiscale chain before and after every squeeze."""
    strides: tuple[int, ...] = setting((), when=(CONV,))
    """Conv: one number for each layer (one more than --hidden): 1 = 3x3, 0 = 1x1, 2 = down, -2 = up; empty: all 1."""
    squeeze_first: bool = setting(False, when=(FLOW, CONVOLUTIONAL,))
    """Images: squeeze 2x2 before the first block."""
    layer: str = setting("concatsquash", when=(LAYERED,), given=(UNDRIVEN,))
    """Time conditioning: ignore, concat, squash, concatsquash, concatcoord, blend, hyper."""
    nonlinearity: str = setting("tanh", when=(ACTIVATED,))
    """Activation: tanh, softplus, elu, swish, relu."""
    residual: Literal["none", "minus", "linear"] = setting("none", when=(FLOW, ACTIVATED,))
    """Term added to the field: none, -x (minus), or a learned linear map (MLP only)."""
    zero_init: bool = True
    """Start as the identity (f = 0), as in RNODE."""
    end_time: float = setting(1.0, POSITIVE, when=(ODE,))
    """Integration time T of each block."""
    learn_end_time: bool = setting(False, when=(ODE,))
    """Learn T."""
    alpha: float = setting(0.01, when=(FLOW,), given=(IMAGES, LOGIT,))
    """Margin of the logit (or of the pixels' distributions), which keeps black and white finite."""
    dequantize: Literal["uniform", "variational", "truncated-normal"] = setting("uniform", when=(FLOW,))
    """Images: dequantisation noise. uniform; variational: learned with the model (Flow++), a tighter bound; truncated-
    normal: normal within each grey level, for flow matching."""
    marginals: Literal["logit", "standardize", "gaussianize", "center"] = setting("standardize", when=(FLOW,), given=(IMAGES,))
    """Images, before the first block. logit: as published; standardize: the logit, then each pixel standardised by the
    training data; gaussianize: each pixel's own distribution mapped to a normal one; center: [0, 1] mapped
    to [-1, 1]."""
    base_std: float = setting(1.0, POSITIVE, when=(FLOW,))
    """Standard deviation of the base distribution."""
    unet_depth: int = setting(2, POSITIVE, when=(UNET,))
    """U-Net: residual blocks at each size, down and up."""
    attention: bool = setting(False, when=(UNET,))
    """U-Net: self-attention at the smallest size."""
    drive: Literal["none", "concat", "hyper", "both"] = setting("none", when=(FLOW, ACTIVATED,))
    """AFFJORD: learned augmented time a(t) in place of t. concat: features next to x; hyper: generates all weights;
    both: as in the paper."""
    drive_dim: int = setting(20, POSITIVE, when=(DRIVEN,))
    """Augmented time: size k of a."""
    drive_entries: int = setting(10, POSITIVE, when=(GENERATING,))
    """Augmented time, hyper and both: entries m of a that generate weights."""
    drive_rank: int = setting(0, NONNEGATIVE, when=(GENERATING,))
    """Augmented time, hyper and both: rank of the generator; 0 is a full one (m + 1 times the weights)."""
    drive_start: Literal["zero", "learned"] = setting("zero", when=(DRIVEN,))
    """Augmented time: initial value a(0)."""
    drive_hidden: int = setting(0, NONNEGATIVE, when=(DRIVEN,), later=True)
    """Augmented time: width of the hidden layer of g in da/dt = g(a); 0 takes that of a."""
    drive_nonlinearity: Literal["tanh", "softplus", "elu", "swish", "relu"] = setting("tanh", when=(DRIVEN,), later=True)
    """Augmented time: activation of g."""
    generator: tuple[int, ...] = setting((32, 32), when=(HYPERNET,), later=True)
    """Hypernet: widths of the generator's tanh layers."""
    augment: int = setting(0, NONNEGATIVE, when=(NODE,))
    """node: zero features (channels) appended to the input."""
    input_layer: bool = setting(False, when=(NODE,))
    """node: learned linear layer as initial state, instead of appended zeros (IL-NODE)."""
    data_control: bool = setting(False, when=(NODE,))
    """node: the field also takes the input, f(t, x, x0)."""
    adaptive_depth: bool = setting(False, when=(NODE,))
    """node: learned end time T(x) > 0 of each input, starting at --end-time; time then enters the field (--time-
    conditioning concat by default), without which no depth can reflect a line."""
    depth: Literal["constant", "chebyshev", "fourier", "stacked"] = setting("constant", when=(NODE,))
    """node: weights over depth: constant (except for --time-conditioning), in a basis, or piecewise constant."""
    depth_terms: int = setting(1, POSITIVE, when=(NODE, BASIS,))
    """node: terms of --depth's basis, or pieces if stacked."""
    head: Literal["linear", "state"] = setting("linear", when=(PREDICTOR,))
    """node, resnet: outputs from a linear layer on the final state, or its first entries."""

    def __post_init__(self) -> None:
        check_settings(self)
