"""A vector field of a user's own in a flow built from settings."""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from cnf._utils.errors import ConfigError

__all__ = ["field_code", "field_maker", "forget_fields", "register_field", "registered"]

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


def field_code() -> str:
    """Return a checksum of the file that defines the registered field, to recognise a change; "" if there is none."""
    if not _FIELD:
        return ""
    try:
        file = inspect.getsourcefile(next(iter(_FIELD.values())))
        return "" if file is None else f"{zlib.crc32(Path(file).read_bytes()):08x}"
    except (OSError, TypeError):
        return ""


def field_maker(name: str) -> Callable[[tuple[int, ...], int], nn.Module]:
    """Return a function of (event_shape, context_dim) that makes the field.

    A class with a parameter ``event_shape`` is called with it, one with other parameters with the number of dimensions,
    and one without any with nothing; ``context_dim`` is passed to a class that has it.

    Raises:
        ConfigError: if it is not registered; from the function, for arguments without a default, or what is no module.

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
        signature = inspect.signature(field)
        options: dict[str, Any] = {"context_dim": context_dim} if "context_dim" in signature.parameters else {}
        place: tuple[int, ...] = ()
        if "event_shape" in signature.parameters:
            options["event_shape"] = shape
        elif set(signature.parameters) - {"context_dim"}:
            place = (math.prod(shape),)
        try:
            signature.bind(*place, **options)
        except TypeError as error:
            raise ConfigError(f"field {name}{signature} cannot be made ({error}): give all arguments but dim or event_shape, and context_dim, a default") from None
        made = field(*place, **options)
        if not isinstance(made, nn.Module):
            raise ConfigError(f"field {name} makes a {type(made).__name__}; expected an nn.Module with forward(t, x, context=None)")
        return made

    return make
