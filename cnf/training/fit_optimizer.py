"""Optimiser and learning rates of cnf.fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cnf._utils.errors import ConfigError
from cnf.training.schedule import adamw, learning_rate

__all__ = ["MakeOptimizer", "Schedule", "optimizer_and_rates"]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
Schedule = Literal["cosine", "constant"] | Callable[[int], float] | LRScheduler


def optimizer_and_rates(
    model: nn.Module, optimizer: Optimizer | MakeOptimizer | None, schedule: Any, lr: float, warmup: int | None, steps: int, device: torch.device
) -> tuple[Callable[[nn.Module], Optimizer], Any]:
    """Return a function that makes the optimiser, and the schedule of its rates."""
    known = {id(p) for p in model.parameters()}
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"{type(model).__name__} has no parameter that requires a gradient: there is nothing to train")
    if optimizer is not None and not callable(optimizer) and not isinstance(optimizer, Optimizer):
        raise ConfigError(f"optimizer must be a torch.optim.Optimizer or a function of the parameters, got {optimizer!r}")

    def make(model: nn.Module) -> Optimizer:
        made = adamw(model, lr) if optimizer is None else optimizer if isinstance(optimizer, Optimizer) else optimizer(model.parameters())
        if not isinstance(made, Optimizer):
            raise ConfigError(f"optimizer returned {type(made).__name__}; expected a torch.optim.Optimizer")
        if isinstance(made, torch.optim.LBFGS):
            raise ConfigError("optimizer=LBFGS evaluates the loss several times a step, which fit does not: choose another one")
        if any(id(p) not in known for group in made.param_groups for p in group["params"]):
            raise ConfigError("optimizer has parameters that are not the model's: make it of model.parameters()")
        for group in made.param_groups:  # counters on the GPU, where a step can be masked without synchronisation
            if device.type == "cuda" and "capturable" in group and not group.get("fused"):
                group["capturable"] = True
        return made

    if isinstance(schedule, LRScheduler):
        if schedule.optimizer is not optimizer:
            raise ConfigError("schedule is a scheduler of another optimiser: give optimizer=, the one it was made of")
        return make, schedule
    if schedule is None:
        schedule = "cosine" if optimizer is None else lambda step: 1.0
    if callable(schedule):
        return make, lambda step, steps: schedule(step)
    if schedule not in ("cosine", "constant"):
        raise ConfigError(f"schedule={schedule!r}; expected 'cosine', 'constant', a function of the step, or a scheduler of torch")
    rise = min(100, steps // 10) if warmup is None else warmup
    return make, lambda step, steps: learning_rate(step, 1.0, rise, steps, schedule)
