"""A vector field of a user's own in a flow built from settings."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from torch import nn

from cnf._utils.errors import ConfigError

__all__ = ["field_maker", "forget_fields", "register_field", "registered"]

_FIELD: dict[str, Callable[..., nn.Module]] = {}


def register_field(name: str, field: Callable[..., nn.Module]) -> None:
    """Use ``field`` in the flows of this process whose settings name it; it takes the place of an earlier one."""
    _FIELD.clear()
    _FIELD[name] = field


def forget_fields() -> None:
    """Forget the registered field."""
    _FIELD.clear()


def registered() -> str:
    """Return the name of the registered field; "" if there is none."""
    return next(iter(_FIELD), "")


def field_maker(name: str) -> Callable[[tuple[int, ...], int], nn.Module]:
    """Return a function of (event_shape, context_dim) that makes the field.

    A class with a parameter ``event_shape`` is called with it, one with other parameters with the number of dimensions,
    and one without any with nothing; ``context_dim`` is passed to a class that has it.

    Raises:
        ConfigError: if it is not registered.

    Example:
        >>> register_field("Zero", lambda: nn.Identity())
        >>> field_maker("Zero")((2,), 0)
        Identity()
        >>> forget_fields()
    """
    if name not in _FIELD:
        other = f", not {registered()}" if _FIELD else ""
        raise ConfigError(f"this run was trained with a field of your own, {name}{other}: give --field FILE.py:{name} again")
    field = _FIELD[name]

    def make(shape: tuple[int, ...], context_dim: int) -> nn.Module:
        parameters = inspect.signature(field).parameters
        options: dict[str, Any] = {"context_dim": context_dim} if "context_dim" in parameters else {}
        if "event_shape" in parameters:
            return field(event_shape=shape, **options)
        return field(math.prod(shape), **options) if set(parameters) - {"context_dim"} else field(**options)

    return make
