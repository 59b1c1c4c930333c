"""The training loop: every step a pure function of (seed, step), so that a resumed run never stopped."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel

from cnf.checkpoint import RunInfo, has_trainer, load_trainer, one_line, save_trainer, write_weights
from cnf.datasets import DataSplits
from cnf.errors import CheckpointError, SolverError, TrainingError
from cnf.flow import Flow
from cnf.likelihood import evaluate
from cnf.objectives import Likelihood
from cnf.training.batches import Batches, fingerprint, validation_rows
from cnf.training.journal import Journal
from cnf.training.schedule import averaging, learning_rate
from cnf.training.signals import Interrupted, Signals
from cnf.training.watch import Watch

__all__ = ["Trainer"]

MAX_SKIPS = 10  # batches skipped in a row before giving up
VALIDATION_SEED = 20_000  # validation noise never changes: validations are comparable within and between runs
LOG_EVERY = 10  # steps between lines of metrics.jsonl
SAVE_SECONDS = 300.0  # a checkpoint at least so often, however rare validations are
NUMBERS = ("step", "skipped", "skips_in_row", "worse", "best", "best_step", "validated", "seconds")


class Trainer:
    """Trains one run in one folder, which :meth:`run` fills; making a Trainer writes nothing unless it resumes.

    Args:
        info: settings and the data's shape.
        data: the splits; the test set is never touched here.
        folder: the run folder (with its config.json).
        resume: continue from the folder's checkpoint.
        quiet: no progress bar and no lines.

    Raises:
        CheckpointError: on resume, for a checkpoint that is damaged, of another model or of other data.
        ConfigError: for settings that do not fit each other.
    """

    def __init__(self, info: RunInfo, data: DataSplits, folder: Path, *, resume: bool = False, quiet: bool = False):
        self.info, self.data, self.folder = info, data, folder
        self.config = info.config.train
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        self.device = torch.device(self.config.device)
        torch.manual_seed(self.config.seed)  # the initial weights
        self.flow = info.build().to(self.device)
        self.batches = Batches(data, self.config.batch_size, self.config.seed, self.device)
        self.flow.fit_statistics(self.batches.x)
        self.objective = Likelihood(self.flow, self.config.kinetic, self.config.jacobian, self.config.regularisers)
        # AdamW with zero decay is Adam; betas and eps are Adam's usual. A learned end time is not decayed: it has no
        # reason to be short
        named = list(self.flow.named_parameters())
        groups = [
            {"params": [p for n, p in named if not n.endswith("sqrt_end_time")], "weight_decay": self.config.weight_decay},
            {"params": [p for n, p in named if n.endswith("sqrt_end_time")], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.config.lr)
        self.ema = AveragedModel(self.flow, multi_avg_fn=averaging(self.config.ema_decay))
        self.validation = validation_rows(data, self.config.validation_items, VALIDATION_SEED, self.device)
        self.step = self.skipped = self.skips_in_row = self.worse = 0
        self.best, self.best_step, self.validated, self.seconds = math.inf, 0, -1, 0.0
        self.best_weights: dict[str, Tensor] = {}
        self.journal = Journal(folder, self.config.steps, quiet=quiet)
        self.watch = Watch(self.flow, info.config.solver, self.config.watch_tolerance, self.config.max_grid_steps, self.say)
        self.signals = Signals()
        self._saved, self._saved_at = -1, time.monotonic()
        if resume and has_trainer(folder):
            self._restore()
        elif resume:  # stopped before its first checkpoint: the beginning is where it continues
            self.journal.cut(0)

    @property
    def unit(self) -> str:
        """bits/dim or nats."""
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
        """Write the whole resume state."""
        self.journal.flush()
        state = {
            "flow": self.flow.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best_weights": self.best_weights,
            "numbers": {name: getattr(self, name) for name in NUMBERS},
            "refinements": self.watch.refinements,
            "metrics": len(self.metrics),
            "data": fingerprint(self.data),
        }
        save_trainer(self.folder, state)
        self._saved, self._saved_at = self.step, time.monotonic()

    def _restore(self) -> None:
        state, notice = load_trainer(self.folder)
        if notice:
            self.say(notice)
        if state.get("data") != fingerprint(self.data):
            raise CheckpointError(f"the data are not those that {self.folder} was trained on: put them back, or start a new run")
        try:
            self.flow.load_state_dict(state["flow"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.best_weights = {k: v.to(self.device) for k, v in state["best_weights"].items()}
            best = self.best_flow() if self.best_weights else None
            for name in NUMBERS:
                setattr(self, name, type(getattr(self, name))(state["numbers"][name]))
            self.watch.refinements, rows = int(state["refinements"]), int(state["metrics"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{self.folder / 'trainer.pt'} is not of this model: {one_line(error)}") from None
        self.watch.apply()
        self.journal.cut(rows)
        if best is not None:  # a later best, from after this checkpoint, is void
            write_weights(self.folder, best)

    def best_flow(self) -> Flow:
        """The averaged weights of the best validation, in evaluation mode."""
        flow = self.info.build().to(self.device)
        flow.load_state_dict(self.best_weights)
        return flow.eval()

    # -- one step ------------------------------------------------------------------------------------------------

    def update(self) -> dict[str, float] | None:
        """One optimiser step at the present ``step``; None if the batch had to be skipped.

        Raises:
            TrainingError: when too many batches in a row could not be used.
        """
        rate = learning_rate(self.step, self.config.lr, self.config.warmup, self.config.steps, self.config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        x, context, noise = self.batches(self.step)
        self.flow.train()
        self.optimizer.zero_grad(set_to_none=True)
        try:
            terms, stats = self.objective.evaluate(x, context, noise)
            loss = terms["loss"].mean()
            loss.backward()
        except SolverError as error:
            self._skip(str(error))
            return None
        except AssertionError as error:  # torchdiffeq's word for a solve that failed, here in the adjoint's backward pass
            if self.info.config.solver.gradient != "adjoint":
                raise
            self._skip(f"the adjoint's solve failed: {error}")
            return None
        norm = clip_grad_norm_(self.flow.parameters(), self.config.max_grad_norm or math.inf)
        # all figures leave the device together
        numbers = torch.stack([v.detach().double() for v in (loss, norm, *(t.mean() for t in terms.values()))]).tolist()
        if not (math.isfinite(numbers[0]) and math.isfinite(numbers[1])):
            self._skip(f"loss {numbers[0]:g}, gradient norm {numbers[1]:g}")
            return None
        self.optimizer.step()
        self.ema.update_parameters(self.flow)
        self.skips_in_row = 0
        values = dict(zip(terms, numbers[2:], strict=True))
        return {**values, "nfe": stats.nfe, "nfe_backward": stats.nfe_backward, "grad_norm": numbers[1], "lr": rate}

    def _skip(self, reason: str) -> None:
        self.skipped += 1
        self.skips_in_row += 1
        if self.skips_in_row >= MAX_SKIPS:
            solver = self.info.config.solver
            finer = f"a smaller --rtol (now {solver.rtol:g})" if solver.adaptive else f"more --grid-steps (now {solver.grid_steps})"
            raise TrainingError(
                f"{MAX_SKIPS} batches in a row could not be used, the last at step {self.step} ({reason}): try a smaller --lr "
                f"(now {self.config.lr:g}), a longer --warmup (now {self.config.warmup}), --kinetic 0.01 or more (now "
                f"{self.config.kinetic:g}), or {finer}, in a new run"
            )
        if self.skipped <= MAX_SKIPS:  # all are counted in metrics.jsonl and result.json
            self.say(f"step {self.step}: batch skipped: {reason}")

    # -- validation ----------------------------------------------------------------------------------------------

    def validate(self) -> dict[str, Any]:
        """Validation of the averaged weights with the evaluation solver; keeps the best."""
        flow = cast(Flow, self.ema.module)
        flow.eval()
        x, context, index = self.validation
        try:
            value = evaluate(flow, x, context, seed=VALIDATION_SEED, index=index).mean
        except SolverError as error:
            self.say(f"step {self.step}: validation failed: {error}")
            value = math.inf
        if math.isnan(value):  # which would compare as neither better nor worse
            value = math.inf
        self.validated = self.step
        self.worse += 1
        if value < self.best or not self.best_weights:
            self.best, self.best_step, self.worse = value, self.step, 0
            self.best_weights = {k: v.detach().clone() for k, v in flow.state_dict().items()}
            write_weights(self.folder, flow)
        return {"validation": value, "best": self.best, "best_step": self.best_step}

    # -- the loop ------------------------------------------------------------------------------------------------

    def stop_reason(self, elapsed: float = 0.0) -> str | None:
        """Why training is over: ``"steps"``, ``"patience"`` or ``"max_time"``; None while it is not."""
        if self.step >= self.config.steps:
            return "steps"
        if self.config.patience and self.worse >= self.config.patience:
            return "patience"
        if self.config.max_time is not None and elapsed >= self.config.max_time:
            return "max_time"
        return None

    def run(self) -> str:
        """Train to the end, from wherever it stands, and say why it ended (see :meth:`stop_reason`).

        Raises:
            Interrupted: after SIGINT or SIGTERM, everything saved.
            TrainingError: when too many batches in a row could not be used.
        """
        started, before, first = time.monotonic(), self.seconds, self.step
        self._saved_at = started
        with self.signals, self.journal.opened(self.step):
            while (reason := self.stop_reason(time.monotonic() - started)) is None and not self.signals.number:
                values = self.update()
                self.step += 1
                self.seconds = before + time.monotonic() - started
                self._after(values, (self.step - first) / max(1e-9, self.seconds - before))
            # where time ran out between two validations, the last weights get theirs; an interrupted run gets none, so
            # that it selects what it would have selected had it never stopped
            if reason is not None and not self.signals.number and self.validated != self.step:
                self.journal.record({"step": self.step, **self.validate(), "seconds": round(self.seconds, 3)})
                self._saved = -1
            if self._saved != self.step:
                self.save()
        if self.signals.number:
            raise Interrupted(self.signals.number, self.step)
        assert reason is not None
        if reason != "steps":
            self.say(f"step {self.step}: " + ("time is up" if reason == "max_time" else f"no better validation in {self.worse}"))
        return reason

    def _after(self, values: dict[str, float] | None, rate: float) -> None:
        """Watch, validate, log and save where it is due."""
        extra: dict[str, Any] = {}
        if self.step % self.config.watch_every == 0:
            extra |= self.watch.measure(self.step, *self.batches(self.step))
        due = self.step % self.config.validate_every == 0 or self.step == self.config.steps
        if due:
            extra |= self.validate()
        if extra or self.step % LOG_EVERY == 0:
            row = {"step": self.step, **(values or {}), "skipped": self.skipped, **extra, "seconds": round(self.seconds, 3)}
            self.journal.record(row)
        parts = [f"{values['nll']:.4f} {self.unit}, NFE {values['nfe']:g}"] if values else ["batch skipped"]
        parts.append(f"{rate * self.batches.size:,.0f} samples/s")
        if self.best_weights:
            last = f"validation {extra['validation']:.4f}, " if due else ""
            parts.append(f"{last}best {self.best:.4f} at {self.best_step}")
        self.journal.progress(self.step, ", ".join(parts), line=due)
        if due or time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.save()
