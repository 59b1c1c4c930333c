"""Fit of a conditional flow: a mixture density network as base, then a conditional field that starts at zero."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cnf.bases.conditional import ConditionalMixture, ContextMixture, MixtureEnsemble
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
_ROWS_PER_COMPONENT = 80
_CLOSE = 0.05  # nats: candidates of an ensemble's transform that are as close to the best take part
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
    folds: Sequence[tuple[Data, Data]],
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

    With one pair of training and validation rows, a field is trained on top of the best mixture. The folds of a
    cross-validation give an ensemble: of each of the best numbers of components, one network for each fold.

    Args:
        folds: pairs of training and validation rows: y (N, D) with standardised contexts (N, C).
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
    folds = [(data.to(device), held.to(device)) for data, held in folds]
    race = (_RACE if len(folds) == 1 else 1.0) * seconds
    parts: dict[str, float] = {}
    found: list[tuple[float, str, int, list[Flow]]] = []
    total = 0
    candidates = _candidates(folds, cells, names, components)
    for i, (name, transform, count) in enumerate(candidates):
        if found and training.now() - began > race:
            break
        flows, outcomes = [], []
        for j, (data, held) in enumerate(folds):
            left = max(race - (training.now() - began), 0.0)
            flow = Flow(transform, data.x.shape[1:], base=_base(transform, data, count, hidden, seed + j)).to(device)
            share = left / (len(folds) * (len(candidates) - i) - j)
            outcomes.append(_train(flow, data, held, share, steps, seed + j, 2e-3))
            flows.append(flow)
        score, start = (_pooled(folds, [getattr(o, which) for o in outcomes]) for which in ("best", "start"))
        parts["linear"] = max(parts.get("linear", start), start)
        total += sum(o.steps for o in outcomes)
        say(f"{name}, {count} components: validation {score:.4f} nats")
        found.append((score, name, count, flows))
    parts["mixture"], name, count, flows = max(found, key=lambda each: each[0])
    start_name = f"{name}, {count} components"
    held_out = [held.to("cpu", torch.float64) for _, held in folds]
    if len(folds) > 1:
        close = [each for each in found if each[1] == name and each[0] >= parts["mixture"] - _CLOSE]
        flows, held_out = [flow for each in close for flow in each[3]], held_out * len(close)
        start_name = f"{name}, {' and '.join(str(each[2]) for each in close)} components"
    else:
        left = seconds - (training.now() - began)
        flows[0], outcome = _with_field(flows[0], *folds[0], hidden, left, steps, seed, on_progress)
        parts["flow"], total = outcome.best, total + outcome.steps
    for flow, held in zip(flows, held_out, strict=True):
        flow.cpu().double()
        choose_solver(flow, held)
    parts["calibrated"] = _calibrate(flows, held_out)
    flow = flows[0]
    if len(flows) > 1:
        flow = Flow(flow.transform, flow.event_shape, base=MixtureEnsemble([_base_of(f) for f in flows]))
    return ConditionalFit(flow.eval(), parts, start_name, parts["calibrated"], total)


def _pooled(folds: Sequence[tuple[Data, Data]], scores: Sequence[float]) -> float:
    """Return the mean over the validation rows of all folds."""
    sizes = [len(held.x) for _, held in folds]
    return sum(size * score for size, score in zip(sizes, scores, strict=True)) / sum(sizes)


def _candidates(
    folds: Sequence[tuple[Data, Data]], cells: Sequence[tuple[float, float] | None] | None, names: Sequence[str] | None, components: int | None
) -> list[tuple[str, Transform, int]]:
    """Return transforms of y with numbers of components."""
    data = folds[0][0]
    x = data.x if len(folds) == 1 else torch.cat([data.x, folds[0][1].x])  # members share one transform
    dim = x.shape[1]
    plain = Standardize(torch.zeros(dim), torch.ones(dim))
    plain.fit(x)
    transforms: list[tuple[str, Transform]] = [("standardised", plain)]
    marginals = MarginalTransform(dim, cells=cells, names=names)
    marginals.fit(x)
    if set(marginals.choices) != {"standardize"}:
        transforms.append(("marginals", marginals))
    counts = (components,) if components is not None else tuple(k for k in _COMPONENTS if k == 1 or k * _ROWS_PER_COMPONENT <= len(data.x))
    if (kinds := _logarithms(x)) is not None and kinds != marginals.choices:
        logarithms = MarginalTransform(dim, kinds=kinds, fixed=True, names=names)
        logarithms.fit(x)
        transforms.append(("logarithms", logarithms))
    return [(name, copy.deepcopy(transform), k) for k in counts for name, transform in transforms]


def _logarithms(x: Tensor) -> tuple[str, ...] | None:
    """Return the kinds of transforms with a logarithm of each positive column that it makes less skew; None for none."""

    def skewness(v: Tensor) -> float:
        return abs(float(((v - v.mean()) / v.std()).pow(3).mean()))

    less = [bool((v > 0).all()) and skewness(v.log()) < skewness(v) for v in x.double().T]
    return tuple("log" if each else "standardize" for each in less) if any(less) else None


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


def _base_of(flow: Flow) -> ContextMixture:
    assert isinstance(flow.base, ContextMixture)
    return flow.base


@torch.no_grad()
def _calibrate(flows: Sequence[Flow], held_out: Sequence[Data]) -> float:
    """Scale the components' standard deviations to the best likelihood of the flows' validation rows; return it."""
    latents = [flow.evaluate(held.x, Request(held.context, integrals=False)) for flow, held in zip(flows, held_out, strict=True)]

    def total(change: float) -> float:
        value = 0.0
        for flow, out, held in zip(flows, latents, held_out, strict=True):
            _base_of(flow).widen(change)
            value += float(flow.density(out.value, out.log_det, held.context).sum())
            _base_of(flow).widen(-change)
        return value

    rows = sum(len(held.x) for held in held_out)
    scores = {change: total(change) for change in _LOG_SCALES}
    best = max(_LOG_SCALES, key=scores.__getitem__)
    # shrunk towards no change, since the estimate of one scale gains half a nat by chance
    change = best * max(0.0, 1 - _CHANCE / max(scores[best] - scores[0.0], _CHANCE))
    value = total(change) / rows
    for flow in flows:
        _base_of(flow).widen(change)
    return value
