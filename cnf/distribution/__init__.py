"""Flows as distributions and transforms of torch."""

from cnf.distribution.density import Density
from cnf.distribution.flow import FlowDistribution, LatentDistribution
from cnf.distribution.transform import FlowTransform, LazyTransform

__all__ = ["Density", "FlowDistribution", "FlowTransform", "LatentDistribution", "LazyTransform"]
