"""Check of a custom field's derivatives against finite differences."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from cnf._utils.async_checks import tracing
from cnf._utils.errors import ConfigError
from cnf.fields.base import SolveField
from cnf.fields.custom import CustomField
from cnf.fields.findings import Findings
from cnf.fields.randomness import draws_random_numbers
from cnf.ode.differences import AGREE, Compared, Rows
from cnf.ode.divergence import Divergence, Exact, closed
from cnf.ode.jumps import jumps

__all__ = ["check_derivative", "check_time_derivative", "first_order", "second_derivative"]

MOST = 256  # dimensions of a closed-form divergence that is compared
_FIRST: Findings[bool] = Findings()  # True once compared, by (training, mode)
_SECOND: Findings[tuple[str, bool]] = Findings()  # the fault of the gradient, and whether it needs reverse mode
_TIME: Findings[bool] = Findings()
_JUMPED: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # fields whose jumps have been reported
# relative heights of jumps that are reported: above the rounding of float32, and of bfloat16 where a field computes in it
JUMP, ROUNDED = 0.003, 0.03


T = TypeVar("T")


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
        if isinstance(found, Compared) and (fault := found.fault()):
            raise ConfigError(
                f"field {type(field.module).__name__} has a derivative that does not match its values: {fault}, so that the log-det would "
                "be wrong: remove what cuts or changes gradients (detach, torch.no_grad, inference_mode, NumPy, rounding, backward hooks)"
            )
        if isinstance(error, ConfigError):
            raise error
        _report_jumps(field, divergence, t, x, context)
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
    if isinstance(found, Compared) and (fault := found.fault()):
        raise ConfigError(
            f"field {type(field.module).__name__} has a derivative in t that does not match its values: {fault}, so that a learned time would "
            "get a wrong gradient: compute with t as a tensor, without float(t), t.item() or detach"
        )
    _TIME.keep(field.module, field.module.training, True)


def _attempt(
    field: CustomField, divergence: Divergence, t: Tensor, x: Tensor, context: Tensor | None, comparison: Callable[[Rows], T]
) -> T | Exception:
    """Return a comparison, or the error that it raised, which the solve itself reports."""
    try:
        with draws_random_numbers(x.device):
            return comparison(Rows(field, divergence, t, x, context))
    except Exception as error:
        return error


def _closed_form(rows: Rows) -> None:
    """Compare a closed-form divergence with the exact trace, for few dimensions.

    Raises:
        ConfigError: if it is another.
    """
    if not rows.closed or rows.x[0].numel() > MOST:
        return
    x = rows.x * rows.bound.unit
    div = rows.bound.field.divergence(rows.t, x, rows.context)[1]
    _, exact, square, _ = Exact(closed_form=False).linearize(rows.bound.field, rows.t, x, None, rows.context, frozenset({"div", "jac_sq"}))
    assert exact is not None and square is not None
    wrong = (div - exact).abs() > AGREE * exact.abs() + rows.eps**0.5 * square.sqrt()
    if 2 * int(wrong.sum()) > len(wrong):
        row = int(wrong.nonzero()[0])
        raise ConfigError(
            f"field {rows.bound.field.name} has a divergence that does not match its forward: {float(div[row]):.3g} in closed form and "
            f"{float(exact[row]):.3g} by autodiff: correct it, or leave it out"
        )


@torch.no_grad()
def _report_jumps(field: CustomField, divergence: Divergence, t: Tensor, x: Tensor, context: Tensor | None) -> None:
    """Warn once of a field with jumps in x, whose log-det lacks what the jumps contribute."""
    if field.module in _JUMPED:
        return
    found = _attempt(field, divergence, t, x, context, _heights)
    if isinstance(found, Tensor) and float(found.max()) > JUMP:
        _JUMPED.add(field.module)
        warnings.warn(
            f"field {field.name} jumps by {float(found.max()):.1%} of its size between points that are next to each other: the log-det does not "
            "contain jumps, so that the density does not integrate to 1 and likelihoods can be far too high. Use continuous functions of x "
            "(softmax, sigmoid, relu) in place of rounding, argmax, sign and conditions", stacklevel=2,
        )  # fmt: skip


def _heights(rows: Rows) -> Tensor:
    """Return the heights of jumps between each row and the next, or next to a single one."""
    if rows.eps > 1e-6:  # values of lower precision jump
        return torch.zeros(len(rows.x))
    end = rows.x.roll(1, 0) if len(rows.x) > 1 else rows.x + rows.e
    heights = jumps(lambda x: rows.bound(rows.t, x), rows.x, end)
    values = rows.bound.field(rows.t, rows.x * rows.bound.unit, rows.context)
    rounded = any(bool((values.to(low).to(values) == values).all()) for low in (torch.bfloat16, torch.float16))  # such as under autocast
    return torch.where(heights > ROUNDED, heights, 0) if rounded else heights


def _first(rows: Rows) -> Compared:
    return rows.compare(rows.product(rows.x), lambda h: rows.e * rows.bound(rows.t, rows.x + h * rows.e))


def _second(rows: Rows) -> Compared:
    with torch.enable_grad():
        point = rows.x.requires_grad_()
        total = rows.trace(point).sum()
        exact = torch.autograd.grad(total, point, materialize_grads=True)[0] if total.requires_grad else torch.zeros_like(point)
    with torch.no_grad():
        return rows.compare(exact * rows.e, lambda h: rows.trace(rows.x + h * rows.e))


def _in_time(rows: Rows) -> Compared:
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
    with torch.no_grad():
        return rows.compare(exact[:, None], lambda h: rows.e * rows.bound(rows.t + h * d, rows.x))


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


def _agrees(found: Compared | Exception) -> bool:
    return isinstance(found, Compared) and not found.fault()


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
