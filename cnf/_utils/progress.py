"""Progress reports on stderr: an updating line in a terminal, else a line every 30 seconds."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import TypeVar

from cnf._utils.output import emit, reports_progress

__all__ = ["LINE_SECONDS", "Progress", "duration_text", "progress"]

T = TypeVar("T")
LINE_SECONDS = 30.0  # between lines and before the first, so that short work prints nothing
TERMINAL_SECONDS = 1.0  # between updates in a terminal


class Progress:
    """Context manager that reports the progress of long work.

    Reports come from a thread, since one unit of work may take minutes.

    Args:
        what: name of the work.
        unit: plural name of its units.
        quiet: disable reports.

    Example:
        >>> with Progress("evaluation", "solves") as work:
        ...     work.update(1, 4)
        >>> work.done, work.total
        (1, 4)
    """

    def __init__(self, what: str, unit: str, *, quiet: bool = False):
        self.what, self.unit, self.done, self.total = what, unit, 0, 0
        self.quiet = quiet or not reports_progress()
        self._ended = threading.Event()
        self._reporter = threading.Thread(target=self._report, daemon=True)

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        if not self.quiet:
            self._reporter.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if not self.quiet:
            self._reporter.join()

    def update(self, done: int, total: int) -> None:
        """Set the numbers of finished and total units."""
        self.done, self.total = done, total

    def text(self) -> str:
        """Return the progress, elapsed time and estimated remaining time as text."""
        spent = time.monotonic() - self._started
        left = f", about {duration_text(spent / self.done * (self.total - self.done))} left" if self.done else ""
        return f"{self.what}: {self.done:,} of {self.total:,} {self.unit} in {duration_text(spent)}{left}"

    def _report(self) -> None:
        terminal, shown = sys.stderr.isatty() and reports_progress(bar=True), False
        with suppress(OSError, ValueError):  # stderr is closed
            while not self._ended.wait(TERMINAL_SECONDS if terminal else LINE_SECONDS):
                shown = terminal
                if terminal:
                    sys.stderr.write(f"\r{self.text()[: shutil.get_terminal_size().columns - 1]}\x1b[K")
                    sys.stderr.flush()
                else:
                    emit("progress", self.text(), what=self.what, done=self.done, total=self.total)
            if shown:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()


def progress(values: Iterable[T], what: str, total: int, unit: str = "images") -> Iterator[T]:
    """Iterate over ``values`` and report progress."""
    with Progress(what, unit) as work:
        for done, value in enumerate(values):
            work.update(done, total)
            yield value


def duration_text(seconds: float) -> str:
    """Return a duration in seconds as text.

    Example:
        >>> duration_text(42), duration_text(600), duration_text(9000)
        ('42 seconds', '10 minutes', '2.5 hours')
    """
    if seconds < 100:
        return f"{seconds:.0f} second{'s' if f'{seconds:.0f}' != '1' else ''}"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
