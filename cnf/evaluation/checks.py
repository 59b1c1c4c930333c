"""Numerical errors of a likelihood: refined solves, round trips, and the integral of a density."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cnf._utils.validation import context_rows, match_flow
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.evaluation.items import ItemNoise
from cnf.evaluation.likelihood import Evaluation, default_batch_size, evaluate
from cnf.flow import Flow
from cnf.ode.continuous import CNF
from cnf.random import Noise
from cnf.solvers import Solution, Solver
from cnf.solvers.base import RHS, State, refined, solver_of
from cnf.transforms import Standardize, iter_leaves

__all__ = ["Check", "block_errors", "check", "integral_2d", "round_trip_error", "solver_error"]


@dataclass(frozen=True)
class Check:
    """Result of :func:`check` on ``items`` rows."""

    items: int
    unit: str
    """Unit of the differences: bits/dim for images, nats for vectors."""
    difference: float
    """Change of the mean at ten times tighter tolerances (twice the steps of a fixed grid), with the same noise."""
    largest: float
    """Largest absolute change of a single row."""
    round_trip: float
    """max |x - inverse(forward(x))|, as :func:`round_trip_error` scales it."""


@torch.no_grad()
def check(
    flow: Flow,
    x: Tensor,
    context: Tensor | None = None,
    *,
    dequantisation: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    index: Tensor | None = None,
    group: Group = SINGLE_PROCESS,
    progress: Callable[[int, int], object] | None = None,
) -> Check:
    """Solve again at ten times tighter tolerances and measure the round-trip error, batch by batch.

    Args:
        flow: in evaluation mode.
        x: the rows to check (N, \\*event).
        context: (N, C), (C,) or None.
        dequantisation, seed, batch_size, index, group, progress: as for :func:`~cnf.evaluation.evaluate`.

    Example:
        >>> from cnf import FlowConfig, SolverConfig, build
        >>> flow = build(FlowConfig.of(hidden=(8,)), SolverConfig(), (2,)).eval()
        >>> result = check(flow, torch.randn(10, 2))
        >>> result.items, result.unit, result.round_trip < 1e-4
        (10, 'nats', True)
    """

    def report(part: int, done: int, total: int) -> None:
        if progress is not None:
            progress(part * total + done, 3 * total)  # three passes: two solves and a round trip of each batch

    def solve(part: int) -> Evaluation:
        return evaluate(
            flow, x, context, dequantisation=dequantisation, seed=seed, batch_size=batch_size, index=index, group=group,
            progress=partial(report, part), solver=refined if part else None,
        )  # fmt: skip

    before = solve(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on rows that cannot be solved: the first solve has warned
        change = solve(1).per_item - before.per_item
    solved = change.isfinite()  # the evaluation reports the others
    change = change[solved]
    parts = solved.nonzero()[:, 0].split(batch_size or default_batch_size(flow))
    errors = torch.zeros(len(parts), dtype=torch.float64)
    done, own = 0, group.owned(len(parts))
    with group.together():
        for number, rows in enumerate(parts):
            if not group.owns(number):
                continue
            points, given = match_flow(x[rows], context_rows(context, rows), flow.like)
            errors[number] = round_trip_error(flow, points, given, noise=ItemNoise(seed, before.index[rows].tolist()))
            done += 1
            report(2, done, own)
    errors = group.sum(errors)
    return Check(len(change), before.unit, float(change.mean()), float(change.abs().max()), float(errors.max()))


@torch.no_grad()
def solver_error(
    flow: Flow, x: Tensor, context: Tensor | None = None, *, noise: Noise | None = None, group: Group = SINGLE_PROCESS
) -> float:
    """Return the absolute change of a batch's mean log-likelihood under a refined solver (twice the steps, or rtol/10).

    In bits/dim for images and nats per dimension for vectors. Both solves use the same noise if ``noise`` is given. The
    mode of ``flow`` selects the solver. Each process of ``group`` passes its own rows of the batch, and all get the
    joint error.
    """
    with group.together():
        change = _changes(flow, x, context, noise)
    difference = abs(group.mean(change)) / flow.dim
    return difference / math.log(2) if flow.levels is not None else difference


def _changes(flow: Flow, x: Tensor, context: Tensor | None, noise: Noise | None) -> Tensor:
    """Return the change of each row's log p (N,) with every block's solver refined."""
    before = flow.log_prob(x, context, noise=noise)
    return flow.log_prob(x, context, noise=noise, solver=refined) - before


class _Recorded:
    """A block's solver that records its solutions and replays them."""

    def __init__(self, solver: Solver):
        self.solver, self.solutions, self.position = solver, list[Solution](), -1

    def solve(self, rhs: RHS, state: State, *, dynamic: int = 1, parameters: Sequence[Tensor] = ()) -> Solution:
        if self.position < 0:
            self.solutions.append(self.solver.solve(rhs, state, dynamic=dynamic, parameters=parameters))
            return self.solutions[-1]
        self.position += 1
        return self.solutions[self.position - 1]

    def refined(self) -> Solver:
        return self.solver.refined()


@torch.no_grad()
def block_errors(
    flow: Flow, x: Tensor, context: Tensor | None = None, *, noise: Noise | None = None, whole: bool = False, group: Group = SINGLE_PROCESS
) -> list[float]:
    """Return, for each block, the change of a batch's likelihood with this block's training solver refined.

    Each is the mean absolute change of the rows, in bits/dim for images and nats per dimension for vectors;
    :func:`solver_error` is at most about their sum. Blocks before the refined one are not solved again. With ``whole``
    all blocks are refined together, which gives one number at a small fraction of the cost.

    Args:
        flow: in training mode.
        x, context, noise, group: as for :func:`solver_error`.
    """
    scale = flow.dim * (math.log(2) if flow.levels is not None else 1.0)
    blocks = flow.blocks
    recorded = {block: _Recorded(solver_of(block)) for block in blocks}
    changes = []
    with group.together():
        if whole:
            changes = [_changes(flow, x, context, noise)]
            blocks = []
        else:
            before = flow.log_prob(x, context, noise=noise, solver=lambda block: recorded[block])
        for i, block in enumerate(blocks):
            for earlier in blocks[:i]:  # replays the input of this block
                recorded[earlier].position = 0
            chosen: dict[CNF, Solver] = {block: refined(block), **{earlier: recorded[earlier] for earlier in blocks[:i]}}
            after = flow.log_prob(x, context, noise=noise, solver=lambda one, chosen=chosen: chosen.get(one) or solver_of(one))  # type: ignore[misc]
            changes.append(after - before)
    return [group.mean(change.abs()) / scale for change in changes]


@torch.no_grad()
def round_trip_error(flow: Flow, x: Tensor, context: Tensor | None = None, *, noise: Noise | None = None) -> float:
    """Return max |x - inverse(forward(x))| over a batch.

    uint8 images count on the scale [0, 1], from the middle of their grey levels; vectors in standard deviations of each
    column if the flow standardises them, since the columns of a table differ by orders of magnitude. NaN for a flow
    without an inverse.
    """
    if not x.is_floating_point():
        assert flow.levels is not None
        x = (x.to(flow.like.dtype) + 0.5) / flow.levels
    z = flow.encode(x, context, noise=noise)
    try:
        error = (flow.decode(z, context, noise=noise) - x).abs()
    except NotImplementedError:  # a custom transform
        return math.nan
    if flow.levels is None:
        error = error / next((leaf.std.to(x) for leaf, _ in iter_leaves(flow.transform) if isinstance(leaf, Standardize)), 1.0)
    return float(error.max())


@torch.no_grad()
def integral_2d(flow: Flow, extent: float = 8.0, resolution: int = 400) -> float:
    """Return ∫ p over the square [-extent, extent]² by the midpoint rule: 1 for a density inside it."""
    like = flow.like
    side = 2 * extent / resolution
    ticks = torch.linspace(-extent + side / 2, extent - side / 2, resolution, dtype=like.dtype, device=like.device)
    grid = torch.cartesian_prod(ticks, ticks)
    total = sum((float(flow.log_prob(part).double().exp().sum()) for part in grid.split(20_000)), 0.0)
    return total * side**2
