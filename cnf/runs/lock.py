"""Lock of a run folder: one writing process at a time."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from cnf._utils.errors import CheckpointError, ConfigError
from cnf.runs.files import remove_temporary, why

__all__ = ["LOCK", "locked", "renew"]

LOCK = ".lock"  # in the run folder while a process writes there; holds its pid and host
WAIT = 0.2  # seconds; the file may have been removed by its last owner between opening and locking
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # errors of a file system without locks


class _Held:
    """A lock file of this process; filelock does the locking, names and removal are done here."""

    def __init__(self, folder: Path):
        self.path, self.depth = folder / LOCK, 0
        self.take()

    def take(self) -> None:
        self.lock = FileLock(
            self.path, timeout=WAIT, thread_local=False, fallback_to_soft=False, poll_interval=0.02, on_acquired=self._sign
        )
        try:
            self.lock.acquire()
        except Timeout:
            self._refuse()
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                where = self.path if error.errno == errno.ELOOP else self.path.parent
                raise CheckpointError(f"{where} cannot be written: {why(self.path, error)}") from None
            if _alive(_owner(self.path)):
                self._refuse()
            with self.path.open("r+b") as file:
                self._sign(file.fileno())

    def current(self) -> bool:
        """Return whether the lock file is still the one that was locked."""
        try:
            return os.path.samestat(os.stat(self.path), self.stat)
        except OSError:
            return False

    def leave(self) -> None:
        with suppress(OSError):
            if self.current():
                self.path.unlink()  # removed while locked: filelock does not accept a removed file
        self.lock.release()

    def _sign(self, number: int) -> None:
        self.stat = os.fstat(number)
        os.ftruncate(number, 0)
        os.write(number, f"{os.getpid()} {socket.gethostname()}\n".encode())

    def _refuse(self) -> None:
        process, _, host = _owner(self.path).partition(" ")
        who = f"process {process}" if process.isdecimal() else "another process"
        who += f" on {host}" if process.isdecimal() and host not in ("", socket.gethostname()) else ""
        raise ConfigError(f"{self.path.parent} is in use by {who}: wait for it, stop it, or use another folder")


_held: dict[tuple[int, str], _Held] = {}  # by process, since a forked child inherits the dictionary but not the locks


def _key(folder: Path) -> tuple[int, str]:
    return os.getpid(), os.path.realpath(folder)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context manager that makes this process the only writer of ``folder``, which is created if missing.

    The kernel frees the lock when its owner ends, even by kill -9; temporary files of a killed owner are removed. A process
    may take the lock repeatedly. Readers need no lock.

    Raises:
        ConfigError: if another process holds the lock (it is named).
        CheckpointError: if the folder cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as name, locked(Path(name)), locked(Path(name)):
        ...     Path(name, LOCK).read_text().split()[0] == str(os.getpid())
        True
    """
    key = _key(folder)
    if key not in _held:
        _held[key] = _Held(folder)
        remove_temporary(folder)
    held = _held[key]
    held.depth += 1
    try:
        yield
    finally:
        held.depth -= 1
        if not held.depth and _held.get(_key(folder)) is held:
            del _held[key]
            held.leave()


def renew(folder: Path) -> None:
    """Take the lock of a folder again that was removed and recreated while locked; errors as :func:`locked`."""
    held = _held.get(_key(folder))
    if held is not None and not held.current():
        held.lock.release()  # of the removed file
        held.take()


def _owner(path: Path) -> str:
    """Return the process and host in a lock file, "" if it is unreadable (filelock has refused links)."""
    with suppress(OSError), path.open("rb") as file:
        return file.read(300).decode(errors="replace").strip()
    return ""


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
