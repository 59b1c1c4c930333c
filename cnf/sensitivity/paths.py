"""Joint integration of a block's state, augmented time and tangents over a time interval."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cnf._utils.errors import DataError, require_at_least
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Bound
from cnf.solvers.base import State
from cnf.transforms import Request

__all__ = ["TangentState", "chunk_size", "clock", "integrate_tangents", "require_points", "unit_rows", "unit_tangents"]

_CHUNK_NUMEL = 2**22  # tangent entries integrated at once: 32 MB in float64


class TangentState(NamedTuple):
    """Point x (N, \\*event), K tangents v (K, N, \\*event), augmented time a (1, k) or None."""

    x: Tensor
    v: Tensor
    a: Tensor | None


def clock(t: Tensor, a: Tensor | None) -> Tensor:
    """Return the field's time argument: t (), or the augmented time a as a vector (k,)."""
    return t if a is None else a[0]


def chunk_size(chunk: int | None, columns: int, numel: int) -> int:
    """Return the number of tangents of ``numel`` entries to integrate at once."""
    require_at_least(1, chunk=chunk)
    return chunk or max(1, min(columns, _CHUNK_NUMEL // max(1, numel)))


def require_points(x: Tensor, module: nn.Module) -> None:
    """Validate that x is a non-empty batch of floats (N, \\*event), of the type of the module's weights."""
    if x.ndim < 2 or len(x) == 0 or not x.is_floating_point():
        raise DataError(f"x has shape {tuple(x.shape)} and type {x.dtype}, expected floats (N, *event)")
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    if like is not None and x.dtype != like.dtype:
        raise DataError(f"x has type {x.dtype}, but the weights are {like.dtype}: use x.to({like.dtype}), or convert the module")


def integrate_tangents(block: CNF, start: TangentState, times: tuple[Tensor, Tensor], request: Request) -> TangentState:
    """Integrate x, a and V from ``times[0]`` to ``times[1]``: dx/dt = f, da/dt = g(a), dV/dt = A V, A = ∂f/∂x.

    Without tangents (K = 0) only the path is integrated. All entries enter an adaptive solver's step size control.
    """
    first, last = times
    span = last - first
    path, bound, moving = block.path, Bound(block.field, request.context), start.v.shape[0] > 0

    def rhs(s: Tensor, state: State) -> State:
        a = None if start.a is None else state[1]
        t = clock(first + s * span, a)
        if moving:
            dx, product = bound.jvp(t, state[0], state[-1])
            out = [dx, product]
        else:
            out = [bound(t, state[0])]
        if a is not None and path is not None:
            out.insert(1, path(a))
        return tuple(span * part for part in out)

    entries = [start.x] + ([] if start.a is None else [start.a]) + ([start.v] if moving else [])
    # none derived from another: a learned end time is part of the two times, and would be counted twice
    modules = [block.field, *([] if path is None else [path])]
    parameters = [p for m in modules for p in m.parameters()] + [first, last]
    parameters += [] if request.context is None else [request.context]
    end = request.solver_of(block).solve(rhs, tuple(entries), dynamic=len(entries), parameters=parameters).state
    return TangentState(end[0], end[-1] if moving else start.v, None if start.a is None else end[1])


def unit_tangents(x: Tensor, chunk: int | None = None) -> Iterator[Tensor]:
    """Yield the unit tangents of all dimensions, (K, N, \\*event) at a time, equal for every row."""
    dim = x.shape[1:].numel()
    for unit in unit_rows(dim, chunk_size(chunk, dim, x.numel()), x):
        yield unit.reshape(len(unit), 1, *x.shape[1:]).expand(len(unit), *x.shape)


def unit_rows(dim: int, size: int, like: Tensor) -> Iterator[Tensor]:
    """Yield the rows of the identity (dim, dim), ``size`` at a time."""
    for first in range(0, dim, size):
        unit = torch.zeros(min(size, dim - first), dim, dtype=like.dtype, device=like.device)
        unit.diagonal(first).fill_(1)
        yield unit
