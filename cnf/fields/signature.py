"""Inspection and validation of the signatures of vector fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from cnf._utils.errors import ConfigError

__all__ = ["check_signature", "takes_context", "velocity_takes_context", "wrapped"]

POINT = ("x", "z", "y", "xt", "x_t", "state", "states", "input", "inputs")
TIME = ("t", "time", "times", "timestep", "timesteps", "s", "tau")
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


class _Parameters(NamedTuple):
    """Positional parameters of a function, whether it takes \\*args, the parameters without a default, and those by keyword alone."""

    names: tuple[str, ...]
    variadic: bool
    required: tuple[inspect.Parameter, ...] = ()
    keywords: tuple[str, ...] = ()


def _parameters(function: Any) -> _Parameters | None:
    """Return the parameters of a function; None if unknown, as for some built-in callables."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    required = (p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    keywords = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    return _Parameters(names, any(p.kind is p.VAR_POSITIONAL for p in parameters), tuple(required), keywords)


def wrapped(module: nn.Module) -> nn.Module:
    """Return the module inside torch.compile, (Distributed)DataParallel or AveragedModel wrappers, or the module."""
    while True:
        inner = getattr(module, "module" if isinstance(module, _WRAPPERS) else "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _signature(module: nn.Module) -> _Parameters | None:
    module = wrapped(module)
    if isinstance(module, torch.jit.ScriptModule):
        schema: Any = module.forward
        return _Parameters(tuple(argument.name for argument in schema.schema.arguments[1:]), False)
    if "forward" in vars(module):  # replaced on the instance, already bound
        return _parameters(vars(module)["forward"])
    signature = _parameters(type(module).forward)
    return None if signature is None else signature._replace(names=signature.names[1:])


def takes_context(module: nn.Module) -> bool:
    """Return whether the field's ``forward`` accepts a context after (t, x)."""
    signature = _signature(module)
    return signature is None or signature.variadic or len(signature.names) > 2


def check_signature(field: nn.Module) -> None:
    """Check that a field can be called as ``field(t, x)``.

    Raises:
        ConfigError: if it is not an ``nn.Module``, or its ``forward`` has fewer than two arguments, takes x first, or takes
            the context by keyword alone.
    """
    if not isinstance(field, nn.Module):
        raise ConfigError(
            f"field is a {type(field).__name__}; expected an nn.Module with forward(t, x, context=None) "
            "(cnf.from_velocity takes a plain function)"
        )
    signature = _signature(field)
    if signature is None:
        return
    if "context" in signature.keywords:
        raise ConfigError(f"{type(field).__name__}.forward takes context by keyword alone; expected forward(t, x, context=None), without * in front of it")
    if signature.variadic:
        return
    names = signature.names
    if len(names) < 2:
        raise ConfigError(f"{type(field).__name__}.forward takes {len(names)} arguments; expected forward(t, x, context=None)")
    if _point_first(names):
        raise ConfigError(
            f"{type(field).__name__}.forward({', '.join(names)}) takes the point first; expected forward(t, x, context=None), "
            "time first"
        )


def _point_first(names: tuple[str, ...]) -> bool:
    """Return whether the names of two or more parameters are those of (x, t), not (t, x)."""
    first, second = (name.lower() for name in names[:2])
    return second in TIME and (first in POINT or (first not in TIME and second != "s"))  # s may name a state


def velocity_takes_context(v: Callable[..., Any]) -> bool:
    """Return whether a function or module v takes a context after (t, x).

    Raises:
        ConfigError: if v cannot be called as v(t, x).
    """
    if not callable(v):
        raise ConfigError(f"v is a {type(v).__name__}; expected a module or a function v(t, x)")
    signature = _parameters(v.forward if isinstance(v, nn.Module) else v)
    if signature is None:
        return True
    names, variadic, required, keywords = signature
    listed = ", ".join(names)
    if len(names) < 2 and not variadic:
        raise ConfigError(f"v takes ({listed}); expected (t, x): pass a function, such as lambda t, x: v(torch.cat([x, t.expand(len(x), 1)], 1))")
    if len(names) >= 2 and _point_first(names):
        raise ConfigError(f"v takes ({listed}), the time second; expected (t, x): pass lambda t, x: v(x, t.expand(len(x)))")
    if "context" in keywords:
        raise ConfigError("v takes context by keyword alone; expected (t, x) or (t, x, context): pass lambda t, x, c: v(t, x, context=c)")
    if len(required) > 3 or any(p.kind is p.KEYWORD_ONLY for p in required):
        needed = ", ".join(p.name for p in required)
        raise ConfigError(f"v requires ({needed}); expected (t, x) or (t, x, context): pass a function that supplies the other arguments")
    return variadic or len(names) > 2
