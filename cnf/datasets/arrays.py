"""Safe reading of NumPy files: arrays by key, and conversion of images to uint8 (N, C, H, W)."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from cnf.datasets.rows import Array
from cnf.datasets.splits import MAXIMUM_CLASSES, Rows
from cnf.errors import DataError
from cnf.strangers import memory, require_file, zip_members

__all__ = ["MAP_FROM", "PARTS", "as_images", "read_numpy", "rows_of_keys"]

MAP_FROM = 2**31  # bytes; an .npy file of this size or more is memory-mapped
MANY_OF_NOTHING = 2**24  # largest dimension of an array with zero elements
PARTS = ("train", "validation", "test")

_SPELLINGS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
_KEYS = ("images", "x", "data")
_LABELS = ("labels", "y")
_DARK = 32  # a highest grey level below this suggests a scale other than 0 to 255
_WHAT = (
    "expected exactly one of 'images', 'x', 'data' (or x_train, x_test and perhaps x_validation), optionally 'labels'"
)


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
        return {"x": mapped}
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
    return array


def rows_of_keys(arrays: dict[str, Array], name: str) -> dict[str, Rows]:
    """Return rows by the keys of data/README.md: under ``"all"``, or by part if the file contains a split.

    Raises:
        DataError: for missing or ambiguous keys, parts of different shape or dtype, labels that do not match, or
            unusable images.
    """
    whole = [k for k in _KEYS if k in arrays]
    split = {k: found for k in _KEYS if (found := _parts_of(arrays, k))}
    if len(whole) + len(split) != 1:
        raise DataError(f"{name!r} holds the keys {sorted(arrays)}; {_WHAT}")
    if whole:
        found = {"all": whole[0]}
        key = next((k for k in _LABELS if k in arrays and _usable(k, arrays[k])), None)
        labels = {"all": key} if key else {}
    else:
        found = next(iter(split.values()))
        missing = [p for p in ("train", "test") if p not in found]
        if missing:
            raise DataError(
                f"{name!r} gives its own split by {', '.join(found.values())} but lacks {', '.join(missing)}; {_WHAT}"
            )
        named = [_parts_of(arrays, k) for k in _LABELS]
        labels = next((n for n in named if n and all(_usable(k, arrays[k]) for k in n.values())), {})
        absent = [p for p in found if p not in labels]
        if labels and absent:
            raise DataError(
                f"{name!r} has labels for {', '.join(labels)} but not for {', '.join(absent)}; expected all or none"
            )
        items = {p: (arrays[k].shape[1:], str(arrays[k].dtype)) for p, k in found.items()}
        if len(set(items.values())) != 1:
            raise DataError(f"{', '.join(found.values())} of {name!r} differ in item shape or dtype: {items}")
    idle = sorted(set(arrays) - {*found.values(), *labels.values()})
    notices = [f"keys of the file that were not used: {', '.join(idle)}"] if idle else []
    parts = {}
    for part, key in found.items():
        x, own = arrays[key], arrays[labels[part]] if part in labels else None
        if own is not None and own.ndim == 2 and own.shape[1] == 1:
            own = own[:, 0]
        if own is not None and own.shape != x.shape[:1]:
            raise DataError(
                f"{labels[part]} of {name!r} has shape {own.shape}; expected {x.shape[:1]}, one for each row"
            )
        what = name if part == "all" else f"{name} [{key}]"
        images, found_out = as_images(x, what) if x.ndim in (3, 4) else (x, [])
        parts[part] = Rows(images, own, (), notices + found_out)
    return parts


def _parts_of(arrays: dict[str, Array], stem: str) -> dict[str, str]:
    """Return keys such as x_train or train_x, by part."""
    found = {}
    for part in PARTS:
        keys = [k for s in _SPELLINGS[part] for k in (f"{stem}_{s}", f"{s}_{stem}") if k in arrays]
        if keys:
            found[part] = keys[0]
    return found


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
        if first and last:
            raise DataError(
                f"images of {name!r} have shape {x.shape}, which does not say where the channels are; expected "
                "(N, H, W), (N, H, W, C) or (N, C, H, W), with 1 or 3 in only one of the two places"
            )
        if not (first or last):
            hint = "; is it transparency? x[..., :-1] drops it" if x.shape[3] in (2, 4) else ""
            raise DataError(
                f"images of {name!r} have shape {x.shape}: neither the second nor the last place holds 1 (grey) or 3 "
                f"(colour) channels; expected (N, H, W), (N, H, W, C) or (N, C, H, W){hint}"
            )
        x = x if first else x.transpose(0, 3, 1, 2)
    if x.size == 0:
        raise DataError(f"images of {name!r} have shape {x.shape}: there is not one pixel")
    x, notices = _grey_levels(x, name)
    highest = int(x[:: max(1, len(x) // 10_000)].max())
    if highest < _DARK:
        notices.append(
            f"the highest grey level is {highest}: almost black on the scale of 0 to 255, on which images are read; if "
            f"{highest} is meant as white, stretch them to 255 in the file and say by nbits how many levels they have"
        )
    return x, notices


def _grey_levels(x: Array, name: str) -> tuple[Array, list[str]]:
    """Convert to uint8 without loss; also return notices."""
    if x.dtype == np.uint8:
        return x, []
    if x.dtype.kind not in "iuf":
        raise DataError(
            f"images of {name!r} have dtype {x.dtype}; expected uint8 grey levels 0 to 255"
            + (" (black and white: (255 * x).astype('uint8'), and nbits=1)" if x.dtype.kind == "b" else "")
        )
    low, high = x.min(), x.max()
    if not np.isfinite([low, high]).all():
        raise DataError(f"images of {name!r} hold NaN or infinite values; expected grey levels")
    if low < 0 or high > 255:
        raise DataError(
            f"images of {name!r} have values from {low:g} to {high:g}; expected uint8 grey levels 0 to 255, or floats "
            "in [0, 1]"
        )
    factor, allowed = (255.0, 1e-3) if x.dtype.kind == "f" and high <= 1 else (1.0, 0.0)
    if x.dtype.kind == "f" and factor > 1:
        allowed += 0.5 * 255 * float(np.finfo(x.dtype).eps)
    out = np.empty(x.shape, dtype=np.uint8)
    for start in range(0, len(x), 4096):
        values = factor * x[start : start + 4096].astype(np.float64)
        rounded = np.rint(values)
        if np.abs(values - rounded).max() > allowed:
            if factor == 1.0:
                raise DataError(
                    f"images of {name!r} are floats from {low:g} to {high:g}, outside [0, 1] and no whole grey levels; "
                    "expected uint8 grey levels 0 to 255, or floats in [0, 1]: rescale them in the file"
                )
            raise DataError(
                f"images of {name!r} are floats in [0, 1] between the 256 grey levels k/255; bits/dim are defined for "
                "grey levels: round them, (255 * x).round().astype('uint8')"
            )
        out[start : start + 4096] = rounded
    how = "floats k/255" if factor > 1 else f"whole numbers of type {x.dtype}"
    return out, [f"{how} read as uint8 grey levels, which loses nothing"]
