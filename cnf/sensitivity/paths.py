"""A block's point, its learned time where it has one, and tangents beside them, carried over a stretch of time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cnf.continuous import CNF
from cnf.divergence import Bound
from cnf.errors import ConfigError, DataError
from cnf.solvers import Solver
from cnf.solvers.base import State

__all__ = ["Carry", "carry", "chunk_size", "clock", "path_end", "require_points", "solver_of", "units"]

_CHUNK_NUMEL = 2**22  # entries of tangents carried at once: 32 MB in float64


class Carry(NamedTuple):
    """Point x (N, \\*event), K tangents v (K, N, \\*event), learned time a (1, k) or None."""

    x: Tensor
    v: Tensor
    a: Tensor | None


def clock(t: Tensor, a: Tensor | None) -> Tensor:
    """What the field is given for its time: t () itself, or the learned a as a vector (k,)."""
    return t if a is None else a[0]


def solver_of(block: CNF, solver: Solver | None) -> Solver:
    """The solver asked for, or the one that the block itself would use in its present mode."""
    return solver or (block.solver if block.training else block.eval_solver)


def chunk_size(chunk: int | None, columns: int, numel: int) -> int:
    """How many tangents of ``numel`` entries to carry at once.

    Raises:
        ConfigError: for a chunk below one.
    """
    if chunk is not None and chunk < 1:
        raise ConfigError(f"chunk={chunk}: expected at least 1 tangent at once, or None to choose by memory")
    return chunk or max(1, min(columns, _CHUNK_NUMEL // max(1, numel)))


def require_points(x: Tensor) -> None:
    """Refuse what has no derivative.

    Raises:
        DataError: for x that is no batch of floats.
    """
    if x.ndim < 2 or len(x) == 0 or not x.is_floating_point():
        raise DataError(f"x is {tuple(x.shape)} of {x.dtype}; expected floats (N, *event): a Jacobian is a derivative")


def carry(
    block: CNF,
    start: Carry,
    times: tuple[Tensor, Tensor],
    context: Tensor | None = None,
    solver: Solver | None = None,
) -> Carry:
    """x, a and V from ``times[0]`` to ``times[1]``: dx/dt = f, da/dt = g(a), dV/dt = A V with A = ∂f/∂x along the path.

    No tangents at all (K = 0) leave the path alone. All entries drive an adaptive solver's step size.
    """
    first, last = times
    span = last - first
    path, bound, moving = block.path, Bound(block.field, context), start.v.shape[0] > 0

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
    # none that another is made of: a learned end time is in the two times, and would be counted twice beside them
    modules = [block.field, *([] if path is None else [path])]
    parameters = [p for m in modules for p in m.parameters()] + [first, last, *([] if context is None else [context])]
    end = solver_of(block, solver).solve(rhs, tuple(entries), dynamic=len(entries), parameters=parameters).state
    return Carry(end[0], end[-1] if moving else start.v, None if start.a is None else end[1])


def path_end(block: CNF, a: Tensor, x: Tensor, solver: Solver | None = None) -> Tensor:
    """a(T) from a(0): the learned time alone, which does not see x."""
    path = block.path
    assert path is not None
    end = block.end_time(x)

    def rhs(s: Tensor, state: State) -> State:
        return (end * path(state[0]),)

    solution = solver_of(block, solver).solve(rhs, (a,), parameters=[*path.parameters(), end])
    return solution.state[0]


def units(x: Tensor, first: int, count: int) -> Tensor:
    """``count`` unit tangents from dimension ``first`` on, (count, N, \\*event), the same for every row."""
    unit = torch.zeros(count, x.shape[1:].numel(), dtype=x.dtype, device=x.device)
    unit[torch.arange(count), torch.arange(first, first + count)] = 1
    return unit.reshape(count, 1, *x.shape[1:]).expand(count, *x.shape)
