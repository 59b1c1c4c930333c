"""Default callbacks of a training, the same for cnf.fit and for the programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cnf.distributed import Group
from cnf.training.callbacks import Callback, WeightAverage
from cnf.training.checkpointer import Checkpointer
from cnf.training.loggers import ProgressBar, RunLogger
from cnf.training.non_finite import NonFinitePolicy
from cnf.training.signals import Signals
from cnf.training.solver_monitor import SolverMonitor
from cnf.training.tensorboard import TensorBoardLogger
from cnf.training.time_sampler import TimeSampler

__all__ = ["default_callbacks"]


def default_callbacks(folder: Path | None, write: Callable[[Path], None], mark: str, group: Group) -> list[Callback]:
    """Return the default callbacks; without a folder none that writes, and loggers on the main process only.

    Args:
        folder: the run folder, or None.
        write: writes the folder's config.json.
        mark: fingerprint of the data, which a resumed run has to match.
        group: the processes.
    """
    callbacks: list[Callback] = [WeightAverage(), TimeSampler(), SolverMonitor(), NonFinitePolicy()]
    if folder is not None:
        callbacks = [Checkpointer(folder, write, mark), *callbacks, Signals()]
    if group.main:
        callbacks += [] if folder is None else [RunLogger(folder), TensorBoardLogger(folder)]
        callbacks.append(ProgressBar())
    return callbacks
