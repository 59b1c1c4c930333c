"""trainer.pt: the resume state of a run with a checksum, and the previous one."""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from cnf._utils.errors import CheckpointError
from cnf._utils.untrusted import check_pickle, refusal, require_file
from cnf.runs.files import temporary_name, why, write_atomic

__all__ = ["has_trainer", "load_trainer", "save_trainer"]

TRAINER = ("trainer.pt", "trainer.previous.pt")
# the checksum is the comment at the end of torch.save's zip file, so that torch.load reads the file unchanged; it
# digests all bytes before the comment, with the comment's length as zero (as torch wrote it)
_MARK, _HEX = b"cnf sha256 ", 64
_TAIL = len(_MARK) + _HEX


def save_trainer(folder: Path, state: dict[str, Any]) -> None:
    """Write trainer.pt and keep the previous one as trainer.previous.pt, intact if the new one cannot be written."""
    path = folder / TRAINER[0]
    if path.exists():
        _keep_previous(path, folder / TRAINER[1])

    def write(temporary: Path) -> None:
        torch.save(state, temporary)
        _append_checksum(temporary)

    write_atomic(path, write)


def _keep_previous(path: Path, previous: Path) -> None:
    """Link the current checkpoint to a second name, so that a whole checkpoint exists at any moment."""
    temporary = temporary_name(previous)
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)
        os.replace(temporary, previous)
    except OSError as error:
        raise CheckpointError(f"{previous} cannot be written: {why(previous, error)}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def has_trainer(folder: Path) -> bool:
    """Return whether there is a checkpoint to resume from, damaged or not."""
    return any((folder / name).exists() for name in TRAINER)


def load_trainer(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the resume state, and a notice if trainer.pt is damaged and the previous one replaces it.

    No code in them runs: torch's ``weights_only`` reader accepts only tensors and plain values.
    """
    reasons = []
    for name in TRAINER:
        try:
            _verify_checksum(folder / name)
            check_pickle(folder / name)
            state = torch.load(folder / name, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise TypeError(f"it holds a {type(state).__name__}")
        except Exception as error:  # torch raises many types for a damaged file
            reasons.append(f"{name}: {type(error).__name__}: {refusal(error)[:120]}")
            continue
        if reasons:  # otherwise the next save would keep the damaged one as the previous
            os.replace(folder / name, folder / TRAINER[0])
        return state, f"{folder}: using the previous checkpoint ({'; '.join(reasons)})" if reasons else ""
    raise CheckpointError(f"{folder} has no checkpoint that can be read ({'; '.join(reasons)})")


def _append_checksum(path: Path) -> None:
    with path.open("rb+") as file:
        file.seek(-22, os.SEEK_END)
        end = file.read()
        if end[:4] != b"PK\x05\x06" or end[-2:] != b"\0\0":
            raise CheckpointError(f"{path}: torch.save wrote no zip file that can take a checksum: use torch 2.6 or later")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(-2, os.SEEK_END)
        file.write(_TAIL.to_bytes(2, "little") + _MARK + digest.encode())


def _verify_checksum(path: Path) -> None:
    size = require_file(path, CheckpointError, "it")
    digest, rest = hashlib.sha256(), size - _TAIL - 2
    with path.open("rb") as file:
        while rest > 0 and (chunk := file.read(min(rest, 2**20))):
            digest.update(chunk)
            rest -= len(chunk)
        tail = file.read()
    digest.update(b"\0\0")
    if tail[:-_HEX] != _TAIL.to_bytes(2, "little") + _MARK:
        raise ValueError("it has no checksum: it is damaged, half-written or of an earlier version")
    if tail[-_HEX:] != digest.hexdigest().encode():
        raise ValueError("it is damaged: its checksum differs")
