"""Invertible transforms with log-determinants."""

from cnf._utils.aliases import aliases
from cnf.transforms.adapter import TorchTransform
from cnf.transforms.base import DeterministicTransform, Transform, TransformOutput
from cnf.transforms.chain import Chain, Sequential, iter_leaves
from cnf.transforms.gaussianize import Gaussianize
from cnf.transforms.images import Dequantize, Logit, Rescale, Squeeze
from cnf.transforms.marginals import MarginalTransform
from cnf.transforms.request import Request
from cnf.transforms.standardize import Standardize

__all__ = [
    "Chain", "Dequantize", "DeterministicTransform", "Gaussianize", "Logit", "MarginalTransform", "Request", "Rescale", "Sequential",
    "Squeeze", "Standardize", "TorchTransform", "Transform", "TransformOutput", "iter_leaves",
]  # fmt: skip

__getattr__ = aliases(__name__, CenterShift="Rescale", Plain="DeterministicTransform", Transformed="TransformOutput", leaves="iter_leaves")
