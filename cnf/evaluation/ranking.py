"""Rows in the order of their likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cnf._utils.errors import ConfigError
from cnf.config.results import CAUTION
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.evaluation.columns import leading_marginals
from cnf.evaluation.likelihood import Evaluation, evaluate
from cnf.flow import Flow

__all__ = ["Ranking", "rank"]


@dataclass(frozen=True)
class Ranking:
    """Rows by likelihood, least likely first. Likelihood alone is not an anomaly score (see :data:`cnf.config.results.CAUTION`)."""

    names: tuple[str, ...]
    scores: Tensor
    """(N,) negative log-likelihood in the evaluation's unit, descending; NaN, last, for rows that cannot be solved."""
    order: Tensor
    """(N,) index of each row in the input."""
    below: Tensor | None
    """(N,) fraction of the reference's rows that are less likely."""
    evaluation: Evaluation

    def text(self, limit: int | None = 20) -> str:
        """Format the first ``limit`` rows (all if None) as lines, with the caution."""
        count = len(self.names) if limit is None else min(limit, len(self.names))
        lines = [f"{len(self.names):,} items by likelihood, least likely first ({self.evaluation.unit}, lower is likelier):"]
        width = max((len(name) for name in self.names[:count]), default=0)
        for i in range(count):
            share = ""
            if self.below is not None and not bool(self.scores[i].isnan()):
                share = f"   {100 * float(self.below[i]):5.1f} % of the reference is less likely"
            lines.append(f"  {self.names[i]:{width}}  {float(self.scores[i]):10.4f}{share}")
        if count < len(self.names):
            lines.append(f"  ... and {len(self.names) - count:,} more")
        if bool(self.scores.isinf().any()):
            lines.append("  inf: outside the support of a column's logarithm or logit, where the density is 0")
        if lost := self.names[len(self.names) - len(self.evaluation.unsolved) :]:
            shown = ", ".join(lost[:10]) + (", ..." if len(lost) > 10 else "")
            lines.append(f"  without a likelihood, ranked last: {shown}, whose ODE cannot be solved: {self.evaluation.reason}")
        return "\n".join([*lines, CAUTION])

    def rows(self) -> list[dict[str, Any]]:
        """Return a dictionary for each row, least likely first: name, index in the input, score, fraction of the reference below."""
        below = [None] * len(self.names) if self.below is None else self.below.tolist()
        cells = zip(self.names, self.order.tolist(), self.scores.tolist(), below, strict=True)
        return [dict(zip(("name", "index", "score", "below"), row, strict=True)) for row in cells]


def _outside(flow: Flow, x: Tensor, steps: Tensor | None) -> Tensor:
    """Return which rows (N,) lie outside the open support of a first MarginalTransform; a dequantised value may be its lower end."""
    first = leading_marginals(flow)
    if first is None or x.ndim != 2:
        return torch.zeros(len(x), dtype=torch.bool, device=x.device)
    low, high = (bound.to(x) for bound in first.bounds)
    spread = torch.zeros_like(low) if steps is None else steps.to(low)
    return ((x < low) | ((x == low) & (spread == 0)) | (x >= high)).any(1)


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
) -> Ranking:
    """Sort rows by their likelihood, least likely first; rows that cannot be solved come last and are named.

    A row outside the support of a column's logarithm or logit has density 0 and comes first.

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

    Raises:
        ConfigError: for a number of names other than that of the rows.
        DataError: for no rows.

    Example:
        >>> from cnf import FlowConfig, SolverConfig, build
        >>> flow = build(FlowConfig.of(hidden=(8,)), SolverConfig(), (2,)).eval()
        >>> rank(flow, torch.tensor([[0.0, 0.0], [4.0, 4.0]]), ["near", "far"]).names
        ('far', 'near')
    """
    if names is not None and len(names) != len(x):
        raise ConfigError(f"names has {len(names)} entries, expected {len(x)}, one per row")
    outside = _outside(flow, x, steps)
    if bool(outside.all()):  # leaves the message to the transform
        outside = torch.zeros_like(outside)
    stand_in = x[int((~outside).int().argmax())] if len(x) else x
    evaluation = evaluate(
        flow, torch.where(outside[:, None], stand_in, x) if bool(outside.any()) else x, context, draws=draws, importance=importance, dequantisation=dequantisation, seed=seed,
        batch_size=batch_size, group=group, steps=steps, progress=progress,
    )  # fmt: skip
    if bool(outside.any()):
        evaluation = replace(
            evaluation, mean=math.inf, standard_error=math.nan, per_item=evaluation.per_item.masked_fill(outside.cpu(), math.inf),
            log_prob=evaluation.log_prob.masked_fill(outside.cpu(), -math.inf), unsolved=tuple(i for i in evaluation.unsolved if not outside[i]),
        )  # fmt: skip
    order = evaluation.per_item.nan_to_num(nan=-math.inf, posinf=math.inf).argsort(descending=True, stable=True)
    scores = evaluation.per_item[order]
    labels = [str(i) for i in range(len(x))] if names is None else list(names)
    below = None
    if reference is not None and len(reference):
        known = reference.double().cpu().sort().values
        below = (len(known) - torch.searchsorted(known, scores, right=True)).double() / len(known)
    return Ranking(tuple(labels[int(i)] for i in order), scores, order, below, evaluation)
