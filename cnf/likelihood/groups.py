"""Items sorted by how hard their solves look, so that batches are of a kind and a hard item holds up none but its like."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cnf.continuous import CNF
from cnf.distributed import Group
from cnf.flow import Flow
from cnf.multiscale import Multiscale
from cnf.solvers import TABLEAUS, Adaptive
from cnf.transforms import Transform, leaves

__all__ = ["hardness", "sorted_rows"]

_FIFTH = TABLEAUS["dopri5"]
# Dormand and Prince's weights of order 5 less those of order 4, the last of them at the step's end
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def sorted_rows(flow: Flow, x: Tensor, context: Tensor | None, *, size: int, group: Group) -> Tensor:
    """The order (N,) in which to cut items into batches of ``size``: by :func:`hardness`, or as they are where that is idle.

    Idle it is for a single batch, and for solvers whose steps do not depend on the items. It saved a trained flow of a
    checkerboard a fifth of its evaluations (batches of 128), one of digits a twelfth (of 64), a multiscale flow of digits
    none: an adaptive solver looks at the mean error over a batch, which one hard item moves little.

    Args:
        flow: in evaluation mode.
        x: points (N, \\*event), images as floats or uint8.
        context: (N, C), (C,) or None.
        size: items of a batch.
        group: processes that share the work; each gets the same order.

    Raises:
        SolverError: from a learned time that could not be solved.
    """
    rows = torch.arange(len(x))
    first = _first(flow)
    adaptive = any(isinstance(block.solver if block.training else block.eval_solver, Adaptive) for block in flow.blocks)
    if len(x) <= size or first is None or not adaptive:
        return rows
    found = torch.zeros(len(x), dtype=torch.float64)
    with group.together():
        for place, part in enumerate(rows.split(size)):
            if group.owns(place):
                given = context if context is None or context.ndim == 1 else context[part]
                found[part] = hardness(flow, x[part], given)
    return group.sum(found).argsort(stable=True)


@torch.no_grad()
def hardness(flow: Flow, x: Tensor, context: Tensor | None = None) -> Tensor:
    """The error (N,) that one step of order 5 over the whole first block would make, float64 on the CPU; seven evaluations of f.

    On trained flows of digits and of a checkerboard it goes with the evaluations of a solve of that item alone (rank
    correlation 0.6 to 0.7 at 1e-5 and at 1e-7), where \\|f\\| or the change of f over a small Euler step do on one set alone,
    if any. Images are looked at in the middle of their grey levels.

    Example:
        >>> from cnf import ModelConfig, SolverConfig, build
        >>> flow = build(ModelConfig(hidden=(8,), zero_init=False), SolverConfig(), (2,)).eval()
        >>> hardness(flow, torch.randn(5, 2)).shape
        torch.Size([5])
    """
    like = flow.like
    context = None if context is None else context.to(like)
    y = x.to(like)
    flow._check("x", y if x.is_floating_point() else x, flow.event_shape, context)
    if flow.levels is not None and not x.is_floating_point():
        y = (y + 0.5) / flow.levels
    block: CNF | None = None
    for leaf in _opened(flow.transform):
        if isinstance(leaf, CNF):
            block = leaf
            break
        y = leaf(y, context, log_det=False).value
    assert block is not None
    end = block.end_time(y)
    slopes = y.new_zeros(len(_ERROR), *y.shape)
    for i, (c, a) in enumerate(zip((*_FIFTH.c, 1.0), (*_FIFTH.a, _FIFTH.b), strict=True)):
        moved = torch.tensordot(y.new_tensor(a), slopes[:i], 1)
        slopes[i] = block.velocity(c * end, y + end * moved, context)
    error: Tensor = torch.tensordot(y.new_tensor(_ERROR), slopes, 1)
    return error.flatten(1).square().sum(1).sqrt().double().cpu()


def _opened(transform: Transform) -> Iterator[Transform]:
    """The leaves of a chain up to a Split, the first scale of a multiscale chain opened too."""
    for leaf in leaves(transform):
        if not isinstance(leaf, Multiscale):
            yield leaf
            continue
        for scale in leaf.scales:
            yield from leaves(scale)  # type: ignore[arg-type]
            return


def _first(flow: Flow) -> CNF | None:
    """The block that an item meets first; None where it stands inside a transform that is no chain."""
    for leaf in _opened(flow.transform):
        if isinstance(leaf, CNF):
            return leaf
        if any(isinstance(m, CNF) for m in leaf.modules()):
            return None
    return None
