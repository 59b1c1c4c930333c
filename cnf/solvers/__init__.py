"""Fixed-grid and adaptive ODE solvers over s in [0, 1] with direct, checkpointed, reversible and adjoint gradients."""

from cnf.solvers.adams import ExponentialAdams, coarse
from cnf.solvers.adaptive import Adaptive
from cnf.solvers.base import Solution, Solver, Stats, refined
from cnf.solvers.fixed import FixedGrid
from cnf.solvers.multistep import ExponentialMultistep
from cnf.solvers.reversible import Reversible
from cnf.solvers.spacing import PowerSpacing, RatioSpacing, Spacing
from cnf.solvers.tableaus import TABLEAUS, Tableau

__all__ = [
    "TABLEAUS",
    "Adaptive",
    "ExponentialAdams",
    "ExponentialMultistep",
    "FixedGrid",
    "PowerSpacing",
    "RatioSpacing",
    "Reversible",
    "Solution",
    "Solver",
    "Spacing",
    "Stats",
    "Tableau",
    "coarse",
    "refined",
]
