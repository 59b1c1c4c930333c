"""CNF block: augmented dynamics, divergence, quadratures, and the log-determinant along a solved path."""

from cnf.ode.continuous import CNF
from cnf.ode.divergence import Divergence, Exact, Hutchinson, Linearization
from cnf.ode.multiscale import Multiscale, SharedAugmentedTime
from cnf.ode.quadratures import Quadrature
from cnf.ode.statistics import fit_statistics

__all__ = [
    "CNF", "Divergence", "Exact", "Hutchinson", "Linearization", "Multiscale", "Quadrature", "SharedAugmentedTime",
    "fit_statistics",
]  # fmt: skip
