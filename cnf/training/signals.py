"""SIGINT and SIGTERM during training: recorded, and handled between two steps."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from cnf.training.callbacks import Callback, Run

__all__ = ["Abandoned", "Signals"]


class Abandoned(BaseException):
    """Raised by a signal inside a computation that can be repeated."""


class Signals(Callback):
    """Handlers of SIGINT and SIGTERM while training: the first signal saves and stops, the second stops at once.

    The first signal sets ``number``, the second raises KeyboardInterrupt or SystemExit(143). Of several processes, whose
    launcher forwards and repeats signals, a second signal is ignored; the launcher kills those that do not end in time.
    """

    def __init__(self) -> None:
        self.shared = self.quiet = False
        self.number = 0
        self._old: dict[int, Any] = {}
        self._open = False

    @contextmanager
    def abandoning(self) -> Iterator[None]:
        """Context manager in which the first signal aborts the computation at once; for work without lasting effects.

        Several processes, which wait for each other, complete their step instead.

        Raises:
            Abandoned: on the signal.
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
        self._report()
        if self._open:
            self._open = False
            raise Abandoned

    def _report(self) -> None:
        if self.quiet:
            return
        with suppress(OSError):  # not print(), which a handler may interrupt half-way
            again = b"" if self.shared else b" (once more: at once, back to the last checkpoint)"
            os.write(2, b"\nstopping, and saving" + again + b"\n")

    def on_start(self, run: Run) -> None:
        """Install the handlers."""
        self.number, self.shared, self.quiet = 0, run.group.size > 1, not run.group.main
        with suppress(ValueError):  # signals can be handled in the main thread only
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._note)

    def on_end(self, run: Run) -> None:
        """Restore the handlers of before."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
