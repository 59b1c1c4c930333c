"""Flow matching: couplings of noise and data, the path of a flow, and distributions of times."""

from cnf.matching.coupling import COUPLINGS, couple
from cnf.matching.path import MatchingPath
from cnf.matching.times import TimeDistribution, stratified

__all__ = ["COUPLINGS", "MatchingPath", "TimeDistribution", "couple", "stratified"]
