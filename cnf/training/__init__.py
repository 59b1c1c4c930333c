"""Training: state, loop and callbacks, of which :func:`cnf.fit` and the programs are made, and reports of runs."""

from cnf._utils.errors import Interrupted
from cnf.config.results import read_json
from cnf.training.auto_steps import AutoSteps
from cnf.training.callbacks import Callback, EarlyStopping, Run, TimeLimit, WeightAverage
from cnf.training.checkpointer import Checkpointer
from cnf.training.feature_history import FeatureHistory
from cnf.training.files import write_json
from cnf.training.loggers import ProgressBar, RunLogger
from cnf.training.loop import Trainer
from cnf.training.non_finite import NonFinitePolicy
from cnf.training.report import comparability, finish, summary
from cnf.training.report_page import REPORT, write_report
from cnf.training.scoring import score, write_scores
from cnf.training.settings import from_settings
from cnf.training.signals import Signals
from cnf.training.solver_monitor import SolverMonitor
from cnf.training.state import TrainState
from cnf.training.tensorboard import TensorBoardLogger
from cnf.training.time_sampler import TimeSampler

__all__ = [
    "REPORT",
    "AutoSteps",
    "Callback",
    "Checkpointer",
    "EarlyStopping",
    "FeatureHistory",
    "Interrupted",
    "NonFinitePolicy",
    "ProgressBar",
    "Run",
    "RunLogger",
    "Signals",
    "SolverMonitor",
    "TensorBoardLogger",
    "TimeLimit",
    "TimeSampler",
    "TrainState",
    "Trainer",
    "WeightAverage",
    "comparability",
    "finish",
    "from_settings",
    "read_json",
    "score",
    "summary",
    "write_json",
    "write_report",
    "write_scores",
]
