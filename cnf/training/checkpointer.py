"""Checkpoints of a training in a run folder."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cnf._utils.errors import CheckpointError, ConfigError
from cnf.distributed import Group
from cnf.losses import Likelihood
from cnf.runs import has_trainer, load_trainer, locked, one_line, renew, save_trainer, write_weights
from cnf.runs.files import why
from cnf.training.callbacks import Callback, Run
from cnf.training.loggers import RunLogger
from cnf.training.state import upgrade
from cnf.training.tensorboard import TensorBoardLogger

__all__ = ["Checkpointer", "run_lock"]


@contextmanager
def run_lock(folder: Path, group: Group) -> Iterator[None]:
    """Context manager that keeps other runs from writing into the folder; rank 0 holds the lock for all processes.

    Raises:
        ConfigError: if another process holds the lock (it is named).
        CheckpointError: if the folder cannot be written.
    """
    with ExitStack() as stack:
        group.on_rank0(lambda: stack.enter_context(locked(folder)))
        yield


class Checkpointer(Callback):
    """Save the resume state (trainer.pt) and the best weights (model.safetensors) in a run folder.

    A checkpoint is written after each validation, after ``save_seconds`` without one, and at the end. The folder is
    locked while training. A failed write does not stop training; at the end the run is saved elsewhere.

    Args:
        folder: the run folder.
        write_config: writes config.json into a folder, for a folder that was removed, or another one.
        fingerprint: of the training data; a run resumes with the same data only.
        save_seconds: longest interval between checkpoints.
        retry_seconds: until the next attempt after a failed one.
    """

    def __init__(
        self,
        folder: Path,
        write_config: Callable[[Path], None],
        fingerprint: str = "",
        save_seconds: float = 300.0,
        retry_seconds: float = 30.0,
    ):
        self.folder, self.write_config, self.fingerprint = folder, write_config, fingerprint
        self.save_seconds, self.retry_seconds = save_seconds, retry_seconds
        self.export_due = False  # whether the best weights are not exported yet
        self._saved, self._next = -1, 0.0  # step of the latest checkpoint, time of the next one
        self._lock = ExitStack()

    def setup(self, run: Run) -> None:
        """Remember the training."""
        self._run = run

    def on_start(self, run: Run) -> None:
        """Lock the folder."""
        self._lock.enter_context(run_lock(self.folder, run.group))
        self._next = time.monotonic() + self.save_seconds

    def on_end(self, run: Run) -> None:
        """Unlock the folder."""
        self._lock.close()

    def on_validation(self, run: Run, better: bool) -> None:
        """Export the best weights; after a failure the next save retries."""
        if not better or not run.group.main:
            return
        try:
            write_weights(self.folder, run.averaged())
            self.export_due = False
        except CheckpointError as error:
            self.export_due = True
            run.say(f"step {run.state.step}: {error}; the next save tries again")

    def on_step_end(self, run: Run) -> None:
        """Save after a validation, or after a long time."""
        if "validation" not in run.figures and time.monotonic() <= self._next:
            return
        try:
            self.save()
        except CheckpointError as error:
            self._next = time.monotonic() + self.retry_seconds
            run.say(f"step {run.state.step}: no checkpoint: {error}; training goes on, and the next save tries again")

    def on_finish(self, run: Run) -> None:
        """Save the final state, elsewhere if it cannot be saved in the folder.

        Raises:
            CheckpointError: if it cannot be saved in the folder; names the one that holds it.
        """
        if self._saved == run.state.step and run.state.pending is None:
            return
        try:
            self.save()
        except CheckpointError as error:
            raise self._save_elsewhere(error) from None

    def save(self) -> None:
        """Write metrics.jsonl and trainer.pt, and model.safetensors if due; recreate the folder if it was removed.

        Raises:
            CheckpointError: if they cannot be written; the previous files are intact.
        """
        if self._run.group.main:
            self._write()
        self._saved, self._next = self._run.state.step, time.monotonic() + self.save_seconds

    def state(self) -> dict[str, Any]:
        """Return the contents of trainer.pt."""
        run = self._run
        return {
            **run.state.state_dict(),
            "penalty_scale": getattr(run.phases[-1].objective, "scale", None),
            "rows": len(run.history),
            "data": self.fingerprint,
        }

    def resume(self) -> None:
        """Restore the state of the folder; without a checkpoint, start from step 0.

        Raises:
            CheckpointError: for a checkpoint that is damaged, of another model or of other data.
        """
        run, logger = self._run, self._run.callback(RunLogger)
        with run_lock(self.folder, run.group):
            if not run.group.on_rank0(lambda: has_trainer(self.folder)):
                if logger is not None:
                    logger.cut(0)
                return
            state, notice = run.group.on_rank0(lambda: load_trainer(self.folder))
            if notice:
                run.say(notice)
            if state.get("data") != self.fingerprint:
                raise CheckpointError(f"the data are not those that {self.folder} was trained on: put them back, or start a new run")
            try:
                state = upgrade(state)
                run.load_state_dict(state)
                best = run.best_model() if run.state.best_weights else None
                rows = int(state["rows"])
                self._keep_penalties(state)
            except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
                raise CheckpointError(f"{self.folder / 'trainer.pt'} is not of this model: {one_line(error)}") from None
            if logger is not None:
                logger.cut(rows)
            if best is not None and run.group.main:  # discard a better validation from after this checkpoint
                write_weights(self.folder, best)

    def _keep_penalties(self, state: dict[str, Any]) -> None:
        """Keep the objective of runs begun before penalties of a bits/dim loss were divided by D ln 2 instead of D."""
        objective = self._run.phases[-1].objective
        if not isinstance(objective, Likelihood) or not objective.weights:
            return
        images = objective.unit == "bits/dim" and objective.scale != 1.0
        known = state.get("penalty_scale")
        scale = float(known if known is not None else objective.flow.dim if images else 1.0)
        if not 0 < scale < math.inf:
            raise ValueError(f"penalty_scale is {scale}")
        if scale != objective.scale:
            self._run.say(
                f"step {self._run.state.step}: an earlier version began this run, with penalties of {objective.scale / scale:.3g} times "
                "RNODE's eq. 17; it keeps them to its end, and a new run has those of eq. 17"
            )
        objective.scale = scale

    def _write(self) -> None:
        run, folder = self._run, self.folder
        logger, board = run.callback(RunLogger), run.callback(TensorBoardLogger)
        gone = not folder.is_dir()
        try:
            if gone:
                folder.mkdir(parents=True)
            renew(folder)
        except OSError as error:
            raise CheckpointError(f"{folder} was removed, and cannot be created again: {why(folder, error)}") from None
        except ConfigError as error:  # its lock was removed, and another run has started there
            raise CheckpointError(str(error)) from None
        if gone:
            self.write_config(folder)
            self.export_due = bool(run.state.best_weights)
            if board is not None:
                board.recreate(run.history)
            run.say(f"step {run.state.step}: {folder} was removed while this run trains: it is created again, with everything in it")
        if self.export_due:
            write_weights(folder, run.best_model())
            self.export_due = False
        if logger is not None:
            logger.flush()
        if board is not None:
            board.flush()
        save_trainer(folder, self.state())

    def _save_elsewhere(self, error: CheckpointError) -> CheckpointError:
        """Save a run that cannot be saved in its folder to a temporary one; return the error that says so."""
        run, step, logger = self._run, self._run.state.step, self._run.callback(RunLogger)
        try:
            other = Path(tempfile.mkdtemp(prefix=f"cnf-{self.folder.name}-"))
            self.write_config(other)
            if run.state.best_weights:
                write_weights(other, run.best_model())
            if logger is not None:
                logger.write(other / logger.path.name)
            save_trainer(other, self.state())
        except (OSError, CheckpointError) as second:
            return CheckpointError(
                f"{error}. Nor could the run be saved elsewhere ({second}): {self.folder} holds it up to its last checkpoint, "
                f"and the steps from there to {step} are lost; --resume takes them again"
            )
        return CheckpointError(f"{error}. Everything up to step {step} is in {other} instead: --resume --out {other} continues from there")
