"""Continuous normalizing flows: exact-likelihood density models that a neural ODE defines."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cnf._utils.former_paths import install
from cnf._utils.version import __version__

if TYPE_CHECKING:
    from cnf._utils.async_checks import defer_checks
    from cnf.bases import Base, DistributionBase, GaussianMixture, StandardNormal
    from cnf.config import (
        AdaptiveConfig,
        AugmentedTimeConfig,
        ConvConfig,
        FlowConfig,
        GeneratingTimeConfig,
        GridConfig,
        HutchinsonConfig,
        HypernetConfig,
        MLPConfig,
        NeuralODEConfig,
        ResNetConfig,
        SolverConfig,
        UNetConfig,
    )
    from cnf.distribution import FlowDistribution
    from cnf.estimators import ConditionalDensityEstimator, DensityEstimator
    from cnf.fields import VectorField
    from cnf.flow import Flow
    from cnf.guidance import guided
    from cnf.models import build
    from cnf.ode.continuous import CNF
    from cnf.ode.divergence import Exact, Hutchinson
    from cnf.random import Noise
    from cnf.runs import load, save
    from cnf.solvers import Adaptive, FixedGrid
    from cnf.training.fitting import FitResult, fit
    from cnf.transforms.marginals import MarginalTransform
    from cnf.velocity import from_velocity

__all__ = [
    "CNF",
    "Adaptive",
    "AdaptiveConfig",
    "AugmentedTimeConfig",
    "Base",
    "ConditionalDensityEstimator",
    "ConvConfig",
    "DensityEstimator",
    "DistributionBase",
    "Exact",
    "FitResult",
    "FixedGrid",
    "Flow",
    "FlowConfig",
    "FlowDistribution",
    "GaussianMixture",
    "GeneratingTimeConfig",
    "GridConfig",
    "Hutchinson",
    "HutchinsonConfig",
    "HypernetConfig",
    "MLPConfig",
    "MarginalTransform",
    "NeuralODEConfig",
    "Noise",
    "ResNetConfig",
    "SolverConfig",
    "StandardNormal",
    "UNetConfig",
    "VectorField",
    "__version__",
    "build",
    "defer_checks",
    "fit",
    "from_velocity",
    "guided",
    "load",
    "save",
]

# public name -> module; imported at first use, so that ``import cnf`` and the settings need no torch (PEP 562)
_HOMES = {
    "cnf._utils.async_checks": ("defer_checks",),
    "cnf.bases": ("Base", "DistributionBase", "GaussianMixture", "StandardNormal"),
    "cnf.runs": ("load", "save"),
    "cnf.config": (
        "AdaptiveConfig",
        "AugmentedTimeConfig",
        "ConvConfig",
        "FlowConfig",
        "GeneratingTimeConfig",
        "GridConfig",
        "HutchinsonConfig",
        "HypernetConfig",
        "MLPConfig",
        "NeuralODEConfig",
        "ResNetConfig",
        "SolverConfig",
        "UNetConfig",
    ),
    "cnf.distribution": ("FlowDistribution",),
    "cnf.ode.continuous": ("CNF",),
    "cnf.ode.divergence": ("Exact", "Hutchinson"),
    "cnf.estimators": ("ConditionalDensityEstimator", "DensityEstimator"),
    "cnf.fields": ("VectorField",),
    "cnf.training.fitting": ("FitResult", "fit"),
    "cnf.flow": ("Flow",),
    "cnf.guidance": ("guided",),
    "cnf.models": ("build",),
    "cnf.random": ("Noise",),
    "cnf.solvers": ("Adaptive", "FixedGrid"),
    "cnf.transforms.marginals": ("MarginalTransform",),
    "cnf.velocity": ("from_velocity",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names} | {"ModelConfig": "cnf.config"}  # a former name


install()


def __getattr__(name: str) -> Any:
    if name in _HOME:
        globals()[name] = found = getattr(import_module(_HOME[name]), name)
        return found
    try:
        if name.startswith("_"):
            raise ModuleNotFoundError(name=f"{__name__}.{name}")
        return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":  # a library that the module needs
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
