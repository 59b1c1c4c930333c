"""How weights move: the optimiser, the learning rate of a step, the averaging."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["averaging", "learning_rate", "optimizer"]


def learning_rate(step: int, peak: float, warmup: int, steps: int, schedule: str) -> float:
    """The rate of step 0, 1, ...: linear warm-up to ``peak``, then constant or a cosine to zero at ``steps``.

    Example:
        >>> [round(learning_rate(i, 1.0, 2, 6, "cosine"), 3) for i in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, with zero decay Adam; betas and eps are Adam's usual. A learned end time is not decayed: it has no reason to be short.

    Example:
        >>> [len(group["params"]) for group in optimizer(nn.Linear(2, 2), 1e-3, 0.1).param_groups]
        [2]
    """
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if not n.endswith("sqrt_end_time")], "weight_decay": weight_decay},
        {"params": [p for n, p in named if n.endswith("sqrt_end_time")], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr)


def averaging(decay: float) -> Callable[[Any, Any, Any], None]:
    """For AveragedModel: exponential averaging by min(decay, (1 + n) / (10 + n)) at update n.

    The bound lets a young average forget the initial weights soon. ``decay=0`` copies the weights: no averaging.
    """

    def update(averaged: Any, current: Any, count: Any) -> None:
        n = float(count)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, count)

    return update
