"""Training logs: metrics.jsonl, TensorBoard, the progress bar and messages."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from cnf.checkpoint import write_atomic
from cnf.training.board import Board

__all__ = ["Journal", "Mute"]

LINE_SECONDS = 60.0  # without a terminal: longest interval between two progress lines


class Journal:
    """Logger of one run. Numbers that JSON lacks (inf, nan) are null in metrics.jsonl.

    Args:
        folder: the run folder.
        total: steps of the whole run.
        quiet: show neither progress bar nor messages.
    """

    def __init__(self, folder: Path, total: int, *, quiet: bool = False):
        self.path, self.total, self.quiet = folder / "metrics.jsonl", total, quiet
        self.rows: list[dict[str, Any]] = []
        self._log: IO[str] | None = None
        self._board: Board | None = None
        self._bar: Any = None
        self._said = time.monotonic()

    def cut(self, rows: int) -> None:
        """Reload the first ``rows`` lines of metrics.jsonl without damaged ones, and rewrite the file."""
        self.rows, damaged = [], 0
        for line in self.path.read_bytes().splitlines()[:rows] if self.path.is_file() else []:
            try:
                self.rows.append({k: math.nan if v is None else _number(v) for k, v in json.loads(line).items()})
            except (ValueError, AttributeError, RecursionError):
                damaged += 1
        if damaged:
            self.say(f"{self.path}: {damaged} damaged lines left out; training does not depend on them")
        self.write(self.path)

    def write(self, path: Path) -> None:
        """Write all rows to ``path``.

        Raises:
            CheckpointError: if the file cannot be written.
        """
        text = "".join(map(_line, self.rows))

        def save(temporary: Path) -> None:
            temporary.write_text(text, encoding="utf-8")

        write_atomic(path, save)

    @contextmanager
    def opened(self, step: int) -> Iterator[None]:
        """Keep log files and progress bar open while the run trains from ``step`` on."""
        self._board = Board(self.path.parent, step, self.say)
        bare = self.quiet or not sys.stderr.isatty()
        try:
            with tqdm(total=self.total, initial=step, disable=bare, dynamic_ncols=True, unit="step") as self._bar:
                self._open()
                yield
        finally:
            self._board.close()
            self._close()
            self._board = self._bar = None

    def record(self, row: dict[str, Any]) -> None:
        """Log one row of metrics at step ``row["step"]``."""
        self.rows.append(row)
        if self._log is not None:
            try:
                self._log.write(_line(row))
            except OSError:  # a full disk: the next flush rewrites all rows
                self._close()
        if self._board is not None:
            self._board.add(row)

    def flush(self) -> None:
        """Flush all recorded rows to disk.

        Raises:
            CheckpointError: if metrics.jsonl cannot be written; the rows are kept for the next call.
        """
        if self._board is None:  # not training
            return
        try:
            if self._log is not None:
                self._log.flush()
                os.fsync(self._log.fileno())
                if not os.path.samestat(os.stat(self.path), os.fstat(self._log.fileno())):
                    raise FileNotFoundError
        except OSError:
            self._close()
        if self._log is None:
            self.write(self.path)
            self._open()
        self._board.flush()

    def renew(self) -> None:
        """Recreate TensorBoard's files after the folder was recreated; the next flush rewrites metrics.jsonl."""
        self._close()
        if self._board is not None:
            self._board.close()
            self._board = Board(self.path.parent, -1, self.say, self.rows)

    def _open(self) -> None:
        with suppress(OSError):  # the next flush retries and reports the error
            self._log = self.path.open("a", encoding="utf-8")

    def _close(self) -> None:
        if self._log is not None:
            with suppress(OSError):
                self._log.close()
            self._log = None

    def progress(self, step: int, text: Callable[[], str], *, line: bool) -> None:
        """Advance the bar by one step. Without a terminal, print ``text`` if ``line``, or after a minute of silence."""
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix_str(text(), refresh=False)
            self._bar.update(1)
        elif not self.quiet and (line or time.monotonic() - self._said > LINE_SECONDS):
            self.say(f"step {step}/{self.total}: {text()}")

    def say(self, line: str) -> None:
        """Print a message above the progress bar."""
        self._said = time.monotonic()
        if not self.quiet:
            tqdm.write(line, file=sys.stderr)


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError
    found: float = value
    return found


def _line(row: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite) + "\n"


class Mute(Journal):
    """Null logger for ranks above 0."""

    def cut(self, rows: int) -> None:
        """Do nothing."""

    @contextmanager
    def opened(self, step: int) -> Iterator[None]:
        """Open nothing."""
        yield

    def record(self, row: dict[str, Any]) -> None:
        """Discard the row."""

    def progress(self, step: int, text: Callable[[], str], *, line: bool) -> None:
        """Print nothing."""

    def say(self, line: str) -> None:
        """Print nothing."""
