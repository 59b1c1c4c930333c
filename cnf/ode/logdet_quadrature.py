r"""Nested Gauss-Patterson quadrature of the log-determinant and other integrals along a solved path.

The log-det is :math:`\int_0^1 \mathrm{div} f \, ds` along the path of x, and x does not depend on it. An adaptive solve
of both computes a derivative at every stage of every step, including rejected ones. Here x is solved first, without
derivatives, and its path is evaluated at the nodes of Gauss-Legendre rules in Patterson's extension. Every rule
contains the nodes of the previous one, so that no evaluation is repeated; the number of nodes is doubled until another
doubling would change the integrals by less than a tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from cnf._utils.async_checks import vectorized
from cnf.ode.refinement import Rows, panels_of, refine
from cnf.solvers import Adaptive, Solution, Solver, Stats
from cnf.solvers.base import RHS, State, require_finite

__all__ = ["RULES", "interpolation", "patterson", "solve", "solve_at_nodes"]

RULES = (1, 3, 7, 15, 31, 63)  # numbers of nodes
FINEST = RULES[-1]
GUARDED = 15  # minimum number of nodes; with the norm "batch" at most half the number of solver steps
KEPT = 31  # nodes at which the path is stored first; all 63 take twice the memory and are seldom needed
# Each doubling changes the integrals by less than the previous one, at least in proportion. To predict the next change,
# the last counts as at least this share of the previous: for the mean over rows, and for the worst row, the only rough
# one perhaps, where two rules may agree by chance
FASTEST = (0.03, 0.1)
WORST = 10.0  # factor of the tolerance for a single row
MANY = 100  # number of dimensions from which the tolerance per row grows with it
ROUNDING = 8.0  # rounding error of an integral in machine epsilons
# ratio to the deviation at the previous rule: above FAST, it is not assumed to fall (0.1 by row; 0.25 for a mean, with
# which smooth presets take half the nodes); above JUMP, the slope jumps
FAST, JUMP = (0.1, 0.25), 0.3
NODES_A_STEP = 2  # maximum evaluations of a refinement for each of a solver's max_steps

# positive nodes on [-1, 1] added by each rule: zeros of the polynomial that is orthogonal, with the previous nodes'
# polynomial as weight, to all of lower degree (T. N. L. Patterson, Math. Comp. 22, 1968)
_ADDED = (
    (0.77459666924148337704,),
    (0.434243749346802558, 0.96049126870802028342),
    (0.22338668642896688163, 0.62110294673722640294, 0.88845923287225699889, 0.99383196321275502221),
    (
        0.11248894313318662575, 0.33113539325797683309, 0.53131974364437562397, 0.70249620649152707861,
        0.8367259381688687355, 0.92965485742974005667, 0.98153114955374010687, 0.99909812496766759766,
    ),
    (
        0.056344313046592789972, 0.16823525155220746498, 0.27774982202182431507, 0.38335932419873034692,
        0.48361802694584102756, 0.57719571005204581484, 0.66290966002478059546, 0.73975604435269475868,
        0.80694053195021761186, 0.86390793819369047715, 0.9103711569570042925, 0.94634285837340290515,
        0.97218287474858179658, 0.98868475754742947994, 0.99720625937222195908, 0.99987288812035761194,
    ),
)  # fmt: skip


@cache
def patterson(n: int) -> tuple[Tensor, Tensor]:
    """Return increasing nodes and weights (n,) on [0, 1] in float64, for the rule with n of :data:`RULES` nodes.

    The rule is exact for polynomials of degree (3 n + 1)/2 (degree 1 for n = 1). Its nodes are the second, fourth, ...
    of the next rule.

    Example:
        >>> nodes, weights = patterson(7)
        >>> bool(abs((weights * nodes**11).sum() - 1 / 12) < 1e-15)
        True
    """
    added = torch.tensor([x for part in _ADDED[: RULES.index(n)] for x in part], dtype=torch.float64)
    x = torch.cat([-added, added.new_zeros(1), added]).sort().values
    legendre = [torch.ones_like(x), x]
    for k in range(1, n - 1):
        legendre.append(((2 * k + 1) * x * legendre[-1] - k * legendre[-2]) / (k + 1))
    # all Legendre polynomials but the first integrate to zero
    first = torch.zeros_like(x)
    first[0] = 1
    return (1 + x) / 2, torch.linalg.solve(torch.stack(legendre[:n]), first)


def solve(
    solver: Solver,
    rhs: RHS,
    state: State,
    *,
    dynamic: int,
    parameters: Sequence[Tensor] = (),
    products: bool,
    rows: Callable[[], Rows | None] | None = None,
) -> Solution:
    """Return the state at s = 1, with the integrals by quadrature if the solver has a ``quadrature_tolerance``.

    If a gradient is recorded, it is that of the solver's own solve of point and integrals; the integrals' values are
    those of the quadrature, so that a log-det is the same number with and without gradient.

    Args:
        solver: any solver; :class:`~cnf.solvers.Adaptive` with a ``quadrature_tolerance`` uses the quadrature.
        rhs: slopes of the state; called with the dynamic entries alone, it returns their slopes without derivatives.
        state: dynamic entries first, starting with the point; then integrals (N,), starting with the log-det.
        dynamic: number of dynamic entries.
        parameters: all tensors that ``rhs`` closes over.
        products: whether ``rhs`` computes derivatives; without them the quadrature saves nothing.
        rows: returns the right-hand side of selected rows, or None if rows must be evaluated together.

    Raises:
        SolverError: from a failed solve.
    """
    nodes = None
    if isinstance(solver, Adaptive) and (tolerance := solver.quadrature_tolerance) and products:
        if vectorized() or not len(state[0]):  # nodes are chosen by each row's values, which torch.func hides
            solver = solver.integrating()
        else:
            with torch.no_grad():
                nodes = solve_at_nodes(solver, rhs, state, dynamic=dynamic, tolerance=tolerance, rows=rows)
            if not torch.is_grad_enabled():
                return nodes
    solution = solver.solve(rhs, state, dynamic=dynamic, parameters=parameters)
    if products:
        solution.stats.all_products()
    if nodes is None:
        return solution
    values = (v + (n - v).detach() for v, n in zip(solution.state[dynamic:], nodes.state[dynamic:], strict=True))
    return Solution((*solution.state[:dynamic], *values), nodes.stats + solution.stats)


def solve_at_nodes(
    solver: Adaptive, rhs: RHS, state: State, *, dynamic: int, tolerance: float, rows: Callable[[], Rows | None] | None = None
) -> Solution:
    """Solve the dynamic entries alone, then compute the integrals with as many nodes as the tolerance requires.

    The number of nodes is doubled until that changes the log-det by less than the tolerance, or is predicted to do so
    next; likewise for other integrals, relative to their size if large. The remaining error is that of the finer rule,
    far smaller for smooth paths. With the norm ``"batch"`` the tolerance is in nats per dimension for the mean over
    rows (ten times that for any single row); with ``"row"`` it is in nats for every row.

    Two rules may agree by chance where the slope of the log-det jumps (a field with ReLU). The values at the new nodes
    are therefore compared with the polynomial through the old ones: for a row whose deviation does not fall fast, the
    deviation itself serves as the error estimate. Rows not converged at 31 nodes, or at 63 if smooth, are refined
    individually (:func:`cnf.ode.refinement.refine`); with the norm ``"row"`` all rows are if one has jumps.

    Raises:
        SolverError: from a failed solve, or integrals that do not converge.
    """
    like, slopes = state[0], _Slopes(solver, rhs, state, dynamic)
    dim, kind, by_row = like.shape[1:].numel(), torch.finfo(like.dtype), solver.norm == "row"
    measures = ((_worst, FASTEST[1]),) if by_row else ((_mean, FASTEST[0]), (lambda v: _worst(v) / WORST, FASTEST[1]))
    one = max(1.0, dim / MANY) if by_row else float(dim)
    fewest = GUARDED if by_row else min(GUARDED, slopes.steps / 2)
    before, earlier, rough = slopes.integrals(RULES[0]), None, None
    for count in RULES[1:]:
        values = slopes.integrals(count)
        size = values.abs().mean(1, keepdim=True)
        unit = size.clamp(min=one)
        unit[0] = one
        rounding = (ROUNDING * kind.eps * size / unit).clamp(min=kind.tiny)
        moved, deviation = (values - before).abs() / unit, slopes.deviation(count) / unit
        # where the deviation falls slowly, or there is no previous one: about the error caused by a jump of its size
        ratio = deviation / (rounding if rough is None else rough.maximum(rounding))
        error = torch.where(ratio > FAST[not by_row], deviation / math.sqrt(count), 0.0)

        def left(moved: Tensor, earlier: Tensor | None, error: Tensor, least: float, rounding: Tensor = rounding) -> Tensor:
            """Return the rule's error: its change or the predicted next one, and at least that of jumps."""
            if earlier is not None:
                coming = moved.maximum(least * earlier).square() / earlier.maximum(rounding)
                moved = moved.minimum(coming)
            return moved.maximum(error)

        settled = [
            left(of(moved), None if earlier is None else of(earlier), of(error), least) <= tolerance + rounding
            for of, least in measures
        ]
        if count >= fewest and bool(torch.cat(settled).all()):
            break
        unsettled = (left(moved, earlier, error, FASTEST[1]) > tolerance + rounding).any(0)
        jumps = count >= KEPT and bool((ratio[:, unsettled] > JUMP).any())
        if jumps and by_row:  # two jumps between the same two nodes are not detected: refine all rows
            unsettled = torch.ones_like(unsettled)
        if jumps or count == FINEST:
            values = slopes.refined(values, unsettled, tolerance * unit / (2 if by_row else 1), rows)
            break
        if not bool(values.isfinite().all()):
            break
        before, earlier, rough = values, moved, deviation
    require_finite(values, "an integral along the path, the log-det foremost,")
    integrals = (entry + value for entry, value in zip(state[dynamic:], values, strict=True))
    return Solution((*slopes.end, *integrals), slopes.cost())


def _mean(values: Tensor) -> Tensor:
    return values.mean(1, keepdim=True)


def _worst(values: Tensor) -> Tensor:
    return values.amax(1, keepdim=True)


class _Slopes:
    """Integrands at the nodes of the finest rule, each evaluated once, on demand."""

    def __init__(self, solver: Adaptive, rhs: RHS, state: State, dynamic: int):
        self.solver, self.rhs, self.start, self.rest = solver, rhs, state[:dynamic], state[dynamic:]
        nodes = patterson(FINEST)[0].to(state[0])
        self.times = torch.cat([nodes.new_zeros(1), nodes, nodes.new_ones(1)])
        self.taken: dict[int, Tensor] = {}
        self.ready: dict[int, Callable[[State], State]] = {}  # right-hand sides prepared for nodes
        self.solves = Stats()
        self.further = 0  # evaluations of the refinement
        self._keep(KEPT)

    def _keep(self, count: int) -> None:
        """Solve the dynamic entries and store them at the ends and at the nodes of the rule with ``count`` nodes."""
        self.every = _every(count)
        self.path, stats = self.solver.path(self.rhs, self.start, self.times[:: self.every], dynamic=len(self.start))
        self.steps = stats.accepted
        self.solves = self.solves + stats

    @property
    def end(self) -> State:
        """The dynamic entries at s = 1."""
        return tuple(entry[-1] for entry in self.path)

    def __call__(self, i: int) -> Tensor:
        """Return the integrands (integrals, N) at node i of the finest rule, counted from 1."""
        if i not in self.taken:
            if i % self.every:
                self._keep(FINEST)
            here = tuple(entry[i // self.every] for entry in self.path)
            state = (*here, *self.rest)
            slopes = self.ready.pop(i)(state) if i in self.ready else self.rhs(self.times[i], state)
            self.taken[i] = torch.stack(slopes[len(here) :])
        return self.taken[i]

    def integrals(self, count: int) -> Tensor:
        """Return the integrals (integrals, N) by the rule with ``count`` nodes."""
        every = _every(count)
        self._prepare(every)
        values = torch.stack([self(i * every) for i in range(1, count + 1)])
        total: Tensor = torch.tensordot(patterson(count)[1].to(values), values, 1)
        return total

    def _prepare(self, every: int) -> None:
        """Prepare the right-hand side for the nodes that the rule of stride ``every`` adds, if it offers that."""
        added, at = slice(every, FINEST + 1, 2 * every), getattr(self.rhs, "at", None)
        if at is not None and (found := at(self.times[None, added])) is not None:
            self.ready = dict(zip(range(FINEST + 1)[added], found[0], strict=True))

    def deviation(self, count: int) -> Tensor:
        """Return the RMS deviation (integrals, N) at the rule's new nodes from the polynomial through the old ones."""
        every = _every(count)
        old, new = ([self(i * every) for i in range(start, count + 1, 2)] for start in (2, 1))
        predicted = torch.einsum("no,oir->nir", interpolation(count).to(new[0]), torch.stack(old))
        return (torch.stack(new) - predicted).square().mean(0).sqrt()

    def refined(self, values: Tensor, unsettled: Tensor, tolerance: Tensor, rows: Callable[[], Rows | None] | None) -> Tensor:
        """Return the integrals (integrals, N) with those of the ``unsettled`` rows refined."""
        panels = panels_of(self.steps)
        times = torch.linspace(0, 1, panels + 1, dtype=self.times.dtype, device=self.times.device)
        path, stats = self.solver.path(self.rhs, self.start, times, dynamic=len(self.start))
        self.solves = self.solves + stats
        integrals, self.further = refine(
            self.rhs, path, self.rest, unsettled.nonzero()[:, 0], tolerance, rows and rows(), most=NODES_A_STEP * self.solver.max_steps
        )
        return values.masked_scatter(unsettled, integrals)

    def cost(self) -> Stats:
        """Return the cost of solves and nodes, as that of one solve."""
        return self.solves.joined(products=len(self.taken) + self.further)


def _every(count: int) -> int:
    """Return the stride of a rule's nodes among those of the finest rule."""
    return (FINEST + 1) // (count + 1)


@cache
def interpolation(count: int) -> Tensor:
    """Return the float64 matrix (new, old) that interpolates from the previous rule's nodes to the new ones."""
    nodes = patterson(count)[0]
    old, new = nodes[1::2], nodes[::2]
    apart = (old[:, None] - old[None]).fill_diagonal_(1).prod(1)  # inverse barycentric weights
    terms = 1 / (apart * (new[:, None] - old))
    return terms / terms.sum(1, keepdim=True)
