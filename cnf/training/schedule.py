"""Optimiser, learning-rate schedule and weight averaging, with steps that can be masked on the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

__all__ = ["Average", "adamw", "learning_rate", "masked_step"]


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


def adamw(model: nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """Return fused AdamW with the default betas and eps (Adam at zero decay); learned end times are not decayed.

    Example:
        >>> [len(group["params"]) for group in adamw(nn.Linear(2, 2), 1e-3, 0.1).param_groups]
        [2]
    """
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if not n.endswith("sqrt_end_time")], "weight_decay": weight_decay},
        {"params": [p for n, p in named if n.endswith("sqrt_end_time")], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr, fused=True)
    optimizer.register_load_state_dict_pre_hook(_as_fused)
    return optimizer


def _as_fused(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Convert the state of any AdamW implementation to that of the fused one."""
    return {**state, "param_groups": [{**group, "fused": True, "foreach": None} for group in state["param_groups"]]}


def masked_step(optimizer: Optimizer, taken: Tensor) -> None:
    """Take one optimiser step where ``taken`` () is True; otherwise weights and the optimiser's state stay unchanged.

    torch's fused Adam and AdamW mask their step themselves, as in mixed precision. Any other optimiser takes its step,
    and weights and state are put back with ``torch.where``, without synchronisation, at the cost of a copy of both. Only
    where a step creates state, as the first one does, or changes a plain number or a tensor on another device (``step``
    of an optimiser without ``capturable`` on a GPU), the host reads ``taken``.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> sgd = torch.optim.SGD([weight], 0.1, momentum=0.9)
        >>> weight.grad = torch.tensor([1.0, float("nan")])
        >>> masked_step(sgd, weight.grad.isfinite().all())
        >>> weight.data, dict(sgd.state)
        (tensor([1., 1.]), {})
    """
    if isinstance(optimizer, torch.optim.Adam) and all(group["fused"] for group in optimizer.param_groups):
        scaled: Any = optimizer
        scaled.grad_scale, scaled.found_inf = None, (~taken).float()
        try:
            optimizer.step()
        finally:
            del scaled.grad_scale, scaled.found_inf
        return
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    tensors = [p.detach() for p in weights]
    before = [p.clone() for p in tensors]
    state = {p: {k: v.clone() if isinstance(v, Tensor) else v for k, v in own.items()} for p, own in optimizer.state.items()}
    optimizer.step()
    plain = False  # whether some of the new state cannot be masked on the device
    for p, own in optimizer.state.items():
        old = state.get(p, {})
        for key, value in own.items():
            if isinstance(value, Tensor) and isinstance(old.get(key), Tensor) and value.device == taken.device:
                tensors.append(value)
                before.append(old[key])
            else:
                plain |= key not in old or isinstance(value, Tensor) or value != old[key]
    if plain and not bool(taken):
        optimizer.state.clear()
        optimizer.state.update(state)
        tensors, before = tensors[: len(weights)], before[: len(weights)]
    with torch.no_grad():
        torch._foreach_copy_(tensors, [torch.where(taken, new, old) for new, old in zip(tensors, before, strict=True)])


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
