"""What a run tells while it trains: metrics.jsonl, TensorBoard, the progress bar, lines for a log."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from cnf.checkpoint import write_atomic

__all__ = ["Journal"]

LINE_SECONDS = 60.0  # without a terminal: a line at least this often


class Journal:
    """The record of one run. What cannot be a JSON number (inf, nan) is null in metrics.jsonl.

    Args:
        folder: the run folder.
        total: steps of the whole run.
        quiet: neither bar nor lines.
    """

    def __init__(self, folder: Path, total: int, *, quiet: bool = False):
        self.path, self.total, self.quiet = folder / "metrics.jsonl", total, quiet
        self.rows: list[dict[str, Any]] = []
        self._log: IO[str] | None = None
        self._writer: SummaryWriter | None = None
        self._bar: Any = None
        self._said = time.monotonic()

    def cut(self, rows: int) -> None:
        """Read metrics.jsonl back and drop what was written after its first ``rows`` lines."""
        lines = self.path.read_text(encoding="utf-8").splitlines()[:rows] if self.path.exists() else []
        self.rows = [{k: math.nan if v is None else v for k, v in json.loads(line).items()} for line in lines]
        text = "".join(line + "\n" for line in lines)

        def save(path: Path) -> None:
            path.write_text(text, encoding="utf-8")

        write_atomic(self.path, save)

    @contextmanager
    def opened(self, step: int) -> Iterator[None]:
        """The files and the bar, open while the run trains from ``step`` on."""
        # purge_step: what TensorBoard has of later steps, from before a resume, is void
        self._writer = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step + 1)
        bare = self.quiet or not sys.stderr.isatty()
        try:
            with (
                self.path.open("a", encoding="utf-8") as self._log,
                tqdm(total=self.total, initial=step, disable=bare, dynamic_ncols=True, unit="step") as self._bar,
            ):
                yield
        finally:
            self._writer.close()
            self._log = self._writer = self._bar = None

    def record(self, row: dict[str, Any]) -> None:
        """One row, ``row["step"]`` its step."""
        assert self._log is not None and self._writer is not None
        self.rows.append(row)
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._log.write(json.dumps(finite) + "\n")
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        """Everything recorded so far is in the files."""
        if self._log is not None and self._writer is not None:
            self._log.flush()
            self._writer.flush()

    def progress(self, step: int, text: str, *, line: bool) -> None:
        """One more step. Without a terminal ``text`` is printed if ``line``, or if nothing was for a minute."""
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(1)
        elif line or time.monotonic() - self._said > LINE_SECONDS:
            self.say(f"step {step}/{self.total}: {text}")

    def say(self, line: str) -> None:
        """A line for the reader, above the bar."""
        self._said = time.monotonic()
        if not self.quiet:
            tqdm.write(line, file=sys.stderr)
