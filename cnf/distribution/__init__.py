"""Flows as distributions and transforms of torch."""

from cnf.distribution.density import Density
from cnf.distribution.embedding import ContextEmbedding
from cnf.distribution.flow import FlowDistribution, LatentDistribution
from cnf.distribution.transform import FlowTransform, LazyTransform

__all__ = ["ContextEmbedding", "Density", "FlowDistribution", "FlowTransform", "LatentDistribution", "LazyTransform"]
