"""Runge-Kutta methods on a fixed grid, with direct and checkpointed gradients."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from cnf._utils.async_checks import deferred, tracing
from cnf._utils.compilation import compiled
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


def moved(y: State, h: float | Tensor, coefficients: Sequence[float], slopes: Sequence[State], count: int | None = None) -> State:
    """Return y + h Σ c_i k_i for the first ``count`` entries, all if None; the others are returned as they are."""
    count = len(y) if count is None else count
    moved = []
    for j, entry in enumerate(y[:count]):
        if isinstance(h, Tensor):
            total = weighted(j, coefficients, slopes)
            moved.append(entry if total is None else entry + h * total)
            continue
        for c, k in zip(coefficients, slopes, strict=False):
            entry = torch.add(entry, k[j], alpha=c * h) if c else entry
        moved.append(entry)
    return (*moved, *y[count:])


def stages(
    tableau: Tableau, rhs: RHS, s: Tensor, h: Tensor, counter: Counter, number: int | None = None
) -> list[Callable[[State], State]]:
    """Return functions of the state that evaluate the stages of one step of size h at s, and count.

    With ``number``, a right-hand side that samples one of a grid's stages gets step and stage as third argument."""
    sampling = number is not None and getattr(rhs, "sampled_stage", None) is not None

    def evaluate(i: int, c: float, y: State) -> State:
        counter.count()
        stage: tuple[Any, ...] = ((number, i),) if sampling else ()
        return rhs(s + c * h, y, *stage)

    return [partial(evaluate, i, c) for i, c in enumerate(tableau.c)]


def slopes_of(tableau: Tableau, evaluate: Sequence[Callable[[State], State]], h: float | Tensor, y: State, dynamic: int) -> list[State]:
    """Return the slopes k_i of one step; the state's entries from ``dynamic`` on, which no slope depends on, stay."""
    slopes: list[State] = []
    for stage, a in zip(evaluate, tableau.a, strict=True):
        slopes.append(stage(moved(y, h, a, slopes, dynamic)))
    return slopes


def _advance(
    tableau: Tableau, evaluate: Sequence[Callable[[State], State]], h: float | Tensor, y: State, dynamic: int, error_entry: int | None
) -> State:
    """Return the state after one step; |h| ‖E‖ of the step's error estimate is added to the entry ``error_entry``."""
    slopes = slopes_of(tableau, evaluate, h, y, dynamic)
    after = moved(y, h, tableau.b, slopes)
    if error_entry is None or len(y) <= error_entry:
        return after
    apart = weighted(0, tableau.error, slopes)
    assert apart is not None
    size = h * torch.linalg.vector_norm((h * apart).flatten(1), dim=1)  # |h| ‖E‖
    return (*after[:error_entry], after[error_entry] + size, *after[error_entry + 1 :])


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

        recomputing = self.gradient == "checkpoint" and torch.is_grad_enabled() and not tracing(*state)
        unit = False if check else getattr(rhs, "compile", False)
        if unit == "solve":
            counter.count(self.steps * len(self.tableau.c))
            return cast(State, compiled(_solved, state[0].is_cuda)(self, rhs, state, nodes, dynamic))
        recording = torch.is_grad_enabled() and any(v.requires_grad for v in (*state, *parameters))
        steps = _Steps(self, rhs, nodes, counter, dynamic, whole=not recomputing, recording=recording, compiles=bool(unit))
        parts = [partial(steps, i) for i in range(self.steps)]
        if recomputing:
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


def _solved(grid: FixedGrid, rhs: RHS, state: State, nodes: Tensor, dynamic: int) -> State:
    """Return the state at s = 1 after all steps, the preparation of their stages included."""
    steps = _Steps(grid, rhs, nodes, Counter(), dynamic, whole=True, recording=False, compiles=False)
    for i in range(grid.steps):
        state = steps(i, *state)
    return state


class _Steps:
    """Steps of one solve on a grid; ``whole`` prepares the right-hand side's stages of all steps at once.

    A right-hand side prepares them by a method ``at`` (see :class:`cnf.ode.dynamics.AugmentedDynamics`). Steps that a
    checkpoint recomputes prepare their own: a part shared by all would be differentiated once for each.
    """

    def __init__(
        self, solver: FixedGrid, rhs: RHS, nodes: Tensor, counter: Counter, dynamic: int, whole: bool, recording: bool, compiles: bool
    ):
        self.tableau, self.rhs, self.nodes, self.counter, self.dynamic = solver.tableau, rhs, nodes, counter, dynamic
        self.error_entry = getattr(rhs, "step_error", None) if self.tableau.error else None
        self.sizes = nodes.diff()
        # equal steps have a size without a tensor, which saves operations; compiled code would be specific to it
        self.compiles = compiles
        self.size = None if solver.spacing is not None else 1 / solver.steps
        self.at, self.recording = getattr(rhs, "at", None), recording
        self.prepared = self._prepare(0, solver.steps) if whole else None

    def _prepare(self, first: int, stop: int) -> Any:
        if self.at is None:
            return None
        s, h = self.nodes[first:stop], self.sizes[first:stop]
        return self.at(torch.stack([s + c * h for c in self.tableau.c], 1), first)

    def __call__(self, i: int, *y: Tensor) -> State:
        """Return the state after step i."""
        found = self._prepare(i, i + 1) if self.prepared is None else self.prepared[i : i + 1]
        tensor, size = self.sizes[i], self.size
        if found is None:
            self.at = None
            evaluate = stages(self.tableau, self.rhs, self.nodes[i], tensor, self.counter, i)
            return _advance(self.tableau, evaluate, tensor if size is None else size, y, self.dynamic, self.error_entry)
        self.counter.count(len(found[0]))
        chosen = getattr(self.rhs, "sampled_stage", None)
        if not self.compiles or (chosen is not None and chosen.step == i):  # a graph for each stage that may be sampled
            return _advance(self.tableau, found[0], tensor if size is None else size, y, self.dynamic, self.error_entry)
        # one graph: the first step's state may lack a gradient and hold the same zeros twice
        recording = self.recording and torch.is_grad_enabled()
        y = tuple(e if e.requires_grad and recording else e.detach().requires_grad_(recording) for e in y)
        return cast(State, compiled(_advance)(self.tableau, found[0], tensor, y, self.dynamic, self.error_entry))
