"""Trainings in the tests: put together from settings, with their parts at hand."""

from cnf.training import from_settings
from cnf.training.callbacks import WeightAverage
from cnf.training.checkpointer import Checkpointer
from cnf.training.loggers import ProgressBar
from cnf.training.non_finite import NonFinitePolicy
from cnf.training.solver_monitor import SolverMonitor

RUN, POLICY, CHECKPOINTER, BAR = {}, {}, {}, {}
"""Attributes that a test gives to every training and its callbacks."""


def training(info, data, folder, **options):
    """The training of these settings, which remembers what it was made of."""
    run = from_settings(info, data, folder, **options)
    for part, attributes in ((run, RUN), (policy(run), POLICY), (checkpointer(run), CHECKPOINTER), (run.callback(ProgressBar), BAR)):
        for name, value in attributes.items():
            setattr(part, name, value)
    run.info, run.data, run.folder, run.config = info, data, folder, info.config.train
    return run


def policy(run):
    return run.callback(NonFinitePolicy)


def monitor(run):
    return run.callback(SolverMonitor)


def average(run):
    return run.callback(WeightAverage).average


def checkpointer(run):
    return run.callback(Checkpointer)


def stop_at(run, step):
    """Time is up at a step."""
    run._stop = lambda: "max_time" if run.state.step >= step else None
