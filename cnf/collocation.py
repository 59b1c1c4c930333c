r"""Integrals along a path at few nodes: the point is solved alone, and derivatives are taken at the nodes only.

The log-det is :math:`\int_0^1 \mathrm{div} f \, ds` along the path of x, which does not depend on it. An adaptive solve that
carries it along takes a derivative in every stage of every step, rejected ones too. Here x is solved first, without any;
its path is then read at the nodes of Gauss-Legendre rules as Patterson extends them, each of which holds the nodes of the
one before, so that nothing is taken twice, and their number is doubled until another doubling would move the integrals by
less than a tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from cnf.deferral import vectorized
from cnf.solvers import Adaptive, Solution, Solver, Stats
from cnf.solvers.base import RHS, State

__all__ = ["RULES", "patterson", "solve", "solve_at_nodes"]

RULES = (1, 3, 7, 15, 31, 63)  # nodes
FINEST = RULES[-1]
GUARDED = 15  # a path of many steps is not trusted to fewer nodes than half its steps, up to here
KEPT = 31  # nodes at which the path is kept at first: all take twice the memory, and are seldom needed
# Each doubling moves the integrals by less than the one before, at least in proportion. Where the next one's move is foretold
# from the last two, the last is taken for no less than this share of the one before: in the mean over rows, and in the worst
# row, which may be alone in being rough and agree with itself by chance
FASTEST = (0.03, 0.1)
WORST = 10.0  # times the tolerance that a single row may move
ROUNDING = 8.0  # machine epsilons of an integral that are no movement

# positive nodes on [-1, 1], rule by rule what it adds: the zeros of the polynomial that is orthogonal, with the nodes so far for
# a weight, to all of lower degree (T. N. L. Patterson, Math. Comp. 22, 1968)
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
    """Nodes, rising, and weights (n,) on [0, 1], float64, of the rule with n of :data:`RULES`.

    It is exact for polynomials of degree (3 n + 1)/2 (n = 1: of degree 1), and its nodes are the second, fourth, ... of the
    next rule's.

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
    # all Legendre polynomials but the first have no integral
    first = torch.zeros_like(x)
    first[0] = 1
    return (1 + x) / 2, torch.linalg.solve(torch.stack(legendre[:n]), first)


def solve(
    solver: Solver, rhs: RHS, state: State, *, dynamic: int, parameters: Sequence[Tensor] = (), products: bool
) -> Solution:
    """The state at s = 1, its integrals taken at nodes where the solver asks for that and no gradient is recorded.

    Args:
        solver: any; :class:`~cnf.solvers.Adaptive` with a ``quadrature_tolerance`` asks for it.
        rhs: slopes of the state; of its dynamic entries alone, without any derivative of the field, where it is given no others.
        state: dynamic entries first, the point foremost; then integrals (N,), the log-det foremost.
        dynamic: how many are dynamic.
        parameters: all tensors that ``rhs`` closes over.
        products: whether ``rhs`` takes derivatives; without them there is nothing to save.

    Raises:
        SolverError: from a solve that failed.
    """
    if isinstance(solver, Adaptive) and solver.quadrature_tolerance and products and not torch.is_grad_enabled() and not vectorized():
        return solve_at_nodes(solver, rhs, state, dynamic=dynamic, tolerance=solver.quadrature_tolerance)
    solution = solver.solve(rhs, state, dynamic=dynamic, parameters=parameters)
    if products:
        solution.stats.all_products()
    return solution


def solve_at_nodes(solver: Adaptive, rhs: RHS, state: State, *, dynamic: int, tolerance: float) -> Solution:
    """The dynamic entries solved alone, then the integrals at as many nodes as they need.

    Their number is doubled until that moves the log-det by less than the tolerance, in nats per dimension of the point and in
    the mean over rows (any single row: ten times that), or would do so the next time; other integrals as well, large ones
    relative to their size. What is left is then the error of the finer rule, which is far smaller where paths are smooth.
    Where the finest rule does not settle them, they are integrated along with the point and in its error norm.

    Raises:
        SolverError: from a solve that failed.
    """
    like, slopes = state[0], _Slopes(solver, rhs, state, dynamic)
    dim, kind = like[0].numel(), torch.finfo(like.dtype)
    fewest = min(GUARDED, slopes.steps / 2)
    before, earlier, least = slopes.integrals(RULES[0]), None, like.new_tensor(FASTEST)[:, None]
    for count in RULES[1:]:
        values = slopes.integrals(count)
        size = values.abs().mean(1)
        unit = size.clamp(min=dim)
        unit[0] = dim
        moves = (values - before).abs() / unit[:, None]
        moved = torch.stack([moves.mean(1), moves.amax(1) / WORST])
        rounding = (ROUNDING * kind.eps * size / unit).clamp(min=kind.tiny)
        coming = moved if earlier is None else moved.maximum(least * earlier).square() / earlier.maximum(rounding)
        if count >= fewest and bool((moved.minimum(coming) <= tolerance + rounding).all()):
            integrals = (entry + value for entry, value in zip(state[dynamic:], values, strict=True))
            return Solution((*slopes.end, *integrals), slopes.cost())
        if not bool(values.isfinite().all()):
            break
        before, earlier = values, moved
    solution = solver.riding().solve(rhs, state, dynamic=dynamic)
    solution.stats.all_products()
    return Solution(solution.state, (slopes.cost() + solution.stats).joined())


class _Slopes:
    """The slopes of the integrals at the nodes of the finest rule, each taken once, when it is asked for."""

    def __init__(self, solver: Adaptive, rhs: RHS, state: State, dynamic: int):
        self.solver, self.rhs, self.start, self.rest = solver, rhs, state[:dynamic], state[dynamic:]
        nodes = patterson(FINEST)[0].to(state[0])
        self.times = torch.cat([nodes.new_zeros(1), nodes, nodes.new_ones(1)])
        self.taken: dict[int, Tensor] = {}
        self.solves = Stats()
        self._keep(KEPT)

    def _keep(self, count: int) -> None:
        """Solve the dynamic entries, and keep them at the ends and at the nodes of the rule of ``count``."""
        self.every = _every(count)
        self.path, stats = self.solver.path(self.rhs, self.start, self.times[:: self.every], dynamic=len(self.start))
        self.steps = stats.accepted
        self.solves = self.solves + stats

    @property
    def end(self) -> State:
        """The dynamic entries at s = 1."""
        return tuple(entry[-1] for entry in self.path)

    def __call__(self, i: int) -> Tensor:
        """The slopes (integrals, N) at node i of the finest rule, the first being 1."""
        if i not in self.taken:
            if i % self.every:
                self._keep(FINEST)
            here = tuple(entry[i // self.every] for entry in self.path)
            self.taken[i] = torch.stack(self.rhs(self.times[i], (*here, *self.rest))[len(here) :])
        return self.taken[i]

    def integrals(self, count: int) -> Tensor:
        """The integrals (integrals, N) by the rule of ``count``."""
        every = _every(count)
        total = torch.zeros_like(self(every))
        for i, weight in enumerate(patterson(count)[1].tolist(), 1):
            total = total + weight * self(i * every)
        return total

    def cost(self) -> Stats:
        """Of the solves and the nodes, as one solve's."""
        return self.solves.joined(products=len(self.taken))


def _every(count: int) -> int:
    """Which of the finest rule's nodes a rule has: every second, every fourth, ..."""
    return (FINEST + 1) // (count + 1)
