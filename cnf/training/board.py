"""TensorBoard logging that never stops a run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

__all__ = ["Board"]


class Board:
    """TensorBoard logger. After a failed write (a full disk) it reports once and logs no more.

    Args:
        folder: the run folder.
        step: events of later steps, logged before a resume, are purged.
        say: prints a message.
        rows: metrics to log at once, when the files are recreated.
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
        """Log the numbers of one row at step ``row["step"]``."""

        def add(writer: SummaryWriter) -> None:
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(name, value, row["step"])

        self._try(add)

    def flush(self) -> None:
        """Flush the event files."""
        self._try(lambda w: w.flush())

    def close(self) -> None:
        """Close the event files and restore the thread exception hook."""
        self._try(lambda w: w.close())
        self._writer = None
        if threading.excepthook == self._quietly:
            threading.excepthook = self._hook

    def _try(self, do: Callable[[SummaryWriter], object]) -> None:
        if self._writer is not None:
            try:
                do(self._writer)
            except (OSError, ValueError) as error:  # ValueError: the file was closed by an earlier failure
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if self._writer is not None:
            with suppress(OSError, ValueError):
                self._writer.close()
        self._writer = None
        self.say(f"TensorBoard's files in {self.folder} cannot be written ({error}): training goes on without; metrics.jsonl has all")

    def _quietly(self, found: threading.ExceptHookArgs) -> None:
        # TensorBoard's writer thread dies on a full disk; the next call in this thread raises the same error
        if not (isinstance(found.exc_value, OSError) and type(found.thread).__name__ == "_AsyncWriterThread"):
            self._hook(found)
