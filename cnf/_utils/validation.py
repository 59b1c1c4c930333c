"""Validation of points, latents, contexts and sample shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf._utils.async_checks import deferred
from cnf._utils.errors import ConfigError, DataError

__all__ = ["as_rows", "check_context", "check_points", "check_unit_interval", "context_rows", "match_flow", "require_unmasked", "sample_rows", "sample_shape"]

_HALF = (torch.float16, torch.bfloat16)


def check_points(name: str, x: Any, shape: tuple[int, ...], like: Tensor, levels: int | None) -> None:
    """Validate points (\\*lead, \\*shape): type, shape, finite values, and dtype and device as ``like``.

    Integers are valid only with grey ``levels``; ``name`` is that of the argument.
    """
    _require_tensor(name, x, like)
    lead = x.ndim - len(shape)
    if lead < 0 or tuple(x.shape[lead:]) != shape:
        raise DataError(f"{name} has shape {tuple(x.shape)}, expected (N, {', '.join(map(str, shape))}), with any leading shape N")
    if x.is_floating_point():
        _require_type(name, x, like)
        _require_finite(name, x, lead)
    elif levels is None:
        raise DataError(f"{name} has type {x.dtype}, expected floats")


def check_context(context: Any, size: int | None, like: Tensor) -> None:
    """Validate a context (\\*lead, C) of C = ``size``: 0 for a flow without context, None if unknown."""
    _require_tensor("context", context, like)
    if size == 0:
        raise ConfigError(f"context has shape {tuple(context.shape)}, but this flow was built without context (context_dim=0): leave it out")
    if not context.is_floating_point():
        raise DataError(f"context has type {context.dtype}, expected floats: encode a label as a one-hot row")
    if context.ndim == 0 or (size is not None and context.shape[-1] != size):
        width = "C" if size is None else size
        raise DataError(f"context has shape {tuple(context.shape)}, expected ({width},) or (N, {width})")
    _require_type("context", context, like)
    _require_finite("context", context, context.ndim - 1)


def check_unit_interval(x: Tensor) -> None:
    """Check that float images lie in [0, 1], where bits/dim are defined (the density extends slightly further)."""
    if x.is_floating_point() and x.numel() and not bool(((x >= 0) & (x <= 1)).all()):
        low, high = (float(v) for v in x.detach().aminmax())
        raise DataError(f"x spans [{low:g}, {high:g}], expected floats in [0, 1], or uint8 grey levels")


def as_rows(x: Tensor, shape: tuple[int, ...], context: Tensor | None) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
    """Return points as (N, \\*shape), a context as (N, C), (C,) or None, and the broadcast leading shape of the result."""
    lead: tuple[int, ...] = tuple(x.shape[: x.ndim - len(shape)])
    if context is None or context.ndim == 1:
        return (x if len(lead) == 1 else x.reshape(math.prod(lead), *shape)), context, lead
    given = tuple(context.shape[:-1])
    try:
        lead = tuple(torch.broadcast_shapes(lead, given))
    except RuntimeError:
        raise DataError(
            f"context has shape {tuple(context.shape)}, but the points have leading shape {lead}: expected one row for each point, "
            f"{(*lead, context.shape[-1])}, or ({context.shape[-1]},) for all"
        ) from None
    count = math.prod(lead)
    rows = context.expand(*lead, context.shape[-1]).reshape(count, context.shape[-1])
    return x.expand(*lead, *shape).reshape(count, *shape), rows, lead


def context_rows(context: Tensor | None, rows: slice | Tensor | list[int]) -> Tensor | None:
    """Return the context of some rows; one shared by all rows (C,) is returned unchanged."""
    return context if context is None or context.ndim == 1 else context[rows]


def match_flow(x: Tensor, context: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Copy points and context to the flow's dtype and device; uint8 images stay uint8."""
    return x.to(like) if x.is_floating_point() else x.to(like.device), None if context is None else context.to(like)


def require_unmasked(name: str, x: Any) -> None:
    """Raise a DataError for masked values of a NumPy array, whose mask a conversion to an array or a tensor ignores."""
    if isinstance(x, np.ma.MaskedArray) and np.ma.getmaskarray(x).any():
        row = int(np.argwhere(np.ma.getmaskarray(x))[0][0])
        raise DataError(f"{name} has masked values, first in row {row}: remove such rows, or fill the values in")


def sample_shape(n: Any) -> tuple[int, ...]:
    """Convert a count or a shape of samples to a shape.

    Example:
        >>> sample_shape(5), sample_shape((3, 2)), sample_shape(())
        ((5,), (3, 2), ())
    """
    try:
        shape = (-1,) if isinstance(n, bool) else tuple(index(k) for k in n) if isinstance(n, Sequence) else (index(n),)
    except TypeError:
        shape = (-1,)
    if any(k < 0 for k in shape):
        raise ConfigError(f"n must be a number of samples, or a shape such as (3, 2), got {n}")
    return shape


def sample_rows(n: Any, context: Tensor | None) -> tuple[tuple[int, ...], Tensor | None]:
    """Return the leading shape of n samples per row of a context (\\*batch, C), and the context as one row per sample.

    Example:
        >>> lead, context = sample_rows(5, torch.zeros(2, 3))
        >>> lead, context.shape
        ((5, 2), torch.Size([10, 3]))
    """
    lead = sample_shape(n)
    if context is not None and context.ndim > 1:
        lead = (*lead, *context.shape[:-1])
        context = context.expand(*lead, context.shape[-1]).reshape(math.prod(lead), context.shape[-1])
    return lead, context


def _require_tensor(name: str, x: Any, like: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise DataError(f"{name} is a {type(x).__name__}, expected a torch.Tensor: use torch.as_tensor({name}, dtype={like.dtype})")
    if x.layout != torch.strided:
        raise DataError(f"{name} has layout {x.layout}, expected a dense tensor: use {name}.to_dense()")
    if x.device != like.device and not (x.device.type == like.device.type and None in (x.device.index, like.device.index)):
        raise DataError(f"{name} is on {x.device}, but the flow is on {like.device}: use {name}.to({str(like.device)!r})")


def _require_type(name: str, x: Tensor, like: Tensor) -> None:
    if like.dtype in _HALF:
        raise DataError(
            f"the flow's weights are {like.dtype}, in which no ODE is solved: convert it by flow.float(), and compute only the field in "
            "reduced precision (CNF(autocast=torch.bfloat16))"
        )
    if x.dtype != like.dtype:
        raise DataError(f"{name} has type {x.dtype}, but the flow computes in {like.dtype}: use {name}.to({like.dtype}), or convert the flow")


def _require_finite(name: str, x: Tensor, lead: int) -> None:
    if deferred(x) or bool(x.isfinite().all()):
        return
    rows = x.reshape(math.prod(x.shape[:lead]), -1)
    row = int((~rows.isfinite().all(1)).nonzero()[0])
    raise DataError(f"{name} holds NaN or infinity, first in row {row}: remove or replace such rows")
