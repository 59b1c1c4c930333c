"""Search for the density of a table in a given time: mixtures, successive halving of flows that start from them, training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cnf._utils.errors import DataError, constant_column, require_at_least, require_inside
from cnf.estimators.budget import Budget
from cnf.estimators.mixtures import COMPONENTS, Candidate, Table, fit_mixtures, log_prob, normal_nll, prepare
from cnf.estimators.pooling import converge, pool
from cnf.estimators.rows import gains, read_rows, scored_rows
from cnf.estimators.starts import Start, start
from cnf.flow import Flow
from cnf.transforms import MarginalTransform, Standardize

__all__ = ["DensityFit", "fit_density"]

MIXTURE_SHARES = 0.15, 0.25, 0.5  # of the time, at which all sizes are tried, the best are at their optimum, and pooled
HALVING_SHARE = 0.1
LAST_SHARE = 0.25  # of what is left, for each of the last two
LAST_VALIDATIONS = 3
VALIDATION_SHARE = 0.1  # of the training
FIRST_STEPS = 100  # of each start in the first round
HALVING_ROWS = 1000  # of validation, for successive halving
TRAINED = 2000  # validation rows while training


@dataclass(frozen=True)
class DensityFit:
    """Result of :func:`fit_density`.

    Attributes:
        flow: the density, in evaluation mode.
        parts: negative log-likelihood of the validation rows, in nats per row, of a uniform density over the range of
            all rows, a standard normal of the standardised columns, the marginals, the best mixture and the flow, in
            this order, as far as they exist.
        gains: what each part after the first gains over the one before, with its standard error over the rows, in nats.
        start: transform and mixture that the flow started from.
        validation: that of ``flow``.
        steps: optimiser steps of the flow, those of successive halving included.
        seconds: CPU seconds of the search (wall-clock seconds on several threads).
    """

    flow: Flow
    parts: dict[str, float]
    gains: dict[str, tuple[float, float]]
    start: str
    validation: float
    steps: int
    seconds: float


def fit_density(
    train: Tensor,
    validation: Tensor,
    *,
    minutes: float = 1.0,
    seed: int = 0,
    cells: Sequence[tuple[float, float] | None] | None = None,
    bounds: Sequence[tuple[float, float] | None] | None = None,
    names: Sequence[str] | None = None,
    hidden: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
    on_progress: Callable[[str], None] | None = None,
    steps: int | None = None,
    components: Sequence[int] = COMPONENTS,
) -> DensityFit:
    """Fit the density of a table within a time; on the validation rows it is never worse than the best mixture.

    Mixtures of Gaussians of rising size are fitted first, to the standardised columns and to columns that pass marginal
    transforms. Flows that start from some of them, at exactly their likelihood, undergo successive halving by the validation; the one
    that is left is trained on, and the best of all weights is returned, the best mixture among them. All figures are of the evaluation
    solver. Within a time, large tables are read in part: 5,000 training rows for each second, 20,000 validation rows.

    Args:
        train: (N, D) rows to fit.
        validation: (M, D) rows to choose by.
        minutes: time of the whole search, CPU time or wall-clock time, whichever is less.
        seed: of fits, initial weights and batches.
        cells, bounds, names: of the columns; see :class:`~cnf.transforms.MarginalTransform`.
        hidden: widths of the two hidden layers of the field; (64, 64) if None.
        device: where to compute.
        on_progress: called with a line whenever a better density is found.
        steps: optimiser steps of the final training in place of a time: the result is then a function of the data and
            ``seed``.
        components: numbers of components of the mixtures, in rising order.

    Raises:
        ConfigError: for minutes or steps out of range.
        DataError: for tables of different width, NaN or infinity, less than two rows, and constant or duplicate columns.

    Example:
        >>> x = torch.randn(300, 2).exp()
        >>> result = fit_density(x[:200], x[200:], steps=5, components=(1, 2))
        >>> list(result.parts), result.flow.sample(4).shape
        (['uniform', 'standard normal', 'marginals', 'mixture', 'flow'], torch.Size([4, 2]))
    """
    require_inside(0, math.inf, minutes=minutes)
    require_at_least(1, steps=steps)
    train, validation = (_rows(name, x, names, device) for name, x in (("train", train), ("validation", validation)))
    _check(train, validation, names)
    if not steps:
        train, validation = train[read_rows(train, minutes, seed)], validation[scored_rows(validation, seed)]
    say = on_progress or (lambda line: None)
    budget = Budget(None if steps else 60 * minutes, wall=train.is_cuda)
    tables = _tables(train, validation, cells, bounds, names)
    spans = torch.maximum(train.amax(0), validation.amax(0)).double() - torch.minimum(train.amin(0), validation.amin(0)).double()
    rows = {"uniform": spans.log().sum().expand(len(validation)), "standard normal": normal_nll(tables[0])}  # of each part, those of validation
    if len(tables) > 1:
        rows["marginals"] = normal_nll(tables[1])
    best = math.inf

    def report(made: Candidate) -> None:
        nonlocal best
        if made.validation < best:
            best = made.validation
            say(f"mixture: {best:.2f} nats per row after {budget.spent:.0f} s ({made.name})")

    first, second, third = (share * budget.total for share in MIXTURE_SHARES)
    candidates = fit_mixtures(tables, budget, first, components, seed, report)
    if budget.limited:
        converge(candidates, budget, second, seed, report)
    mixture = pool(candidates, components, budget, third, seed, report)
    rows["mixture"] = mixture.table.rows(log_prob(mixture.base, mixture.table.validation))
    widths = tuple(hidden) if hidden else (64, 64)
    unmoved = start(mixture, widths, seed)
    starts = [start(made, widths, seed) for made in choose_starts([*candidates, mixture])]
    selected = halve(starts, budget, seed, steps)
    _train(selected, budget, seed, steps)
    scored = selected.score()
    final = float(scored.mean())
    say(f"flow: {final:.2f} nats per row after {budget.spent:.0f} s ({selected.steps} steps)")
    better = final < mixture.validation
    chosen, rows["flow"] = (selected, scored) if better else (unmoved, rows["mixture"])
    parts = {name: float(own.mean()) for name, own in rows.items()}
    return DensityFit(chosen.assemble(), parts, gains(rows), chosen.candidate.name, parts["flow"], chosen.steps, budget.spent)


def choose_starts(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the best mixture, the smallest one of each table, and one between them."""
    chosen = [min(candidates, key=lambda made: made.validation)]
    for name in dict.fromkeys(made.table.name for made in candidates):
        own: dict[int, Candidate] = {}  # the best by number of components
        for made in candidates:
            if made.table.name == name and (made.base.components not in own or made.validation < own[made.base.components].validation):
                own[made.base.components] = made
        chosen += [own[min(own)]]
        if own[top := min(own, key=lambda k: own[k].validation)] is chosen[0]:
            chosen += [own[k] for k in (8,) if k in own and k < top]
    return list({id(made): made for made in chosen}.values())


def halve(starts: list[Start], budget: Budget, seed: int, steps: int | None) -> Start:
    """Train each start for some steps, keep the better half and the first, and so on; the last two train for longer."""
    if len(starts) == 1:
        return starts[0]
    mixture = starts[0]
    rows = torch.arange(min(HALVING_ROWS, len(starts[0].candidate.table.validation)))
    count = max(2, steps // 10) if steps else FIRST_STEPS
    if budget.limited:  # measure the time of a step
        starts[0].train(6, budget, seed=seed, rows=rows)
        total = sum(len(starts) / 2**i for i in range(_rounds(starts)))
        count = max(4, min(count, int(HALVING_SHARE * budget.total / total / starts[0].step_seconds)))
    for number in range(_rounds(starts)):
        last = len(starts) == 2 and budget.limited
        for each in starts:
            until = budget.spent + LAST_SHARE * budget.left if last else math.inf
            plan = int((until - budget.spent) / each.step_seconds) if last else count
            each.train(plan, budget, until, seed=seed + number, rows=rows, validations=LAST_VALIDATIONS if last else 0 if number else 1)
        starts = sorted(starts, key=lambda each: each.predicted(each.steps + (steps or budget.left / each.step_seconds)))[: math.ceil(len(starts) / 2)]
        if len(starts) > 1 and mixture not in starts:  # early predictions are bold
            starts[-1] = mixture
        count *= 2 if number else 1
    return starts[0]


def _rounds(starts: Sequence[Start]) -> int:
    return math.ceil(math.log2(len(starts)))


def _train(selected: Start, budget: Budget, seed: int, steps: int | None) -> None:
    """Train the selected start to the end of the time, with some validations, and time for that of all rows afterwards."""
    total = len(selected.candidate.table.validation)
    rows = torch.arange(min(TRAINED, total))
    until = 0.97 * budget.total - selected.row_seconds * total
    if steps is None:
        cost = max(1e-3, selected.row_seconds * len(rows))
        validations = max(1, min(10, int(VALIDATION_SHARE * (until - budget.spent) / cost)))
        plan = int((until - budget.spent - validations * cost) / selected.step_seconds)
    else:
        validations, plan = 4, steps
    if plan > 0:
        selected.train(plan, budget, until, seed=seed + 100, rows=rows, validations=validations, decay=True)


def _tables(train: Tensor, validation: Tensor, cells: object, bounds: object, names: Sequence[str] | None) -> list[Table]:
    dim = train.shape[1]
    plain = Standardize(torch.zeros(dim), torch.ones(dim)).to(train)
    tables = [prepare("standardised", plain, train, validation)]
    marginals = MarginalTransform(dim, cells=cells, bounds=bounds, names=names).to(train.device)  # type: ignore[arg-type]
    table = prepare("marginals", marginals, train, validation)
    return tables if set(marginals.choices) == {"standardize"} else [*tables, table]


def _rows(name: str, x: Tensor, names: Sequence[str] | None, device: str | torch.device) -> Tensor:
    if x.ndim != 2 or not x.shape[1]:
        raise DataError(f"{name} has shape {tuple(x.shape)}, expected (N, D)")
    x = x.detach().to(device=device, dtype=torch.float32)
    if not bool(x.isfinite().all()):
        row = int((~x.isfinite().all(1)).nonzero()[0])
        raise DataError(f"{name} holds NaN or infinity, first in row {row}: remove or replace such rows")
    return x


def _check(train: Tensor, validation: Tensor, names: Sequence[str] | None) -> None:
    if train.shape[1] != validation.shape[1]:
        raise DataError(f"train has {train.shape[1]} columns and validation {validation.shape[1]}, expected the same number")
    if len(train) < 2 or not len(validation):
        raise DataError(f"train has {len(train)} rows and validation {len(validation)}, expected at least 2 and 1")
    label = [f"column {j}" + (f" ({names[j]!r})" if names else "") for j in range(train.shape[1])]
    for j in range(train.shape[1]):
        if bool((train[:, j] == train[0, j]).all()):
            raise constant_column(label[j], float(train[0, j]))
        for i in range(j):
            if torch.equal(train[:, i], train[:, j]):
                raise DataError(f"{label[j]} is a copy of {label[i]}, so that the table has no density: drop one of them")
