"""Embedded Runge-Kutta methods with torchdiffeq's tableaus, step control and interpolation, without its cost per step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torchdiffeq._impl.odeint import SOLVERS

from cnf._utils.errors import SolverError
from cnf.solvers.base import RHS, Counter, Solution, State, Stats
from cnf.solvers.fixed import moved, weighted

__all__ = ["Attempt", "StepFailure", "embedded"]

SAFETY, GROWTH, SHRINKING = 0.9, 10.0, 0.2  # torchdiffeq's step control
VMAP = (
    "torch.func.vmap is not supported by adaptive solvers, whose steps depend on values: use eval_solver=FixedGrid(...), or call the flow "
    "on the whole batch (log_prob takes any leading shape)"
)


class Attempt(NamedTuple):
    """Start, state and size of a step that was tried."""

    s: float
    state: State
    size: float


class StepFailure(Exception):
    """Raised if no further step can be taken."""

    def __init__(self, reason: str, counter: Counter, attempt: Attempt):
        super().__init__(reason)
        self.counter, self.attempt = counter, attempt


class _Method(NamedTuple):
    """Coefficients of torchdiffeq's method: nodes and rows of the stages after the first, weights, error weights, order."""

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    error: tuple[float, ...]
    order: float
    last: bool
    """Whether the last stage is evaluated at the new state."""
    between: Tensor
    """Weights (4, stages) of the slopes at x of a step, by powers x, x², x³, x⁴: interpolation of order 4."""


@cache
def _method(name: str) -> _Method:
    kind: Any = SOLVERS[name]
    tableau, middle = kind.tableau, kind.mid.double()
    weights = tableau.c_sol.double()
    # the quartic through y₀, the middle and y₁ with the slopes at both ends; y₀'s own coefficients cancel but for the constant
    first, final = torch.zeros_like(weights), torch.zeros_like(weights)
    first[0], final[-1] = 1, 1
    between = torch.stack([
        first,
        final - 4 * first - 5 * weights + 16 * middle,
        5 * first - 3 * final + 14 * weights - 32 * middle,
        2 * (final - first) - 8 * weights + 16 * middle,
    ])  # fmt: skip
    rows = tuple(tuple(row.tolist()) for row in tableau.beta)
    last = weights[-1] == 0 and weights[:-1].tolist() == list(rows[-1])
    return _Method(tuple(tableau.alpha.tolist()), rows, tuple(weights.tolist()), tuple(tableau.c_error.tolist()), float(kind.order), bool(last), between)


def embedded(
    method: str,
    rhs: RHS,
    state: State,
    tolerances: tuple[float, float],
    norm: Callable[[State], Tensor],
    max_steps: int,
    *,
    times: Sequence[float] = (0.0, 1.0),
    integrals: bool = True,
) -> Solution:
    """Return the state at ``times`` (T), increasing from 0 to 1, with entries (T, ...), by steps that end at 1.

    Steps depend on values only: no derivative passes through them. A right-hand side with a method ``at`` prepares all
    stages of a step at once (see :class:`cnf.ode.dynamics.AugmentedDynamics`).

    Args:
        method: a method of torchdiffeq.
        rhs: slopes of the state.
        state: at s = 0.
        tolerances: relative and absolute.
        norm: of errors over tolerances.
        max_steps: maximum number of steps.
        times: output times.
        integrals: whether the state has entries beyond the dynamic ones.

    Raises:
        StepFailure: for too many steps, an underflowing step, or a non-finite state.
        SolverError: under ``vmap``.
    """
    counter, (rtol, atol), kind = Counter(), tolerances, _method(method)
    at, floor = getattr(rhs, "at", None), state[0].new_full((), atol)

    def slope(s: float, y: State) -> State:
        counter.count()
        return rhs(y[0].new_full((), s), y)

    def ratio(e: State, y: State, z: State) -> float:
        largest = (torch.maximum(a.detach().abs(), b.detach().abs()) for a, b in zip(y, z, strict=True))
        return _number(norm(tuple(d.detach() / torch.add(floor, top, alpha=rtol) for d, top in zip(e, largest, strict=True))))

    def stages(s: float, h: float) -> list[Callable[[State], State]]:
        nonlocal at
        if at is not None:
            found = at(state[0].new_tensor([[s + c * h for c in kind.nodes]]), integrals=integrals)
            if found is not None:
                return list(found[0])
            at = None
        return [partial(_at, rhs, state[0], s + c * h) for c in kind.nodes]

    y, s, left = state, 0.0, list(times[1:])
    path = [[entry[None]] for entry in state]
    f = slope(0.0, y)
    h = _first_step(slope, y, f, kind.order - 1, ratio)
    while left:
        failed = partial(StepFailure, counter=counter, attempt=Attempt(s, y, h))
        if (taken := counter.accepted + counter.rejected) >= max_steps:
            raise failed(f"max_num_steps exceeded ({taken}>={max_steps})")
        if not s + h > s or not math.isfinite(h):
            raise failed(f"underflow in dt {h}")
        end = s + h
        if end > 1:
            end, h = 1.0, 1.0 - s
        k, after = [f], y
        for evaluate, row in zip(stages(s, h), kind.rows, strict=True):
            after = moved(y, h, row, k)
            counter.count()
            k.append(evaluate(after))
        if not kind.last:
            after = moved(y, h, kind.weights, k)
        apart = ratio(_error(h, kind.error, k), y, after)
        if apart <= 1:
            counter.accepted += 1
            inside = [time for time in left if time < end]
            if inside:
                for parts, entry in zip(path, _between(kind, y, h, k, [(time - s) / h for time in inside]), strict=True):
                    parts.append(entry)
                left = left[len(inside) :]
            if left[0] == end:
                for parts, entry in zip(path, after, strict=True):
                    parts.append(entry[None])
                left = left[1:]
            y, s, f = after, end, k[-1]
        else:
            counter.rejected += 1
        h = math.nan if math.isnan(apart) else h * _growth(apart, kind.order)
    counter.backward = True
    return Solution(tuple(torch.cat(parts) for parts in path), Stats([counter]))


def _at(rhs: RHS, like: Tensor, s: float, y: State) -> State:
    return rhs(like.new_full((), s), y)


def _growth(apart: float, order: float) -> float:
    """Return the factor of the next step for an error of ``apart`` tolerances."""
    if apart == 0:
        return GROWTH
    factor: float = SAFETY / apart ** (1 / order)
    return min(GROWTH, max(factor, 1.0 if apart < 1 else SHRINKING))


def _error(h: float, coefficients: Sequence[float], slopes: Sequence[State]) -> State:
    """Return h Σ c_i k_i, the estimated error of a step."""
    scaled = [c * h for c in coefficients]
    return tuple(cast(Tensor, weighted(j, scaled, slopes)) for j in range(len(slopes[0])))


def _between(kind: _Method, y: State, h: float, slopes: Sequence[State], places: Sequence[float]) -> State:
    """Return the state (T, ...) at ``places`` (T) of a step from y, fractions of its size, by interpolation."""
    x = torch.tensor(places, dtype=torch.float64)
    weights = h * torch.stack([x, x**2, x**3, x**4], 1) @ kind.between
    out = []
    for j, entry in enumerate(y):
        stacked = torch.stack([k[j] for k in slopes])
        out.append(entry + (weights.to(entry) @ stacked.flatten(1)).reshape(-1, *entry.shape))
    return tuple(out)


def _first_step(slope: Callable[[float, State], State], y: State, f: State, order: float, ratio: Callable[..., float]) -> float:
    """Return the first step size (Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations I, II.4)."""
    d0, d1 = ratio(y, y, y), ratio(f, y, y)
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    ahead = slope(h0, moved(y, h0, [1.0], [f]))
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
