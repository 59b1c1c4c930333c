"""Checks of custom fields while torch.compile traces the whole of a flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import nn

from cnf._utils.errors import ConfigError
from cnf.fields.custom import CustomField, precompute
from cnf.ode.derivatives import check_derivative, second_derivative
from cnf.ode.differences import ROWS
from cnf.ode.divergence import Divergence, Exact, Hutchinson, closed

__all__ = ["check_while_tracing"]

F = TypeVar("F", bound=Callable[..., Any])


def _constant(function: F) -> F:
    """Mark a function that torch.compile calls while it traces, as torch.compiler.assume_constant_result does, which imports the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def check_while_tracing(
    module: nn.Module, closed_form: bool | None, mode: str, with_divergence: bool, t: float, shape: Sequence[int], like: tuple[torch.dtype, torch.device],
    context_shape: Sequence[int] | None, context_type: torch.dtype | None,
) -> tuple[bool, bool, bool]:
    """Check a custom field at random points while torch.compile traces the code around it, which has no values yet.

    Args:
        module: the field.
        closed_form: of an exact trace; None for an estimate.
        mode: of the estimate.
        with_divergence: whether the divergence is integrated.
        t: time of the check.
        shape: of an event.
        like: dtype and device of the points.
        context_shape: (C,), or None without a context; each row has its own.
        context_type: dtype of the context; integers are zero.

    Returns:
        Whether derivatives are taken in reverse mode, whether the field has norms, and whether its rows are one whole.

    Raises:
        ConfigError: for what the checks of an ordinary solve refuse, and for a field that draws random numbers.
    """  # fmt: skip
    dtype, device = like
    generator = torch.Generator().manual_seed(0)  # torch's global generators are not advanced
    x = torch.randn(ROWS, *shape, generator=generator).to(device, dtype)
    now = torch.tensor(t, device=device, dtype=dtype)
    context = None if context_shape is None else torch.randn(ROWS, *context_shape, generator=generator).to(device)
    if context is not None and context_type is not None:
        context = context.to(context_type) if context_type.is_floating_point else torch.zeros_like(context, dtype=context_type)
    divergence: Divergence = Hutchinson(mode=mode) if closed_form is None else Exact(closed_form=closed_form)  # type: ignore[arg-type]
    need = frozenset({"div"} if with_divergence else ())
    with patch.object(torch.compiler, "is_compiling", lambda: False):
        field = precompute(module, x, context, t=now)
        if not isinstance(field, CustomField):
            return False, False, False
        if field.random:
            raise ConfigError(
                f"field {field.name} draws random numbers, which have to stay the same in a whole solve: compile the field by compile=True, or "
                "not at all"
            )
        if fault := check_derivative(field, divergence, need, now, x, context):
            raise ConfigError(second_derivative(field, fault))
    if with_divergence and field.reverse and not field.own_jvp and not closed(divergence, field) and not _traces_reverse_mode():
        raise ConfigError(
            f"field {field.name} needs derivatives in reverse mode (layer norm, batch norm, solve, det, torch.jit), which torch.compile does not "
            "trace: leave the flow uncompiled, or take GroupNorm or RMSNorm"
        )
    return field.reverse, field.normalizes, field.whole


def _traces_reverse_mode() -> bool:
    dynamo: Any = torch._dynamo
    return bool(getattr(dynamo.config, "trace_autograd_ops", False))
