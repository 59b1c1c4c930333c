"""What training minimises: the likelihood with its regularisers, or the error of a prediction."""

from cnf.objectives.base import Objective
from cnf.objectives.likelihood import Likelihood
from cnf.objectives.supervised import Assessment, Supervised, assess

__all__ = ["Assessment", "Likelihood", "Objective", "Supervised", "assess"]
