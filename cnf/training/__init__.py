"""Training: the loop, the monitor of the solver's error, run folders and reports."""

from cnf.training.files import read_json, write_json
from cnf.training.loop import Trainer
from cnf.training.report import comparability, finish, summary
from cnf.training.scoring import score, write_scores
from cnf.training.settings import from_settings
from cnf.training.signals import Interrupted

__all__ = ["Interrupted", "Trainer", "comparability", "finish", "from_settings", "read_json", "score", "summary", "write_json", "write_scores"]
