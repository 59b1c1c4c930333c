"""Training objectives: likelihood with regularisers, flow matching, and supervised losses."""

from cnf.losses.base import Objective
from cnf.losses.custom import CustomLoss
from cnf.losses.likelihood import Likelihood
from cnf.losses.matching import FlowMatching
from cnf.losses.rows import NegativeLogLikelihood
from cnf.losses.supervised import Assessment, Supervised, assess

__all__ = ["Assessment", "CustomLoss", "FlowMatching", "Likelihood", "NegativeLogLikelihood", "Objective", "Supervised", "assess"]
