"""Bisection of a failed batch to find the rows that cannot be solved."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cnf._utils.errors import SolverError
from cnf._utils.validation import context_rows
from cnf.fields.base import SolveField
from cnf.solvers import Solution

__all__ = ["FAILING", "separable", "solve_in_halves"]

FAILING = 16  # maximum number of failing rows to report; one if each failure exhausts max_steps

ROUNDING = 1e-3  # relative change of a row's value allowed when it is evaluated without the other rows


def separable(field: SolveField, module: nn.Module, t: Tensor, x: Tensor, context: Tensor | None) -> bool:
    """Return whether rows of x (N, \\*event) can be evaluated separately.

    False if the field draws random numbers or could not be checked, is in training mode, or gives other values for a
    part of the batch (for example a closure over per-row tensors), checked by evaluating the second half of the rows of
    a custom field alone.
    """
    if field.whole or any(m.training for m in module.modules()):
        return False
    if not field.custom:
        return True
    k = len(x) // 2
    with torch.no_grad():
        try:
            apart = field(t, x[k:], context_rows(context, slice(k, None)))
        except Exception:
            return False
        together = field(t, x, context)[k:]
    finite = together.flatten(1).isfinite().all(1)
    apart, together = apart.flatten(1)[finite], together.flatten(1)[finite]
    return bool(((apart - together).abs() <= ROUNDING * together.abs().amax(1, keepdim=True)).all())


def solve_in_halves(solve: Callable[[Tensor], Solution], x: Tensor, dynamic: int, error: SolverError) -> Solution:
    """Return the solution for all rows of x (N, \\*event) from parts; the first part gives entries without rows.

    ``solve`` returns the solution of the rows of an index, ``error`` is that of the whole batch, and ``dynamic`` the number
    of dynamic entries of the state.

    Raises:
        SolverError: listing the rows that cannot be solved alone, at most :data:`FAILING`.
    """
    parts: list[tuple[Tensor, Solution]] = []
    rows: list[int] = []
    reason, left = error, [torch.arange(len(x), device=x.device)]
    failed = True  # the whole batch has failed already
    while left:
        index = left.pop()
        if not failed:
            try:
                parts.append((index, solve(index)))
                continue
            except SolverError as failure:
                if len(index) == 1 and not rows:
                    reason = failure
        failed = False
        if len(index) > 1:
            left += reversed(index.tensor_split(2))
            continue
        rows.append(int(index))
        if len(rows) == (1 if reason.exhausted else FAILING):
            break
    if rows:
        names = f"row {rows[0]}" if len(rows) == 1 else f"rows {', '.join(map(str, rows))}"
        others = "there may be more" if left else "the other rows can" if parts else "there is no other row"
        raise SolverError(
            f"{names} of {len(x)} cannot be solved ({others}; the largest entry of row {rows[0]} is "
            f"{float(x[rows[0]].detach().abs().max()):.3g}): remove or correct such rows. {reason}",
            s=reason.s, step=reason.step, largest=reason.largest, rows=rows, cause=str(reason),
        )  # fmt: skip
    order = torch.cat([index for index, _ in parts]).argsort()
    states = [solution.state for _, solution in parts]
    state = list(states[0])
    for i in (0, *range(dynamic, len(state))):
        state[i] = torch.cat([one[i] for one in states])[order]
    stats = parts[0][1].stats
    for _, solution in parts[1:]:
        stats = stats + solution.stats
    return Solution(tuple(state), stats.joined())
