"""Costs of a table's columns in nats: each given all others, and alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cnf._utils.errors import ConfigError, DataError, require_at_least
from cnf._utils.validation import context_rows, match_flow
from cnf.flow import Flow
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Divergence, Exact
from cnf.transforms import MarginalTransform, iter_leaves
from cnf.transforms.quantile_map import MarginalState, forward_map, inverse_map

__all__ = ["Column", "column_marginal", "column_report", "conditional_log_prob", "exact_trace", "leading_marginals", "spacing_entropy"]

BUDGET = 2**18  # default number of evaluations of the density in a report
FINEST = 1e-3  # resolution of the quadrature, as a fraction of a column's standard deviation


@dataclass(frozen=True)
class Column:
    r"""Cost of one column of a table, in nats, on the scale of the data.

    The cost of a joint density is not a sum over columns; these are the two extremes of a column's cost. ``alone`` is
    the entropy :math:`H(x_j)` of the column, a property of the data: the cost under the best density of this column by
    itself. ``given_others`` is the model's :math:`-E \ln p(x_j | x_{-j})`, the cost of the column if all others are
    known. ``saved`` = alone - given_others is the gain from the other columns: the mutual information
    :math:`I(x_j; x_{-j})` if the model is exact, and negative if the model is worse than ignoring them.
    """

    name: str
    given_others: float
    standard_error: float
    """Standard error of ``given_others`` over rows."""
    alone: float
    """By m-spacings of all rows; -inf for a column whose values repeat so often that it has no density."""
    saved: float
    log_scale: float
    """ln of the column's standard deviation: the part of both costs that depends on units."""
    quadrature_error: float
    """Mean absolute change of ``given_others`` with every other point of the quadrature (its error is far smaller)."""


def _require_table(x: Tensor) -> None:
    if x.ndim != 2:
        raise DataError(f"x has shape {tuple(x.shape)}, expected a table (N, D)")


def exact_trace(block: CNF) -> Divergence:
    """Return the exact trace of a block: the noise of an estimate would bias the integral."""
    return block.divergence if isinstance(block.divergence, Exact) else Exact()


@torch.no_grad()
def conditional_log_prob(
    flow: Flow,
    x: Tensor,
    column: int,
    context: Tensor | None = None,
    *,
    support: tuple[float, float],
    scale: float,
    points: int = 121,
    batch_size: int = 8192,
) -> tuple[Tensor, Tensor]:
    r"""Return log p(x_j | x_{-j}) = log p(x) - log ∫ p(x) dx_j, in nats, by 1-D quadrature along the column.

    x_j is itself a draw from the conditional density, so that for a density of any width w the mass lies within a few w
    of x_j. The trapezoidal rule therefore runs over :math:`x_j + a \sinh(v)`, uniform in v: the spacing of the points
    is proportional to their distance from x_j, down to a = scale/1000. In a flow that begins with a
    :class:`~cnf.MarginalTransform`, it runs over the latent of x_j in that map instead.

    Args:
        flow: a flow of vectors, in evaluation mode.
        x: rows (N, D).
        column: j.
        context: (N, C), (C,) or None.
        support: the interval of integration; it must contain the column's mass.
        scale: the column's standard deviation.
        points: number of quadrature points.
        batch_size: rows of a solve.

    Returns:
        The conditional log-density (N,), and the same from every other point.

    Raises:
        DataError: for events that are not vectors, or a row outside the support.
        ConfigError: for fewer than five points.
    """
    _require_table(x)
    require_at_least(5, points=points)
    points += 1 - points % 2  # odd, so that every other point includes both ends
    own = x[:, column].double()
    low, high = support
    if float(own.min()) < low or float(own.max()) > high:
        raise DataError(f"column {column} spans [{own.min():g}, {own.max():g}], beyond support=({low:g}, {high:g}): widen it")
    marginal = column_marginal(flow, column)  # a column with a long tail has its mass anywhere in x, and within a few units of the latent
    if marginal is not None:
        ends = forward_map(marginal, torch.cat([own, own.new_tensor([low, high])])[:, None])[0][:, 0]
        own, low, high, scale = ends[:-2], float(ends[-2]), float(ends[-1]), 1.0
    a = FINEST * scale
    left, right = -torch.asinh((own - low) / a), torch.asinh((high - own) / a)
    steps = torch.linspace(0, 1, points, dtype=torch.float64, device=x.device)
    v = left[:, None] + (right - left)[:, None] * steps
    weights = (a * torch.cosh(v)).log() + ((right - left) / (points - 1)).log()[:, None]
    grid = own[:, None] + a * torch.sinh(v)
    if marginal is not None:
        values, slopes = inverse_map(marginal, grid.reshape(-1, 1))
        grid, weights = values.reshape(grid.shape), weights + slopes.reshape(grid.shape)
    grid = grid.to(x.dtype)
    rows = x[:, None].repeat(1, points, 1)
    rows[:, :, column] = grid
    owner = torch.arange(len(x), device=x.device).repeat_interleave(points).split(batch_size)  # row of each point
    parts = [
        flow.log_prob(part, context_rows(context, own), divergence=exact_trace).double()
        for part, own in zip(rows.flatten(0, 1).split(batch_size), owner, strict=True)
    ]
    joint = flow.log_prob(x, context, divergence=exact_trace).double()
    terms = torch.cat(parts).reshape(len(x), points) + weights
    terms[:, 0] -= math.log(2)
    terms[:, -1] -= math.log(2)
    return joint - terms.logsumexp(1), joint - terms[:, ::2].logsumexp(1) - math.log(2)


def spacing_entropy(values: Tensor, m: int | None = None) -> float:
    r"""Return the differential entropy (nats) of a column (N,) by m-spacings.

    It is -inf if more than m rows share a value.

    :math:`\frac{1}{N-m} \sum_i \ln(x_{(i+m)} - x_{(i)}) - \psi(m) + \psi(N+1)`: unbiased for a uniform density.

    Args:
        values: the column.
        m: the spacing; the rounded square root of N if None.

    Raises:
        DataError: for fewer than three values.

    Example:
        >>> uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
        >>> abs(spacing_entropy(uniform)) < 0.02
        True
    """
    n = len(values)
    if n < 3:
        raise DataError(f"values must have at least 3 rows, got {n}")
    m = m or max(1, round(math.sqrt(n)))
    ordered = values.double().cpu().sort().values
    spacings = ordered[m:] - ordered[:-m]
    psi = torch.digamma(torch.tensor([float(m), n + 1.0], dtype=torch.float64))
    return float(spacings.log().mean() - psi[0] + psi[1])


def leading_marginals(flow: Flow) -> MarginalTransform | None:
    """Return the marginal transform that a flow begins with, or None."""
    first = iter_leaves(flow.transform)[0][0]
    return first if isinstance(first, MarginalTransform) else None


def column_marginal(flow: Flow, column: int) -> MarginalState | None:
    """Return the marginal map of a column at the beginning of a flow, or None."""
    first = leading_marginals(flow)
    if first is None:
        return None
    return MarginalState(*(first.get_buffer(name)[column : column + 1] for name in MarginalState._fields))


def _support(flow: Flow, column: int, low: float, high: float) -> tuple[float, float]:
    """Return the interval of integration of a column that spans [low, high]: half as much again on both sides, inside its marginal's support."""
    pad = (high - low) / 2  # for tails beyond these rows
    left, right = low - pad, high + pad
    first = leading_marginals(flow)
    if first is not None:  # whose support is open: stop a thousandth of the gap before its ends
        least, most = (float(bound[column]) for bound in first.bounds)
        left = left if left > least else least + 1e-3 * (low - least)
        right = right if right < most else most - 1e-3 * (most - high)
    return left, right


@torch.no_grad()
def column_report(
    flow: Flow,
    x: Tensor,
    context: Tensor | None = None,
    *,
    names: Sequence[str] = (),
    items: int | None = None,
    points: int = 121,
) -> list[Column]:
    """Return the cost of each column (see :class:`Column`), always with the exact trace.

    Args:
        flow: a flow of vectors, in evaluation mode.
        x: a split (N, D); all rows enter ``alone``.
        context: (N, C), (C,) or None.
        names: of the columns.
        items: number of rows, evenly spaced in the split, that enter ``given_others``; by default as many as BUDGET
            evaluations of the density allow, from 16 to 256.
        points: number of quadrature points.

    Raises:
        DataError: for events that are not vectors, fewer than three rows, or a constant column.
        ConfigError: for a number of names other than that of the columns, or too few items or points.
    """
    _require_table(x)
    n, dim = x.shape
    if names and len(names) != dim:
        raise ConfigError(f"names={tuple(names)} has {len(names)} entries, expected {dim}, one per column")
    require_at_least(2, items=items)
    count = min(n, items or max(16, min(256, BUDGET // (dim * points))))
    chosen = torch.linspace(0, n - 1, count).round().long()
    rows, given = match_flow(x[chosen], context_rows(context, chosen), flow.like)
    report = []
    for j in range(dim):
        column = x[:, j].double()
        scale, low, high = float(column.std()), float(column.min()), float(column.max())
        if not scale > 0:
            raise DataError(f"column {j} is constant and has no density: drop it")
        alone = spacing_entropy(column)
        full, half = conditional_log_prob(
            flow, rows, j, given, support=_support(flow, j, low, high), scale=scale, points=points
        )
        cost = -float(full.mean())
        report.append(
            Column(
                name=names[j] if names else f"column {j}",
                given_others=cost,
                standard_error=float(full.std()) / math.sqrt(count),
                alone=alone,
                saved=alone - cost,
                log_scale=math.log(scale),
                quadrature_error=float((half - full).abs().mean()),
            )
        )
    return report
