"""Runge-Kutta methods on a fixed grid, with direct and checkpointed gradients."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial

import torch
from torch import Tensor

from cnf.errors import ConfigError, SolverError
from cnf.recompute import Recompute
from cnf.solvers.base import RHS, Counter, Solution, State, Stats, finite, largest
from cnf.solvers.tableaus import TABLEAUS

__all__ = ["FixedGrid"]


def _axpy(y: State, h: Tensor, coefficients: Sequence[float], slopes: Sequence[State]) -> State:
    """y + h Σ c_i k_i, entry by entry."""
    out = []
    for j, entry in enumerate(y):
        total = None
        for c, k in zip(coefficients, slopes, strict=False):
            if c:
                total = c * k[j] if total is None else torch.add(total, k[j], alpha=c)
        out.append(entry if total is None else entry + h * total)
    return tuple(out)


class FixedGrid:
    """A Runge-Kutta method on a fixed grid; its gradient is the discretisation's own.

    Args:
        method: ``"euler"``, ``"midpoint"``, ``"heun"``, ``"rk4"`` (the 3/8 rule), ``"rk4-classic"`` or ``"dopri5"``.
        steps: number of equal steps over [0, 1].
        gradient: ``"direct"`` keeps every stage for the backward pass; ``"checkpoint"`` keeps four states and repeats the
            steps between them (once up to four steps, twice beyond): the same gradient, in memory that does not grow with
            the steps. It can be differentiated once, and ``parameters`` of :meth:`solve` must name every tensor that
            ``rhs`` closes over and that wants a gradient.

    Raises:
        ConfigError: for an unknown method or gradient, or fewer than one step.

    Example:
        >>> y = FixedGrid("rk4", steps=8).solve(lambda s, y: (-y[0],), (torch.ones(1),)).state[0]
        >>> bool(abs(y - torch.exp(torch.tensor(-1.0))) < 1e-5)
        True
    """

    def __init__(self, method: str = "rk4", steps: int = 4, gradient: str = "direct"):
        if method not in TABLEAUS:
            near = get_close_matches(str(method), TABLEAUS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"method={method!r} is unknown on a fixed grid: expected one of {list(TABLEAUS)}{hint}")
        if steps < 1:
            raise ConfigError(f"steps={steps}: a grid needs at least 1 step")
        if gradient not in ("direct", "checkpoint"):
            raise ConfigError(f"gradient={gradient!r}: a fixed grid takes 'direct' or 'checkpoint'")
        self.method, self.steps, self.gradient = method, steps, gradient
        self.tableau = TABLEAUS[method]

    def __repr__(self) -> str:
        return f"FixedGrid({self.method!r}, steps={self.steps}, gradient={self.gradient!r})"

    def refined(self) -> FixedGrid:
        """The same method with twice the steps."""
        return FixedGrid(self.method, 2 * self.steps, self.gradient)

    def solve(self, rhs: RHS, state: State, *, dynamic: int = 1, parameters: Sequence[Tensor] = ()) -> Solution:
        """The state at s = 1.

        Raises:
            SolverError: if it is not finite; the solve is then repeated with a check at every step to say where.
        """
        counter = Counter()
        like = state[0]
        nodes = torch.linspace(0, 1, self.steps + 1, dtype=like.dtype, device=like.device)

        def step(s: Tensor, h: Tensor, *y: Tensor) -> State:
            slopes: list[State] = []
            for c, a in zip(self.tableau.c, self.tableau.a, strict=True):
                counter.count()
                slopes.append(rhs(s + c * h, _axpy(y, h, a, slopes)))
            return _axpy(y, h, self.tableau.b, slopes)

        saving = self.gradient == "checkpoint" and torch.is_grad_enabled()
        parts = [partial(step, nodes[i], nodes[i + 1] - nodes[i]) for i in range(self.steps)]

        def run(check: bool) -> State:
            if saving:
                return Recompute(parameters).chain(parts, state)
            y = state
            for i, part in enumerate(parts):
                before, y = y, part(*y)
                if check and not finite(y):
                    raise SolverError(
                        f"the state is not finite after step {i + 1} of {self.steps} ({self.method}) at s={nodes[i + 1]:.4g} "
                        f"of the block's time, {counter.nfe} evaluations: more steps, a smaller learning rate, or a "
                        "kinetic penalty may help",
                        s=float(nodes[i]), step=1 / self.steps, largest=largest(before),
                    )  # fmt: skip
            return y

        y = run(check=False)
        if not finite(y):
            counter.nfe = 0
            with torch.no_grad():
                saving = False
                run(check=True)
        counter.backward, counter.accepted = True, self.steps
        return Solution(y, Stats([counter]))
