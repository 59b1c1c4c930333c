"""One process at a time writes into a run folder."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cnf.checkpoint.files import sweep, why
from cnf.errors import CheckpointError, ConfigError

__all__ = ["LOCK", "locked", "renew"]

LOCK = ".lock"  # in the run folder, while a process writes there: its number and its machine
_FAR = 2**30  # where Windows locks a byte: others cannot read what is locked, and must read the number
# a link in a stranger's folder would have its target emptied; a pipe would be waited for
_OPEN = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # what a file system without locks answers


@dataclass
class _Held:
    number: int  # the open file's
    depth: int = 1


_held: dict[str, _Held] = {}


def _forget() -> None:
    """A forked child writes nothing; its copy of the open file would keep the lock when its parent is dead."""
    for held in _held.values():
        with suppress(OSError):
            os.close(held.number)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, this process is the only one that writes into ``folder``, which is made if it is not there.

    The lock is the kernel's, on a file kept open, so that it ends with its owner however that one ends; what a killed
    owner left half-written is removed. A process may take it several times over. Who only reads needs none.

    Raises:
        ConfigError: where another process has it (named).
        CheckpointError: where the folder cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as name, locked(Path(name)), locked(Path(name)):
        ...     Path(name, LOCK).read_text().split()[0] == str(os.getpid())
        True
    """
    key = os.path.realpath(folder)
    if key in _held:
        _held[key].depth += 1
    else:
        _held[key] = _Held(_take(folder))
        sweep(folder)
    try:
        yield
    finally:
        held = _held.get(key)
        if held is not None:
            held.depth -= 1
            if not held.depth:
                del _held[key]
                _leave(folder, held.number)


def renew(folder: Path) -> None:
    """Take the lock of a folder that was removed and made anew while it was locked.

    Raises:
        ConfigError: where another process was faster.
        CheckpointError: where the folder cannot be written.
    """
    held = _held.get(os.path.realpath(folder))
    if held is not None and not _same(folder / LOCK, held.number):
        number = _take(folder)
        with suppress(OSError):
            os.close(held.number)
        held.number = number


def _take(folder: Path) -> int:
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            number = os.open(path, _OPEN, 0o644)
        except OSError as error:
            where = path if error.errno == errno.ELOOP else folder
            raise CheckpointError(f"{where} cannot be written: {why(path, error)}") from None
        try:
            free = _lock(number)
            owner = "" if free else _read(number)
            if not free:
                raise ConfigError(f"{folder} is in use by {_words(owner)}: wait for it, stop it, or take another folder")
            if not _same(path, number):  # its last owner removed it just now
                os.close(number)
                continue
            os.ftruncate(number, 0)
            os.lseek(number, 0, os.SEEK_SET)
            os.write(number, f"{os.getpid()} {socket.gethostname()}\n".encode())
        except OSError as error:
            os.close(number)
            raise CheckpointError(f"{folder} cannot be written: {why(path, error)}") from None
        except ConfigError:
            os.close(number)
            raise
        return number


def _leave(folder: Path, number: int) -> None:
    with suppress(OSError):
        if _same(folder / LOCK, number):
            (folder / LOCK).unlink()  # while it is locked: who opened it meanwhile sees that it is gone
    with suppress(OSError):
        os.close(number)


def _same(path: Path, number: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(number))
    except OSError:
        return False


def _lock(number: int) -> bool:
    """Whether the lock is ours now."""
    if sys.platform == "win32":
        import msvcrt

        try:
            os.lseek(number, _FAR, os.SEEK_SET)
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return not _alive(_read(number))
    return True


def _read(number: int) -> str:
    os.lseek(number, 0, os.SEEK_SET)
    return os.read(number, 300).decode(errors="replace").strip()


def _alive(owner: str) -> bool:
    """Where the file system has no locks: whether the process that wrote its number there lives, as far as one can tell."""
    process, _, host = owner.partition(" ")
    if not process.isdecimal():
        return False
    if host != socket.gethostname():
        return True  # nobody here can know
    if int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _words(owner: str) -> str:
    process, _, host = owner.partition(" ")
    if not process.isdecimal():
        return "another process"
    return f"process {process}" + (f" on {host}" if host and host != socket.gethostname() else "")
