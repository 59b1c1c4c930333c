"""Training logs: metrics.jsonl and the progress on the screen."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from cnf._utils.output import finite, reports_progress
from cnf._utils.progress import LINE_SECONDS, duration_text
from cnf.flow import Flow
from cnf.runs import write_atomic
from cnf.training.callbacks import Callback, Run, TimeLimit
from cnf.training.interpretation import place

__all__ = ["ProgressBar", "RunLogger"]


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


class ProgressBar(Callback):
    """Progress bar on a terminal, a line every 30 seconds elsewhere, and in both a line for each validation.

    What is printed is selected by :func:`cnf._utils.output.output`.

    Args:
        read_seconds: longest age of the metrics shown.
        entropy: differential entropy of the data in nats, where it is known, with which validations are compared.
    """

    def __init__(self, read_seconds: float = 5.0, entropy: float | None = None):
        self.read_seconds, self.entropy = read_seconds, entropy
        self._bar: Any = None

    def on_start(self, run: Run) -> None:
        """Open the bar."""
        self._first, self._shown = run.state.step, time.monotonic()
        if not run.quiet and sys.stderr.isatty() and reports_progress(bar=True):
            self._bar = tqdm(total=run.steps, initial=run.state.step, dynamic_ncols=True, unit="step")

    def on_row(self, run: Run, row: dict[str, Any]) -> None:
        """Print a line for a validation."""
        if "validation" in row:
            self._shown = time.monotonic()
            run.report("validation", f"step {run.state.step:,}/{run.steps:,}: {self._validation(run, row)}", **{"unit": run.objective.unit, **row})

    def on_step_end(self, run: Run) -> None:
        """Advance the bar by one step, or print a line after 30 seconds without one."""
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._metrics(run)), refresh=False)
            self._bar.update(1)
        elif not run.quiet and time.monotonic() - self._shown > LINE_SECONDS:
            self._shown = time.monotonic()
            left = self._seconds_left(run)
            parts = [*self._metrics(run), f"about {duration_text(left)} left"]
            text = f"step {run.state.step:,}/{run.steps:,}: {', '.join(parts)}"
            run.report("progress", text, step=run.state.step, steps=run.steps, seconds_left=left)

    def on_end(self, run: Run) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _validation(self, run: Run, row: dict[str, Any]) -> str:
        """Return a validation with its interpretation, and the time that is left."""
        state, value = run.state, row["validation"]
        if run.validation is None:
            left = [f"about {duration_text(self._seconds_left(run))} left"] if state.step < run.steps and state.step > self._first else []
            return ", ".join(["no validation data", *self._metrics(run), *left])
        best, form = f"best {self._number(run, state.best)} at {state.best_step:,}", self._number(run, value)
        about = {"value": value, "unit": run.objective.unit, "true_entropy": self.entropy, "levels": getattr(run.model, "levels", None)}
        verdicts = [place(about | {"accuracy": row.get("validation_accuracy"), "outputs": getattr(run.model, "outputs", 0)})]
        validated = any("validation" in earlier for earlier in run.history[:-1])
        verdicts.append("still improving" if state.best_step == state.step and validated else best if validated else "")
        parts = [f"validation {form} {run.objective.unit}".rstrip() + (f" ({text})" if (text := ", ".join(filter(None, verdicts))) else "")]
        parts += [f"NFE {row['validation_nfe']:.0f}"] if "validation_nfe" in row else []
        if state.step < run.steps and state.step > self._first:
            parts += [f"{self._speed(run):,.0f} samples/s", f"about {duration_text(self._seconds_left(run))} left"]
        return ", ".join(parts)

    def _metrics(self, run: Run) -> list[str]:
        """Return the latest known metrics, the speed and the best validation."""
        state, metrics = run.state, run.state.metrics
        if time.monotonic() - metrics.read_at > self.read_seconds:
            metrics.read()
        parts, last = [], metrics.last
        if last is not None:
            text = "batch skipped"
            if last.taken:
                text = f"{self._number(run, last.values[run.objective.metric])} {run.objective.metric_unit}".rstrip()
                text += f", NFE {last.values['nfe']:g}" if last.values["nfe"] else ""
            parts.append(text)
        parts.append(f"{self._speed(run):,.0f} samples/s")
        return [*parts, f"best {self._number(run, state.best)} at {state.best_step:,}"] if math.isfinite(state.best) else parts

    def _number(self, run: Run, value: float) -> str:
        return f"{value:.4f}" if isinstance(run.model, Flow) else f"{value:.4g}"  # a predictor's loss may fall by orders of magnitude

    def _speed(self, run: Run) -> float:
        """Return rows per second."""
        return (run.state.step - self._first) * run.batches.size / max(1e-9, run.elapsed)

    def _seconds_left(self, run: Run) -> float:
        """Return the estimated seconds to the last step, or to the time limit."""
        seconds = (run.steps - run.state.step) * run.elapsed / max(1, run.state.step - self._first)
        limit = run.callback(TimeLimit)
        return seconds if limit is None or limit.seconds is None else max(0.0, min(seconds, limit.seconds - run.elapsed))


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError
    number: float = value
    return number


def _line(row: dict[str, Any]) -> str:
    return json.dumps(finite(row)) + "\n"
