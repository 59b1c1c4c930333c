"""Bounds of settings, and the runs that each belongs to: a setting that does nothing is refused, not ignored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args, get_origin, get_type_hints

from cnf._utils.errors import ConfigError

__all__ = ["COUNT", "DENSITY", "GENERATIVE", "KINDS", "NONNEGATIVE", "POSITIVE", "SEED", "Family", "Kind", "SettingError", "Tags", "cached", "check_settings", "hints", "lenient", "outside", "setting", "tag"]  # fmt: skip

Tags = Mapping[str, Any]
F = TypeVar("F", bound=Callable[..., Any])


class Family(NamedTuple):
    """Runs whose ``tag`` (a setting, or a fact about data or training) has one of ``values``; ``words`` name them."""

    tag: str
    values: tuple[Any, ...]
    words: str


class Kind(NamedTuple):
    """Architectures and objectives of a kind of model."""

    architectures: tuple[str, ...]
    objectives: tuple[str, ...]


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

KINDS = {
    "density": Kind(("stack", "multiscale", "parallel"), ("likelihood", "flow-matching", "both")),
    "predictor": Kind(("node", "resnet"), ("regression", "classification")),
    "autoencoder": Kind(("vae",), ("elbo",)),
}
"""Kinds of models: the architectures and objectives of each."""
DENSITY = Family("objective", KINDS["density"].objectives, "densities")
GENERATIVE = Family("objective", (*DENSITY.values, *KINDS["autoencoder"].objectives), "densities and autoencoders")

_strict: ContextVar[bool] = ContextVar("strict", default=True)


class SettingError(ConfigError):
    """Raised for an invalid value of a setting; ``name``, ``value`` and ``why`` let a program spell its option."""

    def __init__(self, name: str, value: Any, why: str):
        super().__init__(f"{name}={value!r} {why}" if why.startswith("is ") else f"{name}={value!r}; {why}")
        self.name, self.value, self.why = name, value, why


def setting(default: Any, *bounds: Bounds, given: tuple[Family, ...] = (), later: bool = False) -> Any:
    """Return a dataclass field.

    Args:
        default: its default.
        bounds: of a number; None is allowed where it is the default.
        given: families outside of which a user who gives it gets an error that it does nothing, whatever a preset says.
        later: older run folders lack it; the default applies.
    """
    return dataclasses.field(default=default, metadata={"bounds": bounds, "given": given, "optional": later})


def tag(default: str, given: tuple[Family, ...] = ()) -> Any:
    """Return the dataclass field that names a member of a tagged union, such as ``kind: Literal["conv"] = tag("conv")``."""
    return dataclasses.field(default=default, kw_only=True, metadata={"tag": True, "given": given})


def cached(function: F) -> F:
    """Cache a function of classes, which type checkers take for unhashable."""
    return cast(F, cache(function))


@cached
def hints(kind: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields."""
    return get_type_hints(kind)


@contextmanager
def lenient() -> Iterator[None]:
    """Context manager in which settings are constructed unchecked, while a command line is read for its preset."""
    token = _strict.set(False)
    try:
        yield
    finally:
        _strict.reset(token)


def check_settings(part: Any) -> None:
    """Validate types of nested settings, choices and bounds of a settings object, as its ``__post_init__``.

    Raises:
        SettingError: for the first setting that cannot be.
    """
    if not _strict.get():
        return
    known = hints(type(part))
    for field in dataclasses.fields(part):
        value, hint = getattr(part, field.name), known[field.name]
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise SettingError(field.name, value, f"expected one of {', '.join(map(str, get_args(hint)))}")
        if (kinds := tuple(k for k in get_args(hint) or (hint,) if dataclasses.is_dataclass(k))) and not isinstance(value, kinds):  # type: ignore[arg-type]
            names = " or ".join(k.__name__ for k in kinds if isinstance(k, type))
            raise SettingError(field.name, value, f"expected {names}; {type(part).__name__}.of(...) takes all settings by name")
        if isinstance(value, float) and not math.isfinite(value):
            raise SettingError(field.name, value, "expected a finite number")
        for bounds in field.metadata.get("bounds", ()):
            if value is not None and not bounds.hold(value):
                raise SettingError(field.name, value, f"expected {bounds.words}")


def outside(families: Iterable[Family], tags: Tags) -> Family | None:
    """Return the first family that a run with these tags is not in; a tag that is not known counts as inside."""
    return next((f for f in families if f.tag in tags and tags[f.tag] not in f.values), None)
