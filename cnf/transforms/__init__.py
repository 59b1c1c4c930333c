"""Invertible maps with their log|det|: the chain that leads from data to noise."""

from cnf.transforms.base import Sequential, Transform, Transformed, leaves
from cnf.transforms.gaussianize import Gaussianize
from cnf.transforms.images import CenterShift, Dequantize, Logit, Squeeze
from cnf.transforms.standardize import Standardize

__all__ = [
    "CenterShift",
    "Dequantize",
    "Gaussianize",
    "Logit",
    "Sequential",
    "Squeeze",
    "Standardize",
    "Transform",
    "Transformed",
    "leaves",
]
