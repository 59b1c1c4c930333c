"""Resume state of a run: collect, restore, write, and save elsewhere on failure."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnf.checkpoint import load_trainer, locked, one_line, renew, save_trainer, write_config, write_weights
from cnf.checkpoint.files import why
from cnf.distributed import Group
from cnf.errors import CheckpointError, ConfigError
from cnf.objectives import Likelihood
from cnf.training.batches import fingerprint

if TYPE_CHECKING:
    from cnf.training.loop import Trainer

__all__ = ["NUMBERS", "collect", "export", "owning", "rescue", "restore", "write"]

NUMBERS = ("stage", "since", "step", "skipped", "skips_in_row", "worse", "best", "best_step", "validated", "seconds")


def collect(trainer: Trainer) -> dict[str, Any]:
    """Return the resume state as tensors and plain values; the same for any number of processes."""
    return {
        "flow": trainer.flow.state_dict(),
        "ema": trainer.ema.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "best_weights": trainer.best_weights,
        "numbers": {name: getattr(trainer, name) for name in NUMBERS},
        **trainer.watch.state(),
        "recovery": trainer.recovery.state(trainer.step),
        "pending": trainer.pending,
        "outcomes": trainer.ledger.state(),
        "penalty_scale": getattr(trainer.stages[-1].objective, "scale", None),
        "metrics": len(trainer.metrics),
        "data": fingerprint(trainer.data),
    }


def restore(trainer: Trainer) -> None:
    """Restore the state written by :func:`collect` from the run folder.

    Raises:
        CheckpointError: for a checkpoint that is damaged, of another model or of other data.
    """
    folder = trainer.folder
    state, notice = trainer.group.on_rank0(lambda: load_trainer(folder))
    if notice:
        trainer.say(notice)
    if state.get("data") != fingerprint(trainer.data):
        raise CheckpointError(f"the data are not those that {folder} was trained on: put them back, or start a new run")
    try:
        for name in NUMBERS:
            setattr(trainer, name, type(getattr(trainer, name))(state["numbers"][name]))
        trainer.flow.load_state_dict(state["flow"])
        trainer.ema.load_state_dict(state["ema"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.best_weights = {k: v.to(trainer.device) for k, v in state["best_weights"].items()}
        best = trainer.best_flow() if trainer.best_weights else None
        trainer.watch.load(state)
        rows = int(state["metrics"])
        trainer.recovery.load(state["recovery"])
        trainer.pending = dict(state["pending"])
        # absent in checkpoints of earlier versions, which processed every step at once
        trainer.ledger.load(state.get("outcomes", []))
        _keep_penalties(trainer, state)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"{folder / 'trainer.pt'} is not of this model: {one_line(error)}") from None
    trainer.journal.cut(rows)
    if best is not None and trainer.group.main:  # discard a better validation from after this checkpoint
        write_weights(folder, best)


def _keep_penalties(trainer: Trainer, state: dict[str, Any]) -> None:
    """Keep the objective of runs begun before penalties of a bits/dim loss were divided by D ln 2 instead of D."""
    objective = trainer.stages[-1].objective
    if not isinstance(objective, Likelihood) or not objective.weights:
        return
    images = objective.unit == "bits/dim" and trainer.config.regularisers == "paper"
    scale = float(state.get("penalty_scale", objective.flow.dim if images else 1.0))
    if not 0 < scale < math.inf:
        raise ValueError(f"penalty_scale is {scale}")
    if scale != objective.scale:
        trainer.say(
            f"step {trainer.step}: an earlier version began this run, with penalties of {objective.scale / scale:.3g} times "
            "RNODE's eq. 17; it keeps them to its end, and a new run has those of eq. 17"
        )
    objective.scale = scale


@contextmanager
def owning(folder: Path, group: Group) -> Iterator[None]:
    """Context manager that keeps other runs from writing into the folder; rank 0 holds the lock for all processes.

    Raises:
        ConfigError: if another process holds the lock (it is named).
        CheckpointError: if the folder cannot be written.
    """
    with ExitStack() as stack:
        group.on_rank0(lambda: stack.enter_context(locked(folder)))
        yield


def export(trainer: Trainer) -> None:
    """Write model.safetensors; after a failure the next save retries."""
    try:
        write_weights(trainer.folder, trainer.ema.module)
        trainer.export_due = False
    except CheckpointError as error:
        trainer.export_due = True
        trainer.say(f"step {trainer.step}: {error}; the next save tries again")


def write(trainer: Trainer) -> None:
    """Write metrics.jsonl and trainer.pt, and model.safetensors if due; recreate the run folder if it was removed.

    Raises:
        CheckpointError: if they cannot be written; the previous files are intact.
    """
    folder = trainer.folder
    gone = not folder.is_dir()
    try:
        if gone:
            folder.mkdir(parents=True)
        renew(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} was removed, and cannot be made anew: {why(folder, error)}") from None
    except ConfigError as error:  # its lock was removed, and another run has started there
        raise CheckpointError(str(error)) from None
    if gone:
        write_config(folder, trainer.info)
        trainer.export_due = bool(trainer.best_weights)
        trainer.journal.renew()
        trainer.say(f"step {trainer.step}: {folder} was removed while this run trains: it is made anew, with everything in it")
    if trainer.export_due:
        write_weights(folder, trainer.best_flow())
        trainer.export_due = False
    trainer.journal.flush()
    save_trainer(folder, collect(trainer))


def rescue(trainer: Trainer, error: CheckpointError) -> CheckpointError:
    """Save a run that cannot be saved in its folder to a temporary one; return the error that says so."""
    step = trainer.step
    try:
        other = Path(tempfile.mkdtemp(prefix=f"cnf-{trainer.folder.name}-"))
        write_config(other, trainer.info)
        if trainer.best_weights:
            write_weights(other, trainer.best_flow())
        trainer.journal.write(other / trainer.journal.path.name)
        save_trainer(other, collect(trainer))
    except (OSError, CheckpointError) as second:
        return CheckpointError(
            f"{error}. Nor could the run be saved elsewhere ({second}): {trainer.folder} holds it up to its last checkpoint, "
            f"and the steps from there to {step} are lost; --resume takes them again"
        )
    return CheckpointError(f"{error}. Everything up to step {step} is in {other} instead: --resume --out {other} continues from there")
