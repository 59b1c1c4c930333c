"""Settings of the architecture: flows, neural ODEs, residual nets and autoencoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cnf.config.fields import FieldConfig, MLPConfig, PredictorFieldConfig, PredictorMLPConfig
from cnf.config.rules import COUNT, NONNEGATIVE, POSITIVE, Family, setting, tag
from cnf.config.tagged import Settings

__all__ = ["AmortisedPosteriorConfig", "AutoencoderConfig", "CenterConfig", "ConditionalMixtureBaseConfig", "ConstantDepthConfig", "FlowConfig", "FlowPosteriorConfig", "GatedNetworkConfig", "LogitConfig", "MarginalsConfig", "MixtureBaseConfig", "ModelConfig", "NeuralODEConfig", "NormalBaseConfig", "NormalPosteriorConfig", "PerceptronNetworkConfig", "ResNetConfig", "VaryingDepthConfig"]

ODE = Family("ode", (True,), "models that solve an ODE")
IMAGES = Family("events", ("images",), "images")
VECTORS = Family("events", ("vectors",), "tables and points")


@dataclass(frozen=True)
class LogitConfig(Settings):
    """Images pass a logit before the first block, and possibly a map of each pixel."""

    kind: Literal["standardize", "logit", "gaussianize"] = tag("standardize", given=(IMAGES,))
    alpha: float = setting(0.01, given=(IMAGES,))
    """Margin of the logit (or of the pixels' distributions), which keeps black and white finite."""


@dataclass(frozen=True)
class CenterConfig(Settings):
    """Images are mapped from [0, 1] to [-1, 1] before the first block."""

    kind: Literal["center"] = tag("center", given=(IMAGES,))


@dataclass(frozen=True)
class MarginalsConfig(Settings):
    """Each column of a table is standardised, or mapped towards a normal one, whichever its held-out likelihood says."""

    kind: Literal["marginals"] = tag("marginals", given=(VECTORS,))
    knots: int = setting(200, COUNT)
    """Tables: maximum number of pieces of a column's distribution function."""


@dataclass(frozen=True)
class NormalBaseConfig(Settings):
    """Normal base density."""

    kind: Literal["normal"] = tag("normal")
    base_std: float = setting(1.0, POSITIVE)
    """Standard deviation of the base distribution."""


@dataclass(frozen=True)
class MixtureBaseConfig(Settings):
    """Gaussian mixture as base density, fitted to the latents of the training data before the first step."""

    kind: Literal["mixture"] = tag("mixture")
    components: int = setting(30, COUNT)
    """Mixture base: number of components."""
    covariance: Literal["full", "tied", "diag"] = "full"
    """Mixture base: covariance of the components: full, tied (one for all) or diag."""
    train_base: bool = True
    """Mixture base: train it with the flow, not only fit it to the data."""


@dataclass(frozen=True)
class ConditionalMixtureBaseConfig(Settings):
    """Gaussian mixture whose parameters depend on the condition, fitted to the latents before the first step."""

    kind: Literal["conditional-mixture"] = tag("conditional-mixture")
    components: int = setting(3, COUNT)
    base_hidden: tuple[int, ...] = (64, 64)
    """Conditional mixture base: widths of the hidden layers of its network."""


@dataclass(frozen=True)
class _Architecture(Settings):
    architecture: str = tag("stack")
    """stack: CNF blocks in sequence; multiscale: FFJORD's and RNODE's multiscale chain; parallel: blocks whose fields
    sum nets at 4 sizes. Predictors: node, a neural ODE with a linear head (--augment makes it an ANODE); resnet, a
    residual net of --blocks blocks. vae: an autoencoder of images."""


@dataclass(frozen=True)
class FlowConfig(_Architecture):
    """Architecture of a flow: a density.

    Example:
        >>> from cnf.config import ConvConfig
        >>> FlowConfig(field=ConvConfig(hidden=(16,))) == FlowConfig.of(field="conv", hidden=(16,))
        True
    """

    architecture: Literal["stack", "multiscale", "parallel"] = tag("stack")
    field: FieldConfig = MLPConfig()
    """Vector field: mlp; for images also conv or unet; hypernet: weights generated from t (from a with --augmented-
    time). FILE.py:CLASS: a custom field, whose code is run; give it again to resume, evaluate and sample."""
    blocks: int = setting(1, POSITIVE)
    """CNF blocks in sequence; in a multiscale chain before and after every squeeze."""
    end_time: float = setting(1.0, POSITIVE)
    """Integration time T of each block."""
    learn_end_time: bool = False
    """Learn T."""
    dequantize: Literal["uniform", "variational", "truncated-normal"] = "uniform"
    """Images: dequantisation noise. uniform; variational: learned with the model (Flow++), a tighter bound; truncated-
    normal: normal within each grey level, for flow matching."""
    preprocess: LogitConfig | CenterConfig | MarginalsConfig = LogitConfig()
    """Before the first block. Images: logit, as published; standardize: the logit, then each pixel standardised by the
    training data; gaussianize: each pixel's own distribution mapped to a normal one; center: [0, 1] mapped to
    [-1, 1]. Tables: standardize, or marginals: each column's own distribution where that has the higher likelihood."""
    base: NormalBaseConfig | MixtureBaseConfig | ConditionalMixtureBaseConfig = NormalBaseConfig()
    """Base density: normal; mixture: a Gaussian mixture fitted to the training data, from which training starts;
    conditional-mixture: one whose parameters are a network of the condition (--condition)."""


@dataclass(frozen=True)
class ConstantDepthConfig(Settings):
    """The same weights at every depth, except for the time conditioning."""

    kind: Literal["constant"] = tag("constant")


@dataclass(frozen=True)
class VaryingDepthConfig(Settings):
    """Weights that change over depth: in a basis (chebyshev, fourier), or piecewise constant (stacked)."""

    kind: Literal["chebyshev", "fourier", "stacked"] = tag("chebyshev")
    depth_terms: int = setting(1, POSITIVE)
    """node: terms of --depth's basis, or pieces if stacked."""


@dataclass(frozen=True)
class NeuralODEConfig(_Architecture):
    """Architecture of a neural ODE that predicts (NODE, ANODE 1904.01681)."""

    architecture: Literal["node"] = tag("node")
    field: PredictorFieldConfig = PredictorMLPConfig()
    """Vector field: mlp; for images also conv."""
    end_time: float = setting(1.0, POSITIVE)
    """Integration time T of each block."""
    learn_end_time: bool = False
    """Learn T."""
    augment: int = setting(0, NONNEGATIVE)
    """node: zero features (channels) appended to the input."""
    input_layer: bool = False
    """node: learned linear layer as initial state, instead of appended zeros (IL-NODE)."""
    data_control: bool = False
    """node: the field also takes the input, f(t, x, x0)."""
    adaptive_depth: bool = False
    """node: learned end time T(x) > 0 of each input, starting at --end-time; time then enters the field (--time-
    conditioning concat by default), without which no depth can reflect a line."""
    depth: ConstantDepthConfig | VaryingDepthConfig = ConstantDepthConfig()
    """node: weights over depth: constant (except for --time-conditioning), in a basis, or piecewise constant."""
    head: Literal["linear", "state"] = "linear"
    """node, resnet: outputs from a linear layer on the final state, or its first entries."""


@dataclass(frozen=True)
class ResNetConfig(_Architecture):
    """Architecture of a residual net that predicts."""

    architecture: Literal["resnet"] = tag("resnet")
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers."""
    blocks: int = setting(1, POSITIVE)
    """Residual blocks."""
    nonlinearity: str = "tanh"
    """Activation: tanh, softplus, elu, swish, relu."""
    zero_init: bool = True
    """Start as the identity."""
    head: Literal["linear", "state"] = "linear"
    """node, resnet: outputs from a linear layer on the final state, or its first entries."""


@dataclass(frozen=True)
class PerceptronNetworkConfig(Settings):
    """Perceptrons as encoder and decoder."""

    kind: Literal["mlp"] = tag("mlp")
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the encoder's hidden layers; those of the decoder are in reverse."""


@dataclass(frozen=True)
class GatedNetworkConfig(Settings):
    """Gated convolutions of FFJORD's autoencoders as encoder and decoder, for sides that are multiples of 4."""

    kind: Literal["conv"] = tag("conv")


@dataclass(frozen=True)
class NormalPosteriorConfig(Settings):
    """Normal posterior, without a flow."""

    kind: Literal["normal"] = tag("normal")


@dataclass(frozen=True)
class FlowPosteriorConfig(Settings):
    """Posterior of a CNF that is the same for all images."""

    kind: Literal["cnf"] = tag("cnf")
    flow_hidden: tuple[int, ...] = (64,)
    """vae: widths of the hidden layers of the posterior's CNF."""
    blocks: int = setting(1, POSITIVE)
    """vae: CNF blocks of the posterior, in sequence."""


@dataclass(frozen=True)
class AmortisedPosteriorConfig(FlowPosteriorConfig):
    """Posterior of a CNF whose weights the encoder updates (FFJORD's amortised flow)."""

    kind: Literal["cnf-rank"] = tag("cnf-rank")  # type: ignore[assignment]
    rank: int = setting(8, COUNT)
    """vae: rank of the encoder's updates of the weights of the posterior's CNF."""


@dataclass(frozen=True)
class AutoencoderConfig(_Architecture):
    """Architecture of a variational autoencoder of images (FFJORD, 1810.01367)."""

    architecture: Literal["vae"] = tag("vae")
    network: PerceptronNetworkConfig | GatedNetworkConfig = PerceptronNetworkConfig()
    """vae: encoder and decoder: mlp, perceptrons; conv, FFJORD's gated convolutions."""
    latent: int = setting(16, COUNT)
    """vae: dimension of the latent z."""
    posterior: AmortisedPosteriorConfig | FlowPosteriorConfig | NormalPosteriorConfig = AmortisedPosteriorConfig()
    """vae: approximate posterior of z: cnf-rank, a CNF whose weights the encoder updates; cnf, a CNF that is the same for
    all images; normal."""


ModelConfig = FlowConfig | NeuralODEConfig | ResNetConfig | AutoencoderConfig
