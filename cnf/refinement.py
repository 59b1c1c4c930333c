r"""Integrals along a path whose slope jumps: each row's own panels are halved until its error is small.

The divergence of a field with ReLU jumps wherever the path crosses a kink, at a time of each row's own, and no rule of high order
sees where. Here [0, 1] is cut into equal panels, and Simpson's rule is held against the trapezium: their difference is
:math:`\frac{2h}{3} |2 g_m - g_a - g_b|`, at least the error that a jump anywhere in the panel leaves, and never zero by chance
for a single jump. Panels where it is large are halved for the rows where it is, down to the width that their tolerance takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cnf.errors import SolverError
from cnf.solvers.base import RHS, State

__all__ = ["Rows", "panels_of", "refine"]

Rows = Callable[[Tensor], RHS]
"""The right-hand side of the rows of an index (R,)."""

FEWEST, MOST = 128, 1024  # panels: two jumps that undo each other within one are not seen
A_STEP = 2  # panels for each step of the solver: the path is a cubic between their ends
SPREAD = 2.5  # a panel is refined until its difference lies between half its share and all; a jump then errs by 1/2.7 of that
NARROWEST = 2.0**-18  # of a panel's width, whose jumps are rounding


def panels_of(steps: int) -> int:
    """How many panels a path of so many solver steps is cut into: a power of two."""
    return 1 << math.ceil(math.log2(min(max(FEWEST, A_STEP * steps), MOST)))


def refine(
    rhs: RHS, path: State, rest: State, index: Tensor, tolerance: Tensor, rows: Rows | None, *, most: int
) -> tuple[Tensor, int]:
    """The integrals (integrals, R) of the rows ``index`` (R,), and how many evaluations they took.

    Args:
        rhs: slopes of the whole state, all rows together.
        path: the dynamic entries at the panels' ends (panels + 1, ...), the point foremost.
        rest: the integrals' entries of the state, whose values do not matter.
        index: rows to integrate.
        tolerance: standard deviation (integrals, 1) of a row's error. The k rough panels of a row err independently, so each
            is refined to a share :math:`1/\\sqrt{k}`.
        rows: the right-hand side of some rows alone; None evaluates all rows everywhere.
        most: evaluations after which the refinement is given up.

    Raises:
        SolverError: after ``most`` evaluations.
    """
    field = _Field(rhs, path, rest, index, rows, most)
    panels = len(path[0]) - 1
    width = 2 / panels  # of a pair
    for k in range(panels + 1):
        field.end(k)
    values = torch.stack(field.values)  # (panels + 1, integrals, R)
    a, m, b = values[:-1:2], values[1::2], values[2::2]
    total = (width / 6 * (a + 4 * m + b)).sum(0)
    wide = _apart(a, m, b, width) > tolerance * width
    share = SPREAD * tolerance / wide.sum(0).clamp(min=1).sqrt()
    for j in wide.flatten(1).any(1).nonzero()[:, 0].tolist():
        some = field.choose(wide[j])
        a, m, b = (values[2 * j + i][:, some] for i in range(3))
        total = total.index_add(1, some, -width / 6 * (a + 4 * m + b))
        stack = [(j * width, width, some, a, m, b)]
        while stack:
            start, size, some, a, m, b = stack.pop()
            p, q = (field(start + size * part, some) for part in (0.25, 0.75))
            half = size / 2
            for begin, (e, c, f) in ((start, (a, p, m)), (start + half, (m, q, b))):
                rough = _apart(e, c, f, half) > share[:, some]
                again = field.choose(rough) if half > NARROWEST else some[:0]
                done = torch.ones_like(some, dtype=torch.bool)
                done[again] = False
                total = total.index_add(1, some[done], (half / 6 * (e + 4 * c + f))[:, done])
                if len(again):
                    stack.append((begin, half, some[again], e[:, again], c[:, again], f[:, again]))
    return total, field.count


def _apart(a: Tensor, m: Tensor, b: Tensor, width: float) -> Tensor:
    """Simpson's rule less the trapezium over a panel, from the values at its ends and middle."""
    return width / 3 * (2 * m - a - b).abs()


class _Field:
    """The integrands of some rows anywhere on their paths."""

    def __init__(self, rhs: RHS, path: State, rest: State, index: Tensor, rows: Rows | None, most: int):
        self.rhs, self.path, self.rest, self.index, self.rows, self.most = rhs, path, rest, index, rows, most
        self.panels, self.count = len(path[0]) - 1, 0
        self.slopes: list[State] = []
        self.values: list[Tensor] = []

    def choose(self, rough: Tensor) -> Tensor:
        """Which rows, of those that ``rough`` (integrals, R) speaks of, go on: all of them where they cannot be parted."""
        some = rough.any(0)
        return (some if self.rows is not None else some.any().expand_as(some)).nonzero()[:, 0]

    def end(self, k: int) -> None:
        """Evaluate the end k of the panels."""
        point, *others = (entry[k] for entry in self.path)
        every = torch.arange(len(self.index), device=self.index.device)
        slopes = self._evaluate(k / self.panels, point[self.index], others, every)
        self.slopes.append(slopes[: len(self.path)])
        self.values.append(torch.stack(slopes[len(self.path) :]))

    def __call__(self, s: float, some: Tensor) -> Tensor:
        """The integrands (integrals, len(some)) at s, for rows among those of the index: at Hermite's cubic between two ends."""
        k = min(int(s * self.panels), self.panels - 1)
        u, h = s * self.panels - k, 1 / self.panels
        weights = ((1 + 2 * u) * (1 - u) ** 2, u * u * (3 - 2 * u), h * u * (1 - u) ** 2, h * u * u * (u - 1))
        entries = []
        for i, entry in enumerate(self.path):
            parts = [entry[k], entry[k + 1], self.slopes[k][i], self.slopes[k + 1][i]]
            if i == 0:
                where = self.index[some]
                parts = [parts[0][where], parts[1][where], parts[2][some], parts[3][some]]
            entries.append(sum((w * part for w, part in zip(weights[1:], parts[1:], strict=True)), weights[0] * parts[0]))
        return torch.stack(self._evaluate(s, entries[0], entries[1:], some)[len(self.path) :])

    def _evaluate(self, s: float, point: Tensor, others: Sequence[Tensor], some: Tensor) -> State:
        """All slopes at s and at a point (len(some), ...), of the rows ``some`` among the index's."""
        self.count += 1
        if self.count > self.most:
            raise SolverError(
                f"the integrals along the path, the log-det foremost, did not settle within {self.most:,} evaluations: a "
                "larger quadrature_tolerance, a larger max_steps of the solver, or a smoother field may help",
                exhausted=True,
            )
        where, time, count = self.index[some], point.new_tensor(s), len(self.path)
        if self.rows is not None:
            rhs = self.rhs if len(where) == len(self.rest[0]) else self.rows(where)
            return tuple(rhs(time, (point, *others, *(entry[where] for entry in self.rest))))
        found = self.rhs(time, (self.path[0][0].index_copy(0, where, point), *others, *self.rest))
        return tuple(e if 0 < i < count else e[where] for i, e in enumerate(found))
