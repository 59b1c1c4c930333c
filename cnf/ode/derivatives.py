"""Check of a custom field's derivatives against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from cnf._utils.async_checks import tracing
from cnf._utils.errors import ConfigError
from cnf._utils.validation import context_rows
from cnf.fields.base import SolveField
from cnf.fields.custom import CustomField
from cnf.fields.findings import Findings
from cnf.fields.randomness import draws_random_numbers
from cnf.ode.divergence import Bound, Divergence, Exact, closed, jacobian_product

__all__ = ["check_derivative", "check_time_derivative", "first_order", "second_derivative"]

ROWS, MOST = 8, 256  # rows, and dimensions of a closed-form divergence
# relative errors: of a difference quotient that counts, and of a derivative that is rejected (a quotient's own error, mostly from
# kinks, is about a third of its change with the step)
AGREE, WRONG, CHANGES = 0.05, 0.02, 2
_FIRST: Findings[bool] = Findings()  # True once compared, by (training, mode)
_SECOND: Findings[tuple[str, bool]] = Findings()  # the fault of the gradient, and whether it needs reverse mode
_TIME: Findings[bool] = Findings()


T = TypeVar("T")


class _Compared(NamedTuple):
    """Derivative of each row by autodiff and by a difference quotient, the quotient's change with its step, and whether it is accurate."""

    exact: Tensor
    quotient: Tensor
    change: Tensor
    sure: Tensor

    def fault(self) -> str:
        """Return the two derivatives of a row if they differ at more than half of the accurate rows, else ""."""
        wrong = self.sure & ((self.exact - self.quotient).abs() > WRONG * self.quotient.abs() + CHANGES * self.change)
        if 2 * int(wrong.sum()) <= int(self.sure.sum()):
            return ""
        row = int(wrong.nonzero()[0])
        return f"{float(self.exact[row]):.3g} by autodiff and {float(self.quotient[row]):.3g} by differences"


class _Rows:
    """A few rows of a solve, and a direction e of entries ±1 along which derivatives are compared."""

    def __init__(self, field: CustomField, divergence: Divergence, t: Tensor, x: Tensor, context: Tensor | None):
        if not field.whole or field.random:
            x, context = x[:ROWS], context_rows(context, slice(min(ROWS, len(x))))
        generator = torch.Generator().manual_seed(0)  # a separate generator: torch's global ones are not advanced
        self.e = (2 * torch.randint(0, 2, x.shape, generator=generator) - 1).to(x)
        # the precision of the field, which may be lower than that of the state
        self.eps = max(torch.finfo(p.dtype).eps for p in (x, *field.module.parameters()) if p.is_floating_point())
        step = self.eps ** (1 / 3) * x.detach().abs().flatten(1).amax(1).clamp(min=1)
        self.step = step.reshape(-1, *(1,) * (x.ndim - 1))
        # away from kinks, often at zero
        self.x = x.detach() + self.step * torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x)
        self.t, self.context, self.mode = t.detach(), None if context is None else context.detach(), getattr(divergence, "mode", "forward")
        self.bound, self.closed = Bound(field.twin(), self.context), closed(divergence, field)

    def product(self, x: Tensor) -> Tensor:
        """Return terms of eᵀJe, whose sum over a row it is."""
        return jacobian_product(self.bound, self.t, x, self.e[None], self.mode)[1][0] * self.e

    def trace(self, x: Tensor) -> Tensor:
        """Return terms of the divergence, or of eᵀJe where it has no closed form."""
        return self.bound.field.divergence(self.t, x, self.context)[1][:, None] if self.closed else self.product(x)

    def compare(self, exact: Tensor, values: Callable[[Tensor], Tensor], step: Tensor) -> _Compared:
        """Compare derivatives (N, ...), to be summed, with difference quotients of ``values(step)`` (N, ...)."""

        def quotient(h: Tensor) -> Tensor:
            return ((values(h) - values(-h)) / (2 * h)).flatten(1).sum(1)

        wide, narrow = quotient(step), quotient(step / 2)
        rounding = 100 * self.eps * values(0 * step).abs().flatten(1).sum(1) / step.flatten()
        change = (wide - narrow).abs()
        sure = (change <= AGREE * narrow.abs()) & (narrow.abs() > rounding) & narrow.isfinite()
        return _Compared(exact.flatten(1).sum(1), narrow, change, sure)


def check_derivative(
    field: SolveField, divergence: Divergence, need: frozenset[str], t: Tensor, x: Tensor, context: Tensor | None
) -> str:
    """Compare eᵀJe of a custom field at a few rows of x (N, \\*event), and its derivative, with finite differences.

    Gradients cut by a field (``detach``, ``no_grad``, NumPy, rounding) would silently give a wrong log-det. Rows whose
    two difference quotients disagree (kinks, rounding) are ignored. The derivative of eᵀJe, which the gradient of the
    log-det needs, is compared where gradients are recorded; a field without it in forward mode is solved in reverse mode.

    Returns:
        The fault of the gradient of the log-det, for :func:`first_order`; "" for none.

    Raises:
        ConfigError: if the derivative is wrong at more than half of the remaining rows.
    """
    if not need or not isinstance(field, CustomField) or tracing(x) or not len(x):
        return ""
    key = (field.module.training, getattr(divergence, "mode", "forward"), closed(divergence, field))
    if _FIRST.known(field.module, key) is None:
        with torch.no_grad():
            found, error = (_attempt(field, divergence, t, x, context, comparison) for comparison in (_first, _closed_form))
        if isinstance(found, _Compared) and (fault := found.fault()):
            raise ConfigError(
                f"field {type(field.module).__name__} has a derivative that does not match its values: {fault}, so that the log-det would "
                "be wrong: remove what cuts or changes gradients (detach, torch.no_grad, inference_mode, NumPy, rounding, backward hooks)"
            )
        if isinstance(error, ConfigError):
            raise error
        _FIRST.keep(field.module, key, True)
    if not torch.is_grad_enabled() or not (x.requires_grad or any(p.requires_grad for p in field.module.parameters())):
        return ""
    if (known := _SECOND.known(field.module, key)) is None:
        known = _fault_of_gradient(field, divergence, t, x, context)
        _SECOND.keep(field.module, key, known)
    field.reverse = field.reverse or known[1]
    return known[0]


def check_time_derivative(field: SolveField, divergence: Divergence, t: Tensor, x: Tensor, context: Tensor | None) -> None:
    """Compare ∂f/∂t of a custom field, which the gradient of a learned end time or augmented time needs, with differences.

    Raises:
        ConfigError: if it is wrong, as for a field that computes with ``float(t)``.
    """
    if not isinstance(field, CustomField) or tracing(x) or not len(x) or _TIME.known(field.module, field.module.training):
        return
    found = _attempt(field, divergence, t, x, context, _in_time)
    if isinstance(found, _Compared) and (fault := found.fault()):
        raise ConfigError(
            f"field {type(field.module).__name__} has a derivative in t that does not match its values: {fault}, so that a learned time would "
            "get a wrong gradient: compute with t as a tensor, without float(t), t.item() or detach"
        )
    _TIME.keep(field.module, field.module.training, True)


def _attempt(
    field: CustomField, divergence: Divergence, t: Tensor, x: Tensor, context: Tensor | None, comparison: Callable[[_Rows], T]
) -> T | Exception:
    """Return a comparison, or the error that it raised, which the solve itself reports."""
    try:
        with draws_random_numbers(x.device):
            return comparison(_Rows(field, divergence, t, x, context))
    except Exception as error:
        return error


def _closed_form(rows: _Rows) -> None:
    """Compare a closed-form divergence with the exact trace, for few dimensions.

    Raises:
        ConfigError: if it is another.
    """
    if not rows.closed or rows.x[0].numel() > MOST:
        return
    div = rows.bound.field.divergence(rows.t, rows.x, rows.context)[1]
    _, exact, square, _ = Exact(closed_form=False).linearize(rows.bound.field, rows.t, rows.x, None, rows.context, frozenset({"div", "jac_sq"}))
    assert exact is not None and square is not None
    wrong = (div - exact).abs() > AGREE * exact.abs() + rows.eps**0.5 * square.sqrt()
    if 2 * int(wrong.sum()) > len(wrong):
        row = int(wrong.nonzero()[0])
        raise ConfigError(
            f"field {rows.bound.field.name} has a divergence that does not match its forward: {float(div[row]):.3g} in closed form and "
            f"{float(exact[row]):.3g} by autodiff: correct it, or leave it out"
        )


def _first(rows: _Rows) -> _Compared:
    return rows.compare(rows.product(rows.x), lambda h: rows.e * rows.bound(rows.t, rows.x + h * rows.e), rows.step)


def _second(rows: _Rows) -> _Compared:
    with torch.enable_grad():
        point = rows.x.requires_grad_()
        total = rows.trace(point).sum()
        exact = torch.autograd.grad(total, point, materialize_grads=True)[0] if total.requires_grad else torch.zeros_like(point)
    with torch.no_grad():
        return rows.compare(exact * rows.e, lambda h: rows.trace(rows.x + h * rows.e), rows.step)


def _in_time(rows: _Rows) -> _Compared:
    """Compare the sum of e f, along a direction that no symmetry in the entries of an augmented time hides."""
    d = torch.linspace(1.0, 0.3, max(1, rows.t.numel())).to(rows.t).reshape(rows.t.shape)
    with torch.enable_grad():
        time = rows.t.clone().requires_grad_()
        values = (rows.e * rows.bound(time, rows.x)).flatten(1).sum(1)
        if values.requires_grad:
            slopes = [torch.autograd.grad([v], [time], retain_graph=True, materialize_grads=True)[0] for v in values]
            exact = torch.stack([(slope * d).sum() for slope in slopes])
        else:
            exact = 0 * values
    step = torch.full_like(rows.step, rows.eps ** (1 / 3))
    with torch.no_grad():
        return rows.compare(exact[:, None], lambda h: rows.e * rows.bound(rows.t + h.flatten()[0] * d, rows.x), step)


def _fault_of_gradient(field: CustomField, divergence: Divergence, t: Tensor, x: Tensor, context: Tensor | None) -> tuple[str, bool]:
    """Return what is wrong with the derivative of the trace, "" for nothing, and whether it needs reverse mode."""
    found = _attempt(field, divergence, t, x, context, _second)
    if not field.reverse and not _agrees(found):
        field.reverse = True
        if all(_agrees(_attempt(field, divergence, t, x, context, comparison)) for comparison in (_first, _second)):
            return "", True
        field.reverse = False
    if isinstance(found, Exception):
        return f"it cannot be computed ({' '.join(str(found).split())[:200]})", field.reverse
    return found.fault(), field.reverse


def _agrees(found: _Compared | Exception) -> bool:
    return isinstance(found, _Compared) and not found.fault()


class _FirstOrder(torch.autograd.Function):
    """Identity whose backward pass raises a ConfigError."""

    @staticmethod
    def forward(ctx: Any, message: str, value: Tensor) -> Tensor:
        ctx.message = message
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise ConfigError(ctx.message)


def second_derivative(field: SolveField, fault: str) -> str:
    """Return what is said of a fault that :func:`check_derivative` found in the gradient of the log-det."""
    return (
        f"field {field.name} has a second derivative that does not match its values: {fault}, so that the gradient of the log-det "
        "would be wrong: use operations that are differentiable twice (a custom autograd.Function needs a backward of torch operations "
        "on saved tensors), or train by flow matching, which takes no divergence"
    )


def first_order(field: SolveField, fault: str, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return integrals along the path whose gradient is refused for a fault that :func:`check_derivative` found."""
    if not fault:
        return values
    message = second_derivative(field, fault)
    return tuple(cast(Tensor, _FirstOrder.apply(message, v)) if v.requires_grad else v for v in values)
