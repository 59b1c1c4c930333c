"""SIGINT and SIGTERM during training: recorded, and handled between two steps."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Abandoned", "Signals"]


class Abandoned(BaseException):
    """Raised by a signal inside a computation that can be repeated."""


class Signals:
    """Handlers of SIGINT and SIGTERM, active inside ``with``.

    The first signal sets ``number``, the second raises KeyboardInterrupt or SystemExit(143).

    Args:
        shared: the process is one of several, whose launcher forwards and repeats signals: a second signal is ignored,
            and the launcher kills processes that do not end in time.
        quiet: print nothing.
    """

    def __init__(self, *, shared: bool = False, quiet: bool = False) -> None:
        self.shared, self.quiet = shared, quiet
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
        self._tell()
        if self._open:
            self._open = False
            raise Abandoned

    def _tell(self) -> None:
        if self.quiet:
            return
        with suppress(OSError):  # not print(), which a handler may interrupt half-way
            again = b"" if self.shared else b" (once more: at once, back to the last checkpoint)"
            os.write(2, b"\nstopping, and saving" + again + b"\n")

    def __enter__(self) -> Signals:
        with suppress(ValueError):  # signals can be handled in the main thread only
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
