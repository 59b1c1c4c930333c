"""Vector fields f(t, x): time layers and the networks made of them."""

from cnf.fields.maps import Conv, Linear
from cnf.fields.networks import MLP, ConvField, Stack
from cnf.fields.parallel import SqueezeSum
from cnf.fields.time import LAYERS, TimeLayer, time_layer

__all__ = ["LAYERS", "MLP", "Conv", "ConvField", "Linear", "SqueezeSum", "Stack", "TimeLayer", "time_layer"]
