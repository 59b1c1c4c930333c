"""Rivals on tables, trained by the likelihood within CPU seconds: zuko's autoregressive flows, and FFJORD with its own settings.

Each learning rate of zuko's is tried for a sixth of the time with its own cosine, the one with the best validation is
trained again for the rest. FFJORD's is constant, as in its code. The weights of the best validation are tested.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnf.config import FlowConfig, SolverConfig
from cnf.data import DataSplits
from cnf.estimators.budget import Budget
from cnf.estimators.training import Pace
from cnf.estimators.training import train as train_flow
from cnf.evaluation import evaluate
from cnf.models import build
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


def ffjord(parts: Sequence[Tensor], seconds: float, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """Negative log-likelihood (nats) of the test rows by FFJORD (1810.01367) with the settings of its scripts, and what was found.

    In the plane those of its script for points: 64-64-64 with tanh, T = 0.5, exact trace, batches of 100. Otherwise those of its
    script for tables: one hidden layer of ten times the columns with softplus, one Gaussian probe, batches of 1,000, relative
    tolerance 1e-6, absolute 1e-8; its batch normalisation is off by default. dopri5, concatsquash, Adam at 1e-3.
    """
    mean, std = parts[0].mean(0), parts[0].std(0)
    train, validation, test = ((x - mean) / std for x in parts)
    shift, dim = float(std.double().log().sum()), train.shape[1]
    toy = dim == 2
    model = FlowConfig.of(
        hidden=(64, 64, 64) if toy else (10 * dim,), end_time=0.5 if toy else 1.0, learn_end_time=True, zero_init=False,
        time_conditioning="concatsquash", nonlinearity="tanh" if toy else "softplus",
    )  # fmt: skip
    tolerances = (1e-5, 1e-5) if toy else (1e-6, 1e-8)
    solver = SolverConfig.of(
        train_solver="adaptive", rtol=tolerances[0], atol=tolerances[1], gradient="adjoint",
        **{} if toy else {"divergence": "hutchinson", "hutchinson_noise": "gaussian"},
    )  # fmt: skip
    torch.manual_seed(seed)
    flow = build(model, solver, (dim,))
    budget = Budget(seconds)
    pace = Pace(10**9, budget, seconds, VALIDATIONS)
    trainer = train_flow(
        flow, DataSplits("table", "table", train, validation, validation[:0]), lambda module: torch.optim.Adam(module.parameters(), 1e-3), pace,
        pace.rate(1, decay=False), batch_size=100 if toy else 1000, seed=seed, average=0.0, validate_every=100,
    )  # fmt: skip
    found = -evaluate(flow, test).require_solved().log_prob.double() + shift
    about = {"start": "", "steps": trainer.state.step, "seconds": budget.spent, "validation": trainer.state.best + shift}
    return found, {**about, "parameters": sum(p.numel() for p in flow.parameters())}
