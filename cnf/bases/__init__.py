"""Base densities of a flow: standard normal, Gaussian mixture, and any distribution of torch."""

from cnf.bases.adapter import DistributionBase, as_base
from cnf.bases.base import Base, StandardNormal
from cnf.bases.conditional import ConditionalMixture, ContextMixture, MixtureEnsemble
from cnf.bases.mixture import GaussianMixture

__all__ = ["Base", "ConditionalMixture", "ContextMixture", "DistributionBase", "GaussianMixture", "MixtureEnsemble", "StandardNormal", "as_base"]
