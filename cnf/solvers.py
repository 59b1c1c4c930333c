"""Fixed grids and adaptive solving, both over s in [0, 1], with direct, checkpointed and adjoint gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple, Protocol

import torch
import torchdiffeq
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cnf.errors import ConfigError, SolverError

__all__ = ["TABLEAUS", "Adaptive", "FixedGrid", "Solution", "Solver", "Stats", "Tableau"]

State = tuple[Tensor, ...]
RHS = Callable[[Tensor, State], State]


class _Counter:
    """Evaluations of one solve; those made after the forward solve ended belong to the backward pass."""

    def __init__(self) -> None:
        self.nfe = self.nfe_backward = self.accepted = self.rejected = 0
        self.backward = False

    def count(self) -> None:
        if self.backward:
            self.nfe_backward += 1
        else:
            self.nfe += 1


class Stats:
    """Evaluations of the field in one or several solves; sums follow the backward pass when it comes."""

    def __init__(self, counters: Sequence[_Counter] = ()):
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


@dataclass(frozen=True)
class Tableau:
    """A Butcher tableau: nodes c, rows a (strictly lower triangular), weights b, and the order of the method."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int


TABLEAUS = {
    "euler": Tableau((0.0,), ((),), (1.0,), 1),
    "midpoint": Tableau((0.0, 0.5), ((), (0.5,)), (0.0, 1.0), 2),
    "heun": Tableau((0.0, 1.0), ((), (1.0,)), (0.5, 0.5), 2),
    # the 3/8 rule, which torchdiffeq and so the published codes call rk4
    "rk4": Tableau(
        (0.0, 1 / 3, 2 / 3, 1.0), ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8), 4
    ),
    "rk4-classic": Tableau(
        (0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), 4
    ),
    # Dormand-Prince of order 5: the seventh stage serves only the error estimate, which a fixed grid has no use for
    "dopri5": Tableau(
        (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
        (
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        ),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        5,
    ),
}


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
        gradient: ``"direct"`` keeps every stage for the backward pass; ``"checkpoint"`` keeps each step's start and
            repeats the step, the same gradient in memory that hardly grows with the steps.

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
        counter = _Counter()
        like = state[0]
        nodes = torch.linspace(0, 1, self.steps + 1, dtype=like.dtype, device=like.device)

        def step(s: Tensor, h: Tensor, *y: Tensor) -> State:
            slopes: list[State] = []
            for c, a in zip(self.tableau.c, self.tableau.a, strict=True):
                counter.count()
                slopes.append(rhs(s + c * h, _axpy(y, h, a, slopes)))
            return _axpy(y, h, self.tableau.b, slopes)

        saving = self.gradient == "checkpoint" and torch.is_grad_enabled()

        def run(check: bool) -> State:
            y = state
            for i in range(self.steps):
                s, h = nodes[i], nodes[i + 1] - nodes[i]
                y = checkpoint(step, s, h, *y, use_reentrant=False) if saving else step(s, h, *y)
                if check and not _finite(y):
                    raise SolverError(
                        f"the state is not finite after step {i + 1} of {self.steps} ({self.method}) at s={nodes[i + 1]:.4g} "
                        f"of the block's time, {counter.nfe} evaluations: more steps, a smaller learning rate, or a "
                        "kinetic penalty may help"
                    )
            return y

        y = run(check=False)
        if not _finite(y):
            counter.nfe = 0
            with torch.no_grad():
                saving = False
                run(check=True)
        counter.backward, counter.accepted = True, self.steps
        return Solution(y, Stats([counter]))


class _Function:
    """The right-hand side as torchdiffeq wants it, counting evaluations and steps."""

    def __init__(self, rhs: RHS, dtype: torch.dtype):
        self.rhs, self.dtype, self.counter = rhs, dtype, _Counter()

    def __call__(self, s: Tensor, y: State) -> State:
        self.counter.count()
        return self.rhs(s.to(self.dtype), y)

    def callback_accept_step(self, s: Tensor, y: State, h: Tensor) -> None:
        self.counter.accepted += 1

    def callback_reject_step(self, s: Tensor, y: State, h: Tensor) -> None:
        self.counter.rejected += 1


class Adaptive:
    """torchdiffeq's adaptive methods, landing on the end time, quadratures out of the error norm.

    Args:
        method: an adaptive method of torchdiffeq: ``"dopri5"``, ``"dopri8"``, ``"bosh3"``, ``"adaptive_heun"``, ``"fehlberg2"``.
        rtol: relative tolerance.
        atol: absolute tolerance.
        gradient: ``"direct"`` (back-propagation through the steps taken) or ``"adjoint"`` (the continuous adjoint with the
            seminorm of 2009.09457).
        max_steps: steps after which the solve is given up.
        quadratures_in_norm: let log-det and the other integrals drive the step size too.

    Raises:
        ConfigError: for an unknown method or gradient, or tolerances that are not positive.
    """

    METHODS = ("dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2")

    def __init__(
        self,
        method: str = "dopri5",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        gradient: str = "direct",
        max_steps: int = 1000,
        quadratures_in_norm: bool = False,
    ):
        if method not in self.METHODS:
            near = get_close_matches(str(method), self.METHODS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"method={method!r} is unknown among adaptive solvers: expected {self.METHODS}{hint}")
        if rtol <= 0 or atol <= 0:
            raise ConfigError(f"rtol={rtol}, atol={atol}: tolerances must be positive")
        if gradient not in ("direct", "adjoint"):
            raise ConfigError(f"gradient={gradient!r}: an adaptive solver takes 'direct' or 'adjoint'")
        self.method, self.rtol, self.atol, self.gradient = method, rtol, atol, gradient
        self.max_steps, self.quadratures_in_norm = max_steps, quadratures_in_norm

    def __repr__(self) -> str:
        return f"Adaptive({self.method!r}, rtol={self.rtol:g}, atol={self.atol:g}, gradient={self.gradient!r})"

    def refined(self) -> Adaptive:
        """The same method, ten times tighter."""
        return Adaptive(
            self.method, self.rtol / 10, self.atol / 10, self.gradient, 4 * self.max_steps, self.quadratures_in_norm
        )

    def solve(self, rhs: RHS, state: State, *, dynamic: int = 1, parameters: Sequence[Tensor] = ()) -> Solution:
        """The state at s = 1; ``parameters`` are all tensors that ``rhs`` closes over (the adjoint needs them).

        Raises:
            SolverError: too many steps, an underflowing step, or a state that is not finite.
        """
        like = state[0]
        function = _Function(rhs, like.dtype)
        used = len(state) if self.quadratures_in_norm else dynamic

        def norm(y: State) -> Tensor:
            return torch.stack([e.abs().square().mean().sqrt() for e in y[:used]]).max()

        def options(end: float) -> dict[str, Any]:
            # step_t makes the last step land on the end, where torchdiffeq would step past it and interpolate
            return {"step_t": like.new_tensor([end], dtype=torch.float64), "max_num_steps": self.max_steps}

        ends = torch.tensor([0.0, 1.0], dtype=like.dtype, device=like.device)
        common: dict[str, Any] = {"rtol": self.rtol, "atol": self.atol, "method": self.method}
        try:
            if self.gradient == "adjoint" and torch.is_grad_enabled():
                path = torchdiffeq.odeint_adjoint(
                    function,
                    state,
                    ends,
                    options={**options(1.0), "norm": norm},
                    adjoint_options={**options(0.0), "norm": "seminorm"},
                    adjoint_params=tuple(p for p in parameters if p.requires_grad),
                    **common,
                )
            else:
                path = torchdiffeq.odeint(function, state, ends, options={**options(1.0), "norm": norm}, **common)
        except AssertionError as error:
            raise SolverError(self._diagnosis(str(error), function.counter)) from None
        y = tuple(e[-1] for e in path)
        if not _finite(y):
            raise SolverError(self._diagnosis("the final state is not finite", function.counter))
        function.counter.backward = True
        return Solution(y, Stats([function.counter]))

    def _diagnosis(self, reason: str, counter: _Counter) -> str:
        return (
            f"{self!r} gave up after {counter.accepted} accepted and {counter.rejected} rejected steps, {counter.nfe} "
            f"evaluations ({reason[:200]}): looser tolerances, a larger max_steps (now {self.max_steps}), or a kinetic "
            "penalty may help"
        )


def _finite(y: State) -> bool:
    return all(bool(torch.isfinite(e).all()) for e in y)
