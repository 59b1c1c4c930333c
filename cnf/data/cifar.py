"""Safe reader of CIFAR-10's pickled batches, from their folder or archive; no code in them is executed."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from cnf._utils.errors import DataError
from cnf._utils.untrusted import require_file
from cnf.data.rows import Array

__all__ = ["parse_batch", "read_cifar10"]

LARGEST = 2**26  # bytes of a batch; the published batches have 31 million
PIXELS = 3 * 32 * 32
_ARRAYS = (("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"))


class _Inert:
    """Inert replacement of the classes in a pickle: stores its arguments and state."""

    def __init__(self, *given: Any):
        self.given, self.state = given, ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAYS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return type(name, (_Inert,), {})  # a new class each time, since a pickle may set attributes on it


def parse_batch(content: bytes) -> tuple[Array, list[int]]:
    """Parse one batch as pickled by Python 2 and NumPy; return uint8 images (N, 3, 32, 32) and labels.

    No code in the pickle is executed.

    Raises:
        ValueError: for any other content.
    """
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        array, labels = batch[b"data"], batch[b"labels"]
        _, shape, dtype, fortran, pixels = array.state
        fits = dtype.given[0] == b"u1" and not fortran and shape[1:] == (PIXELS,) and len(pixels) == shape[0] * PIXELS
        if not (fits and type(pixels) is bytes and len(labels) == shape[0] and all(type(n) is int for n in labels)):
            raise TypeError("it holds no uint8 images with a label for each")
        return np.frombuffer(pixels, dtype=np.uint8).reshape(-1, 3, 32, 32), labels
    except Exception as error:  # pickle raises many exception types for damaged files
        raise ValueError(f"no CIFAR-10 batch: {error}") from None


def read_cifar10(root: Path, train: bool, download: bool) -> SimpleNamespace:
    """Read ``data`` and ``targets`` of one part, from ``root/cifar-10-batches-py`` or ``root/cifar-10-python.tar.gz``.

    The checksum of each batch is verified. The archive is read without unpacking it.

    Args:
        root: data folder.
        train: read the five training batches instead of the test batch.
        download: download the archive with torchvision.

    Raises:
        RuntimeError: if files are missing or differ from the published ones.
        DataError: if a path is a pipe or device.
    """
    from torchvision.datasets import CIFAR10, utils  # type: ignore[import-untyped]

    listed = CIFAR10.train_list if train else CIFAR10.test_list
    if download:
        utils.download_url(CIFAR10.url, str(root), CIFAR10.filename, CIFAR10.tgz_md5)
    parts: list[tuple[Array, list[int]]] = []
    folder, archive = root / CIFAR10.base_folder, root / CIFAR10.filename
    if not folder.exists() or download:
        contents = _from_archive(archive, CIFAR10.tgz_md5, [f"{CIFAR10.base_folder}/{name}" for name, _ in listed])
    else:
        contents = [_from_file(folder / name) for name, _ in listed]
    for (name, md5), content in zip(listed, contents, strict=True):
        _require_checksum(name, io.BytesIO(content), md5)
        parts.append(parse_batch(content))
    return SimpleNamespace(data=np.concatenate([x for x, _ in parts]), targets=[n for _, labels in parts for n in labels])


def _require_checksum(name: str, file: io.BufferedIOBase, md5: str) -> None:
    if hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() != md5:
        raise RuntimeError(f"{name} is not the published file: its checksum differs")


def _size(path: Path) -> int:
    if not path.exists():
        raise RuntimeError(f"{path.name} is missing")
    return require_file(path, DataError)


def _from_file(path: Path) -> bytes:
    if _size(path) > LARGEST:
        raise RuntimeError(f"{path.name} is larger than any batch")
    return path.read_bytes()


def _from_archive(path: Path, md5: str, names: list[str]) -> list[bytes]:
    _size(path)
    with path.open("rb") as file:
        _require_checksum(path.name, file, md5)
    contents: dict[str, bytes] = {}
    with tarfile.open(path, "r|gz") as archive:  # a stream: members are read in order
        for member in archive:
            if member.name not in names:
                continue
            part = archive.extractfile(member) if member.isreg() and member.size <= LARGEST else None
            if part is None:
                raise RuntimeError(f"{member.name} is a link, or larger than any batch")
            contents[member.name] = part.read()
    if len(contents) < len(names):
        raise RuntimeError(f"{path.name} lacks {', '.join(sorted(set(names) - set(contents)))}")
    return [contents[name] for name in names]
