"""SIGINT and SIGTERM while a run trains: noted, and obeyed between two steps."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupted", "Signals"]


class Interrupted(Exception):
    """A signal asked for the end; everything up to ``step`` is saved."""

    def __init__(self, number: int, step: int):
        super().__init__(f"interrupted by signal {number} at step {step}")
        self.number, self.step = number, step


class Signals:
    """Inside ``with``, the first SIGINT or SIGTERM sets ``number`` and a second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.number = 0
        self._old: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        with suppress(OSError):  # not print(), which a handler may interrupt in the middle
            os.write(2, b"\nstopping after this step (once more: at once, back to the last checkpoint)\n")

    def __enter__(self) -> Signals:
        with suppress(ValueError):  # not in the main thread, where signals cannot be handled
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
