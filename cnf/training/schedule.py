"""Optimiser, learning-rate schedule and weight averaging, with steps that can be masked on the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["AdamW", "Average", "learning_rate", "optimizer"]


def learning_rate(step: int, peak: float, warmup: int, steps: int, schedule: str) -> float:
    """Return the learning rate: linear warm-up to ``peak``, then constant or cosine decay to 0 at ``steps``.

    Example:
        >>> [round(learning_rate(i, 1.0, 2, 6, "cosine"), 3) for i in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW with a step masked by a tensor on the device, as in mixed precision.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> adam = AdamW([{"params": [weight]}], 0.1)
        >>> weight.grad = torch.tensor([1.0, float("nan")])
        >>> adam.step_where(weight.grad.isfinite().all())
        >>> weight.data, adam.state[weight]["step"]
        (tensor([1., 1.]), tensor(0.))
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float):
        super().__init__(groups, lr=lr, fused=True)
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self.register_load_state_dict_pre_hook(_as_fused)

    def step_where(self, taken: Tensor) -> None:
        """Take one step where ``taken`` () is True; otherwise weights, moments and counters stay unchanged."""
        self.found_inf = (~taken).float()
        try:
            self.step()
        finally:
            self.found_inf = None


def _as_fused(adam: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Convert the state of any AdamW implementation to that of the fused one."""
    return {**state, "param_groups": [{**group, "fused": True, "foreach": None} for group in state["param_groups"]]}


def optimizer(model: nn.Module, lr: float, weight_decay: float) -> AdamW:
    """Return AdamW with the default betas and eps (Adam at zero decay); learned end times are not decayed.

    Example:
        >>> [len(group["params"]) for group in optimizer(nn.Linear(2, 2), 1e-3, 0.1).param_groups]
        [2]
    """
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if not n.endswith("sqrt_end_time")], "weight_decay": weight_decay},
        {"params": [p for n, p in named if n.endswith("sqrt_end_time")], "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr)


class Average(AveragedModel):
    """Exponential moving average of a model's weights with decay min(decay, (1 + n) / (10 + n)) at update n.

    The first update copies the weights, and the bound lets a young average forget the initial weights quickly.
    ``decay=0`` copies the weights at every update, without averaging.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = Average(model, 0.5)
        >>> for value, taken in ((1.0, True), (5.0, False), (2.0, True)):
        ...     _ = model.weight.data.fill_(value)
        ...     average.update_parameters(model, torch.tensor(taken))
        >>> round(average.module.weight.item(), 4), int(average.n_averaged)  # 2/11 of the old, 9/11 of the new
        (1.8182, 2)
    """

    def __init__(self, model: nn.Module, decay: float):
        # the count is on the device of the weights, since a tensor known only there is added to it
        super().__init__(model, device=next((p.device for p in model.parameters()), None))
        self.decay = decay
        # a model, the average's parameters and the model's; cached: walking all modules is slow
        self._known: tuple[Any, ...] = (None,)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module, taken: Tensor | None = None) -> None:
        """Update the average with the model's current weights, where ``taken`` () is True or None."""
        n = self.n_averaged.double()
        decay = ((1 + n) / (10 + n)).clamp(max=self.decay) * (n > 0)
        weight = 1 - decay if taken is None else (1 - decay) * taken
        if self._known[0] is not model:
            self._known = model, list(self.module.parameters()), list(model.parameters())
        mine, others = self._known[1:]
        cast = {dtype: weight.to(dtype) for dtype in {p.dtype for p in mine}}
        weights: list[Tensor] = [cast[p.dtype] for p in mine]
        torch._foreach_lerp_(mine, others, weights)
        for own, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(buffer)
        self.n_averaged += 1 if taken is None else taken
