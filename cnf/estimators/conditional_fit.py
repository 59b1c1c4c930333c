"""Fit of a conditional flow: a mixture density network as base, then a conditional field that starts at zero."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cnf.bases.conditional import ConditionalMixture, ContextMixture, MixtureEnsemble
from cnf.data import DataSplits
from cnf.estimators.budget import Budget
from cnf.estimators.rows import gains, in_chunks, read_rows, scored_rows
from cnf.estimators.training import Pace, choose_solver, train
from cnf.fields import MLP
from cnf.flow import Flow
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Exact
from cnf.solvers import FixedGrid
from cnf.training import EarlyStopping, Trainer
from cnf.transforms import MarginalTransform, Request, Sequential, Standardize, Transform

__all__ = ["ConditionalFit", "fit_conditional"]

_COMPONENTS = (1, 3, 8)
_ROWS_PER_COMPONENT = 80
_CLOSE = 0.05  # nats: candidates of an ensemble's transform that are as close to the best take part
_CHOICE = 0.5  # share of the time for the choice of transform and components
_LOG_SCALES = tuple(0.025 * i for i in range(-20, 21))  # changes of the log standard deviations
_CHANCE = 2.0  # nats: smaller gains of calibration are not significant
_BATCH_SIZE = 256  # tables of at most twice as many rows are taken whole
_PATIENCE = 15  # validations
_EVERY, _EPOCHS = 50, 10  # steps between validations, and epochs in a small table
_VALIDATED = 4096  # validation rows while training
_WARMUP = 20


@dataclass(frozen=True)
class ConditionalFit:
    """Result of :func:`fit_conditional`; ``parts`` are negative log-likelihoods (nats) of validation rows by part."""

    flow: Flow
    parts: dict[str, float]
    gains: dict[str, tuple[float, float]]
    start: str
    validation: float
    steps: int
    seconds: float


def fit_conditional(
    folds: Sequence[DataSplits],
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
        folds: training and validation rows: y (N, D) with standardised contexts (N, C).
        minutes: limit.
        seed: of all randomness.
        cells, names: of the columns of y; see :class:`~cnf.transforms.MarginalTransform`.
        components: of the mixture; chosen on validation if None.
        hidden: widths of the hidden layers of network and field.
        steps: limit of the optimiser steps, of each candidate and of the training with the field.
        device: of the training.
        on_progress: is called with lines of progress.
    """
    say = on_progress or (lambda line: None)
    if not steps:
        folds = [_part(data, read_rows(data.train, minutes, seed), scored_rows(data.validation, seed)) for data in folds]
    folds = [_to(data, device) for data in folds]
    budget = Budget(60 * minutes, wall=folds[0].train.is_cuda)
    until = (_CHOICE if len(folds) == 1 else 1.0) * budget.total
    rows: dict[str, Tensor] = {}  # of each part, those of validation
    found: list[tuple[float, str, int, list[Flow]]] = []
    total = 0
    candidates = _candidates(folds, cells, names, components)
    for i, (name, transform, count) in enumerate(candidates):
        if found and budget.spent > until:
            break
        flows, starts = [], []
        for j, data in enumerate(folds):
            flow = Flow(transform, data.train.shape[1:], base=_base(transform, data, count, hidden, seed + j)).to(device)
            share = max(until - budget.spent, 0.0) / (len(folds) * (len(candidates) - i) - j)
            starts.append(_nll(flow.eval(), data))
            total += _train(flow, data, [(flow.base, 2e-3)], Pace(_EVERY, budget, budget.spent + share, most=steps), seed + j).state.step
            flows.append(flow)
        trained = torch.cat([_nll(flow, data) for flow, data in zip(flows, folds, strict=True)])
        _keep(rows, "linear", torch.cat(starts))
        _keep(rows, "mixture", trained)
        score = float(trained.mean())
        if not found or score < min(each[0] for each in found):
            say(f"mixture: {score:.2f} nats per row after {budget.spent:.0f} s ({name}, {count} Gaussian{'s' if count > 1 else ''})")
        found.append((score, name, count, flows))
    best, name, count, flows = min(found, key=lambda each: each[0])
    start_name = f"{name}, {count} components"
    held_out = [_to(data, "cpu", torch.float64) for data in folds]
    if len(folds) > 1:
        close = [each for each in found if each[1] == name and each[0] <= best + _CLOSE]
        flows, held_out = [flow for each in close for flow in each[3]], held_out * len(close)
        start_name = f"{name}, {' and '.join(str(each[2]) for each in close)} components"
    else:
        flows[0], trainer = _with_field(flows[0], folds[0], hidden, Pace(_EVERY, budget, budget.total, most=steps), seed)
        rows["flow"], total = _nll(flows[0], folds[0]), total + trainer.state.step
        say(f"flow: {float(rows['flow'].mean()):.2f} nats per row after {budget.spent:.0f} s ({trainer.state.step} steps)")
    for flow, data in zip(flows, held_out, strict=True):
        flow.cpu().double()
        choose_solver(flow, data.validation, data.validation_context)
    total_rows = sum(len(data.validation) for data in folds)
    members = _calibrate(flows, held_out).reshape(-1, total_rows)  # of each number of components, the one that has not seen the row
    rows["calibrated"] = math.log(len(members)) - (-members).logsumexp(0)
    parts = {part: float(own.mean()) for part, own in rows.items()}
    flow = flows[0]
    if len(flows) > 1:
        flow = Flow(flow.transform, flow.event_shape, base=MixtureEnsemble([_base_of(f) for f in flows]))
    return ConditionalFit(flow.eval(), parts, gains(rows), start_name, parts["calibrated"], total, budget.spent)


def _to(data: DataSplits, *target: Any) -> DataSplits:
    """Return training and validation rows on a device, or in a dtype."""
    names = ("train", "validation", "train_context", "validation_context")
    return dataclasses.replace(data, **{name: getattr(data, name).to(*target) for name in names})


def _part(data: DataSplits, read: Tensor | slice, scored: Tensor | slice) -> DataSplits:
    """Return some of the training and validation rows."""
    assert data.train_context is not None and data.validation_context is not None
    return dataclasses.replace(
        data,
        train=data.train[read],
        validation=data.validation[scored],
        train_context=data.train_context[read],
        validation_context=data.validation_context[scored],
    )


def _nll(flow: Flow, data: DataSplits) -> Tensor:
    """Return the negative log-likelihood (M,) of the validation rows."""
    assert data.validation_context is not None
    return -in_chunks(flow.log_prob, data.validation, data.validation_context).double()


def _keep(rows: dict[str, Tensor], part: str, own: Tensor) -> None:
    """Keep the rows of the candidate with the lowest mean."""
    if part not in rows or own.mean() < rows[part].mean():
        rows[part] = own


def _candidates(
    folds: Sequence[DataSplits], cells: Sequence[tuple[float, float] | None] | None, names: Sequence[str] | None, components: int | None
) -> list[tuple[str, Transform, int]]:
    """Return transforms of y with numbers of components."""
    data = folds[0]
    x = data.train if len(folds) == 1 else torch.cat([data.train, data.validation])  # members share one transform
    dim = x.shape[1]
    plain = Standardize(torch.zeros(dim), torch.ones(dim))
    plain.fit(x)
    transforms: list[tuple[str, Transform]] = [("standardised", plain)]
    marginals = MarginalTransform(dim, cells=cells, names=names)
    marginals.fit(x)
    if set(marginals.choices) != {"standardize"}:
        transforms.append(("marginals", marginals))
    counts = (components,) if components is not None else tuple(k for k in _COMPONENTS if k == 1 or k * _ROWS_PER_COMPONENT <= len(data.train))
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


def _base(transform: Transform, data: DataSplits, components: int, hidden: Sequence[int], seed: int) -> ConditionalMixture:
    assert data.train_context is not None
    with torch.no_grad():
        z = transform(data.train).value
    return ConditionalMixture.fit(z, data.train_context, components, hidden, seed=seed)


def _train(flow: Flow, data: DataSplits, rates: Sequence[tuple[nn.Module, float]], pace: Pace, seed: int) -> Trainer:
    """Train parts of a flow with a learning rate each, until the time is up or the validation no longer improves."""
    n = len(data.train)
    size = n if n <= 2 * _BATCH_SIZE else _BATCH_SIZE
    every = min(_EVERY, max(1, _EPOCHS * (n // size)))
    groups = [{"params": list(module.parameters()), "lr": rate} for module, rate in rates]
    return train(
        flow,
        _part(data, slice(None), slice(_VALIDATED)),
        lambda _: torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=1e-2, fused=True),
        pace,
        pace.rate(_WARMUP),
        batch_size=size,
        seed=seed,
        average=1 - 0.5 / every,
        validate_every=every,
        callbacks=[EarlyStopping(_PATIENCE)],
    )


def _with_field(flow: Flow, data: DataSplits, hidden: Sequence[int], pace: Pace, seed: int) -> tuple[Flow, Trainer]:
    """Add a field that starts at zero, and train it with the base."""
    assert data.train_context is not None
    dim = data.train.shape[1]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        field = MLP(dim, tuple(hidden[:2]), context_dim=data.train_context.shape[1], zero_init=True)
    block = CNF(field, Exact(), FixedGrid("rk4", 2), FixedGrid("rk4", 4)).to(data.train.device)
    whole = Flow(Sequential([flow.transform, block]), (dim,), base=flow.base)
    return whole, _train(whole, data, [(field, 2e-3), (flow.base, 5e-4)], pace, seed)


def _base_of(flow: Flow) -> ContextMixture:
    assert isinstance(flow.base, ContextMixture)
    return flow.base


@torch.no_grad()
def _calibrate(flows: Sequence[Flow], held_out: Sequence[DataSplits]) -> Tensor:
    """Scale the components' standard deviations to the best likelihood of the flows' validation rows, whose values are returned."""
    latents = [flow.evaluate(data.validation, Request(data.validation_context, integrals=False)) for flow, data in zip(flows, held_out, strict=True)]

    def values(change: float) -> Tensor:
        found = []
        for flow, out, data in zip(flows, latents, held_out, strict=True):
            _base_of(flow).widen(change)
            found.append(-flow.density(out.value, out.log_det, data.validation_context))
            _base_of(flow).widen(-change)
        return torch.cat(found)

    scores = {change: -float(values(change).sum()) for change in _LOG_SCALES}
    best = max(_LOG_SCALES, key=scores.__getitem__)
    # shrunk towards no change, since the estimate of one scale gains half a nat by chance
    change = best * max(0.0, 1 - _CHANCE / max(scores[best] - scores[0.0], _CHANCE))
    calibrated = values(change)
    for flow in flows:
        _base_of(flow).widen(change)
    return calibrated
