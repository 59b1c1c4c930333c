"""Algebraically reversible Runge-Kutta grids: the backward pass walks the solve back instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from cnf.deferral import deferred, tracing
from cnf.errors import ConfigError, SolverError
from cnf.recompute import Recompute, final, present_autocast
from cnf.solvers.base import RHS, Counter, State
from cnf.solvers.fixed import FixedGrid, stages, weighted
from cnf.solvers.tableaus import Tableau

__all__ = ["Reversible"]

WIDE = torch.float64  # of sums over steps: what is added can then be taken off again
WHOLE_COUPLING = 1e-3  # λ^steps by default: the walk back amplifies rounding by its inverse, 1e3 of float64's 1e-16
LEAST_COUPLING = 1e-6  # λ^steps below which a coupling is refused


class Reversible(FixedGrid):
    r"""A Runge-Kutta method on a fixed grid, made reversible (2410.11648): the discretisation's own gradient in memory that is
    the same for any number of steps.

    Two copies of the point advance together, each by the method's increment :math:`\Psi` at the other:

    .. math::
        y_{n+1} = \lambda y_n + (1 - \lambda) z_n + \Psi_h(s_n, z_n), \qquad z_{n+1} = z_n - \Psi_{-h}(s_{n+1}, y_{n+1}),

    from :math:`y_0 = z_0`, and can be had back from :math:`(y_{n+1}, z_{n+1})` without solving an equation. The backward pass
    does so step by step. The order is the method's. Quadratures do not enter the right-hand side and need no second copy: they
    are summed along z, by the increments that carry y.

    What is kept is the difference of the copies, :math:`d = y - z`, which is of the size of the method's error:
    :math:`d_{n+1} = \lambda d_n + \Psi_h + \Psi_{-h}`. Sums are float64 whatever the state is, the right-hand side sees the
    state's own type: the points are then met again to the last bit of float32 but for rare ones. A state that is not met
    again (a flow that contracts by many orders of magnitude on too coarse a grid) shows itself in :math:`d_0`, which is zero,
    and is an error.

    A step costs two evaluations of the point's slope for one of a plain grid's, and the walk back as many again; the quadratures
    are evaluated as often as on a plain grid, where the right-hand side knows to leave them out (see
    :class:`~cnf.solvers.base.Solver`). The last step's second half is never needed. A small convolutional flow's training step
    took twice the time of the direct gradient's (a checkpoint's: 1.3 to 1.7 times, holding a quarter of the states for a while).

    Args:
        method: as in :class:`FixedGrid`.
        steps: number of equal steps over [0, 1].
        coupling: λ in (0, 1]; None for :math:`10^{-3/\text{steps}}`. Errors of d are damped by λ a step and, walking back,
            amplified by 1/λ. Small is stable: where the flow contracts by e⁻⁵, 16 steps of rk4 are a hundred times more
            accurate with the default than with 0.99.
        gradient: ``"reversible"``, or ``"direct"`` for the same numbers with every stage kept. The former can be differentiated
            once, and ``parameters`` of :meth:`solve` must name every tensor that ``rhs`` closes over and that wants a gradient.

    Raises:
        ConfigError: for an unknown method or gradient, fewer than one step, or a coupling that is none or too small for so
            many steps.
        SolverError: from the backward pass, for a solve that cannot be walked back.

    Example:
        >>> w = torch.tensor(-1.0, requires_grad=True)
        >>> y = Reversible("rk4", steps=8).solve(lambda s, y: (w * y[0],), (torch.ones(1),), parameters=[w]).state[0]
        >>> (slope,) = torch.autograd.grad(y.sum(), w)
        >>> bool(abs(y - torch.exp(w)) < 1e-5), bool(abs(slope - torch.exp(w)) < 1e-4)
        (True, True)
    """

    GRADIENTS = ("reversible", "direct")
    KIND = "reversible grid"

    def __init__(
        self, method: str = "rk4", steps: int = 4, coupling: float | None = None, gradient: str = "reversible"
    ):
        super().__init__(method, steps, gradient)
        self.given = coupling
        self.coupling = WHOLE_COUPLING ** (1 / steps) if coupling is None else coupling
        if not 0 < self.coupling <= 1:  # nan is neither
            raise ConfigError(f"coupling={coupling}: expected a number in (0, 1], or None to choose by the steps")
        if self.coupling**steps < LEAST_COUPLING:
            raise ConfigError(
                f"coupling={coupling} with steps={steps}: walking back, rounding would grow by {self.coupling**-steps:.3g}; "
                f"expected at least {LEAST_COUPLING ** (1 / steps):.4g} for so many steps, or None"
            )

    def __repr__(self) -> str:
        return (
            f"Reversible({self.method!r}, steps={self.steps}, coupling={self.coupling:.4g}, gradient={self.gradient!r})"
        )

    def with_steps(self, steps: int) -> Reversible:
        """The same method with so many steps, its copies coupled as closely over the whole."""
        coupling = None if self.given is None else self.given ** (self.steps / steps)
        return Reversible(self.method, steps, coupling, self.gradient)

    def _run(
        self,
        rhs: RHS,
        state: State,
        nodes: Tensor,
        counter: Counter,
        dynamic: int,
        parameters: Sequence[Tensor],
        check: bool = False,
    ) -> State:
        walk = _Walk(self, rhs, state, nodes, counter, dynamic, parameters)
        if self.gradient == "reversible" and torch.is_grad_enabled() and not tracing(*state):
            found: State = _Walked.apply(walk, *state, *walk.whole.parameters)
            return found
        require = partial(self._require_finite, nodes=nodes, counter=counter) if check else None
        return walk.forth(state, require)[0]


class _Walk:
    """The recursion of one solve, forth, and back with its gradients; z and d are lists of the dynamic entries."""

    def __init__(
        self,
        solver: Reversible,
        rhs: RHS,
        state: State,
        nodes: Tensor,
        counter: Counter,
        dynamic: int,
        parameters: Sequence[Tensor],
    ):
        self.solver, self.rhs, self.nodes, self.counter = solver, rhs, nodes, counter
        self.dynamic, self.types = dynamic, [e.dtype for e in state]
        self.idle = tuple(e.detach() for e in state[dynamic:])  # the right-hand side does not look at them
        # one for each half of a step: what the second closes over may be less
        self.whole, self.motion = (Recompute(parameters, solver.gradient) for _ in range(2))
        self.deferred = deferred()

    def ahead(self, i: int, *z: Tensor) -> State:
        """Ψ_h of all entries from node i."""
        h = self.nodes[i + 1] - self.nodes[i]
        return self._increment(lambda s, y: self.rhs(s, (*y, *self.idle)), self.nodes[i], h, z, len(self.types))

    def behind(self, i: int, *y: Tensor) -> State:
        """Ψ_{-h} of the dynamic entries from node i + 1."""
        h = self.nodes[i] - self.nodes[i + 1]
        return self._increment(self.rhs, self.nodes[i + 1], h, y, self.dynamic)

    def _increment(self, rhs: RHS, s: Tensor, h: Tensor, point: State, count: int) -> State:
        tableau: Tableau = self.solver.tableau
        y = tuple(e.to(t) for e, t in zip(point, self.types, strict=False))
        slopes = stages(tableau, rhs, s, h, y, self.counter)
        return tuple((h * cast(Tensor, weighted(j, tableau.b, slopes))).to(WIDE) for j in range(count))

    def forth(
        self, state: State, require: Callable[[int, State, State], None] | None = None
    ) -> tuple[State, list[Tensor], list[Tensor]]:
        """The state at s = 1, and z and d before the last step."""
        k, coupling, steps = self.dynamic, self.solver.coupling, self.solver.steps
        z, sums = [e.to(WIDE) for e in state[:k]], [e.to(WIDE) for e in state[k:]]
        d = [torch.zeros_like(e) for e in z]
        last = state
        for i in range(steps):
            b = self.ahead(i, *z)
            sums = [q + e for q, e in zip(sums, b[k:], strict=True)]
            y = [p + (coupling * c + e) for p, c, e in zip(z, d, b, strict=False)]
            if require is not None or i + 1 == steps:
                before, last = last, tuple(e.to(t) for e, t in zip((*y, *sums), self.types, strict=True))
            if require is not None:
                require(i, before, last)
            if i + 1 < steps:
                a = self.behind(i, *y)
                d = [coupling * c + (e + f) for c, e, f in zip(d, a, b, strict=False)]
                z = [p - e for p, e in zip(z, a, strict=True)]
        return last, z, d

    def back(
        self,
        z: Sequence[Tensor],
        d: Sequence[Tensor],
        given: Sequence[Tensor | None],
        named: Sequence[bool],
        autocast: torch.autocast,
    ) -> list[Tensor | None]:
        """The gradients of the first state, then those of the parameters (of the ``named`` ones), from the last state's.

        Raises:
            SolverError: where the first state is not met again; if checks are deferred the gradients are then not finite.
        """
        k, coupling = self.dynamic, self.solver.coupling
        wanted = [True] * k + list(named)
        # a quadrature is a sum over the steps: its gradient is the same for all of them
        gq = [None if g is None else g.to(WIDE) for g in given[k:]]
        gy = [torch.zeros_like(p) if g is None else g.to(WIDE) for g, p in zip(given, z, strict=False)]
        gz, gd = [torch.zeros_like(p) for p in z], [torch.zeros_like(p) for p in z]
        total: list[Tensor | None] = [None] * len(named)
        for i in reversed(range(self.solver.steps)):
            if last := i + 1 == self.solver.steps:
                a: State = ()
            else:
                y = [p + c for p, c in zip(z, d, strict=True)]
                ga = [u - v for u, v in zip(gd, gz, strict=True)]
                a, found = self.motion.pull(partial(self.behind, i), y, ga, wanted, autocast)
                gy = [torch.zeros_like(p) if g is None else g for g, p in zip(found, z, strict=False)]
                total = [_sum(u, v) for u, v in zip(total, found[k:], strict=True)]
                z = [p + e for p, e in zip(z, a, strict=True)]
            gb = [u + v for u, v in zip(gy, gd, strict=True)]
            b, found = self.whole.pull(partial(self.ahead, i), z, (*gb, *gq), wanted, autocast)
            gz = [cast(Tensor, _sum(u + v, w)) for u, v, w in zip(gz, gy, found, strict=False)]
            gd = [coupling * g for g in gb]
            total = [_sum(u, v) for u, v in zip(total, found[k:], strict=True)]
            if not last:
                d = [(c - (e + f)) / coupling for c, e, f in zip(d, a, b, strict=False)]
        state = [g if g is None else g.to(t) for g, t in zip((*gz, *gq), self.types, strict=True)]
        return self._checked([*state, *total], self.missed(z, d))

    def _checked(self, gradients: list[Tensor | None], missed: Tensor) -> list[Tensor | None]:
        if self.deferred:
            factor = torch.where(missed <= 1, 1.0, torch.nan)
            return [g if g is None else g * factor.to(g.dtype) for g in gradients]
        if not missed <= 1:  # nan is no pass
            raise SolverError(
                f"{self.solver!r} could not be walked back for its gradient: it missed the state that it started from by "
                f"{float(missed):.3g} times what is tolerated: more steps, a kinetic penalty, or gradient='checkpoint' of a "
                "FixedGrid may help"
            )
        return gradients

    def missed(self, z: Sequence[Tensor], d: Sequence[Tensor]) -> Tensor:
        """How far the walk back missed the first state, where both copies are one, in units of what is tolerated."""
        shares = []
        for entry, difference, kind in zip(z, d, self.types, strict=False):
            allowed = torch.finfo(kind).eps ** (1 / 3) * entry.abs().max().clamp(min=1)
            shares.append(difference.abs().max() / allowed)
        return torch.stack(shares).max()


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where either may be missing."""
    return b if a is None else a if b is None else a + b


class _Walked(torch.autograd.Function):
    """The state at s = 1, of which z and d before the last step are kept."""

    @staticmethod
    def forward(ctx: Any, walk: _Walk, *tensors: Tensor) -> State:
        count = len(walk.types)
        ctx.walk, ctx.autocast = walk, present_autocast(tensors[0])
        last, z, d = walk.forth(tensors[:count])
        ctx.save_for_backward(*z, *d, *tensors[count:])
        ctx.set_materialize_grads(False)
        return last

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        walk: _Walk = ctx.walk
        k, count = walk.dynamic, len(walk.types)
        needed = ctx.needs_input_grad[1:]
        kept = ctx.saved_tensors
        with torch.no_grad():
            found = walk.back(kept[:k], kept[k : 2 * k], gradients, needed[count:], ctx.autocast)
        return (None, *final(walk.solver.gradient, [g if n else None for g, n in zip(found, needed, strict=True)]))
