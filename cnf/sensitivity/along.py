"""Joint integration of a block's state and tangents, with substituted parameters and derivatives by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from cnf._utils.errors import ConfigError
from cnf.fields.custom import protect
from cnf.ode.continuous import CNF
from cnf.sensitivity.paths import clock
from cnf.solvers import Solver
from cnf.solvers.base import State, solver_of

__all__ = ["Along", "Values"]

Values = Mapping[str, Tensor]


class _Functional(nn.Module):
    """Augmented dynamics of a block as one module, for torch.func.functional_call."""

    def __init__(self, block: CNF):
        super().__init__()
        self.block = block

    def forward(self, share: Tensor | None, context: Tensor | None, *point: Tensor) -> State:
        """Return d(x, a)/du at the fraction u = ``share`` of the block's time; the initial state for ``share=None``."""
        x, a = point[0], point[1] if len(point) > 1 else None
        if share is None:
            a = self.block.initial_augmented_time(x)
            return (x,) if a is None else (x, a)
        end, path = self.block.end_time(x), self.block.path
        dx = end * protect(self.block.field)(clock(end * share, a), x, context)
        return (dx,) if a is None or path is None else (dx, end * path(a))


class Along:
    """Integrator of a block's state (x, [a]) and its K tangents, under parameters and their tangents (K, ...)."""

    def __init__(self, block: CNF, context: Tensor | None, solver: Solver | None, pieces: Sequence[Values] = ()):
        self.block, self.context, self.solver = block, context, solver
        given = [value for piece in pieces for value in piece.values()] + ([] if context is None else [context])
        self.known = [*block.parameters(), *given]  # for solvers that recompute or solve the adjoint
        self.whole = _Functional(block)
        self.own = dict(block.named_parameters())

    def check(self, values: Mapping[str, Tensor | None]) -> None:
        """Validate the names and shapes of parameters."""
        for name, value in values.items():
            if name not in self.own:
                near = get_close_matches(name, self.own, 1)
                advice = f"did you mean {near[0]!r}?" if near else f"expected one of {sorted(self.own)}"
                raise ConfigError(f"{name!r} is no parameter of this block: {advice}")
            if value is not None and value.shape != self.own[name].shape:
                raise ConfigError(f"{name!r} has shape {tuple(value.shape)}, expected {tuple(self.own[name].shape)}")

    def _jvp(
        self, share: Tensor | None, values: Values, unit: Values, point: State, tangents: State
    ) -> tuple[State, State]:
        """Return the right-hand side, and its derivative A S + (∂f/∂θ) θ' by one vmapped jvp over the columns."""
        theta = {name: values.get(name, self.own[name]) for name in unit}
        rest = {f"block.{name}": value for name, value in values.items() if name not in unit}

        def call(moved: Values, *y: Tensor) -> State:
            named = rest | {f"block.{name}": value for name, value in moved.items()}
            out: State = torch.func.functional_call(self.whole, named, (share, self.context, *y))
            return out

        if not tangents:
            return call(theta, *point), ()
        jvp: Any = torch.func.jvp
        vmap: Any = torch.func.vmap

        def push(direction: Values, *moved: Tensor) -> tuple[State, State]:
            pair: tuple[State, State] = jvp(call, (theta, *point), (dict(direction), *moved))
            return pair

        value, derivative = vmap(push, out_dims=(None, 0), randomness="same")(dict(unit), *tangents)
        return value, derivative

    def zero_tangents(self, point: State, unit: Values) -> State:
        """Return zero tangents (K, ...) of a state, one for every column of ``unit``."""
        count = next(iter(unit.values())).shape[0] if unit else 0
        return tuple(entry.new_zeros(count, *entry.shape) for entry in point) if count else ()

    def begin(self, x: Tensor, values: Values, unit: Values) -> tuple[State, State]:
        """Return the state at t = 0 and its tangents, which are zero except for a learned initial a."""
        if self.block.path is None:
            return (x,), self.zero_tangents((x,), unit)
        return self._jvp(None, values, unit, (x,), self.zero_tangents((x,), unit))

    def integrate(
        self,
        point: State,
        tangents: State,
        shares: tuple[float, float],
        values: Callable[[Tensor], Values],
        unit: Callable[[Tensor], Values],
    ) -> tuple[State, State]:
        """Integrate state and tangents between two fractions of the block's time."""
        first, last = shares
        count = len(point)

        def rhs(s: Tensor, state: State) -> State:
            share = first + s * (last - first)
            t = self.block.end_time(state[0]) * share
            slope, moved = self._jvp(share, values(t), unit(t), state[:count], state[count:])
            return tuple((last - first) * part for part in (*slope, *moved))

        entries = (*point, *tangents)
        solver = solver_of(self.block, self.solver)
        out = solver.solve(rhs, entries, dynamic=len(entries), parameters=self.known).state
        return out[:count], out[count:]
