"""Flow matching: couplings of noise and data, the path of a flow, and distributions of times."""

from cnf.flow_matching.coupling import COUPLINGS, couple
from cnf.flow_matching.path import MatchingPath
from cnf.flow_matching.times import TimeDistribution, stratified

__all__ = ["COUPLINGS", "MatchingPath", "TimeDistribution", "couple", "stratified"]
