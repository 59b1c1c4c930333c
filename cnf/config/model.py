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
    """The flow's architecture."""

    architecture: Literal["stack", "multiscale", "parallel", "node", "resnet"] = "stack"
    """Blocks one after another; FFJORD's and RNODE's multiscale chain; blocks whose fields sum nets at 4 sizes. To predict: a
    neural ODE with a linear head (--augment makes it an ANODE), or a residual net (--blocks of them)."""
    field: Literal["mlp", "conv", "unet", "hypernet"] = "mlp"
    """Vector field: fully connected; for images also convolutional, or a U-Net; hypernet: weights generated from t (from a with
    --augmented-time). FILE.py:CLASS: a custom field, whose code is run; give it again to resume, evaluate and sample."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths (or channels) of the hidden layers; one or two give an MLP a closed-form exact trace. U-Net: channels at each size."""
    blocks: int = setting(1, POSITIVE, when=(BLOCKS,))
    """Number of CNF blocks, one after another; in a multiscale chain before and after every squeeze."""
    strides: tuple[int, ...] = setting((), when=(CONV,))
    """Conv: a number for each layer (one more than --hidden): 1 = 3x3, 0 = 1x1, 2 = down, -2 = up; all 1 if empty."""
    squeeze_first: bool = setting(False, when=(FLOW, CONVOLUTIONAL,))
    """Images: squeeze 2x2 before the first block."""
    layer: str = setting("concatsquash", when=(LAYERED,), given=(UNDRIVEN,))
    """Time conditioning: ignore, concat, squash, concatsquash, concatcoord, blend, hyper."""
    nonlinearity: str = setting("tanh", when=(ACTIVATED,))
    """Activation: tanh, softplus, elu, swish, relu."""
    residual: Literal["none", "minus", "linear"] = setting("none", when=(FLOW, ACTIVATED,))
    """Added to the field: nothing, -x, or a learned linear map (MLP only)."""
    zero_init: bool = True
    """Start as the identity (f = 0), as RNODE does."""
    end_time: float = setting(1.0, POSITIVE, when=(ODE,))
    """Integration time T of each block."""
    learn_end_time: bool = setting(False, when=(ODE,))
    """Learn T."""
    alpha: float = setting(0.01, when=(FLOW,), given=(IMAGES, LOGIT,))
    """Margin of the logit (or of the pixels' distributions), which keeps black and white finite."""
    dequantize: Literal["uniform", "variational", "truncated-normal"] = setting("uniform", when=(FLOW,))
    """Images: noise that spreads the grey levels: uniform; learned with the model (Flow++), a tighter bound; or normal, cut off
    at the level's edges, which suits flow matching."""
    marginals: Literal["logit", "standardize", "gaussianize", "center"] = setting("standardize", when=(FLOW,), given=(IMAGES,))
    """Images, before the first block: the logit alone, as published; then each pixel standardised by the training data; or in
    its place each pixel's own distribution made normal, exactly; or [0, 1] moved to [-1, 1], all pixels alike."""
    base_std: float = setting(1.0, POSITIVE, when=(FLOW,))
    """Standard deviation of the base distribution."""
    unet_depth: int = setting(2, POSITIVE, when=(UNET,))
    """U-Net: residual blocks at each size, down and up."""
    attention: bool = setting(False, when=(UNET,))
    """U-Net: self-attention at the smallest size."""
    drive: Literal["none", "concat", "hyper", "both"] = setting("none", when=(FLOW, ACTIVATED,))
    """AFFJORD: how a learned time a(t) takes t's place: concat: features next to x; hyper: generates all weights; both: the paper's."""
    drive_dim: int = setting(20, POSITIVE, when=(DRIVEN,))
    """--augmented-time: size k of a."""
    drive_entries: int = setting(10, POSITIVE, when=(GENERATING,))
    """--augmented-time hyper, both: entries m of a from which weights are generated."""
    drive_rank: int = setting(0, NONNEGATIVE, when=(GENERATING,))
    """--augmented-time hyper, both: 0 for a full generator (m + 1 times the weights), or the rank of a small one."""
    drive_start: Literal["zero", "learned"] = setting("zero", when=(DRIVEN,))
    """--augmented-time: a(0)."""
    drive_hidden: int = setting(0, NONNEGATIVE, when=(DRIVEN,), later=True)
    """--augmented-time: width of the hidden layer of g, where da/dt = g(a); that of a if 0."""
    drive_nonlinearity: Literal["tanh", "softplus", "elu", "swish", "relu"] = setting("tanh", when=(DRIVEN,), later=True)
    """--augmented-time: g's activation."""
    generator: tuple[int, ...] = setting((32, 32), when=(HYPERNET,), later=True)
    """--field hypernet: widths of the generator's tanh layers."""
    augment: int = setting(0, NONNEGATIVE, when=(NODE,))
    """node: zero features (channels) appended to the event."""
    input_layer: bool = setting(False, when=(NODE,))
    """node: a learned linear layer makes the first state, in place of zeros appended (IL-NODE)."""
    data_control: bool = setting(False, when=(NODE,))
    """node: the field also sees the event itself, f(t, x, x0)."""
    adaptive_depth: bool = setting(False, when=(NODE,))
    """node: each event has a learned end time T(x) > 0, --end-time at the start; time then enters the field (--time-conditioning concat,
    unless another layer is given), without which no depth can reflect a line."""
    depth: Literal["constant", "chebyshev", "fourier", "stacked"] = setting("constant", when=(NODE,))
    """node: weights over depth: constant (but for --time-conditioning), in a basis, or piecewise constant."""
    depth_terms: int = setting(1, POSITIVE, when=(NODE, BASIS,))
    """node: terms of --depth's basis, or pieces if stacked."""
    head: Literal["linear", "state"] = setting("linear", when=(PREDICTOR,))
    """node, resnet: outputs by a linear layer on the final state, or its first entries themselves."""

    def __post_init__(self) -> None:
        check_settings(self)
