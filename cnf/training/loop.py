"""The training loop: every step a pure function of (seed, step), so that a resumed run never stopped."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from cnf.checkpoint import RunInfo, load_trainer, save_trainer, write_weights
from cnf.datasets import DataSplits
from cnf.errors import SolverError, TrainingError
from cnf.flow import Flow
from cnf.likelihood import evaluate, solver_error
from cnf.models import train_solver
from cnf.noise import Noise
from cnf.objectives import Likelihood

__all__ = ["Interrupted", "Trainer", "learning_rate"]

MAX_SKIPS = 10  # batches skipped in a row before giving up
VALIDATION_SEED = 20_000  # validation noise never changes: validations are comparable within and between runs


class Interrupted(Exception):
    """A signal asked for the end; everything is saved."""

    def __init__(self, number: int):
        self.number = number


def learning_rate(step: int, peak: float, warmup: int, steps: int, schedule: str) -> float:
    """The rate of step 0, 1, ...: linear warm-up to ``peak``, then constant or a cosine to zero at ``steps``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


class Trainer:
    """Trains one run in one folder.

    Args:
        info: settings and the data's shape.
        data: the splits.
        folder: the run folder (with its config.json).
        resume: continue from the folder's checkpoint.
        quiet: no progress bar.
    """

    def __init__(self, info: RunInfo, data: DataSplits, folder: Path, *, resume: bool = False, quiet: bool = False):
        self.info, self.data, self.folder, self.quiet = info, data, folder, quiet
        self.config = info.config.train
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        self.device = torch.device(self.config.device)
        torch.manual_seed(self.config.seed)  # the initial weights
        self.flow = info.build().to(self.device)
        self.flow.fit_statistics(data.train.to(self.device))
        self.objective = Likelihood(self.flow, self.config.kinetic, self.config.jacobian)
        # betas and eps are Adam's usual; AdamW with zero decay is Adam
        self.optimizer = torch.optim.AdamW(
            self.flow.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay
        )
        self.ema = AveragedModel(self.flow, multi_avg_fn=get_ema_multi_avg_fn(self.config.ema_decay))
        self.train, self.context = data.train.to(self.device), _to(data.train_context, self.device)
        self.step = self.skipped = self.skips_in_row = self.worse = 0
        self.grid_steps = info.config.solver.grid_steps
        self.best, self.best_step, self.seconds = math.inf, 0, 0.0
        self.best_weights: dict[str, Tensor] = {}
        self.metrics: list[dict[str, Any]] = []
        self.signal = 0
        if resume:
            self._restore(load_trainer(folder))

    @property
    def unit(self) -> str:
        """bits/dim or nats."""
        return self.objective.unit

    # -- state ---------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "flow": self.flow.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best_weights": self.best_weights,
            "numbers": {
                name: getattr(self, name)
                for name in ("step", "skipped", "skips_in_row", "worse", "grid_steps", "best", "best_step", "seconds")
            },
            "metrics": len(self.metrics),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.flow.load_state_dict(state["flow"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best_weights = state["best_weights"]
        for name, value in state["numbers"].items():
            setattr(self, name, value)
        self._set_grid(self.grid_steps)
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()[: state["metrics"]] if path.exists() else []
        self.metrics = [json.loads(line) for line in lines]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def save(self) -> None:
        """Write the whole resume state."""
        save_trainer(self.folder, self._state())

    def best_flow(self) -> Flow:
        """The averaged weights of the best validation, in evaluation mode."""
        flow = self.info.build().to(self.device)
        flow.load_state_dict(self.best_weights)
        return flow.eval()

    # -- one step ------------------------------------------------------------------------------------------------

    def batch(self, step: int) -> tuple[Tensor, Tensor | None, Noise]:
        """The batch and the noise of a step: functions of (seed, step) alone."""
        size = min(self.config.batch_size, len(self.train))
        per_epoch = len(self.train) // size
        epoch, place = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        rows = torch.randperm(len(self.train), generator=generator)[place * size : (place + 1) * size].to(self.device)
        noise = Noise(self.config.seed, "train", step)
        x = self.train[rows]
        if self.data.flip:
            chosen = noise.draw("flip", "uniform", (size,), device=self.device) < 0.5
            x = torch.where(chosen[:, None, None, None], x.flip(3), x)
        return x, None if self.context is None else self.context[rows], noise

    def _update(self) -> dict[str, float] | None:
        """One optimiser step; None if the batch had to be skipped."""
        rate = learning_rate(self.step, self.config.lr, self.config.warmup, self.config.steps, self.config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        x, context, noise = self.batch(self.step)
        self.flow.train()
        self.optimizer.zero_grad(set_to_none=True)
        try:
            terms, stats = self.objective.evaluate(x, context, noise)
        except SolverError as error:
            self._skip(str(error))
            return None
        loss = terms["loss"].mean()
        loss.backward()
        norm = clip_grad_norm_(self.flow.parameters(), self.config.max_grad_norm)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            self._skip(f"loss {loss.item():g}, gradient norm {norm.item():g}")
            return None
        self.optimizer.step()
        self.ema.update_parameters(self.flow)
        self.skips_in_row = 0
        values = {name: value.mean().item() for name, value in terms.items()}
        return {**values, "nfe": stats.nfe, "nfe_backward": stats.nfe_backward, "grad_norm": norm.item(), "lr": rate}

    def _skip(self, reason: str) -> None:
        self.skipped += 1
        self.skips_in_row += 1
        if self.skips_in_row >= MAX_SKIPS:
            raise TrainingError(
                f"{MAX_SKIPS} batches in a row could not be used, the last at step {self.step} ({reason}): try a smaller "
                f"--lr (now {self.config.lr:g}), a longer --warmup, a kinetic penalty, or more --grid-steps"
            )

    # -- watch and validation ------------------------------------------------------------------------------------

    def _set_grid(self, steps: int) -> None:
        self.grid_steps = steps
        for block in self.flow.blocks:
            block.solver = train_solver(self.info.config.solver, steps)

    def watch(self) -> dict[str, Any]:
        """The training solver's error on a batch; a grid that is too coarse gets twice the steps (design: a coarse
        grid's likelihood can be gamed)."""
        x, context, noise = self.batch(self.step)
        self.flow.train()
        try:
            error = solver_error(self.flow, x, context, noise=noise)
        except SolverError:
            error = math.inf
        if error > self.config.watch_tolerance and not self.info.config.solver.adaptive:
            if 2 * self.grid_steps <= self.config.max_grid_steps:
                self._set_grid(2 * self.grid_steps)
                what = f"now {self.grid_steps} steps a block"
            else:
                what = f"already at {self.grid_steps} steps a block: add --kinetic, or raise --max-grid-steps"
            self.say(f"step {self.step}: the grid's error is {error:.3g} {self.unit.split('/')[0]}/dim, {what}")
        return {"solver_error": error, "grid_steps": self.grid_steps}

    def validate(self) -> dict[str, Any]:
        """Validation of the averaged weights with the evaluation solver; keeps the best."""
        flow = cast(Flow, self.ema.module)
        flow.eval()
        try:
            value = evaluate(flow, self.data.validation.to(self.device), _to(self.data.validation_context, self.device), seed=VALIDATION_SEED).mean
        except SolverError as error:
            self.say(f"step {self.step}: validation failed: {error}")
            value = math.inf
        self.worse += 1
        if value < self.best or not self.best_weights:
            self.best, self.best_step, self.worse = value, self.step, 0
            self.best_weights = {k: v.detach().clone() for k, v in flow.state_dict().items()}
            write_weights(self.folder, flow)
        return {"validation": value, "best": self.best, "best_step": self.best_step}

    # -- the loop ------------------------------------------------------------------------------------------------

    def say(self, line: str) -> None:
        """A line for the reader, above the bar."""
        if not self.quiet:
            tqdm.write(line, file=sys.stderr)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, frame: Any) -> None:
            if self.signal:  # a second time: at once
                raise KeyboardInterrupt
            self.signal = number

        try:
            old = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread
            old = {}
        try:
            yield
        finally:
            for n, handler in old.items():
                signal.signal(n, handler)

    def run(self) -> None:
        """Train to the end, from wherever it stands.

        Raises:
            Interrupted: after SIGINT or SIGTERM, everything saved.
            TrainingError: when too many batches in a row could not be used.
        """
        started, before = time.monotonic(), self.seconds
        writer = SummaryWriter(str(self.folder / "tensorboard"))
        terminal = sys.stderr.isatty() and not self.quiet
        bar = tqdm(total=self.config.steps, initial=self.step, disable=not terminal, dynamic_ncols=True, unit="step")
        with self._signals(), (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as log, bar:
            try:
                while self.step < self.config.steps:
                    row = self._update()
                    self.step += 1
                    self.seconds = before + time.monotonic() - started
                    self._after(row, log, writer, bar)
                    late = self.config.max_time is not None and self.seconds > self.config.max_time
                    bored = bool(self.config.patience) and self.worse >= self.config.patience
                    if self.signal or late or bored:
                        if bored:
                            self.say(f"step {self.step}: no better validation in {self.worse}, stopping")
                        break
            finally:
                writer.close()
        if not self.best_weights:
            self.validate()
        self.save()
        if self.signal:
            raise Interrupted(self.signal)

    def _after(self, row: dict[str, float] | None, log: Any, writer: SummaryWriter, bar: Any) -> None:
        """Watch, validate, log and save where it is due."""
        extra: dict[str, Any] = {}
        if self.step % self.config.watch_every == 0:
            extra |= self.watch()
        due = self.step % self.config.validate_every == 0 or self.step == self.config.steps
        if due:
            extra |= self.validate()
        bar.update(1)
        if row is not None:
            rate = self.config.batch_size * self.step / max(self.seconds, 1e-9)
            bar.set_postfix_str(f"{row['nll']:.4g} {self.unit}, NFE {row['nfe']:g}, {rate:.0f} items/s, best {self.best:.4g}")
        if row is None and not extra and self.step % 10:
            return
        if extra or self.step % 10 == 0:
            line = {"step": self.step, **(row or {}), "skipped": self.skipped, **extra}
            self.metrics.append(line)
            log.write(json.dumps({**line, "seconds": round(self.seconds, 3)}) + "\n")
            for name, value in line.items():
                if name != "step":
                    writer.add_scalar(name, value, self.step)
        if due:
            log.flush()
            if not sys.stderr.isatty():
                nll = f"train {row['nll']:.4f}, " if row else ""
                self.say(
                    f"step {self.step}/{self.config.steps}: {nll}validation {extra['validation']:.4f} {self.unit} "
                    f"(best {self.best:.4f} at {self.best_step}), {self.grid_steps} grid steps, {self.seconds:.0f} s"
                )
            self.save()


def _to(x: Tensor | None, device: torch.device) -> Tensor | None:
    return None if x is None else x.to(device)
