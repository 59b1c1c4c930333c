"""SIGINT and SIGTERM while a run trains: noted, and obeyed between two steps."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Abandoned", "Interrupted", "Signals"]


class Interrupted(Exception):
    """A signal asked for the end; everything up to ``step`` is saved."""

    def __init__(self, number: int, step: int):
        super().__init__(f"interrupted by signal {number} at step {step}")
        self.number, self.step = number, step


class Abandoned(BaseException):
    """A signal came while something was computed that can be computed again."""


class Signals:
    """Inside ``with``, the first SIGINT or SIGTERM sets ``number``, and a second one raises KeyboardInterrupt or SystemExit(143).

    Args:
        shared: the process is one of several, whose launcher passes signals on and repeats them: a second one is ignored (the
            launcher itself kills what does not end in time).
        quiet: say nothing.
    """

    def __init__(self, *, shared: bool = False, quiet: bool = False) -> None:
        self.shared, self.quiet = shared, quiet
        self.number = 0
        self._old: dict[int, Any] = {}
        self._open = False

    @contextmanager
    def abandoning(self) -> Iterator[None]:
        """Inside, where nothing is changed that lasts, the first signal ends the work at once, however long it takes.

        Several processes that wait for each other go on to the end of their step.

        Raises:
            Abandoned: when the signal comes.
        """
        self._open = not self.shared
        try:
            yield
        finally:
            self._open = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and self.shared:
            return
        if self.number:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.number = number
        self._tell()
        if self._open:
            self._open = False
            raise Abandoned

    def _tell(self) -> None:
        if self.quiet:
            return
        with suppress(OSError):  # not print(), which a handler may interrupt in the middle
            again = b"" if self.shared else b" (once more: at once, back to the last checkpoint)"
            os.write(2, b"\nstopping, and saving" + again + b"\n")

    def __enter__(self) -> Signals:
        with suppress(ValueError):  # not in the main thread, where signals cannot be handled
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
