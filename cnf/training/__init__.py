"""Training: the loop, the monitor of the solver's error, run folders and reports."""

from cnf.errors import Interrupted
from cnf.results import read_json
from cnf.training.files import write_json
from cnf.training.loop import Trainer
from cnf.training.report import comparability, finish, summary
from cnf.training.scoring import score, write_scores
from cnf.training.settings import from_settings

__all__ = ["Interrupted", "Trainer", "comparability", "finish", "from_settings", "read_json", "score", "summary", "write_json", "write_scores"]
