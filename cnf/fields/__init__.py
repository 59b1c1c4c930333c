"""Vector fields f(t, x): time layers and the networks made of them."""

from cnf.fields.networks import MLP, ConvField, Stack
from cnf.fields.time import LAYERS, Conv, Linear, TimeLayer, time_layer

__all__ = ["LAYERS", "MLP", "Conv", "ConvField", "Linear", "Stack", "TimeLayer", "time_layer"]
