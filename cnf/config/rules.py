"""Bounds of settings, and the families that each belongs to: a setting outside its family is refused, not ignored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from cnf._utils.errors import ConfigError

__all__ = ["COUNT", "DENSITY", "NONNEGATIVE", "POSITIVE", "SEED", "Family", "SettingError", "Tags", "applies", "check_settings", "lenient", "outside", "setting"]  # fmt: skip

Tags = Mapping[str, Any]


class Family(NamedTuple):
    """Runs whose ``tag`` (a setting, or a fact about data or training) has one of ``values``; ``words`` name them."""

    tag: str
    values: tuple[Any, ...]
    words: str


class Bounds(NamedTuple):
    """Interval of a number; ``words`` describe it."""

    words: str
    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def hold(self, value: float) -> bool:
        """Return whether the value lies within."""
        return self.least <= value <= self.most and self.above < value < self.below


POSITIVE = Bounds("a positive number", above=0)
NONNEGATIVE = Bounds("zero or more", least=0)
COUNT = Bounds("1 to 100,000", least=1, most=100_000)
SEED = Bounds(f"zero or more, at most {2**32 - 1}", least=0, most=2**32 - 1)
DENSITY = Family("objective", ("likelihood", "flow-matching", "both"), "densities")

_strict: ContextVar[bool] = ContextVar("strict", default=True)


class SettingError(ConfigError):
    """Raised for an invalid value of a setting; ``name``, ``value`` and ``why`` let a program spell its option."""

    def __init__(self, name: str, value: Any, why: str):
        super().__init__(f"{name}={value!r} {why}" if why.startswith("is ") else f"{name}={value!r}; {why}")
        self.name, self.value, self.why = name, value, why


def setting(
    default: Any, *bounds: Bounds, when: tuple[Family, ...] = (), given: tuple[Family, ...] = (), later: bool = False
) -> Any:
    """Return a dataclass field.

    Args:
        default: its default.
        bounds: of a number; None is allowed where it is the default.
        when: families that it belongs to; outside any of them only the default can be constructed.
        given: families outside of which a user who gives it gets an error that it does nothing, whatever a preset says.
        later: older run folders lack it; the default applies.
    """
    metadata = {"bounds": bounds, "when": when, "given": given, "optional": later}
    return dataclasses.field(default=default, metadata=metadata)


@contextmanager
def lenient() -> Iterator[None]:
    """Context manager in which settings are constructed unchecked, while a command line is read for its preset."""
    token = _strict.set(False)
    try:
        yield
    finally:
        _strict.reset(token)


def check_settings(part: Any) -> None:
    """Validate bounds and families of a settings object, as its ``__post_init__``.

    Raises:
        SettingError: for the first setting that cannot be.
    """
    if not _strict.get():
        return
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise SettingError(field.name, value, "expected a finite number")
        for bounds in field.metadata.get("bounds", ()):
            if value is not None and not bounds.hold(value):
                raise SettingError(field.name, value, f"expected {bounds.words}")
        if value != field.default and (family := outside(field.metadata.get("when", ()), vars(part))):
            other = vars(part)[family.tag]
            raise SettingError(field.name, value, f"is for {family.words}, not for {family.tag}={other!r}: leave it at {field.default!r}")


def outside(families: Iterable[Family], tags: Tags) -> Family | None:
    """Return the first family that a run with these tags is not in; a tag that is not known counts as inside."""
    return next((f for f in families if f.tag in tags and tags[f.tag] not in f.values), None)


def applies(field: dataclasses.Field[Any], tags: Tags) -> bool:
    """Return whether a setting belongs to a run with these tags."""
    return outside((*field.metadata.get("when", ()), *field.metadata.get("given", ())), tags) is None
