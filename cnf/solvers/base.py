"""What a solver is, what it returns, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["RHS", "Counter", "Solution", "Solver", "State", "Stats", "finite"]

State = tuple[Tensor, ...]
RHS = Callable[[Tensor, State], State]


class Counter:
    """Evaluations of one solve; those made after the forward solve ended belong to the backward pass."""

    def __init__(self) -> None:
        self.nfe = self.nfe_backward = self.accepted = self.rejected = 0
        self.backward = False

    def count(self) -> None:
        """One more evaluation."""
        if self.backward:
            self.nfe_backward += 1
        else:
            self.nfe += 1


class Stats:
    """Evaluations of the field in one or several solves; sums follow the backward pass when it comes."""

    def __init__(self, counters: Sequence[Counter] = ()):
        self._counters = tuple(counters)

    def __add__(self, other: Stats) -> Stats:
        return Stats(self._counters + other._counters)

    def _sum(self, name: str) -> int:
        return sum(getattr(c, name) for c in self._counters)

    @property
    def nfe(self) -> int:
        """Evaluations in the forward solves."""
        return self._sum("nfe")

    @property
    def nfe_backward(self) -> int:
        """Evaluations made for the gradient: the adjoint's own, or a checkpoint's repeated ones."""
        return self._sum("nfe_backward")

    @property
    def accepted(self) -> int:
        """Accepted steps."""
        return self._sum("accepted")

    @property
    def rejected(self) -> int:
        """Rejected steps (adaptive solvers)."""
        return self._sum("rejected")

    def __repr__(self) -> str:
        parts = (f"{n}={self._sum(n)}" for n in ("nfe", "nfe_backward", "accepted", "rejected"))
        return f"Stats({', '.join(parts)})"


class Solution(NamedTuple):
    """The state at s = 1 and what it cost."""

    state: State
    stats: Stats


class Solver(Protocol):
    """Solves d state / ds = rhs(s, state) over s in [0, 1]."""

    def solve(self, rhs: RHS, state: State, *, dynamic: int = 1, parameters: Sequence[Tensor] = ()) -> Solution:
        """The state at s = 1; the first ``dynamic`` entries are the point, the rest quadratures."""

    def refined(self) -> Solver:
        """The same solver, finer: what this one's error is measured against."""


def finite(y: State) -> bool:
    """Whether every entry of a state is finite."""
    return all(bool(torch.isfinite(e).all()) for e in y)
