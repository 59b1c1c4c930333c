"""Strict decoding of JSON values as settings."""

from __future__ import annotations

import dataclasses
import math
import reprlib
import types
import typing
from typing import Any

from cnf._utils.errors import CheckpointError, ConfigError
from cnf.config.tagged import members, select, tag_of

__all__ = ["decode", "once"]


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, as ``object_pairs_hook``.

    Raises:
        ValueError: for a repeated name.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def decode(kind: Any, value: Any, where: str) -> Any:
    """Decode a JSON value as a dataclass, tuple, Literal or plain type.

    Raises:
        CheckpointError: for any other value, with the field.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise CheckpointError(f"{where} is {reprlib.repr(value)}; expected an object")
        hints = typing.get_type_hints(kind)
        for name in value.keys() - hints.keys():
            raise CheckpointError(f"{where}: unknown field {name[:80]!r}")
        later = {field.name for field in dataclasses.fields(kind) if field.metadata.get("optional")}
        for name in hints.keys() - value.keys() - later:
            raise CheckpointError(f"{where}: field {name!r} is missing")
        values = {name: decode(hint, value[name], f"{where}: {name}") for name, hint in hints.items() if name in value}
        try:
            return kind(**values)
        except ConfigError as error:
            raise CheckpointError(f"{where}: {error}") from None
    if origin is tuple:
        if not isinstance(value, list):
            raise CheckpointError(f"{where} is {reprlib.repr(value)}; expected a list")
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(value) != len(arguments):
            raise CheckpointError(f"{where} is {reprlib.repr(value)}; expected a list of {len(arguments)}")
        return tuple(decode(a, v, where) for a, v in zip(arguments, value, strict=True))
    if origin is typing.Literal:
        if not any(type(value) is type(a) and value == a for a in arguments):
            raise CheckpointError(f"{where} is {reprlib.repr(value)}; expected one of {arguments}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = members(kind)
        if len(kinds) > 1 and isinstance(value, dict):
            name = tag_of(kinds[0]) or ""
            found = select(kinds, value.get(name, kinds[0].__dataclass_fields__[name].default))
            if found is None:
                choices = ", ".join(repr(c) for k in kinds for c in typing.get_args(typing.get_type_hints(k)[name]))
                raise CheckpointError(f"{where}: {name} is {reprlib.repr(value[name])}; expected one of {choices}")
            return decode(found, value, where)
        return decode(next(a for a in arguments if a is not type(None)), value, where)
    return _plain(kind, value, where)


def _plain(kind: Any, value: Any, where: str) -> Any:
    """Decode a number, string or bool."""
    whole = type(value) is int
    if type(value) is not kind and not (whole and kind is float):
        raise CheckpointError(f"{where} is {reprlib.repr(value)}; expected {kind.__name__}")
    if whole and abs(value) >= 2**63:
        raise CheckpointError(f"{where} is a whole number of {value.bit_length()} bits; expected at most 63")
    value = float(value) if kind is float else value
    if kind is float and not math.isfinite(value):
        raise CheckpointError(f"{where} is {value}; expected a finite number")
    if kind is str and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise CheckpointError(f"{where} is {reprlib.repr(value)}; expected text (it has half a character)")
    return value
