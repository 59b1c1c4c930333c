"""What flow matching regresses: which noise belongs to which data, at which times, and along which path of a flow."""

from cnf.matching.coupling import COUPLINGS, couple
from cnf.matching.path import MatchingPath
from cnf.matching.times import TimeDistribution, stratified

__all__ = ["COUPLINGS", "MatchingPath", "TimeDistribution", "couple", "stratified"]
