"""Solver protocol, its result, and its cost in evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from cnf._utils.errors import ConfigError, SolverError

__all__ = ["RHS", "Counter", "Solution", "Solver", "SolverOverride", "State", "Stats", "finite", "interval", "largest", "refined", "require_finite", "solver_of"]

State = tuple[Tensor, ...]
RHS = Callable[[Tensor, State], State]
COUNTS = ("nfe", "nfe_backward", "accepted", "rejected", "products")


class Counter:
    """Evaluation counts of one solve; evaluations after the forward solve count as backward."""

    def __init__(self) -> None:
        self.nfe = self.nfe_backward = self.accepted = self.rejected = 0
        self.products = 0  # forward evaluations with a derivative, set by the owner of the right-hand side
        self.backward = False
        self.attempt: tuple[Tensor, Tensor] | None = None  # s and step size of the adjoint's latest step

    def count(self, number: int = 1) -> None:
        """Count evaluations."""
        if self.backward:
            self.nfe_backward += number
        else:
            self.nfe += number


class Stats:
    """Evaluation counts of one or several solves; they include later backward passes."""

    def __init__(self, counters: Sequence[Counter] = ()):
        self.counters = tuple(counters)

    def __add__(self, other: Stats) -> Stats:
        return Stats(self.counters + other.counters)

    def _sum(self, name: str) -> int:
        return sum(getattr(c, name) for c in self.counters)

    @property
    def nfe(self) -> int:
        """Number of evaluations (NFE) in the forward solves."""
        return self._sum("nfe")

    @property
    def nfe_backward(self) -> int:
        """Number of evaluations for the gradient, by the adjoint, a checkpoint or a reversible solve."""
        return self._sum("nfe_backward")

    @property
    def accepted(self) -> int:
        """Number of accepted solver steps."""
        return self._sum("accepted")

    @property
    def rejected(self) -> int:
        """Number of rejected solver steps (adaptive solvers)."""
        return self._sum("rejected")

    @property
    def products(self) -> int:
        """Number of forward evaluations with a derivative of the field (Jacobian product or closed-form trace)."""
        return self._sum("products")

    def all_products(self) -> None:
        """Mark every forward evaluation so far as one with a derivative."""
        for counter in self.counters:
            counter.products = counter.nfe

    def joined(self, products: int = 0) -> Stats:
        """Return the totals as those of one solve, plus ``products`` further evaluations with a derivative."""
        one = Counter()
        for name in COUNTS:
            setattr(one, name, self._sum(name))
        one.nfe, one.products, one.backward = one.nfe + products, one.products + products, True
        return Stats([one])

    def costliest(self) -> str:
        """Describe the block with most evaluations; "" for a single block."""
        if len(self.counters) < 2:
            return ""
        number, counter = max(enumerate(self.counters, 1), key=lambda pair: pair[1].nfe)
        return f" in block {number} of {len(self.counters)} ({counter.nfe:,} evaluations)"

    def stalled(self) -> str:
        """Describe where an adjoint's backward solve stopped, "" if unknown; blocks are solved last to first."""
        for number, counter in enumerate(self.counters, 1):
            if counter.attempt is not None:
                s, h = (abs(float(v.detach())) for v in counter.attempt)
                where = f" in block {number} of {len(self.counters)}" if len(self.counters) > 1 else ""
                return f"{where} at s={s:.4g} of its time, step size {h:.3g}, after {counter.nfe_backward:,} evaluations"
        return ""

    def __repr__(self) -> str:
        return f"Stats({', '.join(f'{name}={self._sum(name)}' for name in COUNTS)})"


class Solution(NamedTuple):
    """State at s = 1 and evaluation counts."""

    state: State
    stats: Stats


class Solver(Protocol):
    """Solver of d state / ds = rhs(s, state) over s in [0, 1].

    The right-hand side does not depend on the quadratures. A solver may therefore call it with the dynamic entries
    alone and read only their slopes; the right-hand side may then omit the others. Solvers that depend on the block's
    time t = start + s span read the attributes ``start`` and ``span``, tensors (); without them t = s.
    """

    def solve(self, rhs: RHS, state: State, *, dynamic: int = 1, parameters: Sequence[Tensor] = ()) -> Solution:
        """Return the state at s = 1; first ``dynamic`` dynamic entries (the point first), then quadratures."""

    def refined(self) -> Solver:
        """Return a finer version of this solver, the reference for error estimates."""


SolverOverride = Solver | Callable[[Any], Solver] | None
"""Solver of one call: a solver for every block, a function of the block that returns one, or None for the block's own."""


def solver_of(block: Any, override: SolverOverride = None) -> Solver:
    """Return the solver of a block for one call: ``override``, ``override(block)``, or the block's own in its mode.

    Args:
        block: module with ``solver`` (training) and ``eval_solver``, such as a CNF or a NeuralODE.
        override: solver, function that returns the solver of a block (such as :func:`refined`), or None.

    Raises:
        ConfigError: for an override that is neither.
    """
    if override is None:
        own: Solver = block.solver if block.training else block.eval_solver
        return own
    if isinstance(override, type) or not (hasattr(override, "solve") or callable(override)):
        raise ConfigError(f"solver={override!r}: expected a solver such as FixedGrid('rk4', 8), or a function of the block that returns one")
    chosen: Solver = override if hasattr(override, "solve") else override(block)  # type: ignore[assignment,operator]
    return chosen


def refined(block: Any) -> Solver:
    """Return the refined solver of a block in its present mode: ten times tighter tolerances, or twice the steps of a grid."""
    return solver_of(block).refined()


def interval(rhs: RHS, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return start and length () of the block's time interval, negative from noise to data; 0 and 1 if ``rhs`` has none."""
    return getattr(rhs, "start", like.new_zeros(())), getattr(rhs, "span", like.new_ones(()))


def largest(y: State) -> float:
    """Return the largest absolute value in a state."""
    return max(float(e.detach().abs().max()) for e in y)


def finite(y: State) -> bool:
    """Return whether every entry of a state is finite."""
    # e - e is NaN where e is not finite, and zero elsewhere: half the operations of isfinite
    return not any(bool((e - e).any()) for e in map(Tensor.detach, y))


def require_finite(values: Tensor, what: str) -> None:
    """Check that values are finite.

    Raises:
        SolverError: if they are not; ``what`` names them.
    """
    if not finite((values,)):
        raise SolverError(f"{what} is not finite")
