"""What a solver is, what it returns, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cnf.errors import SolverError

__all__ = ["RHS", "Counter", "Solution", "Solver", "State", "Stats", "finite", "largest", "require_finite"]

State = tuple[Tensor, ...]
RHS = Callable[[Tensor, State], State]


class Counter:
    """Evaluations of one solve; those made after the forward solve ended belong to the backward pass."""

    def __init__(self) -> None:
        self.nfe = self.nfe_backward = self.accepted = self.rejected = 0
        self.products = 0  # forward evaluations that took a derivative, which whoever owns the right-hand side knows
        self.backward = False
        self.attempt: tuple[Tensor, Tensor] | None = None  # s and step size of the adjoint's latest step

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
        """Evaluations made for the gradient: the adjoint's own, or those that a checkpoint or a walk back repeats."""
        return self._sum("nfe_backward")

    @property
    def accepted(self) -> int:
        """Accepted steps."""
        return self._sum("accepted")

    @property
    def rejected(self) -> int:
        """Rejected steps (adaptive solvers)."""
        return self._sum("rejected")

    @property
    def products(self) -> int:
        """Evaluations in the forward solves that took a derivative of the field (a product, or the closed form of the trace)."""
        return self._sum("products")

    def all_products(self) -> None:
        """Every evaluation so far in the forward solves took a derivative."""
        for counter in self._counters:
            counter.products = counter.nfe

    def joined(self, products: int = 0) -> Stats:
        """All of it as one solve's, with as many further evaluations, all of which took a derivative."""
        one = Counter()
        for name in ("nfe", "nfe_backward", "accepted", "rejected", "products"):
            setattr(one, name, self._sum(name))
        one.nfe, one.products, one.backward = one.nfe + products, one.products + products, True
        return Stats([one])

    def costliest(self) -> str:
        """The block that took most evaluations, in words; "" where there is one only."""
        if len(self._counters) < 2:
            return ""
        number, counter = max(enumerate(self._counters, 1), key=lambda pair: pair[1].nfe)
        return f" in block {number} of {len(self._counters)} ({counter.nfe:,} evaluations)"

    def stalled(self) -> str:
        """Where an adjoint's backward solve stopped, in words: the blocks are solved last to first."""
        for number, counter in enumerate(self._counters, 1):
            if counter.attempt is not None:
                s, h = (abs(float(v.detach())) for v in counter.attempt)
                where = f" in block {number} of {len(self._counters)}" if len(self._counters) > 1 else ""
                return f"{where} at s={s:.4g} of its time, step size {h:.3g}, after {counter.nfe_backward:,} evaluations"
        return ""

    def __repr__(self) -> str:
        parts = (f"{n}={self._sum(n)}" for n in ("nfe", "nfe_backward", "accepted", "rejected", "products"))
        return f"Stats({', '.join(parts)})"


class Solution(NamedTuple):
    """The state at s = 1 and what it cost."""

    state: State
    stats: Stats


class Solver(Protocol):
    """Solves d state / ds = rhs(s, state) over s in [0, 1].

    Quadratures do not enter the right-hand side. A solver may so hand it the dynamic entries alone, and then looks at their
    slopes only: a right-hand side may leave the others out.
    """

    def solve(self, rhs: RHS, state: State, *, dynamic: int = 1, parameters: Sequence[Tensor] = ()) -> Solution:
        """The state at s = 1; the first ``dynamic`` entries are the point, the rest quadratures."""

    def refined(self) -> Solver:
        """The same solver, finer: what this one's error is measured against."""


def largest(y: State) -> float:
    """The largest entry of a state, in absolute value."""
    return max(float(e.detach().abs().max()) for e in y)


def finite(y: State) -> bool:
    """Whether every entry of a state is finite."""
    return all(bool(torch.isfinite(e).all()) for e in y)


def require_finite(values: Tensor, what: str) -> None:
    """Refuse values that are not finite.

    Raises:
        SolverError: saying what is not finite.
    """
    if not finite((values,)):
        raise SolverError(f"{what} is not finite")
