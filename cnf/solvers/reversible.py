"""Algebraically reversible Runge-Kutta methods: the backward pass reconstructs the solve instead of storing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from cnf._utils.async_checks import deferred, tracing
from cnf._utils.errors import ConfigError, SolverError
from cnf.solvers.base import RHS, Counter, State
from cnf.solvers.checkpointing import Recompute, final, present_autocast
from cnf.solvers.fixed import FixedGrid, slopes_of, stages, weighted
from cnf.solvers.spacing import Spacing
from cnf.solvers.tableaus import Tableau

__all__ = ["Reversible"]

WIDE = torch.float64  # dtype of sums over steps, so that what is added can be subtracted again
WHOLE_COUPLING = 1e-3  # default of λ^steps: the reverse solve amplifies rounding (1e-16 in float64) by its inverse, 1e3
LEAST_COUPLING = 1e-6  # smallest λ^steps accepted


class Reversible(FixedGrid):
    r"""Reversible Runge-Kutta method (2410.11648): exact gradient of the discretisation in constant memory.

    Two copies of the point advance together, each by the method's increment :math:`\Psi` at the other:

    .. math::
        y_{n+1} = \lambda y_n + (1 - \lambda) z_n + \Psi_h(s_n, z_n), \qquad z_{n+1} = z_n - \Psi_{-h}(s_{n+1}, y_{n+1}),

    from :math:`y_0 = z_0`. The step is explicitly invertible, and the backward pass inverts it step by step. The order
    is that of the method. The right-hand side does not depend on quadratures, which need no second copy: they are
    summed along z, by the increments that advance y.

    The difference :math:`d = y - z`, of the size of the method's error, is stored instead of y:
    :math:`d_{n+1} = \lambda d_n + \Psi_h + \Psi_{-h}`. Sums are float64 for any state; the right-hand side gets the
    state's dtype. The points are then reconstructed to the last bit of float32, with rare exceptions. A failed
    reconstruction (a flow that contracts by many orders of magnitude on too coarse a grid) gives a nonzero :math:`d_0`
    and raises an error.

    A step evaluates the point's slope twice as often as a plain grid, and the reverse solve as often again; quadratures
    are evaluated as often as on a plain grid if the right-hand side can omit them (see
    :class:`~cnf.solvers.base.Solver`). The second half of the last step is not needed. A training step of a small
    convolutional flow took twice the time of the direct gradient (a checkpoint: 1.3 to 1.7 times, with a quarter of the
    states stored temporarily).

    Args:
        method: as in :class:`FixedGrid`.
        steps: number of solver steps over [0, 1].
        coupling: λ in (0, 1]; None for :math:`10^{-3/\text{steps}}`. Each step damps errors of d by λ, and the reverse
            step amplifies them by 1/λ. Small values are stable: where the flow contracts by e⁻⁵, 16 steps of rk4 are a
            hundred times more accurate with the default than with 0.99.
        gradient: ``"reversible"``, or ``"direct"`` for the same values with every stage stored. ``"reversible"`` can be
            differentiated once, and ``parameters`` of :meth:`solve` must list every tensor that ``rhs`` closes over and
            that requires a gradient.
        spacing: as in :class:`FixedGrid`.

    Raises:
        ConfigError: for an unknown method or gradient, fewer than one step, or a coupling outside (0, 1] or too small
            for the number of steps.
        SolverError: from the backward pass, if the solve cannot be reversed.

    Example:
        >>> w = torch.tensor(-1.0, requires_grad=True)
        >>> y = Reversible("rk4", steps=8).solve(lambda s, y: (w * y[0],), (torch.ones(1),), parameters=[w]).state[0]
        >>> (slope,) = torch.autograd.grad(y.sum(), w)
        >>> bool(abs(y - torch.exp(w)) < 1e-5), bool(abs(slope - torch.exp(w)) < 1e-4)
        (True, True)
    """

    GRADIENTS = ("reversible", "direct")

    def __init__(
        self,
        method: str = "rk4",
        steps: int = 4,
        coupling: float | None = None,
        gradient: str = "reversible",
        *,
        spacing: Spacing | None = None,
    ):
        super().__init__(method, steps, gradient, spacing=spacing)
        self.requested_coupling = coupling
        self.coupling = WHOLE_COUPLING ** (1 / steps) if coupling is None else coupling
        if not 0 < self.coupling <= 1:  # nan is neither
            raise ConfigError(f"coupling must be in (0, 1] or None (chosen by the steps), got {coupling}")
        if self.coupling**steps < LEAST_COUPLING:
            raise ConfigError(
                f"coupling={coupling} with steps={steps}: the reverse solve would amplify rounding by {self.coupling**-steps:.3g}; "
                f"expected at least {LEAST_COUPLING ** (1 / steps):.4g} for so many steps, or None"
            )

    def __repr__(self) -> str:
        return (
            f"Reversible({self.method!r}, steps={self.steps}, coupling={self.coupling:.4g}, gradient={self.gradient!r}"
            f"{self._spacing_repr()})"
        )

    def with_steps(self, steps: int) -> Reversible:
        """Return the same method with ``steps`` steps and the same total coupling λ^steps."""
        coupling = None if self.requested_coupling is None else self.requested_coupling ** (self.steps / steps)
        return Reversible(self.method, steps, coupling, self.gradient, spacing=self.spacing)

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
            return cast(State, _Walked.apply(walk, *state, *walk.whole.parameters))
        require = partial(self._require_finite, nodes=nodes, counter=counter) if check else None
        return walk.forth(state, require)[0]


class _Walk:
    """Forward and reverse recursion of one solve; z and d are lists of the dynamic entries."""

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
        self.idle = tuple(e.detach() for e in state[dynamic:])  # the right-hand side does not read them
        # one for each half step: the second may close over fewer tensors
        self.whole, self.motion = (Recompute(parameters, solver.gradient) for _ in range(2))
        self.deferred = deferred()

    def ahead(self, i: int, *z: Tensor) -> State:
        """Return Ψ_h of all entries from node i."""
        h = self.nodes[i + 1] - self.nodes[i]
        return self._increment(lambda s, y: self.rhs(s, (*y, *self.idle)), self.nodes[i], h, z, len(self.types))

    def behind(self, i: int, *y: Tensor) -> State:
        """Return Ψ_{-h} of the dynamic entries from node i + 1."""
        h = self.nodes[i] - self.nodes[i + 1]
        return self._increment(self.rhs, self.nodes[i + 1], h, y, self.dynamic)

    def _increment(self, rhs: RHS, s: Tensor, h: Tensor, point: State, count: int) -> State:
        tableau: Tableau = self.solver.tableau
        y = tuple(e.to(t) for e, t in zip(point, self.types, strict=False))
        slopes = slopes_of(tableau, stages(tableau, rhs, s, h, self.counter), h, y, self.dynamic)
        return tuple((h * cast(Tensor, weighted(j, tableau.b, slopes))).to(WIDE) for j in range(count))

    def forth(
        self, state: State, require: Callable[[int, State, State], None] | None = None
    ) -> tuple[State, list[Tensor], list[Tensor]]:
        """Return the state at s = 1, and z and d before the last step."""
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
        """Return the gradients of the initial state and of the ``named`` parameters, from those of the final state.

        Raises:
            SolverError: if the initial state is not reconstructed; with deferred checks the gradients are NaN instead.
        """
        k, coupling = self.dynamic, self.solver.coupling
        wanted = [True] * k + list(named)
        # a quadrature is a sum over the steps: all steps share its gradient
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
                a, products = self.motion.vjp(partial(self.behind, i), y, ga, wanted, autocast)
                gy = [torch.zeros_like(p) if g is None else g for g, p in zip(products, z, strict=False)]
                total = [_sum(u, v) for u, v in zip(total, products[k:], strict=True)]
                z = [p + e for p, e in zip(z, a, strict=True)]
            gb = [u + v for u, v in zip(gy, gd, strict=True)]
            b, products = self.whole.vjp(partial(self.ahead, i), z, (*gb, *gq), wanted, autocast)
            gz = [cast(Tensor, _sum(u + v, w)) for u, v, w in zip(gz, gy, products, strict=False)]
            gd = [coupling * g for g in gb]
            total = [_sum(u, v) for u, v in zip(total, products[k:], strict=True)]
            if not last:
                d = [(c - (e + f)) / coupling for c, e, f in zip(d, a, b, strict=False)]
        state = [g if g is None else g.to(t) for g, t in zip((*gz, *gq), self.types, strict=True)]
        return self._checked([*state, *total], self.missed(z, d))

    def _checked(self, gradients: list[Tensor | None], missed: Tensor) -> list[Tensor | None]:
        if self.deferred:
            factor = torch.where(missed <= 1, 1.0, torch.nan)
            return [g if g is None else g * factor.to(g.dtype) for g in gradients]
        if not missed <= 1:  # nan fails too
            raise SolverError(
                f"{self.solver!r} could not be reversed for its gradient: the error of the reconstructed initial state is "
                f"{float(missed):.3g} times the tolerance: more steps, a kinetic penalty, or gradient='checkpoint' of a "
                "FixedGrid may help"
            )
        return gradients

    def missed(self, z: Sequence[Tensor], d: Sequence[Tensor]) -> Tensor:
        """Return the error of the reconstructed initial state, where y = z, relative to the tolerance."""
        shares = []
        for entry, difference, kind in zip(z, d, self.types, strict=False):
            allowed = torch.finfo(kind).eps ** (1 / 3) * entry.abs().max().clamp(min=1)
            shares.append(difference.abs().max() / allowed)
        return torch.stack(shares).max()


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return a + b; either may be None."""
    return b if a is None else a if b is None else a + b


class _Walked(torch.autograd.Function):
    """State at s = 1; stores z and d before the last step for the backward pass."""

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
            grads = walk.back(kept[:k], kept[k : 2 * k], gradients, needed[count:], ctx.autocast)
        return (None, *final(walk.solver.gradient, [g if n else None for g, n in zip(grads, needed, strict=True)]))
