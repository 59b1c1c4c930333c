"""What the programs print: text, only warnings and results (``--quiet``), or one JSON object a line (``--json``)."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["emit", "emit_error", "finite", "output", "reports_progress", "speaks", "take_output", "terminal_width"]

ESSENTIAL = ("data", "warning", "result", "error")  # what --quiet leaves
ABOVE_THE_BAR = ("warning", "validation", "progress")  # as text on stderr, above a progress bar


@dataclass(frozen=True)
class _Mode:
    quiet: bool = False
    json: bool = False


_mode = _Mode()


def take_output(words: Sequence[str]) -> tuple[list[str], dict[str, bool]]:
    """Return a command line without ``--quiet`` and ``--json``, and the options of :func:`output` that they are.

    Example:
        >>> take_output(["train", "digits", "--json"])
        (['train', 'digits'], {'json': True})
    """
    flags = {word: word[2:] for word in ("--quiet", "--json")}
    return [word for word in words if word not in flags], {flags[word]: True for word in words if word in flags}


@contextmanager
def output(*, quiet: bool = False, json: bool = False) -> Iterator[None]:
    """Context manager that selects what :func:`emit` prints; an outer selection stays in force."""
    global _mode
    before = _mode
    _mode = _Mode(quiet or before.quiet, json or before.json)
    try:
        yield
    finally:
        _mode = before


def reports_progress(*, bar: bool = False) -> bool:
    """Return whether progress is reported; with ``bar``, whether by a line that changes, which JSON has none of."""
    return not (_mode.quiet or (bar and _mode.json))


def emit(event: str, text: str, /, **values: Any) -> None:
    """Print a line of text, or an object with the event, the text and values.

    Args:
        event: ``"message"``, ``"start"``, ``"data"``, ``"progress"``, ``"validation"``, ``"warning"`` or ``"result"``.
        text: one or several lines.
        **values: further entries of the JSON object; not finite numbers become null.

    Example:
        >>> with output(json=True):
        ...     emit("validation", "step 5: 1.25 nats", step=5, validation=1.25)
        {"event": "validation", "text": "step 5: 1.25 nats", "step": 5, "validation": 1.25}
    """
    if _mode.quiet and event not in ESSENTIAL:
        return
    if _mode.json:
        line = json.dumps(finite({"event": event, "text": text} | values), allow_nan=False, default=_plain)
        sys.stdout.write(f"{line}\n")  # in one piece: reports of progress come from another thread
        sys.stdout.flush()
    elif event not in ABOVE_THE_BAR:
        print(text, flush=True)
    elif speaks():
        from tqdm import tqdm  # here, so that lists and help need not import it

        tqdm.write(text, file=sys.stderr)


def terminal_width() -> int:
    """Return the width of the terminal: COLUMNS if it is set, 80 without a terminal.

    In a pipe it is that of the terminal of the other streams, since a pager shows the text there.
    """
    stated = os.environ.get("COLUMNS", "")
    if stated.isdecimal() and int(stated):
        return int(stated)
    for stream in (sys.__stdout__, sys.__stderr__, sys.__stdin__):
        with suppress(AttributeError, OSError, ValueError):
            if columns := os.get_terminal_size(stream.fileno()).columns:  # type: ignore[union-attr]
                return columns
    return 80


def speaks() -> bool:
    """Return whether this process is rank 0 or the only one; the standard output of others is discarded."""
    return os.environ.get("RANK", "0") == "0"


def emit_error(text: str, code: int) -> None:
    """Print an error and its exit code as a JSON object; text is on stderr already."""
    if _mode.json:
        emit("error", text, code=code)


def finite(value: Any) -> Any:
    """Return a JSON value whose numbers that are not finite are None.

    Example:
        >>> finite({"a": [1.0, float("nan")], "b": (float("inf"),)})
        {'a': [1.0, None], 'b': [None]}
    """
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")
