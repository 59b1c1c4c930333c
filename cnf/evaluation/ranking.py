"""Rows in the order of their likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from cnf._utils.errors import ConfigError, DataError
from cnf._utils.validation import context_rows
from cnf.config.results import CAUTION
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.evaluation.columns import leading_marginals
from cnf.evaluation.likelihood import Evaluation, evaluate
from cnf.flow import Flow

__all__ = ["Ranking", "rank"]

FEW = 10  # rows in a line of names


@dataclass(frozen=True)
class Ranking:
    """Rows by likelihood, least likely first. Likelihood alone is not an anomaly score (see :data:`cnf.config.results.CAUTION`)."""

    names: tuple[str, ...]
    scores: Tensor
    """(N,) negative log-likelihood in the evaluation's unit, descending: infinite for unseen rows, NaN for rows that cannot be solved or have gaps."""
    order: Tensor
    """(N,) index of each row in the input."""
    below: Tensor | None
    """(N,) fraction of the reference's rows that are less likely; NaN for rows without a likelihood."""
    evaluation: Evaluation
    unseen: Mapping[int, str] = field(default_factory=dict)
    """By index, why the model gives a row no probability: a cell that the columns of training cannot hold, or a value outside the support."""
    incomplete: Mapping[int, str] = field(default_factory=dict)
    """By index, which values of a row are missing."""

    def text(self, limit: int | None = 20, notes: Mapping[int, Sequence[str]] = MappingProxyType({})) -> str:
        """Format the first ``limit`` rows (all if None) as lines, with the caution.

        Args:
            limit: number of rows.
            notes: further lines on rows, by their index in the input.
        """
        ranked = len(self.names) - len(self.incomplete)
        count = ranked if limit is None else min(limit, ranked)
        lines = [f"{ranked:,} items by likelihood, least likely first ({self.evaluation.unit}, lower is likelier):"]
        width = max((len(name) for name in self.names[:count]), default=0)
        for i in range(count):
            row, share = int(self.order[i]), ""
            if row in self.unseen:
                lines.append(f"  {self.names[i]:{width}}  {'unseen':>10}   {self.unseen[row]}")
            else:
                if self.below is not None and not bool(self.scores[i].isnan()):
                    share = f"   {100 * float(self.below[i]):5.1f} % of the reference is less likely"
                lines.append(f"  {self.names[i]:{width}}  {float(self.scores[i]):10.4f}{share}")
            lines += [f"      {line}" for line in notes.get(row, ())]
        if count < ranked:
            lines.append(f"  ... and {ranked - count:,} more")
        if lost := self.names[ranked - len(self.evaluation.unsolved) : ranked]:
            shown = ", ".join(lost[:FEW]) + (", ..." if len(lost) > FEW else "")
            lines.append(f"  without a likelihood, ranked last: {shown}, whose ODE cannot be solved: {self.evaluation.reason}")
        if self.incomplete:
            gaps = [f"{name} ({self.incomplete[int(row)]})" for name, row in zip(self.names[ranked:], self.order[ranked:], strict=True)]
            lines.append(f"  not ranked, {len(gaps):,} with missing values: {', '.join(gaps[:FEW])}{', ...' if len(gaps) > FEW else ''}")
        return "\n".join([*lines, CAUTION])

    def rows(self) -> list[dict[str, Any]]:
        """Return a dictionary for each row, least likely first.

        It has the row's name, its index in the input, its score, the fraction of the reference below, and why it has
        no score, or None.
        """
        below = [None] * len(self.names) if self.below is None else self.below.tolist()
        why = [self.unseen.get(i, self.incomplete.get(i)) for i in self.order.tolist()]
        cells = zip(self.names, self.order.tolist(), self.scores.tolist(), below, why, strict=True)
        return [dict(zip(("name", "index", "score", "below", "reason"), row, strict=True)) for row in cells]


def _outside(flow: Flow, x: Tensor, steps: Tensor | None, columns: Sequence[str]) -> dict[int, str]:
    """Return, by row, the values outside the open support of a first MarginalTransform; a dequantised value may be its lower end."""
    first = leading_marginals(flow)
    if first is None or x.ndim != 2:
        return {}
    low, high = (bound.to(x) for bound in first.bounds)
    spread = torch.zeros_like(low) if steps is None else steps.to(low)
    outside = (x < low) | ((x == low) & (spread == 0)) | (x >= high)
    found: dict[int, str] = {}
    for row, j in outside.nonzero().tolist():
        said = f"{columns[j] if columns else f'column {j}'} = {float(x[row, j]):g}, outside the support of its logarithm or logit, where the density is 0"
        found[row] = f"{found[row]}; {said}" if row in found else said
    return found


@torch.no_grad()
def rank(
    flow: Flow,
    x: Tensor,
    names: Sequence[str] | None = None,
    context: Tensor | None = None,
    *,
    reference: Tensor | None = None,
    draws: int = 1,
    importance: int = 1,
    dequantisation: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    group: Group = SINGLE_PROCESS,
    steps: Tensor | None = None,
    progress: Callable[[int, int], object] | None = None,
    columns: Sequence[str] = (),
    unseen: Mapping[int, str] = MappingProxyType({}),
    incomplete: Mapping[int, str] = MappingProxyType({}),
) -> Ranking:
    """Sort rows by their likelihood, least likely first; rows that cannot be solved come last and are named.

    A row outside the support of a column's logarithm or logit has density 0 and comes first, as do rows with
    cells that the columns of training cannot hold (``unseen``).

    Likelihood alone is not an anomaly score: a density depends on the units of the data and is low for busy or rare
    detail, and image models are known to assign plain images of other kinds a higher likelihood than their own data
    ("Do deep generative models know what they don't know?", 1810.09136). Compare with the scores of known good rows
    (``reference``), and inspect both ends before calling anything an anomaly.

    Args:
        flow: in evaluation mode.
        x: the rows (N, \\*event).
        names: of the rows; their indices if None.
        context: (N, C), (C,) or None.
        reference: (M,) scores of known rows in the same unit, such as the per-row scores of a test split.
        draws, importance, dequantisation, seed, batch_size, group, steps, progress: as for
            :func:`~cnf.evaluation.evaluate`.
        columns: names of the columns of rows (N, D), for messages.
        unseen: by row, cells that the columns of training cannot hold, such as a new category; these rows come first, and are not evaluated.
        incomplete: by row, which values are missing; these rows come last, and are not evaluated.

    Raises:
        ConfigError: for a number of names other than that of the rows.
        DataError: for no rows, or none that can be evaluated.

    Example:
        >>> from cnf import FlowConfig, SolverConfig, build
        >>> flow = build(FlowConfig.of(hidden=(8,)), SolverConfig(), (2,)).eval()
        >>> rank(flow, torch.tensor([[0.0, 0.0], [4.0, 4.0]]), ["near", "far"]).names
        ('far', 'near')
    """
    if names is not None and len(names) != len(x):
        raise ConfigError(f"names has {len(names)} entries, expected {len(x)}, one per row")
    outside = _outside(flow, x, steps, columns)
    unseen = {**{row: said for row, said in outside.items() if row not in incomplete}, **unseen}
    index = torch.tensor([i for i in range(len(x)) if i not in unseen and i not in incomplete], dtype=torch.long)
    if len(x) and not len(index):
        first, why = min({**incomplete, **unseen}.items())
        raise DataError(f"no row can be ranked: {why}, in the first, {first if names is None else names[first]}; give rows with a value in each column of the model")
    evaluation = evaluate(
        flow, x[index], context_rows(context, index), draws=draws, importance=importance, dequantisation=dequantisation, seed=seed,
        batch_size=batch_size, index=index, group=group, steps=None if steps is None else steps[index], progress=progress,
    )  # fmt: skip
    if len(index) < len(x):
        per_item = torch.full((len(x),), math.nan, dtype=torch.float64)
        log_prob = per_item.clone()
        per_item[index], log_prob[index] = evaluation.per_item, evaluation.log_prob
        per_item[list(unseen)], log_prob[list(unseen)] = math.inf, -math.inf
        evaluation = replace(evaluation, per_item=per_item, log_prob=log_prob, index=torch.arange(len(x)))
        if unseen:
            evaluation = replace(evaluation, mean=math.inf, standard_error=math.nan)
    rank_by = evaluation.per_item.nan_to_num(nan=-math.inf, posinf=math.inf)
    last = torch.tensor([i in incomplete for i in range(len(x))])  # after the rows that cannot be solved
    order = torch.cat([part[rank_by[part].argsort(descending=True, stable=True)] for part in ((~last).nonzero()[:, 0], last.nonzero()[:, 0])])
    scores = evaluation.per_item[order]
    labels = [str(i) for i in range(len(x))] if names is None else list(names)
    below = None
    if reference is not None and len(reference):
        known = reference.double().cpu().sort().values
        below = (len(known) - torch.searchsorted(known, scores, right=True)).double() / len(known)
        below[~scores.isfinite()] = math.nan  # without a likelihood there is nothing to compare
    return Ranking(tuple(labels[int(i)] for i in order), scores, order, below, evaluation, unseen, dict(incomplete))
