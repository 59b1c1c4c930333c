"""Cost of a training step, measured before a long run."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from dataclasses import dataclass

import torch
from torch import nn

from cnf.config import AdaptiveConfig, ConvConfig, FlowConfig, UNetConfig
from cnf.data import DataSplits
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.runs import RunInfo
from cnf.training.callbacks import Callback, Run, WeightAverage
from cnf.training.loop import Trainer
from cnf.training.memory import saved_tensor_bytes
from cnf.training.phases import Phase
from cnf.training.settings import prepare
from cnf.training.step import micro_batches

__all__ = ["Cost", "CostMeter", "measure"]

NEVER = 2**62
SECONDS, GROWTH = 4.0, 4
"""Seconds that the steps of all phases may take, and growth of the batch from one attempt to the next."""
SIDE = 32
"""Pixels: on a CPU, the steps of convolutional models are measured on parts of larger images: for adaptive solvers of half the size."""


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
    """Measure memory and time of a few steps, after a first one (of the first, if no others are needed), and stop.

    Args:
        accumulate: micro-batches of a step.

    Attributes:
        least_steps: steps to measure at least.
        enough_seconds: time after which they are enough.
    """

    least_steps, enough_seconds = 3, 2.0

    def __init__(self, accumulate: int = 1):
        self.accumulate = accumulate
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
        seconds = (self.times[-1] - self.times[0]) / (len(self.times) - 1) if len(self.times) > 1 else self.times[0]
        count = sum(p.numel() for p in run.model.parameters())
        self.cost = Cost(count, run.batches.size, self.kept / 2**20, peak, where, seconds)


def measure(info: RunInfo, data: DataSplits, group: Group = SINGLE_PROCESS) -> list[Cost]:
    """Return the cost of a step in each training phase of these settings; writes nothing.

    Batches grow fourfold from one row on. A batch that would take longer than :data:`SECONDS` is not measured: the cost of a
    smaller one is extrapolated, as a constant and a part for each row. On a CPU the cost of large images is that of a part of
    some pixels a side (:data:`SIDE`), times the number of parts, where the model is convolutional.
    """
    factor = _parts_a_side(info, data)
    if factor > 1:
        part, (height, width) = _corner(data, factor), data.event_shape[1:]
        whole = sum(p.numel() for p in info.build().parameters())
        said = f"; an upper estimate from {height // factor}x{width // factor} of {height}x{width} pixels"
        return [_times(cost, factor**2, whole, said) for cost in measure(dataclasses.replace(info, event_shape=part.event_shape), part, group)]
    model, stages = prepare(info, data, group)
    costs: list[Cost] = []
    for number, phase in enumerate(stages):
        cost = _cost(model, phase, info, group, SECONDS / len(stages))
        costs.append(dataclasses.replace(cost, where=f"{cost.where}, so far") if number and cost.where == "process" else cost)
    return costs


def _parts_a_side(info: RunInfo, data: DataSplits) -> int:
    """Return into how many parts to divide the sides of images, a power of two; 1 for not at all."""
    model, factor = info.config.model, 1
    field = model.field if isinstance(model, FlowConfig) and not info.custom_field else None
    if data.kind != "image" or not isinstance(field, ConvConfig | UNetConfig) or torch.device(info.config.train.device).type != "cpu":
        return 1
    if min(data.event_shape[1:]) <= SIDE:
        return 1
    largest = SIDE // 2 if isinstance(info.config.solver.train_solver, AdaptiveConfig) else SIDE
    while min(data.event_shape[1:]) > largest * factor and all(side % (largest // 2 * factor) == 0 for side in data.event_shape[1:]):
        factor *= 2
    return factor


def _corner(data: DataSplits, factor: int) -> DataSplits:
    """Return the images' upper left parts, for each side its ``factor``-th part."""
    height, width = (side // factor for side in data.event_shape[1:])
    train, validation, test = (part[..., :height, :width] for part in (data.train, data.validation, data.test))
    return dataclasses.replace(data, train=train, validation=validation, test=test)


def _times(cost: Cost, parts: int, parameters: int, said: str) -> Cost:
    kept = cost.kept * parts
    peak, seconds, where = cost.peak + kept - cost.kept, cost.seconds * parts, cost.where + said
    return dataclasses.replace(cost, parameters=parameters, kept=kept, peak=peak, seconds=seconds, where=where)


def _cost(model: nn.Module, phase: Phase, info: RunInfo, group: Group, limit: float) -> Cost:
    started, batch = math.nan, phase.batches.size
    size = min(batch, group.size * info.config.train.accumulate)
    if info.config.solver.compile:  # every other size would be compiled anew
        size = batch
    smaller: tuple[int, float] = (0, 0.0)  # rows and seconds of the attempt before: a step is a constant and a part for each row
    while True:
        cost = _run(model, phase, info, group, size, again=not smaller[0])
        if size == batch:
            return cost
        if not smaller[0]:  # before, libraries were imported: seconds on a busy machine
            started = time.monotonic()
        larger = min(batch, GROWTH * size)
        each = max(0.0, cost.seconds - smaller[1]) / (size - smaller[0])
        steps = 2 + CostMeter.least_steps * (larger == batch)  # with a forward pass and a first step
        if group.all_max([steps * (cost.seconds + each * (larger - size)) + time.monotonic() - started])[0] > limit:
            kept = cost.kept * batch / size
            where = f"{cost.where}; by arithmetic from {size:,} of {batch:,} rows" + ("" if smaller[0] else ", an upper estimate")
            seconds = cost.seconds + each * (batch - size)
            return dataclasses.replace(cost, batch=batch, kept=kept, peak=cost.peak + kept - cost.kept, where=where, seconds=seconds)
        smaller, size = (size, cost.seconds), larger


def _run(model: nn.Module, phase: Phase, info: RunInfo, group: Group, size: int, again: bool) -> Cost:
    """Measure steps of ``size`` rows; for a part of the batch the first step, or with ``again`` the second one, which is warm."""
    config, whole = info.config.train, size == phase.batches.size
    meter = CostMeter(config.accumulate)
    if not whole:
        meter.least_steps, meter.enough_seconds = int(again), 0.0
    Trainer(
        model,
        [dataclasses.replace(phase, steps=None, batches=phase.batches if whole else phase.batches.resized(size))],
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
    return meter.cost
