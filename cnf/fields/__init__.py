"""Vector fields f(t, x) and their time layers."""

from cnf._utils.aliases import aliases
from cnf.fields.augmented import AUGMENTED_TIME_LAYERS, AugmentedTimeConditioning, TimePath
from cnf.fields.base import VectorField
from cnf.fields.denoiser import PERIODS, Denoiser
from cnf.fields.hypernet import HyperMLP
from cnf.fields.layers import LAYERS, LayerFactory, time_layer
from cnf.fields.maps import Conv, Linear
from cnf.fields.mixture import MixtureVelocity
from cnf.fields.networks import MLP, ConvField, Stack
from cnf.fields.parallel import SqueezeSum
from cnf.fields.time import TimeLayer
from cnf.fields.unet import UNet
from cnf.solvers.interpolant import Interpolant

__all__ = [
    "AUGMENTED_TIME_LAYERS",
    "LAYERS",
    "MLP",
    "PERIODS",
    "AugmentedTimeConditioning",
    "Conv",
    "ConvField",
    "Denoiser",
    "HyperMLP",
    "Interpolant",
    "LayerFactory",
    "Linear",
    "MixtureVelocity",
    "SqueezeSum",
    "Stack",
    "TimeLayer",
    "TimePath",
    "UNet",
    "VectorField",
    "time_layer",
]

__getattr__ = aliases(__name__, Drive="AugmentedTimeConditioning", DRIVES="AUGMENTED_TIME_LAYERS", Schedule="Interpolant")
