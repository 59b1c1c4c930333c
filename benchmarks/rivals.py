"""zuko's autoregressive flows as rivals on tables: trained by the likelihood within CPU seconds, the learning rate chosen.

Each rate is tried for a sixth of the time with its own cosine, the one with the best validation is trained anew for the
rest. The weights of the best validation are tested.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnf.training.schedule import learning_rate

RATES = (5e-4, 1e-3, 3e-3)
VALIDATIONS = 20
CHUNK = 4096


def autoregressive(
    parts: Sequence[Tensor], seconds: float, seed: int, kind: str = "NSF", rates: Sequence[float] = RATES, batch_size: int = 512
) -> tuple[Tensor, dict[str, Any]]:
    """Negative log-likelihood (nats) of the test rows by ``zuko.flows.NSF`` or ``MAF``, and what was found.

    Args:
        parts: training, validation and test rows (N, D).
        seconds: CPU time of the whole choice and training.
        seed: of weights and batches.
        kind: name of zuko's class.
        rates: learning rates.
        batch_size: rows of a step.
    """
    mean, std = parts[0].mean(0), parts[0].std(0)
    train, validation, test = ((x - mean) / std for x in parts)
    shift = float(std.double().log().sum())
    rate, share = rates[0], 1 / 6 if len(rates) > 1 else 0.0
    if len(rates) > 1:
        tried = {rate: _train(kind, train, validation, share * seconds, seed, rate, batch_size)[1] for rate in rates}
        rate = min(tried, key=tried.__getitem__)
    flow, best, steps = _train(kind, train, validation, (1 - share * len(rates)) * seconds, seed, rate, batch_size)
    with torch.no_grad():
        found = torch.cat([_nll(flow, part) for part in test.split(CHUNK)]).double() + shift
    about = {"start": f"rate {rate:g}", "steps": steps, "seconds": seconds, "validation": best + shift}
    return found, {**about, "parameters": sum(p.numel() for p in flow.parameters())}


def _nll(flow: nn.Module, x: Tensor) -> Tensor:
    value: Tensor = -flow().log_prob(x)
    return value


def _train(kind: str, train: Tensor, validation: Tensor, seconds: float, seed: int, rate: float, batch_size: int) -> tuple[nn.Module, float, int]:
    """One flow with its best validation weights, their negative log-likelihood, and the steps taken."""
    import zuko  # of the extra dev

    torch.manual_seed(seed)
    options: dict[str, Any] = {"bins": 8} if kind == "NSF" else {}
    flow = getattr(zuko.flows, kind)(train.shape[1], transforms=5, hidden_features=(64, 64), **options)
    adam = torch.optim.Adam(flow.parameters(), lr=rate)
    began, step, best, due = time.process_time(), 0, math.inf, 0.0
    kept = {k: v.clone() for k, v in flow.state_dict().items()}
    while True:
        share = (time.process_time() - began) / seconds
        if share >= due or share >= 1:
            due += 1 / VALIDATIONS
            with torch.no_grad():
                value = float(torch.cat([_nll(flow, part) for part in validation.split(CHUNK)]).double().mean())
            if value < best:
                best, kept = value, {k: v.clone() for k, v in flow.state_dict().items()}
            if share >= 1:
                break
        for group in adam.param_groups:
            group["lr"] = learning_rate(round(1000 * share), rate, 50, 1000, "cosine")
        adam.zero_grad(set_to_none=True)
        _nll(flow, train[torch.randint(len(train), (min(batch_size, len(train)),))]).mean().backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        adam.step()
        step += 1
    flow.load_state_dict(kept)
    return flow, best, step
