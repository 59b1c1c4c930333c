"""Safe reading of NumPy files: arrays by key, and conversion of images to uint8 (N, C, H, W)."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from cnf._utils.errors import DataError
from cnf._utils.untrusted import memory, require_file, zip_members
from cnf.data.rows import Array
from cnf.data.splits import MAXIMUM_CLASSES, Rows

__all__ = ["MAP_FROM", "as_images", "dark", "read_numpy", "rows_of_keys"]

MAP_FROM = 2**31  # bytes; an .npy file of this size or more is memory-mapped
MANY_OF_NOTHING = 2**24  # largest dimension of an array with zero elements

_SPELLINGS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
_KEYS = ("images", "x", "data")
_LABELS = ("labels", "y")
_DARK = 32  # a highest grey level below this suggests a scale other than 0 to 255
_WHAT = "expected exactly one of 'images', 'x', 'data' (or x_train, x_test and perhaps x_validation), optionally 'labels'"


def read_numpy(path: Path) -> dict[str, Array]:
    """Read the arrays of an .npz file by key, or of an .npy file under ``"x"``; pickles are refused.

    An .npy file of 2 GiB or more is memory-mapped (private, copy on write: the file is never changed). Members of an
    .npz file are read as arrays and never unpacked to disk. The size of a file has to match its header, and the members
    of an .npz file their checksums.

    Raises:
        DataError: if the file is missing, damaged, larger than memory, a decompression bomb, or holds Python objects.
    """
    size = require_file(path, DataError)
    try:
        with path.open("rb") as file:
            start = file.read(6)
            file.seek(0)
            if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
                return _read_zip(file, size)
            if start != b"\x93NUMPY":
                pickled = " (is it a pickle? those can run code)" if start.startswith(b"\x80") else ""
                raise ValueError(f"it is neither an .npy nor an .npz file{pickled}")
            if size < MAP_FROM:
                return {"x": _read_array(file)}
        mapped = np.load(path, mmap_mode="c", allow_pickle=False)
        if mapped.offset + mapped.nbytes != size:
            raise ValueError("it has more bytes than its header says")
        return {"x": _native(mapped)}
    except Exception as error:  # zipfile and numpy raise many exception types for damaged files
        if "allow_pickle" in str(error) or "Python objects" in str(error):
            raise DataError(
                f"{str(path)!r} holds pickled Python objects, which can run code when read and are refused; "
                "save plain numbers: numpy.save(path, numpy.asarray(x, dtype=numpy.float32))"
            ) from None
        raise DataError(f"{str(path)!r} cannot be read as a NumPy file: {error or type(error).__name__}") from error


def _read_zip(file: IO[bytes], size: int) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    with zipfile.ZipFile(file) as archive:
        members = zip_members(archive, size)
        total = sum(m.file_size for m in members)
        if total > memory():
            raise ValueError(f"it unpacks to {total:,} bytes, more than the memory has")
        for member in members:
            if not member.filename.endswith(".npy"):
                raise ValueError(f"its member {member.filename[:80]!r} is no array")
            with archive.open(member) as part:
                arrays[member.filename.removesuffix(".npy")] = _read_array(part)
    return arrays


def _read_array(file: IO[bytes]) -> Array:
    array: Array = np.lib.format.read_array(file, allow_pickle=False)
    if file.read(1):  # reading to the end also verifies the checksum of a zip member
        raise ValueError("it has more bytes than its header says")
    if array.nbytes == 0 and max(array.shape, default=0) > MANY_OF_NOTHING:
        raise ValueError(f"it claims the shape {array.shape} and holds nothing")
    return _native(array)


def _native(array: Array) -> Array:
    """Return the array in this machine's byte order, which pandas and torch require."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def rows_of_keys(arrays: dict[str, Array], name: str) -> dict[str, Rows]:
    """Return rows by the keys of data/README.md: under ``"all"``, or by part if the file contains a split.

    Raises:
        DataError: for missing or ambiguous keys, parts of different shape or dtype, labels that do not match, or
            unusable images.
    """
    candidates = [keys for stem in _KEYS for keys in ({"all": stem} if stem in arrays else {}, _parts_of(arrays, stem)) if keys]
    if len(candidates) != 1:
        raise DataError(f"{name!r} holds the keys {sorted(arrays)}; {_WHAT}")
    keys = candidates[0]
    missing = [part for part in ("train", "test") if part not in keys]
    if "all" not in keys and missing:
        raise DataError(f"{name!r} gives its own split by {', '.join(keys.values())} but lacks {', '.join(missing)}; {_WHAT}")
    named = [{"all": stem} if "all" in keys and stem in arrays else _parts_of(arrays, stem) for stem in _LABELS]
    labels = next((n for n in named if n and all(_usable(k, arrays[k]) for k in n.values())), {})
    absent = [part for part in keys if part not in labels]
    if labels and absent:
        raise DataError(f"{name!r} has labels for {', '.join(labels)} but not for {', '.join(absent)}; expected all or none")
    kinds = {part: (arrays[key].shape[1:], str(arrays[key].dtype)) for part, key in keys.items()}
    if len(set(kinds.values())) != 1:
        raise DataError(f"{', '.join(keys.values())} of {name!r} differ in row shape or dtype: {kinds}")
    idle = sorted(set(arrays) - {*keys.values(), *labels.values()})
    notices = [f"keys of the file that were not used: {', '.join(idle)}"] if idle else []
    parts = {}
    for part, key in keys.items():
        x, own = arrays[key], arrays[labels[part]] if labels else None
        if own is not None and own.ndim == 2 and own.shape[1] == 1:
            own = own[:, 0]
        if own is not None and own.shape != x.shape[:1]:
            raise DataError(f"{labels[part]} of {name!r} must have shape {x.shape[:1]}, one for each row, got {own.shape}")
        images, said = as_images(x, name if part == "all" else f"{name} [{key}]") if x.ndim in (3, 4) else (x, [])
        parts[part] = Rows(images, own, notices + said)
    return parts


def _parts_of(arrays: dict[str, Array], stem: str) -> dict[str, str]:
    """Return keys such as x_train or train_x, by part."""
    keys: dict[str, str] = {}
    for part, spellings in _SPELLINGS.items():
        matching = [key for s in spellings for key in (f"{stem}_{s}", f"{s}_{stem}") if key in arrays]
        if matching:
            keys[part] = matching[0]
    return keys


def _usable(key: str, values: Array) -> bool:
    """Return whether an array holds labels; ``y``, possibly a target, must have few distinct integers or strings."""
    return "labels" in key or (values.dtype.kind in "iubU" and len(np.unique(values)) <= MAXIMUM_CLASSES)


def as_images(x: Array, name: str) -> tuple[Array, list[str]]:
    """Convert images (N, H, W), (N, H, W, C) or (N, C, H, W), C 1 or 3, to uint8 (N, C, H, W); also return notices.

    Integers 0 to 255 of another dtype, and floats that are exact multiples of 1/255 in [0, 1] (the output of
    ``ToTensor``), convert without loss. Other values would need rounding and are rejected.

    Raises:
        DataError: for values that are not 8-bit grey levels, or a shape with an ambiguous channel axis.

    Example:
        >>> images, notices = as_images(np.full((5, 8, 8, 3), 51 / 255), "grey")
        >>> images.shape, images.dtype.name, int(images[0, 0, 0, 0])
        ((5, 3, 8, 8), 'uint8', 51)
    """
    if x.ndim == 3:
        x = x[:, None]
    else:
        first, last = x.shape[1] in (1, 3), x.shape[3] in (1, 3)
        if first == last:
            hint = "; is the last channel transparency? x[..., :-1] drops it" if x.shape[3] in (2, 4) else ""
            raise DataError(
                f"images of {name!r} must have shape (N, H, W), (N, H, W, C) or (N, C, H, W), with C = 1 or 3 channels on "
                f"{'only ' if first else ''}one of the two axes, got {x.shape}{hint}"
            )
        x = x if first else x.transpose(0, 3, 1, 2)
    if x.size == 0:
        raise DataError(f"images of {name!r} must have at least one pixel, got shape {x.shape}")
    x, notices = _grey_levels(x, name)
    return x, notices + dark(x)


def dark(x: Array) -> list[str]:
    """Return a notice of uint8 images (N, C, H, W) whose scale may not be that of 0 to 255, or none."""
    highest = int(x[:: max(1, len(x) // 10_000)].max())
    if highest >= _DARK:
        return []
    return [
        f"the highest grey level is {highest}, almost black on the scale of 0 to 255; if {highest} is meant as white, "
        "stretch the images to 255 in the file and set nbits to their number of bits"
    ]


def _grey_levels(x: Array, name: str) -> tuple[Array, list[str]]:
    """Convert to uint8 without loss; also return notices."""
    if x.dtype == np.uint8:
        return x, []
    expected = f"images of {name!r} must be uint8 grey levels 0 to 255, or floats in [0, 1]"
    if x.dtype.kind not in "iuf":
        hint = " (black and white: (255 * x).astype('uint8'), and nbits=1)" if x.dtype.kind == "b" else ""
        raise DataError(f"{expected}, got dtype {x.dtype}{hint}")
    low, high = x.min(), x.max()
    if not np.isfinite([low, high]).all():
        raise DataError(f"{expected}, got NaN or infinite values")
    if low < 0 or high > 255:
        raise DataError(f"{expected}, got values from {low:g} to {high:g}")
    factor, allowed = (255.0, 1e-3) if x.dtype.kind == "f" and high <= 1 else (1.0, 0.0)
    if x.dtype.kind == "f" and factor > 1:
        allowed += 0.5 * 255 * float(np.finfo(x.dtype).eps)
    out = np.empty(x.shape, dtype=np.uint8)
    for start in range(0, len(x), 4096):
        values = factor * x[start : start + 4096].astype(np.float64)
        rounded = np.rint(values)
        if np.abs(values - rounded).max() > allowed:
            if factor == 1.0:
                raise DataError(f"{expected}, got floats from {low:g} to {high:g} that are no whole grey levels; rescale them in the file")
            raise DataError(
                f"images of {name!r} must be multiples of 1/255 if they are floats in [0, 1], since bits/dim are defined for grey "
                "levels; round them: (255 * x).round().astype('uint8')"
            )
        out[start : start + 4096] = rounded
    how = "floats k/255" if factor > 1 else f"whole numbers of type {x.dtype}"
    return out, [f"{how} read as uint8 grey levels, which loses nothing"]
