"""Training logs: metrics.jsonl, TensorBoard and the progress bar."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from cnf.flow import Flow
from cnf.runs import write_atomic
from cnf.training.callbacks import Callback, Run

__all__ = ["ProgressBar", "RunLogger", "TensorBoardLogger"]

LINE_SECONDS = 60.0  # without a terminal: longest interval between two progress lines


class RunLogger(Callback):
    """Logger of metrics.jsonl in a run folder. Numbers that JSON lacks (inf, nan) are null there.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path):
        self.path = folder / "metrics.jsonl"
        self.rows: list[dict[str, Any]] = []
        self.say: Callable[[str], object] = lambda line: None
        self._log: IO[str] | None = None
        self._training = False

    def setup(self, run: Run) -> None:
        """Remember the rows to log."""
        self.rows, self.say = run.history, run.say

    def on_start(self, run: Run) -> None:
        """Open the file."""
        self._training = True
        self._open()

    def on_row(self, run: Run, row: dict[str, Any]) -> None:
        """Append a row."""
        if self._log is not None:
            try:
                self._log.write(_line(row))
            except OSError:  # a full disk: the next flush rewrites all rows
                self._close()

    def on_end(self, run: Run) -> None:
        """Close the file."""
        self._training = False
        self._close()

    def cut(self, rows: int) -> None:
        """Reload the first ``rows`` lines of metrics.jsonl without damaged ones, and rewrite the file."""
        del self.rows[:]
        damaged = 0
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

    def flush(self) -> None:
        """Flush all recorded rows to disk.

        Raises:
            CheckpointError: if metrics.jsonl cannot be written; the rows are kept for the next call.
        """
        if not self._training:
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

    def _open(self) -> None:
        with suppress(OSError):  # the next flush retries and reports the error
            self._log = self.path.open("a", encoding="utf-8")

    def _close(self) -> None:
        if self._log is not None:
            with suppress(OSError):
                self._log.close()
            self._log = None


class TensorBoardLogger(Callback):
    """TensorBoard logger. After a failed write (a full disk) it reports once and logs no more.

    Args:
        folder: the run folder; events go into its ``tensorboard``.
    """

    def __init__(self, folder: Path):
        self.folder = folder / "tensorboard"
        self._writer: Any = None
        self._hook = threading.excepthook

    def setup(self, run: Run) -> None:
        """Remember where messages go."""
        self.say = run.say

    def on_start(self, run: Run) -> None:
        """Open the event file; events of later steps, logged before a resume, are purged."""
        self._hook = threading.excepthook
        threading.excepthook = self._quietly
        self._begin(run.state.step)

    def on_row(self, run: Run, row: dict[str, Any]) -> None:
        """Log the numbers of a row at step ``row["step"]``."""
        self._add(row)

    def on_end(self, run: Run) -> None:
        """Close the event file."""
        self._try(lambda writer: writer.close())
        self._writer = None
        if threading.excepthook == self._quietly:
            threading.excepthook = self._hook

    def flush(self) -> None:
        """Flush the event file."""
        self._try(lambda writer: writer.flush())

    def recreate(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write the event files of a removed folder again."""
        self._try(lambda writer: writer.close())
        self._begin(-1)
        for row in rows:
            self._add(row)

    def _begin(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(str(self.folder), purge_step=step + 1)
        except OSError as error:
            self._give_up(error)

    def _add(self, row: dict[str, Any]) -> None:
        def add(writer: Any) -> None:
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(name, value, row["step"])

        self._try(add)

    def _try(self, write: Callable[[Any], object]) -> None:
        if self._writer is not None:
            try:
                write(self._writer)
            except (OSError, ValueError) as error:  # ValueError: the file was closed by an earlier failure
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if self._writer is not None:
            with suppress(OSError, ValueError):
                self._writer.close()
        self._writer = None
        self.say(f"TensorBoard's files in {self.folder} cannot be written ({error}): training goes on without; metrics.jsonl has all")

    def _quietly(self, failure: threading.ExceptHookArgs) -> None:
        # TensorBoard's writer thread dies on a full disk; the next call in this thread raises the same error
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__name__ == "_AsyncWriterThread"):
            self._hook(failure)


class ProgressBar(Callback):
    """Progress bar on a terminal; otherwise a line at each validation, or after a minute without one.

    Args:
        read_seconds: longest age of the metrics shown.
    """

    def __init__(self, read_seconds: float = 5.0):
        self.read_seconds = read_seconds
        self._bar: Any = None

    def on_start(self, run: Run) -> None:
        """Open the bar."""
        self._first, self._shown = run.state.step, time.monotonic()
        if not run.quiet and sys.stderr.isatty():
            self._bar = tqdm(total=run.steps, initial=run.state.step, dynamic_ncols=True, unit="step")

    def on_step_end(self, run: Run) -> None:
        """Advance the bar by one step, or print a line."""
        if self._bar is not None:
            self._bar.set_postfix_str(self._text(run), refresh=False)
            self._bar.update(1)
        elif not run.quiet and ("validation" in run.figures or time.monotonic() - self._shown > LINE_SECONDS):
            self._shown = time.monotonic()
            run.say(f"step {run.state.step}/{run.steps}: {self._text(run)}")

    def on_end(self, run: Run) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _text(self, run: Run) -> str:
        """Return the latest known metrics, the speed and the validation."""
        state, metrics = run.state, run.state.metrics
        if time.monotonic() - metrics.read_at > self.read_seconds:
            metrics.read()
        form = ".4f" if isinstance(run.model, Flow) else ".4g"  # a predictor's loss may fall by orders of magnitude
        parts, last = [], metrics.last
        if last is not None:
            text = "batch skipped"
            if last.taken:
                text = f"{last.values[run.objective.metric]:{form}} {run.objective.metric_unit}".rstrip()
                text += f", NFE {last.values['nfe']:g}" if last.values["nfe"] else ""
            parts.append(text)
        speed = (state.step - self._first) / max(1e-9, run.elapsed)
        parts.append(f"{speed * run.batches.size:,.0f} samples/s")
        if state.best_weights:
            now = f"validation {run.figures['validation']:{form}}, " if "validation" in run.figures else ""
            parts.append(f"{now}best {state.best:{form}} at {state.best_step}")
        return ", ".join(parts)


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError
    number: float = value
    return number


def _line(row: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite) + "\n"
