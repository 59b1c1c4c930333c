"""Continuous normalizing flows: exact-likelihood density models that a neural ODE defines."""

from cnf.checkpoint import load
from cnf.continuous import CNF
from cnf.divergence import Exact, Hutchinson
from cnf.flow import Flow
from cnf.models import ModelConfig, SolverConfig, build
from cnf.noise import Noise
from cnf.solvers import Adaptive, FixedGrid
from cnf.velocity import from_velocity

__version__ = "0.1.0"
__all__ = [
    "CNF",
    "Adaptive",
    "Exact",
    "FixedGrid",
    "Flow",
    "Hutchinson",
    "ModelConfig",
    "Noise",
    "SolverConfig",
    "build",
    "from_velocity",
    "load",
]
