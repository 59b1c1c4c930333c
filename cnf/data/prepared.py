"""Prepared image sets: decoded once into a uint8 file that later runs read or memory-map."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cnf._utils.errors import DataError
from cnf.data.arrays import read_numpy
from cnf.data.folders import ARRAYS
from cnf.data.rows import Array

__all__ = ["find_prepared", "prepare", "reduce_bits", "stamp"]

Blocks = Callable[[], Iterator[Array]]  # each call returns a new iterator over uint8 blocks (n, C, H, W)


def reduce_bits(images: Array, nbits: int) -> Array:
    """Return the ``nbits`` most significant bits of uint8 images: x // 2**(8 − nbits), with 2**nbits levels.

    Example:
        >>> reduce_bits(np.array([0, 7, 8, 255], dtype=np.uint8), 5).tolist()
        [0, 0, 1, 31]
    """
    return images if nbits == 8 else images >> np.uint8(8 - nbits)


def stamp(paths: Iterable[Path], *settings: Any) -> str:
    """Return a fingerprint of the sources and settings, twelve hexadecimal digits.

    Files enter by name, size and modification time; folders by modification time (a file added, removed or renamed),
    with their sub-folders and the array files in them. An image overwritten in place is not detected: that would need a
    ``stat`` call for each of a million files at every start.
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
    """Return the images that :func:`prepare` wrote for the same sources, or None.

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


def prepare(folder: Path, stem: str, mark: str, blocks: Blocks, shape: tuple[int, int, int], nbits: int) -> tuple[Array, list[str]]:
    """Return images, uint8 (N, C, H, W), and notices; read ``folder/stem-mark.npy``, or decode and write it first.

    The file is written under a temporary name and renamed when complete; it can be deleted at any time. If it cannot be
    written, the images stay in memory, with a notice.

    Args:
        folder: folder of prepared files, created if missing.
        stem: part, size and bits.
        mark: fingerprint of the source, see :func:`stamp`.
        blocks: source of the images.
        shape: shape of one image.
        nbits: bits kept of each value.

    Raises:
        DataError: for blocks of another shape or dtype, no images, or a damaged prepared file.
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
        again = f"decoded into memory, and again at the next start, because {str(folder)!r} cannot be written: {error}"
        return np.concatenate(list(_checked(blocks, shape, nbits))), [again]
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return read_numpy(path)["x"], [f"decoded once into {path.name}; later runs read that"]


def _checked(blocks: Blocks, shape: tuple[int, int, int], nbits: int) -> Iterator[Array]:
    count = 0
    for block in blocks():
        if block.dtype != np.uint8 or block.shape[1:] != shape:
            raise DataError(f"images must be uint8 of shape {shape}, got {block.dtype} of shape {block.shape[1:]}")
        count += len(block)
        yield reduce_bits(block, nbits)
    if count == 0:
        raise DataError("the set must hold at least one image, got none")


def _write(path: Path, blocks: Iterator[Array], shape: tuple[int, int, int]) -> None:
    """Write an .npy file block by block; not memory-mapped, so that a full disk raises instead of crashing."""
    header = {"descr": "|u1", "fortran_order": False}
    with path.open("wb") as file:
        # numpy pads the header for a growing first dimension, so it can be rewritten once the number is known
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
