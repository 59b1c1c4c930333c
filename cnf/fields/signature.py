"""Inspection and validation of the signatures of vector fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from cnf.errors import ConfigError

__all__ = ["check_signature", "takes_context", "velocity_takes_context", "wrapped"]

POINT = ("x", "z", "y", "xt", "x_t", "state", "states", "input", "inputs")
TIME = ("t", "time", "times", "timestep", "timesteps", "s", "tau")
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def _positional(forward: Any) -> tuple[tuple[str, ...], bool] | None:
    """Return the names of ``forward``'s positional parameters and whether it takes \\*args; None if unknown."""
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        return None
    names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    return names, any(p.kind is p.VAR_POSITIONAL for p in parameters)


def wrapped(module: nn.Module) -> nn.Module:
    """Return the module inside torch.compile, (Distributed)DataParallel or AveragedModel wrappers, or the module."""
    while True:
        inner = getattr(module, "module" if isinstance(module, _WRAPPERS) else "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _signature(module: nn.Module) -> tuple[tuple[str, ...], bool] | None:
    module = wrapped(module)
    if isinstance(module, torch.jit.ScriptModule):
        schema: Any = module.forward
        return tuple(argument.name for argument in schema.schema.arguments[1:]), False
    if "forward" in vars(module):  # replaced on the instance, already bound
        return _positional(vars(module)["forward"])
    found = _positional(type(module).forward)
    return None if found is None else (found[0][1:], found[1])


def takes_context(module: nn.Module) -> bool:
    """Return whether the field's ``forward`` accepts a context after (t, x)."""
    found = _signature(module)
    return found is None or found[1] or len(found[0]) > 2


def check_signature(field: nn.Module) -> None:
    """Check that a field can be called as ``field(t, x)``.

    Raises:
        ConfigError: if it is not an ``nn.Module``, or its ``forward`` has fewer than two arguments or takes x first.
    """
    if not isinstance(field, nn.Module):
        raise ConfigError(
            f"field is a {type(field).__name__}; expected an nn.Module with forward(t, x, context=None) "
            "(cnf.from_velocity takes a plain function)"
        )
    found = _signature(field)
    if found is None or found[1]:
        return
    names = found[0]
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
    try:
        parameters = list(inspect.signature(v.forward if isinstance(v, nn.Module) else v).parameters.values())
    except (TypeError, ValueError):  # some built-in callables have no signature
        return True
    several = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    placed = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    names = ", ".join(placed)
    if len(placed) < 2 and not several:
        raise ConfigError(f"v takes ({names}); expected (t, x): pass a function, such as lambda t, x: v(torch.cat([x, t.expand(len(x), 1)], 1))")
    if len(placed) >= 2 and _point_first(placed):
        raise ConfigError(f"v takes ({names}), the time second; expected (t, x): pass lambda t, x: v(x, t.expand(len(x)))")
    if len(needed) > 3 or any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        raise ConfigError(f"v needs ({', '.join(needed)}); expected (t, x) or (t, x, context): pass a function that fills in the rest")
    return several or len(placed) > 2
