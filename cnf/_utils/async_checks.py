"""Value checks, immediate or deferred to the caller."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from cnf._utils.aliases import aliases

__all__ = ["defer_checks", "deferred", "outside_inference_mode", "to_device", "tracing", "vectorized"]

P = ParamSpec("P")
R = TypeVar("R")


class _State(threading.local):
    depth = 0


_STATE = _State()


def vectorized() -> bool:
    """Return whether a transform of ``torch.func`` is running, such as ``vmap`` or ``grad``."""
    return not torch.compiler.is_compiling() and bool(torch._C._are_functorch_transforms_active())


def tracing(*tensors: Tensor) -> bool:
    """Return whether values are unavailable (torch.compile, torch.export, torch.func, meta or fake tensors).

    Example:
        >>> tracing(torch.zeros(2)), tracing(torch.zeros(2, device="meta")), bool(torch.func.vmap(lambda x: x * tracing(x))(torch.ones(2)).all())
        (False, True, True)
    """
    if torch.compiler.is_compiling() or vectorized():
        return True
    return any(t.is_meta or isinstance(t, FakeTensor) for t in tensors)


def deferred(*tensors: Tensor) -> bool:
    """Return whether value checks of these tensors are deferred to the caller, or impossible (see :func:`tracing`)."""
    return tracing(*tensors) or _STATE.depth > 0


@contextmanager
def defer_checks() -> Iterator[None]:
    """Defer value checks in this thread, to avoid host synchronisation; a failed solve returns non-finite values.

    Non-finite data and states, grey levels and ranges are not checked, and a fixed grid raises no SolverError: the
    caller has to check that loss and gradient are finite. Shapes, dtypes and adaptive solves, whose steps depend on
    values anyway, are still checked.

    Example:
        >>> from cnf import CNF, Flow, defer_checks
        >>> from cnf.fields import MLP
        >>> flow, x = Flow(CNF(MLP(2)), (2,)).train(), torch.tensor([[0.0, float("nan")]])
        >>> with defer_checks():
        ...     flow.log_prob(x).isnan()
        tensor([True])
        >>> flow.log_prob(x)
        Traceback (most recent call last):
        cnf.errors.DataError: x holds NaN or infinity, first in row 0: remove or replace such rows
    """
    _STATE.depth += 1
    try:
        yield
    finally:
        _STATE.depth -= 1


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function that takes derivatives leave ``torch.inference_mode()``, in which reverse mode finds no dependence on x.

    Example:
        >>> square = outside_inference_mode(lambda x: torch.func.vjp(torch.square, x)[1](torch.ones(()))[0])
        >>> with torch.inference_mode():
        ...     square(torch.tensor(3.0))
        tensor(6.)
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            copies: Any = tree_map(lambda v: v.clone() if isinstance(v, Tensor) and v.is_inference() else v, (args, kwargs))
            return function(*copies[0], **copies[1])

    return run


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy to the device asynchronously (pinned memory)."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)


__getattr__ = aliases(__name__, deferred_checks="defer_checks", sent="to_device")
