"""Progress of long work on stderr: a bar in a terminal, elsewhere a line every half minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

__all__ = ["LINE_SECONDS", "Progress", "duration_text", "progress"]

T = TypeVar("T")
LINE_SECONDS = 30.0  # between lines, and before the first one, so that short work is silent
BAR_DELAY = 1.0  # seconds before a bar appears


class Progress:
    """Report how much of some work is done.

    Args:
        what: name of the work.
        total: units of work.
        unit: name of the units, in the plural.
        quiet: report nothing.

    Example:
        >>> with Progress("evaluation", 2, quiet=True) as work:
        ...     work.advance()
        >>> work.done
        1
    """

    def __init__(self, what: str, total: int, unit: str = "batches", *, quiet: bool = False):
        self.what, self.total, self.unit, self.quiet, self.done = what, total, unit, quiet, 0
        self._started = self._reported = time.monotonic()
        self._bar: Any = None
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm(desc=what, total=total, unit=f" {unit}", delay=BAR_DELAY, leave=False, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int = 1) -> None:
        """Count finished units, and report where a line is due."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif not self.quiet and self.done < self.total and (now := time.monotonic()) - self._reported >= LINE_SECONDS:
            self._reported, spent = now, now - self._started
            left = duration_text(spent / self.done * (self.total - self.done)) if self.done else "unknown"
            line = f"{self.what}: {self.done:,} of {self.total:,} {self.unit} in {duration_text(spent)}, about {left} left"
            print(line, file=sys.stderr, flush=True)


def progress(items: Iterable[T], what: str, total: int, unit: str = "images") -> Iterator[T]:
    """Iterate over ``items`` and report how many are done."""
    with Progress(what, total, unit) as work:
        for item in items:
            yield item
            work.advance()


def duration_text(seconds: float) -> str:
    """Seconds in words.

    Example:
        >>> duration_text(42), duration_text(600), duration_text(9000)
        ('42 seconds', '10 minutes', '2.5 hours')
    """
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
