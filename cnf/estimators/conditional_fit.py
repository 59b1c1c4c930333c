"""Fit of a conditional flow: a mixture density network as base, then a conditional field that starts at zero."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cnf.bases.conditional import ConditionalMixture
from cnf.estimators import training
from cnf.estimators.training import Data, Outcome, choose_solver, train
from cnf.fields import MLP
from cnf.flow import Flow
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Exact
from cnf.solvers import FixedGrid
from cnf.transforms import MarginalTransform, Request, Sequential, Standardize, Transform

__all__ = ["ConditionalFit", "fit_conditional"]

_COMPONENTS = (1, 3, 8)
_ROWS_PER_COMPONENT = 20
_RACE = 0.5  # share of the time for the choice of transform and components
_LOG_SCALES = tuple(0.025 * i for i in range(-20, 21))  # changes of the log standard deviations
_CHANCE = 2.0  # nats: smaller gains of calibration are not significant


@dataclass(frozen=True)
class ConditionalFit:
    """Result of :func:`fit_conditional`; ``parts`` are validation log-likelihoods (nats) by part."""

    flow: Flow
    parts: dict[str, float]
    start: str
    validation: float
    steps: int


def fit_conditional(
    data: Data,
    validation: Data,
    *,
    minutes: float,
    seed: int,
    cells: Sequence[tuple[float, float] | None] | None = None,
    names: Sequence[str] | None = None,
    components: int | None = None,
    hidden: Sequence[int] = (64, 64),
    steps: int | None = None,
    device: str = "cpu",
    on_progress: Callable[[str], None] | None = None,
) -> ConditionalFit:
    """Fit p(y | context) within a given time; validation rows choose transform, components and weights.

    Args:
        data, validation: y (N, D) with standardised contexts (N, C).
        minutes: limit.
        seed: of all randomness.
        cells, names: of the columns of y; see :class:`~cnf.transforms.MarginalTransform`.
        components: of the mixture; chosen on validation if None.
        hidden: widths of the hidden layers of network and field.
        steps: limit of the optimiser steps, of each candidate and of the training with the field.
        device: of the training.
        on_progress: is called with lines of progress.
    """
    began, seconds = training.now(), 60 * minutes
    say = on_progress or (lambda line: None)
    parts: dict[str, float] = {}
    best: tuple[float, str, Flow] | None = None
    total = 0
    candidates = _candidates(data, validation, cells, names, components)
    for i, (name, transform, count) in enumerate(candidates):
        left = _RACE * seconds - (training.now() - began)
        if best is not None and left <= 0:
            break
        flow = Flow(transform, data.x.shape[1:], base=_base(transform, data, count, hidden, seed)).to(device)
        share = max(left, 0.0) / (len(candidates) - i)
        outcome = _train(flow, data.to(device), validation.to(device), share, steps, seed, 2e-3)
        parts.setdefault("linear", outcome.start)
        total += outcome.steps
        say(f"{name}, {count} components: validation {outcome.best:.4f} nats after {outcome.steps} steps")
        if best is None or outcome.best > best[0]:
            best = outcome.best, f"{name}, {count} components", flow
    assert best is not None
    parts["mixture"], start, flow = best
    flow, outcome = _with_field(flow, data.to(device), validation.to(device), hidden, seconds - (training.now() - began), steps, seed, on_progress)
    parts["flow"] = outcome.best
    flow.cpu().double()
    held = validation.to("cpu", torch.float64)
    choose_solver(flow, held)
    parts["calibrated"] = _calibrate(flow, held)
    return ConditionalFit(flow, parts, start, parts["calibrated"], total + outcome.steps)


def _candidates(
    data: Data, validation: Data, cells: Sequence[tuple[float, float] | None] | None, names: Sequence[str] | None, components: int | None
) -> list[tuple[str, Transform, int]]:
    """Return transforms of y with numbers of components."""
    dim = data.x.shape[1]
    plain = Standardize(torch.zeros(dim), torch.ones(dim))
    plain.fit(data.x)
    transforms: list[tuple[str, Transform]] = [("standardised", plain)]
    marginals = MarginalTransform(dim, cells=cells, names=names)
    marginals.fit(data.x)
    if set(marginals.choices) != {"standardize"}:
        transforms.append(("marginals", marginals))
    counts = (components,) if components is not None else tuple(k for k in _COMPONENTS if k == 1 or k * _ROWS_PER_COMPONENT <= len(data.x))
    return [(name, copy.deepcopy(transform), k) for k in counts for name, transform in transforms]


def _base(transform: Transform, data: Data, components: int, hidden: Sequence[int], seed: int) -> ConditionalMixture:
    assert data.context is not None
    with torch.no_grad():
        z = transform(data.x).value
    return ConditionalMixture.fit(z, data.context, components, hidden, seed=seed)


def _train(flow: Flow, data: Data, validation: Data, seconds: float, steps: int | None, seed: int, lr: float) -> Outcome:
    base = [p for p in flow.base.parameters()]
    return train(flow, data, validation, [{"params": base, "lr": lr, "weight_decay": 1e-2}], seconds=seconds, steps=steps, seed=seed)


def _with_field(
    flow: Flow,
    data: Data,
    validation: Data,
    hidden: Sequence[int],
    seconds: float,
    steps: int | None,
    seed: int,
    on_progress: Callable[[str], None] | None,
) -> tuple[Flow, Outcome]:
    """Add a field that starts at zero, and train it with the base."""
    assert data.context is not None
    dim = data.x.shape[1]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        field = MLP(dim, tuple(hidden[:2]), context_dim=data.context.shape[1], zero_init=True)
    block = CNF(field, Exact(), FixedGrid("rk4", 2), FixedGrid("rk4", 4)).to(data.x.device)
    whole = Flow(Sequential([flow.transform, block]), (dim,), base=flow.base)
    groups = [
        {"params": list(field.parameters()), "lr": 2e-3, "weight_decay": 1e-2},
        {"params": list(flow.base.parameters()), "lr": 5e-4, "weight_decay": 1e-2},
    ]
    outcome = train(whole, data, validation, groups, seconds=seconds, steps=steps, seed=seed, on_progress=on_progress)
    return whole, outcome


def _calibrate(flow: Flow, validation: Data) -> float:
    """Scale the components' standard deviations to the best validation likelihood; return it."""
    base = flow.base
    assert isinstance(base, ConditionalMixture)
    start, scores = base.log_diagonal.detach().clone(), {}
    with torch.no_grad():
        out = flow.evaluate(validation.x, Request(validation.context, integrals=False))
        for change in _LOG_SCALES:
            base.log_diagonal.copy_(start - change)
            scores[change] = float(flow.density(out.value, out.log_det, validation.context).mean())
        best = max(_LOG_SCALES, key=scores.__getitem__)
        gain = (scores[best] - scores[0.0]) * len(validation.x)
        # shrunk towards no change, since the estimate of one scale gains half a nat by chance
        change = best * max(0.0, 1 - _CHANCE / max(gain, _CHANCE))
        base.log_diagonal.copy_(start - change)
        return float(flow.density(out.value, out.log_det, validation.context).mean())
