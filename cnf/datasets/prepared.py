"""Large image sets, decoded once into one uint8 file that later runs map into memory."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cnf.datasets.arrays import read_numpy
from cnf.datasets.folders import ARRAYS
from cnf.datasets.rows import Array
from cnf.errors import DataError

__all__ = ["find_prepared", "prepare", "reduce_bits", "stamp"]

Blocks = Callable[[], Iterator[Array]]  # uint8 (n, C, H, W), n at a time, anew at each call


def reduce_bits(images: Array, nbits: int) -> Array:
    """The ``nbits`` most significant bits of uint8 images: x // 2**(8 − nbits), with 2**nbits levels.

    Example:
        >>> reduce_bits(np.array([0, 7, 8, 255], dtype=np.uint8), 5).tolist()
        [0, 0, 1, 31]
    """
    return images if nbits == 8 else images >> np.uint8(8 - nbits)


def stamp(paths: Iterable[Path], *settings: Any) -> str:
    """Twelve digits that change with the sources and the settings.

    Files count by name, size and time; folders by the time of their last change (a file added, removed or renamed),
    with that of their sub-folders, and the arrays in them as files. A picture that is overwritten in place is not
    noticed: that would take a look at each of a million files at every start.
    """
    seen = []
    for path in paths:
        inside: list[Path] = []
        if path.is_dir():
            with os.scandir(path) as entries:
                inside = sorted(Path(e.path) for e in entries if e.is_dir() or e.name.lower().endswith(ARRAYS))
        for p in (path, *inside):
            status = p.stat()
            seen.append(f"{p.name} {status.st_mtime_ns} {0 if p.is_dir() else status.st_size}")
    return hashlib.sha256(repr((seen, settings)).encode()).hexdigest()[:12]


def find_prepared(folder: Path, stem: str, mark: str, shape: tuple[int, int, int]) -> Array | None:
    """What :func:`prepare` wrote earlier for the same sources, or None.

    Raises:
        DataError: for a damaged file.
    """
    path = folder / f"{stem}-{mark}.npy"
    if not path.exists():
        return None
    images = read_numpy(path)["x"]
    if images.dtype != np.uint8 or images.shape[1:] != shape:
        raise DataError(f"{str(path)!r} is damaged: it holds {images.dtype} {images.shape}; delete it")
    return images


def prepare(
    folder: Path, stem: str, mark: str, blocks: Blocks, shape: tuple[int, int, int], nbits: int
) -> tuple[Array, list[str]]:
    """The images as uint8 (N, C, H, W), from ``folder/stem-mark.npy`` if it is there, else decoded and written there.

    The file is written under a temporary name and renamed when whole; it can be deleted at any time. Where it cannot be
    written, the images are kept in memory, with a notice.

    Args:
        folder: of prepared files; made if need be.
        stem: part, size and bits.
        mark: of the source, see :func:`stamp`.
        blocks: the source.
        shape: of one image.
        nbits: bits kept of each value.

    Raises:
        DataError: for blocks of another shape, no images, or a prepared file that is damaged.
    """
    path = folder / f"{stem}-{mark}.npy"
    images = find_prepared(folder, stem, mark, shape)
    if images is not None:
        return images, [f"read from {path.name}, which an earlier run decoded"]
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(temporary, _checked(blocks, shape, nbits), shape)
        os.replace(temporary, path)
    except OSError as error:
        kept = list(_checked(blocks, shape, nbits))
        again = "decoded into memory, and again at the next start"
        return np.concatenate(kept), [f"{again}, because {str(folder)!r} cannot be written: {error}"]
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return read_numpy(path)["x"], [f"decoded once into {path.name}; later runs read that"]


def _checked(blocks: Blocks, shape: tuple[int, int, int], nbits: int) -> Iterator[Array]:
    count = 0
    for block in blocks():
        if block.dtype != np.uint8 or block.shape[1:] != shape:
            raise DataError(f"images are {block.dtype} of shape {block.shape[1:]}; expected uint8 {shape}")
        count += len(block)
        yield reduce_bits(block, nbits)
    if count == 0:
        raise DataError("there is not one image")


def _write(path: Path, blocks: Iterator[Array], shape: tuple[int, int, int]) -> None:
    """An .npy file, block by block. Written, not mapped: a full disk is then an error and not a crash."""
    header = {"descr": "|u1", "fortran_order": False}
    with path.open("wb") as file:
        # numpy leaves room in the header for the first size to grow, so it can be written again when the number is
        # known
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (0, *shape)})
        start, count = file.tell(), 0
        for block in blocks:
            file.write(np.ascontiguousarray(block).data)
            count += len(block)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (count, *shape)})
        if file.tell() != start:
            raise DataError(f"{count} images of shape {shape} do not fit the file's header")
        file.flush()
        os.fsync(file.fileno())
