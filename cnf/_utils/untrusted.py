"""Validation of untrusted files before they are read."""

from __future__ import annotations

import mmap
import os
import re
import stat
import zipfile
from pathlib import Path

from cnf._utils.errors import CNFError

__all__ = ["check_pickle", "memory", "refusal", "require_file", "zip_members"]

BOMB_BYTES, BOMB_RATIO = 2**28, 500  # a zip archive that unpacks to more than both is a decompression bomb
_ALLOCATES = re.compile(rb"c(?:__builtin__|builtins)\nbytearray\n")


def require_file(path: Path, error: type[CNFError], name: str | None = None) -> int:
    """Return the size in bytes of a regular file; reject pipes and devices, which could block forever.

    Args:
        path: the file.
        error: exception class to raise.
        name: name of the file in messages.

    Raises:
        error: for a missing or inaccessible file, or a folder, pipe or device.
    """
    name = name or repr(str(path))
    try:
        status = path.stat()
    except FileNotFoundError:
        raise error(f"{name} does not exist") from None
    except (OSError, ValueError) as problem:  # ValueError: a null character in the name
        raise error(f"{name} cannot be read: {problem}") from None
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{name} does not exist as a file: it is a folder, pipe or device")
    return status.st_size


def zip_members(archive: zipfile.ZipFile, size: int, *, stored: bool = False) -> list[zipfile.ZipInfo]:
    """Return the files in a zip archive after validating their sizes; read them in memory, do not unpack them.

    Args:
        archive: archive opened for reading.
        size: size of the archive in bytes.
        stored: accept only uncompressed members, as torch writes them.

    Raises:
        zipfile.BadZipFile: for members that share a name or bytes, are encrypted or compressed by an unsupported
            method, or unpack to more than 256 MiB and 500 times the archive's size (a decompression bomb).
    """
    members = archive.infolist()
    if len({m.filename for m in members}) < len(members):
        raise zipfile.BadZipFile("two of its members have one name")
    for member in members:
        # other methods do not bound the output of one read
        allowed = (zipfile.ZIP_STORED,) if stored else (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if member.flag_bits & 1 or member.compress_type not in allowed:
            kind = "encrypted" if member.flag_bits & 1 else f"compressed by method {member.compress_type}"
            raise zipfile.BadZipFile(f"its member {member.filename[:80]!r} is {kind}, expected plain or deflated bytes")
        if member.compress_type == zipfile.ZIP_STORED and member.file_size != member.compress_size:
            raise zipfile.BadZipFile(f"its member {member.filename[:80]!r} claims two sizes")
    if sum(m.compress_size for m in members) > size:
        raise zipfile.BadZipFile("its members claim more bytes than the file has, or share them")
    total = sum(m.file_size for m in members)
    if total > BOMB_BYTES and total > BOMB_RATIO * size:
        raise zipfile.BadZipFile(f"it claims to unpack to {total:,} bytes, {total // max(size, 1):,} times its size: a bomb?")
    return [m for m in members if not m.is_dir()]


def check_pickle(path: Path) -> None:
    """Check what torch's ``weights_only`` reader does not: checksums, compression and bytearray allocations.

    Raises:
        ValueError: for an empty file, an allocation of a bytearray, or a TorchScript archive.
        zipfile.BadZipFile: for a zip archive with a damaged or compressed member.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise ValueError("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if _ALLOCATES.search(content):
                raise ValueError("it allocates a bytearray, which no weights need")
        file.seek(0)
        if file.read(4) != b"PK\x03\x04":
            return
        with zipfile.ZipFile(file) as archive:
            for member in zip_members(archive, size, stored=True):
                if member.filename.endswith("constants.pkl"):
                    raise ValueError("it is a TorchScript archive, which holds code")
                with archive.open(member) as part:
                    while part.read(2**20):  # zipfile verifies the checksum at the end
                        pass


def refusal(error: BaseException) -> str:
    """Return in one line why torch's ``weights_only`` reader refused a file, without its advice to read it unsafely.

    Example:
        >>> refusal(ValueError("Re-run with `weights_only` set to `False`. WeightsUnpickler error: Unsupported global: os.system"))
        'Unsupported global: os.system'
    """
    text = " ".join(str(error).split())
    if "weights_only" in text:
        for start in ("from a trusted source. ", "WeightsUnpickler error: "):
            text = text.rpartition(start)[2]
        for end in (" Please use ", " Check the documentation"):
            text = text.partition(end)[0]
    return text


def memory() -> int:
    """Return the machine's memory in bytes; 2**62 if it is unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 2**62
