"""TensorBoard's files, which no run shall fail for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

__all__ = ["Board"]


class Board:
    """Curves for TensorBoard. Where they cannot be written (a full disk), a line says so, and there are none from there on.

    Args:
        folder: the run folder.
        step: what TensorBoard has of later steps, from before a resume, is void.
        say: takes a line for the reader.
        rows: what is shown from the beginning, for files that are made anew.
    """

    def __init__(self, folder: Path, step: int, say: Callable[[str], None], rows: Iterable[dict[str, Any]] = ()):
        self.folder, self.say = folder / "tensorboard", say
        self._writer: SummaryWriter | None = None
        self._hook = threading.excepthook
        threading.excepthook = self._quietly
        try:
            self._writer = SummaryWriter(str(self.folder), purge_step=step + 1)
        except OSError as error:
            self._give_up(error)
        for row in rows:
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """The numbers of one row, ``row["step"]`` its step."""

        def add(writer: SummaryWriter) -> None:
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(name, value, row["step"])

        self._try(add)

    def flush(self) -> None:
        """Everything is in the files."""
        self._try(lambda w: w.flush())

    def close(self) -> None:
        """No more."""
        self._try(lambda w: w.close())
        self._writer = None
        if threading.excepthook == self._quietly:
            threading.excepthook = self._hook

    def _try(self, do: Callable[[SummaryWriter], object]) -> None:
        if self._writer is not None:
            try:
                do(self._writer)
            except (OSError, ValueError) as error:  # ValueError: a file that an earlier failure has closed
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if self._writer is not None:
            with suppress(OSError, ValueError):
                self._writer.close()
        self._writer = None
        self.say(f"TensorBoard's files in {self.folder} cannot be written ({error}): training goes on without; metrics.jsonl has all")

    def _quietly(self, found: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread of its own, which dies of a full disk; the next call in this thread raises the same
        if not (isinstance(found.exc_value, OSError) and type(found.thread).__name__ == "_AsyncWriterThread"):
            self._hook(found)
