"""Vector fields f(t, x): time layers and the networks made of them."""

from cnf.fields.augmented import DRIVES, Drive, TimePath
from cnf.fields.maps import Conv, Linear
from cnf.fields.networks import MLP, ConvField, Stack
from cnf.fields.parallel import SqueezeSum
from cnf.fields.time import LAYERS, LayerFactory, TimeLayer, time_layer

__all__ = [
    "DRIVES",
    "LAYERS",
    "MLP",
    "Conv",
    "ConvField",
    "Drive",
    "LayerFactory",
    "Linear",
    "SqueezeSum",
    "Stack",
    "TimeLayer",
    "TimePath",
    "time_layer",
]
