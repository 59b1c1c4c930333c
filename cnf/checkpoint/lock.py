"""Lock of a run folder: one writing process at a time."""

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

LOCK = ".lock"  # in the run folder while a process writes there; holds its pid and host
_FAR = 2**30  # offset of the byte locked on Windows, since a locked byte is unreadable and the pid must be readable
# a link in an untrusted folder would have its target truncated; opening a pipe would block
_OPEN = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # errors of a file system without locks


@dataclass
class _Held:
    number: int  # descriptor of the open file
    depth: int = 1


_held: dict[str, _Held] = {}


def _forget() -> None:
    """Close the locks in a forked child, whose copies would hold them after its parent's death."""
    for held in _held.values():
        with suppress(OSError):
            os.close(held.number)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context manager that makes this process the only writer of ``folder``, which is created if missing.

    The lock is the kernel's, on an open file, so that it ends with its owner, however that ends; temporaries of a
    killed owner are removed. A process may take it repeatedly. Readers need no lock.

    Raises:
        ConfigError: if another process holds the lock (it is named).
        CheckpointError: if the folder cannot be written.

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
    """Take the lock of a folder again that was removed and recreated while locked.

    Raises:
        ConfigError: if another process took it first.
        CheckpointError: if the folder cannot be written.
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
            if not _same(path, number):  # its last owner has just removed it
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
            (folder / LOCK).unlink()  # unlinked while locked: a process that opened it meanwhile notices
    with suppress(OSError):
        os.close(number)


def _same(path: Path, number: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(number))
    except OSError:
        return False


def _lock(number: int) -> bool:
    """Try to lock the open file; return whether it succeeded (without lock support: whether its owner is dead)."""
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
    """Return whether the process named in the lock file is alive, as far as known; for file systems without locks."""
    process, _, host = owner.partition(" ")
    if not process.isdecimal():
        return False
    if host != socket.gethostname():
        return True  # unknown from this machine
    if int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:  # a process of another user
        return True
    return True


def _words(owner: str) -> str:
    process, _, host = owner.partition(" ")
    if not process.isdecimal():
        return "another process"
    return f"process {process}" + (f" on {host}" if host and host != socket.gethostname() else "")
