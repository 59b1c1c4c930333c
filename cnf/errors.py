"""The exceptions that the package raises on purpose; every message says what was wrong and what to try."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["CNFError", "CheckpointError", "ConfigError", "DataError", "SolverError", "TrainingError"]


class CNFError(Exception):
    """Base of every exception that ``cnf`` raises deliberately."""


class ConfigError(CNFError, ValueError):
    """An argument or option has a value that cannot work."""


class DataError(CNFError, ValueError):
    """A data set, file or batch cannot be used as it is."""


class SolverError(CNFError, RuntimeError):
    """An ODE solve failed: a non-finite state, an underflowing step, or too many steps.

    Args:
        message: what happened, and what to try.
        s: where, in the solver's own time from 0 to 1.
        step: the size of the step in that time.
        largest: the largest entry of the state there.
        rows: the rows of the batch that could not be solved, where they are known; the others could.
        exhausted: whether the solve took all the steps, or evaluations, that it may.
        cause: where ``rows`` are known, why the first of them failed.
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
        """The same error, naming the block, and where known its times from start to stop."""
        place = ""
        if times is not None:
            start, stop = times
            block, place = f"{block}, t {start:g} to {stop:g}", self.where(start, stop - start)
        cause = f"{block}: {self.cause}{place}" if self.cause else ""
        return SolverError(f"{block}: {self}{place}", rows=self.rows, cause=cause)

    def where(self, start: float, span: float) -> str:
        """Place, step size and state in the time from ``start`` to ``start + span``, in words; "" where not known.

        Example:
            >>> SolverError("too many steps", s=0.25, step=0.001, largest=1e9).where(0.0, 2.0)
            ' (at t = 0.5, step size 0.002, largest entry 1e+09)'
        """
        if self.s is None or self.step is None:
            return ""
        entry = "" if self.largest is None else f", largest entry {self.largest:.3g}"
        return f" (at t = {start + self.s * span:.4g}, step size {self.step * abs(span):.3g}{entry})"


class CheckpointError(CNFError, RuntimeError):
    """A run folder or a checkpoint cannot be read."""


class TrainingError(CNFError, RuntimeError):
    """Training cannot go on."""
