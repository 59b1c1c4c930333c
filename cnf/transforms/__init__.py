"""Invertible transforms with log-determinants."""

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
