"""Adaptive Runge-Kutta solver for torch.func transforms, which torchdiffeq does not support."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchdiffeq._impl.odeint import SOLVERS

from cnf._utils.errors import SolverError
from cnf.solvers.base import RHS, Counter, Solution, State, Stats

__all__ = ["embedded"]

SAFETY, GROWTH, SHRINKING = 0.9, 10.0, 0.2  # torchdiffeq's step control
VMAP = (
    "torch.func.vmap is not supported by adaptive solvers, whose steps depend on values: use eval_solver=FixedGrid(...), or call the flow "
    "on the whole batch (log_prob takes any leading shape)"
)


def embedded(
    method: str, rhs: RHS, state: State, tolerances: tuple[float, float], norm: Callable[[State], Tensor], max_steps: int
) -> Solution:
    """Return the state at s = 1 with torchdiffeq's tableau and step control; ``norm`` is that of errors over tolerances.

    Raises:
        SolverError: under ``vmap``, for too many steps, an underflowing step, or a non-finite state.
    """
    counter, (rtol, atol) = Counter(), tolerances
    kind: Any = SOLVERS[method]
    tableau, order = kind.tableau, float(kind.order)
    nodes, rows = [0.0, *tableau.alpha.tolist()], [[], *(row.tolist() for row in tableau.beta)]
    weights, error = tableau.c_sol.tolist(), tableau.c_error.tolist()

    def slopes(s: float, y: State) -> State:
        counter.count()
        return rhs(y[0].new_full((), s), y)

    def ratio(e: State, y: State, z: State) -> float:
        # steps depend on values only: no derivative passes through them
        scaled = tuple(d.detach() / (atol + rtol * torch.maximum(a.detach().abs(), b.detach().abs())) for d, a, b in zip(e, y, z, strict=True))
        return _number(norm(scaled))

    y, s = state, 0.0
    f = slopes(0.0, y)
    h = _first_step(slopes, y, f, order - 1, ratio)
    while s < 1:
        if counter.accepted + counter.rejected >= max_steps:
            raise SolverError(f"max_num_steps exceeded ({max_steps})", s=s, step=h)
        if not h > 1e-15 or not all(_number(e.detach().isfinite().all()) for e in y):
            raise SolverError("the step underflows, or the state is not finite", s=s, step=h)
        h = min(h, 1.0 - s)
        k = [f]
        for c, row in zip(nodes[1:], rows[1:], strict=True):
            k.append(slopes(s + c * h, _moved(y, h, row, k)))
        after = _moved(y, h, weights, k)
        apart = ratio(_moved(tuple(torch.zeros_like(e) for e in y), h, error, k), y, after)
        if apart <= 1:
            counter.accepted += 1
            s, y, f = (1.0 if s + h >= 1 - 1e-14 else s + h), after, k[-1]
        else:
            counter.rejected += 1
        h = h * (GROWTH if apart == 0 else min(GROWTH, max(SAFETY / apart ** (1 / order), 1.0 if apart < 1 else SHRINKING)))
    counter.backward = True
    return Solution(y, Stats([counter]))


def _moved(y: State, h: float, coefficients: list[float], slopes: list[State]) -> State:
    """Return y + h Σ c_i k_i, entry by entry."""
    out = []
    for j, entry in enumerate(y):
        for c, k in zip(coefficients, slopes, strict=False):
            entry = torch.add(entry, k[j], alpha=c * h) if c else entry
        out.append(entry)
    return tuple(out)


def _first_step(slopes: Callable[[float, State], State], y: State, f: State, order: float, ratio: Callable[..., float]) -> float:
    """Return the first step size (Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations I, II.4)."""
    d0, d1 = ratio(y, y, y), ratio(f, y, y)
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    ahead = slopes(h0, _moved(y, h0, [1.0], [f]))
    d2 = ratio(tuple(a - b for a, b in zip(ahead, f, strict=True)), y, y) / h0
    h1 = max(1e-6, h0 * 1e-3) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2)) ** (1 / (order + 1))
    return min(100 * h0, h1)


def _number(value: Tensor) -> float:
    try:
        return float(value)
    except RuntimeError as error:
        if "vmap" in str(error):
            raise SolverError(VMAP) from None
        raise
