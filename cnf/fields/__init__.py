"""Vector fields f(t, x) and their time layers."""

from cnf.fields.augmented import DRIVES, Drive, TimePath
from cnf.fields.base import VectorField
from cnf.fields.denoiser import PERIODS, Denoiser
from cnf.fields.hypernet import HyperMLP
from cnf.fields.interpolant import Interpolant
from cnf.fields.layers import LAYERS, LayerFactory, time_layer
from cnf.fields.maps import Conv, Linear
from cnf.fields.networks import MLP, ConvField, Stack
from cnf.fields.parallel import SqueezeSum
from cnf.fields.time import TimeLayer
from cnf.fields.unet import UNet

__all__ = [
    "DRIVES",
    "LAYERS",
    "MLP",
    "PERIODS",
    "Conv",
    "ConvField",
    "Denoiser",
    "Drive",
    "HyperMLP",
    "Interpolant",
    "LayerFactory",
    "Linear",
    "SqueezeSum",
    "Stack",
    "TimeLayer",
    "TimePath",
    "UNet",
    "VectorField",
    "time_layer",
]
