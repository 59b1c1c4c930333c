"""Exceptions of the package."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from numbers import Integral, Real

__all__ = [
    "CNFError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Interrupted",
    "SolverError",
    "TrainingError",
    "constant_column",
    "require_at_least",
    "require_inside",
    "unknown_name",
]  # fmt: skip


class CNFError(Exception):
    """Base class of the exceptions that ``cnf`` raises deliberately."""


class ConfigError(CNFError, ValueError):
    """Raised for an invalid value of an argument or option."""


def unknown_name(argument: str, value: object, expected: Iterable[str], owner: str = "") -> ConfigError:
    """Return the error for a value that is none of the names that ``owner`` expects; it suggests the nearest one.

    Example:
        >>> unknown_name("method", "rk5", ["euler", "rk4"], "FixedGrid")
        ConfigError("method='rk5' is unknown for FixedGrid: expected 'euler' or 'rk4'; did you mean 'rk4'?")
    """
    names = list(expected)
    near = get_close_matches(str(value), names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    listed = " or ".join([", ".join(map(repr, names[:-1])), repr(names[-1])] if len(names) > 1 else map(repr, names))
    suffix = f" for {owner}" if owner else ""
    return ConfigError(f"{argument}={value!r} is unknown{suffix}: expected {listed}{hint}")


def require_at_least(least: int, **arguments: int | None) -> None:
    """Raise a ConfigError for the first argument that is no integer or below ``least``; None passes.

    Example:
        >>> require_at_least(1, draws=3, batch_size=0)
        Traceback (most recent call last):
        cnf.errors.ConfigError: batch_size must be at least 1, got 0
    """
    for name, value in arguments.items():
        if not isinstance(value, Integral | None) or isinstance(value, bool):
            raise ConfigError(f"{name} must be an integer, got {value!r}")
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")


def require_inside(low: float, high: float, **arguments: float) -> None:
    """Raise a ConfigError for the first argument that is no number or outside the open interval (low, high).

    Example:
        >>> require_inside(0, 1, q="0.5")
        Traceback (most recent call last):
        cnf.errors.ConfigError: q must be inside (0, 1), got '0.5'
    """
    for name, value in arguments.items():
        if not isinstance(value, Real) or not low < value < high:
            expected = "positive and finite" if (low, high) == (0, math.inf) else f"inside ({low:g}, {high:g})"
            raise ConfigError(f"{name} must be {expected}, got {value!r}")


class DataError(CNFError, ValueError):
    """Raised when a data set, file or batch cannot be used."""


def constant_column(label: str, value: float) -> DataError:
    """Return the error for a column with a single value.

    Example:
        >>> constant_column("column 2", 1.5)
        DataError('column 2 is constant at 1.5 and has no density: drop it, or add noise')
    """
    return DataError(f"{label} is constant at {value + 0.0:g} and has no density: drop it, or add noise")


class SolverError(CNFError, RuntimeError):
    """Raised when an ODE solve fails: a non-finite state, step size underflow, or too many steps.

    Args:
        message: what happened, and what to try.
        s: position in the solver's time, from 0 to 1.
        step: step size in the solver's time.
        largest: largest entry of the state there.
        rows: rows of the batch that could not be solved, if known; all others were solved.
        exhausted: True if the limit of steps or evaluations was reached.
        cause: if ``rows`` are known, why the first of them failed.
    """

    def __init__(
        self,
        message: str,
        *,
        s: float | None = None,
        step: float | None = None,
        largest: float | None = None,
        rows: Sequence[int] = (),
        exhausted: bool = False,
        cause: str = "",
    ):
        super().__init__(message)
        self.s, self.step, self.largest = s, step, largest
        self.rows, self.exhausted, self.cause = tuple(rows), exhausted, cause

    def inside(self, block: str, times: tuple[float, float] | None) -> SolverError:
        """Return the same error with the block's name and, if known, its start and stop times in the message."""
        where = ""
        if times is not None:
            start, stop = times
            block, where = f"{block}, t {start:g} to {stop:g}", self.where(start, stop - start)
        cause = f"{block}: {self.cause}{where}" if self.cause else ""
        return SolverError(f"{block}: {self}{where}", rows=self.rows, cause=cause)

    def where(self, start: float, span: float) -> str:
        """Format position, step size and state for the time interval from ``start`` to ``start + span``; "" if unknown.

        Example:
            >>> SolverError("too many steps", s=0.25, step=0.001, largest=1e9).where(0.0, 2.0)
            ' (at t = 0.5, step size 0.002, largest entry 1e+09)'
        """
        if self.s is None or self.step is None:
            return ""
        entry = "" if self.largest is None else f", largest entry {self.largest:.3g}"
        return f" (at t = {start + self.s * span:.4g}, step size {self.step * abs(span):.3g}{entry})"


class CheckpointError(CNFError, RuntimeError):
    """Raised when a run folder or a checkpoint cannot be read."""


class TrainingError(CNFError, RuntimeError):
    """Raised when training cannot continue."""


class Interrupted(Exception):
    """Raised after a signal ended training; everything up to ``step`` is saved."""

    def __init__(self, number: int, step: int):
        super().__init__(f"interrupted by signal {number} at step {step}")
        self.number, self.step = number, step


for _error in (CNFError, ConfigError, DataError, SolverError, CheckpointError, TrainingError, Interrupted):
    _error.__module__ = "cnf.errors"  # the public name, in tracebacks and pickles
