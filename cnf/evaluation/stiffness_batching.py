"""Batches of rows of similar stiffness, so that a stiff row slows down only similar ones."""

from __future__ import annotations

import torch
from torch import Tensor

from cnf._utils.validation import context_rows
from cnf.distributed import Group
from cnf.flow import Flow
from cnf.ode.continuous import CNF
from cnf.solvers import TABLEAUS, Adaptive
from cnf.solvers.base import solver_of
from cnf.transforms import Request, iter_leaves
from cnf.transforms.chain import input_of

__all__ = ["local_error", "sorted_rows"]

_FIFTH = TABLEAUS["dopri5"]
# Dormand and Prince's weights of order 5 minus those of order 4, the last one at the end of the step
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def sorted_rows(flow: Flow, x: Tensor, context: Tensor | None, *, size: int, group: Group) -> Tensor:
    """Return the order (N,) in which to batch the rows: by :func:`local_error`, or unchanged where sorting is useless.

    Sorting is useless for a single batch, and for solvers whose steps do not depend on the rows. It saved a fifth of
    the evaluations of a trained flow of a checkerboard (batches of 128), a twelfth of one of digits (of 64), none of a
    multiscale flow of digits: an adaptive solver controls the mean error over a batch, which one stiff row moves
    little.

    Args:
        flow, x, context: as for :func:`~cnf.evaluation.evaluate`.
        size: rows of a batch.
        group: processes that share the work; each gets the same order.
    """
    rows = torch.arange(len(x))
    first = _first(flow)
    adaptive = any(isinstance(solver_of(block), Adaptive) for block in flow.blocks)
    if len(x) <= size or first is None or not adaptive:
        return rows
    errors = torch.zeros(len(x), dtype=torch.float64)
    with group.together():
        for number, part in enumerate(rows.split(size)):
            if group.owns(number):
                errors[part] = local_error(flow, x[part], context_rows(context, part))
    return group.sum(errors).argsort(stable=True)


@torch.no_grad()
def local_error(flow: Flow, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Return the local error (N,) of one fifth-order step over the whole first block, float64 on the CPU.

    It costs seven evaluations of f. On trained flows of digits and of a checkerboard it correlates with the evaluations
    of a solve of that row alone (rank correlation 0.6 to 0.7 at tolerances 1e-5 and 1e-7), whereas \\|f\\| and the
    change of f over a small Euler step do so on one data set at most. Images are evaluated at the middle of their grey
    levels.

    Example:
        >>> from cnf import FlowConfig, SolverConfig, build
        >>> flow = build(FlowConfig.of(hidden=(8,), zero_init=False), SolverConfig(), (2,)).eval()
        >>> local_error(flow, torch.randn(5, 2)).shape
        torch.Size([5])
    """
    like = flow.like
    context = None if context is None else context.to(like)
    y = x.to(like)
    flow._check("x", y if x.is_floating_point() else x, flow.event_shape, context)
    if flow.levels is not None and not x.is_floating_point():
        y = (y + 0.5) / flow.levels
    context = flow.embed(context)
    y = input_of(flow.transform, y, Request(context, log_det=False), lambda leaf: isinstance(leaf, CNF))
    block = _first(flow)
    assert block is not None
    end = block.end_time(y)
    slopes = y.new_zeros(len(_ERROR), *y.shape)
    for i, (c, a) in enumerate(zip((*_FIFTH.c, 1.0), (*_FIFTH.a, _FIFTH.b), strict=True)):
        moved = torch.tensordot(y.new_tensor(a), slopes[:i], 1)
        slopes[i] = block.velocity(c * end, y + end * moved, context)
    error: Tensor = torch.tensordot(y.new_tensor(_ERROR), slopes, 1)
    return error.flatten(1).square().sum(1).sqrt().double().cpu()


def _first(flow: Flow) -> CNF | None:
    """Return the first block on a row's way; None if it is inside a transform that is not a chain."""
    holding = (leaf for leaf, _ in iter_leaves(flow.transform) if any(isinstance(m, CNF) for m in leaf.modules()))
    first = next(holding, None)
    return first if isinstance(first, CNF) else None
