"""Check of a custom field's derivative against finite differences, once per field."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from cnf._utils.async_checks import tracing
from cnf._utils.errors import ConfigError
from cnf._utils.validation import context_rows
from cnf.fields.base import SolveField
from cnf.fields.custom import CustomField
from cnf.fields.randomness import draws_random_numbers
from cnf.ode.divergence import Bound, Divergence, jacobian_product

__all__ = ["check_derivative"]

ROWS = 8
AGREE, WRONG = 0.05, 0.2  # relative errors: accepted for a difference quotient, rejected for a derivative
_CHECKED: weakref.WeakKeyDictionary[nn.Module, set[tuple[bool, str]]] = weakref.WeakKeyDictionary()  # (training, mode)


def check_derivative(
    field: SolveField, divergence: Divergence, need: frozenset[str], t: Tensor, x: Tensor, context: Tensor | None
) -> None:
    """Compare eᵀJe of a custom field at a few rows of x (N, \\*event) with finite differences.

    Gradients cut by a field (``detach``, ``no_grad``, NumPy, rounding) would silently give a wrong log-det. Rows whose
    two difference quotients disagree (kinks, rounding) are ignored.

    Raises:
        ConfigError: if the derivative is wrong at more than half of the remaining rows.
    """
    if not need or not isinstance(field, CustomField) or tracing(x) or not len(x):
        return
    mode = getattr(divergence, "mode", "forward")
    known = _CHECKED.setdefault(field.module, set())
    if (key := (field.module.training, mode)) in known:
        return
    if not field.whole or field.random:
        x = x[:ROWS]
        context = context_rows(context, slice(len(x)))
    try:
        with draws_random_numbers(x.device):
            exact, quotient, sure = _compare(Bound(field.twin(), context), mode, t.detach(), x.detach())
    except Exception:  # the solve itself reports what is wrong
        known.add(key)
        return
    wrong = sure & ((exact - quotient).abs() > WRONG * quotient.abs())
    if 2 * int(wrong.sum()) > int(sure.sum()):
        row = int(wrong.nonzero()[0])
        raise ConfigError(
            f"field {type(field.module).__name__} has a derivative that does not match its values: {float(exact[row]):.3g} by autodiff and "
            f"{float(quotient[row]):.3g} by differences, so that the log-det would be wrong: remove what cuts or changes gradients "
            "(detach, torch.no_grad, inference_mode, NumPy, rounding, backward hooks)"
        )
    known.add(key)


@torch.no_grad()
def _compare(field: Bound, mode: str, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return eᵀJe of each row by autodiff and by a difference quotient, and whether the quotient is accurate."""
    generator = torch.Generator().manual_seed(0)  # a separate generator: torch's global ones are not advanced
    e = (2 * torch.randint(0, 2, x.shape, generator=generator) - 1).to(x)
    eps = torch.finfo(x.dtype).eps
    step = eps ** (1 / 3) * x.abs().flatten(1).amax(1).clamp(min=1).reshape(-1, *(1,) * (x.ndim - 1))
    x = x + step * torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x)  # away from kinks, often at zero

    def along(values: Tensor) -> Tensor:
        return (values * e).flatten(1).sum(1)

    def quotient(h: Tensor) -> Tensor:
        return along((field(t, x + h * e) - field(t, x - h * e)) / (2 * h))

    value, product = jacobian_product(field, t, x, e[None], mode)
    wide, narrow = quotient(step), quotient(step / 2)
    rounding = 100 * eps * value.abs().flatten(1).sum(1) / step.flatten()
    sure = ((wide - narrow).abs() <= AGREE * narrow.abs()) & (narrow.abs() > rounding) & narrow.isfinite()
    return along(product[0]), narrow, sure
