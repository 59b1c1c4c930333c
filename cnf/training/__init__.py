"""Training: the loop, its watch over the solver, and what it writes."""

from cnf.training.loop import Interrupted, Trainer
from cnf.training.report import finish, score, summary, write_json

__all__ = ["Interrupted", "Trainer", "finish", "score", "summary", "write_json"]
