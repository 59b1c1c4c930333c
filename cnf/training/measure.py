"""Cost of a training step, measured before a long run."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import torch

from cnf.training.loop import Trainer
from cnf.training.memory import kept_bytes
from cnf.training.step import micro_batches

__all__ = ["Cost", "measure"]

MINIMUM_STEPS = 3
ENOUGH_SECONDS = 2.0


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


def measure(trainer: Trainer) -> Cost:
    """Take a few steps with ``trainer`` and measure them; ``trainer`` is not usable afterwards."""
    trainer.flow.train()
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    part = next(micro_batches(*trainer.batches(trainer.step), trainer.config.accumulate))
    kept = kept_bytes(trainer.flow, lambda: trainer.objective.evaluate(*part))
    _step(trainer)
    steps, started = 0, time.perf_counter()

    def more() -> bool:  # until all processes have enough
        wanted = steps < MINIMUM_STEPS or (time.perf_counter() - started < ENOUGH_SECONDS and steps < 50)
        return bool(trainer.group.all_max([float(wanted)])[0])

    while more():
        _step(trainer)
        steps += 1
    seconds = (time.perf_counter() - started) / steps
    trainer.settle()
    if trainer.device.type == "cuda":
        peak, where = torch.cuda.max_memory_allocated(trainer.device) / 2**20, "GPU"
    else:
        import resource  # Unix only; imported here so that the rest works elsewhere

        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB elsewhere
        peak, where = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, "process" if trainer.stage == 0 else "process, so far"
    count = sum(p.numel() for p in trainer.flow.parameters())
    return Cost(count, trainer.batches.size, kept / 2**20, peak, where, seconds)


def _step(trainer: Trainer) -> None:
    trainer.update()
    if trainer.last_stage or trainer.step + 1 < trainer.stage_end:  # stay in the current phase
        trainer.step += 1
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
