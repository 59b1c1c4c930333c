r"""Adaptive refinement of integrals along a path whose integrand jumps, with separate panels for each row.

The divergence of a field with ReLU jumps where the path crosses a kink, at different times for each row, which no
high-order rule detects. [0, 1] is divided into equal panels, on which Simpson's rule is compared with the trapezium:
their difference :math:`\frac{2h}{3} |2 g_m - g_a - g_b|` is at least the error caused by a jump anywhere in the panel,
and is never zero by chance for a single jump. Panels with a large difference are halved, for the rows concerned, until
the rows' tolerances are met.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cnf._utils.errors import SolverError
from cnf.solvers.base import RHS, State

__all__ = ["Rows", "panels_of", "refine"]

Rows = Callable[[Tensor], RHS]
"""Returns the right-hand side of the rows of an index (R,)."""

FEWEST, MOST = 128, 1024  # panels: two opposite jumps within one panel are not detected
A_STEP = 2  # panels per solver step: the path is a cubic between their ends
SPREAD = 2.5  # refinement stops with a difference of half to all of a panel's share; a jump's error is 1/2.7 of it
NARROWEST = 2.0**-18  # relative to a panel's width; jumps below it are rounding


def panels_of(steps: int) -> int:
    """Return the number of panels for a path of ``steps`` solver steps: a power of two."""
    return 1 << math.ceil(math.log2(min(max(FEWEST, A_STEP * steps), MOST)))


def refine(
    rhs: RHS, path: State, rest: State, index: Tensor, tolerance: Tensor, rows: Rows | None, *, most: int
) -> tuple[Tensor, int]:
    """Return the integrals (integrals, R) of the rows ``index`` (R,) and the number of evaluations.

    Args:
        rhs: slopes of the whole state for all rows.
        path: the dynamic entries at the panels' ends (panels + 1, ...), the point first.
        rest: the state's integral entries, whose values are not used.
        index: rows to integrate.
        tolerance: standard deviation (integrals, 1) of a row's error. The errors of a row's k rough panels are
            independent, so each panel is refined to a share :math:`1/\\sqrt{k}`.
        rows: returns the right-hand side of selected rows; None evaluates all rows together.
        most: maximum number of evaluations.

    Raises:
        SolverError: if ``most`` evaluations do not suffice.
    """
    field = _Field(rhs, path, rest, index, rows, most)
    panels = len(path[0]) - 1
    width = 2 / panels  # of a pair of panels
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
    """Return the difference of Simpson's rule and the trapezium on a panel, from values at its ends and middle."""
    return width / 3 * (2 * m - a - b).abs()


class _Field:
    """Integrands of selected rows at any point of their paths."""

    def __init__(self, rhs: RHS, path: State, rest: State, index: Tensor, rows: Rows | None, most: int):
        self.rhs, self.path, self.rest, self.index, self.rows, self.most = rhs, path, rest, index, rows, most
        self.panels, self.count = len(path[0]) - 1, 0
        self.slopes: list[State] = []
        self.values: list[Tensor] = []

    def choose(self, rough: Tensor) -> Tensor:
        """Return the rows to refine given ``rough`` (integrals, R): all of them if rows must be evaluated together."""
        some = rough.any(0)
        return (some if self.rows is not None else some.any().expand_as(some)).nonzero()[:, 0]

    def end(self, k: int) -> None:
        """Evaluate the field at panel end k."""
        point, *others = (entry[k] for entry in self.path)
        every = torch.arange(len(self.index), device=self.index.device)
        slopes = self._evaluate(k / self.panels, point[self.index], others, every)
        self.slopes.append(slopes[: len(self.path)])
        self.values.append(torch.stack(slopes[len(self.path) :]))

    def __call__(self, s: float, some: Tensor) -> Tensor:
        """Return the integrands (integrals, len(some)) at s for rows ``some``, on the cubic Hermite interpolant."""
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
        """Return all slopes at s and a point (len(some), ...) of the rows ``some`` of the index."""
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
        slopes = self.rhs(time, (self.path[0][0].index_copy(0, where, point), *others, *self.rest))
        return tuple(e if 0 < i < count else e[where] for i, e in enumerate(slopes))
