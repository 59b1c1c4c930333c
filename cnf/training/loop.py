"""The training loop: every step a pure function of (seed, step), so that a resumed run never stopped."""

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
from cnf.distributed import ALONE, Group
from cnf.errors import CheckpointError, SolverError
from cnf.objectives import Objective
from cnf.training.batches import Batches, shared_settings, validation_rows
from cnf.training.importance import TimesWatch
from cnf.training.journal import Journal, Mute
from cnf.training.memory import fitting
from cnf.training.settle import Ledger, advance, settle, told
from cnf.training.signals import Abandoned, Interrupted, Signals
from cnf.training.stages import enter, fresh, rate, stages, undo_gaming
from cnf.training.state import NUMBERS, export, owning, rescue, restore, write
from cnf.training.step import gradient, tensor_cores
from cnf.training.watch import Watch

__all__ = ["NUMBERS", "Trainer"]

VALIDATION_SEED = 20_000  # validation noise never changes: validations are comparable within and between runs
LOG_EVERY = 10  # steps between lines of metrics.jsonl, for which all steps since are read from the device
SAVE_SECONDS = 300.0  # a checkpoint at least so often, however rare validations are
RETRY_SECONDS = 30.0  # to the next attempt where a checkpoint could not be written


class Trainer:
    """Trains one run, of a flow or of a model that predicts, in one folder, which :meth:`run` fills; making a Trainer writes nothing unless it resumes.

    Args:
        info: settings and the data's shape.
        data: the splits; the test set is never touched here.
        folder: the run folder (with its config.json).
        resume: continue from the folder's checkpoint.
        quiet: no progress bar and no lines.
        group: the processes that train this run together, all with the same arguments: one optimiser step on each joint
            batch, the same weights everywhere, and one (rank 0) that writes. Any number of them may resume a run.

    Raises:
        CheckpointError: on resume, for a checkpoint that is damaged, of another model or of other data.
        ConfigError: for settings that do not fit each other.
    """

    def __init__(
        self, info: RunInfo, data: DataSplits, folder: Path, *, resume: bool = False, quiet: bool = False, group: Group = ALONE
    ):
        self.info, self.data, self.folder, self.group = info, data, folder, group
        self.config = info.config.train
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        self.device = torch.device(self.config.device)
        torch.manual_seed(self.config.seed)  # the initial weights
        self.flow = info.build().to(self.device)
        self.weights = list(self.flow.parameters())  # a walk through all modules takes a while
        self.journal = (Journal if group.main else Mute)(folder, self.config.steps, quiet=quiet)
        batches = Batches(data, self.config.batch_size, self.config.seed, self.device, group, self.flow.like.dtype)
        self.stages = stages(self.flow, self.config, info.config.solver, batches, self.say)
        self.stages[0].objective.prepare(batches.x)
        group.agree(shared_settings(info.config, data))
        group.spread(self.flow.state_dict().values())  # the same already, but for what another machine rounds differently
        self.stage = 0  # which of the stages is under way, and since which step
        self.since = 0
        self.optimizer, self.ema, self.recovery = fresh(self)
        self.validation = validation_rows(data, self.config.validation_items, VALIDATION_SEED, self.device)
        self.step = self.skipped = self.skips_in_row = self.worse = 0
        self.best, self.best_step, self.validated, self.seconds = math.inf, 0, -1, 0.0
        self.best_weights: dict[str, Tensor] = {}
        self.signals = Signals(shared=group.size > 1, quiet=not group.main)
        self.ledger = Ledger(self.flow)
        self.pending: dict[str, Any] = {}  # of the latest step, while what follows it (:meth:`_after`) is not complete
        self.export_due = False  # the best weights are not in the folder yet
        self.signal, self._saved, self._saved_at = 0, -1, time.monotonic()
        with owning(folder, group) if resume else nullcontext():
            if resume and group.first(lambda: has_trainer(folder)):
                restore(self)
            elif resume:  # stopped before its first checkpoint: the beginning is where it continues
                self.journal.cut(0)

    @property
    def objective(self) -> Objective:
        """What is minimised at present."""
        return self.stages[self.stage].objective

    @property
    def batches(self) -> Batches:
        """The present stage's batches."""
        return self.stages[self.stage].batches

    @property
    def last_stage(self) -> bool:
        """Whether no stage follows."""
        return self.stage + 1 == len(self.stages)

    @property
    def stage_end(self) -> int:
        """The step with which the present stage ends."""
        return self.config.steps - (0 if self.last_stage else self.config.tune_steps)

    @property
    def watch(self) -> Watch | TimesWatch:
        """The present stage's watch."""
        return self.stages[self.stage].watch

    @property
    def unit(self) -> str:
        """Of the objective: bits/dim, nats, or squared error."""
        return self.objective.unit

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return self.journal.rows

    def say(self, line: str) -> None:
        """A line for the reader."""
        self.journal.say(line)

    # -- state ---------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the whole resume state.

        Raises:
            CheckpointError: where it cannot be written; what was saved before is still there.
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
        """The averaged weights of the best validation, in evaluation mode."""
        flow = self.info.build().to(self.device)
        flow.load_state_dict(self.best_weights)
        return flow.eval()

    # -- one step ------------------------------------------------------------------------------------------------

    def update(self) -> None:
        """One optimiser step at the present ``step``, left out on the device where loss or gradient is not finite.

        Nothing waits for the device, and what the step gave is not known before :meth:`settle`: but for adaptive solvers,
        whose steps depend on values, and several processes, which wait for each other.

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
        # from here on, gradient and figures are the joint batch's, so that all processes do the same
        figures, failure = self.group.joint(self.weights, len(x) / self.batches.size, found.figures, found.failure)
        if failure:
            self.ledger.fail(self.step, failure)
        else:
            advance(self, lr, found.names, figures)

    def settle(self) -> dict[str, float] | None:
        """What the latest step gave, read from the device with all before it, and what is to follow; None if its batch was skipped.

        Raises:
            TrainingError: when too many batches in a row could not be used, again and again.
        """
        return settle(self)

    # -- validation ----------------------------------------------------------------------------------------------

    def validate(self) -> dict[str, Any]:
        """Validation of the averaged weights with the evaluation solver; keeps the best."""
        model = self.ema.module.eval()
        x, context, index = self.validation
        found: dict[str, float] = {}
        try:
            with self.signals.abandoning(), tensor_cores(False):
                found = self.objective.validate(model, x, context, index=index, seed=VALIDATION_SEED, group=self.group)
        except SolverError as error:
            self.say(f"step {self.step}: validation failed: {error}")
        value = found.get("validation", math.inf)
        if math.isnan(value):  # which would compare as neither better nor worse
            value = math.inf
        self.validated, self.worse = self.step, self.worse + 1
        if value < self.best or not self.best_weights:
            self.best, self.best_step, self.worse = value, self.step, 0
            self.best_weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
            if self.group.main:
                export(self)
        # a fine-tuning that validates worse may follow a grid that was gamed since it was measured
        if math.isfinite(value) and (self.stage == 0 or self.worse == 0):
            self.recovery.keep(self.step)
        return {**found, "validation": value, "best": self.best, "best_step": self.best_step}

    # -- the loop ------------------------------------------------------------------------------------------------

    def stop_reason(self, elapsed: float = 0.0) -> str | None:
        """Why training is over: ``"steps"``, ``"patience"`` or ``"max_time"``; None while it is not."""
        if self.step >= self.config.steps:
            return "steps"
        if self.config.patience and self.worse >= self.config.patience and self.last_stage:
            return "patience"
        if self.config.max_time is not None and elapsed >= self.config.max_time:
            return "max_time"
        return None

    def _stop(self, started: float) -> str | None:
        """The reason to stop on all processes alike: rank 0's clock counts, and a signal to one of them is one to all."""
        elapsed = time.monotonic() - started if self.group.main else 0.0
        number, elapsed = self.group.largest([self.signals.number, elapsed])
        self.signal = int(number)
        return self.stop_reason(elapsed)

    def run(self) -> str:
        """Train to the end, from wherever it stands, and say why it ended (see :meth:`stop_reason`).

        Raises:
            Interrupted: after SIGINT or SIGTERM, everything saved.
            TrainingError: when too many batches in a row could not be used, again and again.
            CheckpointError: when the end of the run cannot be saved; it says where it is instead.
        """
        started, before, first = time.monotonic(), self.seconds, self.step
        self._saved_at = started
        with owning(self.folder, self.group), self.signals, self.journal.opened(self.step):
            while ((reason := self._stop(started)) is None or self.pending) and not self.signal:
                with suppress(Abandoned):  # a signal: the step, or what follows it, is for who resumes
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
            # where time ran out between two validations, the last weights get theirs: for the test and the export, not for
            # the state, so that a resumed run selects what it would have selected had it never stopped
            if last:
                with suppress(Abandoned):
                    self.settle()
                    self.journal.record({"step": self.step, **self.validate(), "seconds": round(self.seconds, 3)})
            self._stop(started)  # a signal during the last validation; and all wait until everything is saved
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
        """Where it is due, at the end, and where matching ends: its finished weights are what fine-tuning has to better."""
        return self.step % self.config.validate_every == 0 or self.step in (self.stage_end, self.config.steps)

    @property
    def _due(self) -> bool:
        """Whether this step gets a row in metrics.jsonl, and so all before it are to be judged."""
        return self._watches or self._validates or self.step % LOG_EVERY == 0

    def _after(self, values: dict[str, float] | None, extra: dict[str, Any], rate: float) -> None:
        """Watch, validate, log and save where it is due; ``extra`` is what an earlier call that was interrupted has found."""
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
