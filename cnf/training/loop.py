"""The training loop: every step is a pure function of (seed, step), so that a resumed run repeats it bit for bit."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnf.checkpoint import RunInfo, has_trainer
from cnf.datasets import DataSplits
from cnf.deferral import deferred_checks
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.errors import CheckpointError, Interrupted, SolverError
from cnf.objectives import Objective
from cnf.training.batches import Batches, shared_settings, validation_rows
from cnf.training.importance import TimesWatch
from cnf.training.journal import Journal, Mute
from cnf.training.memory import fitting
from cnf.training.settle import Ledger, advance, settle, told
from cnf.training.signals import Abandoned, Signals
from cnf.training.stages import enter, fresh, rate, stages, undo_gaming
from cnf.training.state import NUMBERS, export, owning, rescue, restore, write
from cnf.training.step import gradient, tensor_cores
from cnf.training.watch import Watch

__all__ = ["NUMBERS", "Trainer"]

VALIDATION_SEED = 20_000  # fixed validation noise, so that validations compare within and between runs
LOG_EVERY = 10  # steps between lines of metrics.jsonl; the steps since the last one are read from the device then
SAVE_SECONDS = 300.0  # longest interval between checkpoints, however rare validations are
RETRY_SECONDS = 30.0  # until the next attempt after a failed checkpoint


class Trainer:
    """Trainer of a flow or predictor in a run folder; the constructor writes only when it resumes.

    Args:
        info: settings and shape of the data.
        data: the splits; the test split is never used here.
        folder: the run folder, with its config.json.
        resume: continue from the folder's checkpoint.
        quiet: show neither progress bar nor messages.
        group: processes that train this run together, all with the same arguments: one optimiser step for each joint
            batch, the same weights on all ranks, files written by rank 0. A run resumes on any number of processes.

    Raises:
        CheckpointError: on resume, for a checkpoint that is damaged, of another model or of other data.
        ConfigError: for incompatible settings.
    """

    def __init__(
        self, info: RunInfo, data: DataSplits, folder: Path, *, resume: bool = False, quiet: bool = False, group: Group = SINGLE_PROCESS
    ):
        self.info, self.data, self.folder, self.group = info, data, folder, group
        self.config = info.config.train
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        self.device = torch.device(self.config.device)
        torch.manual_seed(self.config.seed)  # the initial weights
        self.flow = info.build().to(self.device)
        self.weights = list(self.flow.parameters())  # cached: walking all modules is slow
        self.journal = (Journal if group.main else Mute)(folder, self.config.steps, quiet=quiet)
        batches = Batches(data, self.config.batch_size, self.config.seed, self.device, group, self.flow.like.dtype)
        self.stages = stages(self.flow, self.config, info.config.solver, batches, self.say)
        self.stages[0].objective.prepare(batches.x)
        group.check_same(shared_settings(info.config, data))
        group.broadcast(self.flow.state_dict().values())  # equal already, up to rounding that differs between machines
        self.stage = 0  # index of the current phase, and its first step (``since``)
        self.since = 0
        self.optimizer, self.ema, self.recovery = fresh(self)
        self.validation = validation_rows(data, self.config.validation_items, VALIDATION_SEED, self.device)
        self.step = self.skipped = self.skips_in_row = self.worse = 0
        self.best, self.best_step, self.validated, self.seconds = math.inf, 0, -1, 0.0
        self.best_weights: dict[str, Tensor] = {}
        self.signals = Signals(shared=group.size > 1, quiet=not group.main)
        self.ledger = Ledger(self.flow)
        self.pending: dict[str, Any] = {}  # metrics of the latest step until :meth:`_after` has completed
        self.export_due = False  # the best weights are not exported yet
        self.signal, self._saved, self._saved_at = 0, -1, time.monotonic()
        with owning(folder, group) if resume else nullcontext():
            if resume and group.on_rank0(lambda: has_trainer(folder)):
                restore(self)
            elif resume:  # stopped before its first checkpoint: start from step 0
                self.journal.cut(0)

    @property
    def objective(self) -> Objective:
        """The objective of the current phase."""
        return self.stages[self.stage].objective

    @property
    def batches(self) -> Batches:
        """The batches of the current phase."""
        return self.stages[self.stage].batches

    @property
    def last_stage(self) -> bool:
        """Whether the current phase is the last one."""
        return self.stage + 1 == len(self.stages)

    @property
    def stage_end(self) -> int:
        """The step at which the current phase ends."""
        return self.config.steps - (0 if self.last_stage else self.config.tune_steps)

    @property
    def watch(self) -> Watch | TimesWatch:
        """The monitor of the current phase."""
        return self.stages[self.stage].watch

    @property
    def unit(self) -> str:
        """Unit of the objective: bits/dim, nats or squared error."""
        return self.objective.unit

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return self.journal.rows

    def say(self, line: str) -> None:
        """Print a message."""
        self.journal.say(line)

    # -- state ---------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the whole resume state.

        Raises:
            CheckpointError: if it cannot be written; the previous checkpoint is intact.
        """
        if self.group.main:
            write(self)
        self._saved, self._saved_at = self.step, time.monotonic()

    def _try_save(self) -> None:
        try:
            self.save()
        except CheckpointError as error:
            self._saved_at = time.monotonic() - SAVE_SECONDS + RETRY_SECONDS
            self.say(f"step {self.step}: no checkpoint: {error}; training goes on, and the next save tries again")

    def best_flow(self) -> Any:
        """Return a model with the averaged weights of the best validation, in evaluation mode."""
        flow = self.info.build().to(self.device)
        flow.load_state_dict(self.best_weights)
        return flow.eval()

    # -- one step ------------------------------------------------------------------------------------------------

    def update(self) -> None:
        """Take one optimiser step, masked on the device where loss or gradient is not finite.

        Runs without host synchronisation (:meth:`settle` reads the metrics later), except with adaptive solvers, whose
        steps depend on values, and with several processes, which synchronise.

        Raises:
            TrainingError: for a batch that does not fit into memory.
        """
        enter(self)
        config, lr = self.config, rate(self)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x, context, noise = self.batches(self.step)
        self.flow.train()
        self.optimizer.zero_grad(set_to_none=True)
        limits = {"limit": self.recovery.limit(), "limit_backward": self.recovery.limit("nfe_backward")}
        adjoint = self.info.config.solver.gradient == "adjoint"
        tf32 = tensor_cores(self.info.config.solver.precision == "tf32")
        with self.signals.abandoning(), fitting(self, x, context, noise), deferred_checks(), tf32:
            found = gradient(self.objective, x, context, noise, count=config.accumulate, adjoint=adjoint, **limits)
        # from here on, gradient and metrics are the joint batch's, so that all processes do the same
        figures, failure = self.group.all_reduce_gradients(self.weights, len(x) / self.batches.size, found.figures, found.failure)
        if failure:
            self.ledger.fail(self.step, failure)
        else:
            advance(self, lr, found.names, figures)

    def settle(self) -> dict[str, float] | None:
        """Read and process the pending metrics; return the latest step's, None if its batch was skipped.

        Raises:
            TrainingError: if too many consecutive batches are unusable after all rollbacks.
        """
        return settle(self)

    # -- validation ----------------------------------------------------------------------------------------------

    def validate(self) -> dict[str, Any]:
        """Validate the averaged weights with the evaluation solver and keep the best ones."""
        model = self.ema.module.eval()
        x, context, index = self.validation
        found: dict[str, float] = {}
        try:
            with self.signals.abandoning(), tensor_cores(False):
                found = self.objective.validate(model, x, context, index=index, seed=VALIDATION_SEED, group=self.group)
        except SolverError as error:
            self.say(f"step {self.step}: validation failed: {error}")
        value = found.get("validation", math.inf)
        if math.isnan(value):  # compares as neither better nor worse
            value = math.inf
        self.validated, self.worse = self.step, self.worse + 1
        if value < self.best or not self.best_weights:
            self.best, self.best_step, self.worse = value, self.step, 0
            self.best_weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
            if self.group.main:
                export(self)
        # worse validations in fine-tuning may mean that it exploits the grid's error since the last measurement
        if math.isfinite(value) and (self.stage == 0 or self.worse == 0):
            self.recovery.keep(self.step)
        return {**found, "validation": value, "best": self.best, "best_step": self.best_step}

    # -- the loop ------------------------------------------------------------------------------------------------

    def stop_reason(self, elapsed: float = 0.0) -> str | None:
        """Return why training ends, ``"steps"``, ``"patience"`` or ``"max_time"``; None while it continues."""
        if self.step >= self.config.steps:
            return "steps"
        if self.config.patience and self.worse >= self.config.patience and self.last_stage:
            return "patience"
        if self.config.max_time is not None and elapsed >= self.config.max_time:
            return "max_time"
        return None

    def _stop(self, started: float) -> str | None:
        """Return the stop reason, the same on all processes: by rank 0's clock, and a signal to any rank stops all."""
        elapsed = time.monotonic() - started if self.group.main else 0.0
        number, elapsed = self.group.all_max([self.signals.number, elapsed])
        self.signal = int(number)
        return self.stop_reason(elapsed)

    def run(self) -> str:
        """Train from the current step to the end and return the stop reason (see :meth:`stop_reason`).

        Raises:
            Interrupted: after SIGINT or SIGTERM, with everything saved.
            TrainingError: if too many consecutive batches are unusable after all rollbacks.
            CheckpointError: if the final state cannot be saved in the run folder; names the one that holds it.
        """
        started, before, first = time.monotonic(), self.seconds, self.step
        self._saved_at = started
        with owning(self.folder, self.group), self.signals, self.journal.opened(self.step):
            while ((reason := self._stop(started)) is None or self.pending) and not self.signal:
                with suppress(Abandoned):  # a signal: the interrupted work is repeated on resume
                    if not self.pending:
                        self.update()
                        self.step += 1
                        self.pending = {"values": None, "extra": {}}
                    if self.ledger.failed or (self._due and len(self.ledger)):
                        self.pending["values"] = self.settle()
                    self.seconds = before + time.monotonic() - started
                    self._after(**self.pending, rate=(self.step - first) / max(1e-9, self.seconds - before))
            last = reason is not None and not self.signal and self.validated != self.step
            if last or self._saved != self.step:
                try:
                    self.save()
                except CheckpointError as error:
                    raise rescue(self, error) from None
            # after a stop by time, validate the last weights for the test and the export only, not for the saved state:
            # a resumed run then selects the same weights as an uninterrupted one
            if last:
                with suppress(Abandoned):
                    self.settle()
                    self.journal.record({"step": self.step, **self.validate(), "seconds": round(self.seconds, 3)})
            self._stop(started)  # catch a signal during the last validation; all ranks wait until everything is saved
        if self.signal:
            raise Interrupted(self.signal, self.step)
        assert reason is not None
        if reason != "steps":
            self.say(f"step {self.step}: " + ("time is up" if reason == "max_time" else f"no better validation in {self.worse}"))
        return reason

    @property
    def _watches(self) -> bool:
        return self.watch.due(self.step)

    @property
    def _validates(self) -> bool:
        """Whether to validate now: on schedule, at the end, and after flow matching, as the baseline of fine-tuning."""
        return self.step % self.config.validate_every == 0 or self.step in (self.stage_end, self.config.steps)

    @property
    def _due(self) -> bool:
        """Whether this step gets a row in metrics.jsonl, which requires reading the metrics of all steps before it."""
        return self._watches or self._validates or self.step % LOG_EVERY == 0

    def _after(self, values: dict[str, float] | None, extra: dict[str, Any], rate: float) -> None:
        """Measure, validate, log and save where due; ``extra`` holds the results of an interrupted earlier call."""
        if self._watches and not extra:
            extra |= self.watch.measure(self.step, *self.batches(self.step), self.group)
            undo_gaming(self, extra)
        due = self._validates
        if due:
            extra |= self.validate()
        if self._due:
            row = {"step": self.step, **(values or {}), "skipped": self.skipped, **self.recovery.told, **extra, "seconds": round(self.seconds, 3)}
            self.journal.record(row)
        self.journal.progress(self.step, lambda: told(self, rate, extra), line=due)
        self.pending = {}
        if due or time.monotonic() - self._saved_at > SAVE_SECONDS:
            self._try_save()
