"""Cost of a training step, measured before a long run."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass

import torch

from cnf.data import DataSplits
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.runs import RunInfo
from cnf.training.callbacks import Callback, Run, WeightAverage
from cnf.training.loop import Trainer
from cnf.training.memory import saved_tensor_bytes
from cnf.training.settings import prepare
from cnf.training.step import micro_batches

__all__ = ["Cost", "CostMeter", "measure"]

NEVER = 2**62


@dataclass(frozen=True)
class Cost:
    """Cost of a training step: memory in MiB, time in seconds."""

    parameters: int
    batch: int
    kept: float
    """Tensors that the forward pass of one micro-batch saves for the backward pass, without weights."""
    peak: float
    """Peak memory of the process, or of its allocations on the GPU."""
    where: str
    seconds: float


class CostMeter(Callback):
    """Measure memory and time of a few steps, after a first one, and stop.

    Args:
        accumulate: micro-batches of a step.
        least_steps: steps to measure at least.
        enough_seconds: time after which they are enough.
    """

    enough_seconds = 2.0

    def __init__(self, accumulate: int = 1, least_steps: int = 3):
        self.accumulate, self.least_steps = accumulate, least_steps
        self.times: list[float] = []

    def on_start(self, run: Run) -> None:
        """Measure the tensors that a forward pass saves."""
        self.device = run.batches.device
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        part = next(micro_batches(*run.batches(run.state.step), self.accumulate))
        run.model.train()
        self.kept = saved_tensor_bytes(run.model, lambda: run.objective.evaluate(*part))

    def on_step_end(self, run: Run) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def stop_reason(self, run: Run) -> str | None:
        """Return ``"measured"`` after enough steps."""
        if run.state.step:
            self.times.append(run.elapsed)
        steps = len(self.times) - 1
        enough = steps >= 50 or (steps >= self.least_steps and self.times[-1] - self.times[0] >= self.enough_seconds)
        return "measured" if enough else None

    def on_finish(self, run: Run) -> None:
        """Put the figures together."""
        if self.device.type == "cuda":
            peak, where = torch.cuda.max_memory_allocated(self.device) / 2**20, "GPU"
        else:
            import resource  # Unix only; imported here so that the rest works elsewhere

            unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB elsewhere
            peak, where = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, "process"
        seconds = (self.times[-1] - self.times[0]) / (len(self.times) - 1)
        count = sum(p.numel() for p in run.model.parameters())
        self.cost = Cost(count, run.batches.size, self.kept / 2**20, peak, where, seconds)


def measure(info: RunInfo, data: DataSplits, group: Group = SINGLE_PROCESS) -> list[Cost]:
    """Return the cost of a step in each training phase of these settings; writes nothing."""
    model, stages = prepare(info, data, group)
    config, costs = info.config.train, []
    for number, phase in enumerate(stages):
        meter = CostMeter(config.accumulate)
        Trainer(
            model,
            [dataclasses.replace(phase, steps=None)],
            steps=NEVER,
            callbacks=[WeightAverage(config.ema_decay), meter],
            validate_every=NEVER,
            log_every=NEVER,
            accumulate=config.accumulate,
            max_grad_norm=config.max_grad_norm,
            tf32=info.config.solver.precision == "tf32",
            group=group,
            quiet=True,
        ).run()
        cost = meter.cost
        costs.append(dataclasses.replace(cost, where=f"{cost.where}, so far") if number and cost.where == "process" else cost)
    return costs
