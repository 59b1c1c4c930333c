"""Former names of public things, which warn for one release."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

__all__ = ["aliases", "renamed_arguments", "warn_deprecated"]

P = ParamSpec("P")
R = TypeVar("R")


def warn_deprecated(text: str) -> None:
    """Give a DeprecationWarning at the nearest caller outside cnf and torch."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("cnf", "torch", "importlib"):
        frame = frame.f_back
    place, registry = frame.f_globals, frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, DeprecationWarning, frame.f_code.co_filename, frame.f_lineno, place.get("__name__"), registry)


def aliases(module: str, **names: str) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that resolves former names to new ones with a DeprecationWarning.

    Args:
        module: the module's ``__name__``.
        names: new name by former name; with dots, an object of another module.
    """

    def resolve(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_deprecated(f"{module}.{name} is called {names[name]}; the former name will be removed by the next release")
        home, _, present = names[name].rpartition(".")
        return getattr(import_module(home or module), present)

    return resolve


def renamed_arguments(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that accepts former keyword names with a DeprecationWarning.

    Args:
        names: new name by former name.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for former in names.keys() & kwargs.keys():
                warn_deprecated(f"the argument {former!r} is called {names[former]!r}; the former name will be removed by the next release")
                kwargs[names[former]] = kwargs.pop(former)
            return function(*args, **kwargs)

        return call

    return decorate
