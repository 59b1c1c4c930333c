"""Runge-Kutta methods on a fixed grid, with direct and checkpointed gradients."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from cnf._utils.async_checks import deferred, tracing
from cnf._utils.errors import SolverError, require_at_least, unknown_name
from cnf.solvers.base import RHS, Counter, Solution, State, Stats, finite, interval, largest
from cnf.solvers.checkpointing import Recompute
from cnf.solvers.spacing import Spacing, require_spacing
from cnf.solvers.tableaus import TABLEAUS, Tableau

__all__ = ["FixedGrid"]


def weighted(j: int, coefficients: Sequence[float], slopes: Sequence[State]) -> Tensor | None:
    """Return Σ c_i k_i for entry j of a state; None if every c_i is zero."""
    total = None
    for c, k in zip(coefficients, slopes, strict=False):
        if c:
            total = c * k[j] if total is None else torch.add(total, k[j], alpha=c)
    return total


def _axpy(y: State, h: Tensor, coefficients: Sequence[float], slopes: Sequence[State]) -> State:
    """Return y + h Σ c_i k_i, entry by entry."""
    sums = [weighted(j, coefficients, slopes) for j in range(len(y))]
    return tuple(entry if total is None else entry + h * total for entry, total in zip(y, sums, strict=True))


def stages(
    tableau: Tableau, rhs: RHS, s: Tensor, h: Tensor, y: State, counter: Counter, number: int | None = None
) -> list[State]:
    """Return the slopes k_i of one step of size h from y at s.

    With ``number``, a right-hand side that samples one of a grid's stages gets step and stage as third argument."""
    slopes: list[State] = []
    sampling = number is not None and getattr(rhs, "sampled_stage", None) is not None
    for i, (c, a) in enumerate(zip(tableau.c, tableau.a, strict=True)):
        counter.count()
        stage: tuple[Any, ...] = ((number, i),) if sampling else ()
        slopes.append(rhs(s + c * h, _axpy(y, h, a, slopes), *stage))
    return slopes


class FixedGrid:
    r"""Runge-Kutta method on a fixed grid, differentiated as a discretisation.

    A right-hand side may request the steps' error estimates by an attribute ``step_error``: the index of the state
    entry to which :math:`|h| \|E\|` of every step is added (see :class:`cnf.ode.quadratures.StepError`).

    Args:
        method: ``"euler"``, ``"midpoint"``, ``"heun"``, ``"rk4"`` (the 3/8 rule), ``"rk4-classic"`` or ``"dopri5"``.
        steps: number of solver steps over [0, 1].
        gradient: ``"direct"`` stores every stage for the backward pass; ``"checkpoint"`` stores four states and
            recomputes the steps between them (once up to four steps, twice beyond): the same gradient, in memory
            independent of the number of steps. It can be differentiated once, and ``parameters`` of :meth:`solve` must
            list every tensor that ``rhs`` closes over and that requires a gradient.
        spacing: places the nodes in the block's time, in both directions, such as :class:`~cnf.solvers.PowerSpacing`;
            None for equal steps. Gradients treat the nodes as constants.

    Raises:
        ConfigError: for an unknown method or gradient, fewer than one step, or a spacing without a method ``times``.

    Example:
        >>> y = FixedGrid("rk4", steps=8).solve(lambda s, y: (-y[0],), (torch.ones(1),)).state[0]
        >>> bool(abs(y - torch.exp(torch.tensor(-1.0))) < 1e-5)
        True
    """

    GRADIENTS: ClassVar[tuple[str, ...]] = ("direct", "checkpoint")

    def __init__(self, method: str = "rk4", steps: int = 4, gradient: str = "direct", *, spacing: Spacing | None = None):
        if method not in TABLEAUS:
            raise unknown_name("method", method, TABLEAUS, type(self).__name__)
        require_at_least(1, steps=steps)
        if gradient not in self.GRADIENTS:
            raise unknown_name("gradient", gradient, self.GRADIENTS, type(self).__name__)
        self.method, self.steps, self.gradient, self.spacing = method, steps, gradient, require_spacing(spacing)
        self.tableau = TABLEAUS[method]

    def __repr__(self) -> str:
        return f"FixedGrid({self.method!r}, steps={self.steps}, gradient={self.gradient!r}{self._spacing_repr()})"

    def _spacing_repr(self) -> str:
        return "" if self.spacing is None else f", spacing={self.spacing!r}"

    def with_steps(self, steps: int) -> FixedGrid:
        """Return the same method and spacing with ``steps`` steps."""
        return FixedGrid(self.method, steps, self.gradient, spacing=self.spacing)

    def refined(self) -> FixedGrid:
        """Return the same method with twice the steps."""
        return self.with_steps(2 * self.steps)

    def stage(self, u: float) -> tuple[int, int, float]:
        """Sample a step and stage by weight from u, uniform on [0, 1); return step, stage and probability.

        Example:
            >>> FixedGrid("midpoint", steps=2).stage(0.7)
            (1, 1, 0.5)
        """
        sizes = [abs(b) for b in self.tableau.b] * self.steps
        at = min(bisect(list(accumulate(sizes)), u * sum(sizes)), len(sizes) - 1)
        return *divmod(at, len(self.tableau.b)), sizes[at] / sum(sizes)

    def solve(self, rhs: RHS, state: State, *, dynamic: int = 1, parameters: Sequence[Tensor] = ()) -> Solution:
        """Return the state at s = 1.

        Raises:
            SolverError: for a non-finite state; the solve is repeated with a check after every step to locate it.
                Inside :func:`cnf.defer_checks` the state is not checked.
        """
        counter = Counter()
        nodes = self.nodes(rhs, state[0])
        y = self._run(rhs, state, nodes, counter, dynamic, parameters)
        if not deferred(*y) and not finite(y):
            counter.nfe = 0
            with torch.no_grad():
                self._run(rhs, state, nodes, counter, dynamic, parameters, check=True)
        counter.backward, counter.accepted = True, self.steps
        return Solution(y, Stats([counter]))

    @torch.no_grad()
    def nodes(self, rhs: RHS, like: Tensor) -> Tensor:
        """Return the nodes (steps + 1,) of s, from 0 to 1, with dtype and device of ``like``."""
        even = torch.linspace(0, 1, self.steps + 1, dtype=like.dtype, device=like.device)
        if self.spacing is None:
            return even
        start, span = interval(rhs, like)
        inner = (self.spacing.times(start, start + span, self.steps)[1:-1] - start) / span
        return torch.cat([even[:1], inner.to(even).clamp(0, 1), even[-1:]])

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
        """Return the state at s = 1; with ``check`` (without gradient) the state is checked after every step."""

        error_entry = getattr(rhs, "step_error", None) if self.tableau.error else None

        def step(i: int, s: Tensor, h: Tensor, *y: Tensor) -> State:
            slopes = stages(self.tableau, rhs, s, h, y, counter, i)
            after = _axpy(y, h, self.tableau.b, slopes)
            if error_entry is None or len(y) <= error_entry:
                return after
            apart = weighted(0, self.tableau.error, slopes)
            assert apart is not None
            size = h * torch.linalg.vector_norm((h * apart).flatten(1), dim=1)  # |h| ‖E‖
            return *after[:error_entry], after[error_entry] + size, *after[error_entry + 1 :]

        parts = [partial(step, i, nodes[i], nodes[i + 1] - nodes[i]) for i in range(self.steps)]
        if self.gradient == "checkpoint" and torch.is_grad_enabled() and not tracing(*state):
            return Recompute(parameters).checkpoint_sequential(parts, state)
        y = state
        for i, part in enumerate(parts):
            before, y = y, part(*y)
            if check:
                self._require_finite(i, before, y, nodes, counter)
        return y

    def _require_finite(self, i: int, before: State, y: State, nodes: Tensor, counter: Counter) -> None:
        """Check that the state after step i is finite; otherwise raise a SolverError with the step, s and cost."""
        if not finite(y):
            raise SolverError(
                f"the state is not finite after step {i + 1} of {self.steps} ({self.method}) at s={nodes[i + 1]:.4g} "
                f"of the block's time, {counter.nfe} evaluations: more steps, a smaller learning rate, or a "
                "kinetic penalty may help",
                s=float(nodes[i]), step=float(nodes[i + 1] - nodes[i]), largest=largest(before),
            )  # fmt: skip
