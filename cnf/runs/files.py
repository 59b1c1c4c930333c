"""Atomic file writes."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from cnf._utils.errors import CheckpointError, CNFError

__all__ = ["STAGES", "leftovers", "one_line", "remove_temporary", "sync_folder", "temporary_name", "why", "write_atomic", "write_text"]

# set by tests only, to fail or exit at one of STAGES; called there with the file
hook: Callable[[str, Path], None] | None = None
STAGES = ("before", "written", "synced", "renamed", "done")

_TEMPORARY = re.compile(r"\.(.+)\.\d+\.tmp")
# files that only the owner of a run folder writes (see cnf.runs.lock): under the lock their temporaries are stale
_OWN = (
    "config.json", "metrics.jsonl", "model.safetensors", "report.html", "result.json", "test_nll.npz", "test_predictions.npz",
    "trainer.previous.pt", "trainer.pt",
)  # fmt: skip
_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "your quota is used up: free some space",
    errno.EFBIG: "the file exceeds the size limit: raise it (ulimit -f)",
    errno.EROFS: "the file system is read-only: make it writable, or use another folder",
    errno.EACCES: "you may not write there: change the folder's permissions, or use another folder",
    errno.EPERM: "you may not write there: change the folder's permissions, or use another folder",
    errno.ENOENT: "its folder was removed: restore it",
    errno.ENOTDIR: "its folder is a file: replace it by a folder",
    errno.ELOOP: "it is a link, which is not followed: remove it",
}


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file atomically: to a temporary name in the same folder, synchronised to disk, then renamed.

    After a crash, even of the machine, the file is either the old one or the new one.

    Raises:
        CheckpointError: if the file cannot be written, with the reason and what to try; the old file is intact.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_atomic(Path(folder, "a.txt"), lambda p: write_text(p, "whole"))
        ...     [(p.name, p.read_text()) for p in Path(folder).iterdir()]
        [('a.txt', 'whole\\n')]
    """
    temporary = temporary_name(path)
    try:
        _at("before", path)
        temporary.unlink(missing_ok=True)  # remove whatever has that name, links included
        write(temporary)
        _at("written", temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        _at("synced", temporary)
        os.replace(temporary, path)
        _at("renamed", path)
        sync_folder(path.parent)
        _at("done", path)
    except CNFError:
        raise
    # torch and safetensors raise their own errors for a full disk
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {why(path, error)}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Return this process's temporary name for ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sync_folder(folder: Path) -> None:
    """Synchronise a folder's entries to disk, where the system supports it."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def why(path: Path, error: BaseException) -> str:
    """Return why a write failed and what to try."""
    number = getattr(error, "errno", None)
    text = (getattr(error, "strerror", None) or one_line(error)) if isinstance(error, OSError) else one_line(error)
    if number is None and not path.parent.is_dir():
        number = errno.ENOENT
    elif number is None and not isinstance(error, OSError):
        with suppress(OSError):
            number = errno.ENOSPC if shutil.disk_usage(path.parent).free < 2**20 else None
    return f"{text} ({_ADVICE[number]})" if number in _ADVICE else text


def leftovers(folder: Path) -> list[Path]:
    """Return a killed process's temporary files in a run folder, of those files that only the folder's owner writes."""
    names = (_TEMPORARY.fullmatch(p.name) for p in folder.iterdir())
    return sorted(folder / m.string for m in names if m is not None and m[1] in _OWN)


def remove_temporary(folder: Path) -> None:
    """Remove :func:`leftovers`; requires the folder's lock."""
    with suppress(OSError):
        for path in leftovers(folder):
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text with a final newline."""
    path.write_text(text + "\n", encoding="utf-8")


def one_line(error: BaseException, length: int = 300) -> str:
    """Shorten an error message of torch to one line of at most ``length`` characters."""
    text = " ".join(str(error).replace("Error(s) in loading state_dict for Flow:", "").split())
    return text if len(text) <= length else text[: length - 3] + "..."


def _at(stage: str, path: Path) -> None:
    if hook is not None:
        hook(stage, path)
