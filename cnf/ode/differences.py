"""Derivatives of a field at a few rows, next to difference quotients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cnf._utils.validation import context_rows
from cnf.fields.custom import CustomField
from cnf.ode.divergence import Bound, Divergence, closed, jacobian_product

__all__ = ["AGREE", "ROWS", "Compared", "Rows"]

ROWS, UNITS = 8, 256  # rows to compare, and rows of which the units of their entries are taken
# relative errors: of a difference quotient that counts, and of a derivative that is rejected (a quotient's own error, mostly from
# kinks, is about a third of its change with the step)
AGREE, WRONG, CHANGES = 0.05, 0.02, 2


class Compared(NamedTuple):
    """Derivative of each row by autodiff and by a difference quotient, the quotient's change with its step and rounding error, and whether it is accurate."""

    exact: Tensor
    quotient: Tensor
    change: Tensor
    noise: Tensor
    sure: Tensor

    def fault(self) -> str:
        """Return the two derivatives of a row if they differ at more than half of the accurate rows, else ""."""
        lost = self.sure & ~self.exact.isfinite()  # as of torch.where, whose other branch is NaN: no kink does this
        allowed = WRONG * self.quotient.abs() + CHANGES * self.change + 5 * self.noise
        wrong = self.sure & ((self.exact - self.quotient).abs() > allowed) | lost
        if 2 * int(wrong.sum()) <= int(self.sure.sum()) and not bool(lost.any()):
            return ""
        row = int((lost if bool(lost.any()) else wrong).nonzero()[0])
        where = " (torch.where differentiates both branches: keep NaN and infinity out of the one that is not taken)" if bool(lost.any()) else ""
        return f"{float(self.exact[row]):.3g} by autodiff and {float(self.quotient[row]):.3g} by differences{where}"


class Rows:
    """A few rows of a solve in units of their entries, and a direction e of entries ±1 along which derivatives are compared."""

    def __init__(self, field: CustomField, divergence: Divergence, t: Tensor, x: Tensor, context: Tensor | None):
        unit = unit_of(x.detach())
        if not field.whole or field.random:
            index = spread(len(x), ROWS, x.device)
            x, context = x[index], context_rows(context, index)
        generator = torch.Generator().manual_seed(0)  # a separate generator: torch's global ones are not advanced
        self.e = (2 * torch.randint(0, 2, x.shape, generator=generator) - 1).to(x)
        # the precision of the field, which may be lower than that of the state
        self.eps = max(torch.finfo(p.dtype).eps for p in (x, *field.module.parameters()) if p.is_floating_point())
        self.step = self.eps ** (1 / 3)
        # away from kinks, often at zero
        self.x = x.detach() / unit + self.step * torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x)
        self.t, self.context, self.mode = t.detach(), None if context is None else context.detach(), getattr(divergence, "mode", "forward")
        self.bound, self.closed = InUnits(field.twin(), self.context, unit), closed(divergence, field)

    def product(self, x: Tensor) -> Tensor:
        """Return terms of eᵀJe, whose sum over a row it is."""
        return jacobian_product(self.bound, self.t, x, self.e[None], self.mode)[1][0] * self.e

    def trace(self, x: Tensor) -> Tensor:
        """Return terms of the divergence, or of eᵀJe where it has no closed form."""
        return self.bound.field.divergence(self.t, x * self.bound.unit, self.context)[1][:, None] if self.closed else self.product(x)

    def compare(self, exact: Tensor, values: Callable[[float], Tensor]) -> Compared:
        """Compare derivatives (N, ...), to be summed, with difference quotients of ``values(step)`` (N, ...)."""

        def quotient(h: float) -> Tensor:
            return ((values(h) - values(-h)) / (2 * h)).flatten(1).sum(1)

        wide, middle, narrow = (quotient(self.step / part) for part in (1, 2, 4))  # two agree by chance where the field saturates
        noise = 200 * self.eps * values(0.0).abs().flatten(1).sum(1) / self.step
        sure = narrow.isfinite()
        for other in (wide, middle):
            sure &= (other - narrow).abs() <= AGREE * narrow.abs() + noise
        return Compared(exact.detach().flatten(1).sum(1), narrow.detach(), (middle - narrow).detach().abs(), noise.detach(), sure)


class InUnits(Bound):
    """Field g(t, y) = f(t, u y) / u, in units u of each entry: its Jacobian has the trace of f's."""

    def __init__(self, field: CustomField, context: Tensor | None, unit: Tensor):
        super().__init__(field, context)
        self.unit = unit

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return super().__call__(t, x * self.unit) / self.unit

    def jvp(self, t: Tensor, x: Tensor, v: Tensor, *, t_dot: Tensor | None = None) -> tuple[Tensor, Tensor]:
        dx, product = super().jvp(t, x * self.unit, v * self.unit, t_dot=t_dot)
        return dx / self.unit, product / self.unit


def spread(rows: int, most: int, device: torch.device) -> Tensor:
    """Return indices of at most so many rows, over the whole batch: rows may be sorted."""
    return torch.linspace(0, rows - 1, min(most, rows), device=device).round().long()


def unit_of(x: Tensor) -> Tensor:
    """Return the unit of each entry of x (N, \\*event), between its spread over the rows and its size: columns of a table may have any."""
    largest = x.abs().amax(0)
    unit = torch.zeros_like(largest)
    if len(x) > 3:
        some = x[spread(len(x), UNITS, x.device)]
        size, width = some.abs().median(0).values, (some - some.median(0).values).abs().median(0).values
        unit = size ** (1 / 3) * width ** (2 / 3)
    unit = torch.where(unit > 0, unit, largest)
    return torch.where(unit > 0, unit, largest.max() if bool(largest.any()) else 1.0)
