"""Training objectives: likelihood with regularisers, flow matching, and supervised losses."""

from cnf.objectives.base import Objective
from cnf.objectives.custom import CustomLoss
from cnf.objectives.likelihood import Likelihood
from cnf.objectives.matching import FlowMatching
from cnf.objectives.supervised import Assessment, Supervised, assess

__all__ = ["Assessment", "CustomLoss", "FlowMatching", "Likelihood", "Objective", "Supervised", "assess"]
