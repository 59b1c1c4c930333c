"""The user's own data: .npz, .npy, .csv, a folder of pictures. Nothing read here can execute code."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cnf.datasets.splits import DataSplits, contexts, split_indices
from cnf.datasets.tables import load_table
from cnf.errors import DataError

__all__ = ["load_path"]

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


def load_path(
    path: Path,
    *,
    seed: int,
    condition: str | None,
    discrete: str,
    limit: int | None,
    nbits: int,
    image_size: int | None,
) -> DataSplits:
    """A table or a set of images from a path.

    Raises:
        DataError: for everything that is not a usable data set, saying what.
    """
    if path.is_dir():
        pictures, marks, kinds = _folder(path, image_size)
        return _images(path, pictures, marks, kinds, seed, condition, limit, nbits)
    suffix = path.suffix.lower()
    if suffix == ".csv":
        values, columns = _csv(path)
        return load_table(path.stem, values, columns, None, (), seed, condition, discrete, limit)
    if suffix not in (".npy", ".npz"):
        raise DataError(f"{path}: unknown kind of file {suffix!r}; expected .npz, .npy, .csv, a picture, or a folder of pictures")
    arrays = _numpy(path)
    labels = arrays.pop("labels", None)
    names = [k for k in ("images", "x", "data", "") if k in arrays]
    if not names:
        raise DataError(f"{path} holds {sorted(arrays)}: expected an array called 'images' (uint8), or 'x' or 'data'")
    value = arrays[names[0]]
    if labels is not None and labels.shape != (len(value),):
        raise DataError(f"{path}: labels have shape {labels.shape}; expected ({len(value)},), one for each item")
    classes: tuple[str, ...] = ()
    if labels is not None:
        distinct, labels = np.unique(labels, return_inverse=True)
        classes = tuple(map(str, distinct))
    if value.ndim in (3, 4):
        if value.dtype != np.uint8:
            raise DataError(f"{path}: images of type {value.dtype}; expected uint8 grey levels 0 to 255")
        if value.ndim == 3:
            value = value[:, None]
        elif value.shape[1] not in (1, 3) and value.shape[3] in (1, 3):
            value = value.transpose(0, 3, 1, 2)
        elif value.shape[1] not in (1, 3):
            raise DataError(f"{path}: images of shape {value.shape}; expected (N, H, W), (N, H, W, C) or (N, C, H, W), C 1 or 3")
        return _images(path, value, labels, classes, seed, condition, limit, nbits)
    if value.ndim != 2 or value.dtype.kind not in "fiub":
        raise DataError(f"{path}: an array of shape {value.shape} and type {value.dtype}; expected a numeric table (N, D) or images")
    return load_table(path.stem, value.astype(np.float64), (), labels, classes, seed, condition, discrete, limit)


def _numpy(path: Path) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return {k: loaded[k] for k in loaded.files}
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except Exception as error:  # a damaged file can raise nearly anything from numpy and zipfile
        raise DataError(f"{path} cannot be read as a NumPy file without pickles: {error}") from None


def _csv(path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a csv file: {error}") from None
    if not rows:
        raise DataError(f"{path} is empty")
    columns: tuple[str, ...] = ()
    if not any(_number(cell) for cell in rows[0]):
        columns, rows = tuple(cell.strip() for cell in rows[0]), rows[1:]
    values = np.empty((len(rows), len(columns) or (len(rows[0]) if rows else 0)))
    for i, row in enumerate(rows):
        if len(row) != values.shape[1]:
            raise DataError(f"{path}: row {i + 1} has {len(row)} cells; expected {values.shape[1]}")
        for j, cell in enumerate(row):
            if not _number(cell):
                name = columns[j] if columns else f"{j}"
                raise DataError(f"{path}: row {i + 1}, column {name}: {cell!r} is not a number")
            values[i, j] = float(cell)
    return values, columns


def _number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _folder(path: Path, size: int | None) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in PICTURES and f.is_file())
    if not files:
        raise DataError(f"{path} holds no picture: expected {', '.join(PICTURES)}, in sub-folders if they have labels")
    folders = [f.relative_to(path).parts[0] if f.parent != path else "" for f in files]
    images = []
    for file in files:
        try:
            with warnings.catch_warnings(), Image.open(file) as picture:
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                grey = picture.mode in ("1", "L", "I;16", "LA")
                image = picture.convert("L" if grey else "RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(f"{file} cannot be read as a picture: {error}") from None
        if size is not None:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side)).resize((size, size))
        images.append(image)
    if any(image.mode == "RGB" for image in images):
        images = [image.convert("RGB") for image in images]
    for file, image in zip(files, images, strict=True):
        if image.size != images[0].size:
            raise DataError(
                f"{file} is {image.size[0]}x{image.size[1]} but {files[0].name} is {images[0].size[0]}x{images[0].size[1]}: "
                "all pictures must have one size; --image-size S crops the centre and resizes"
            )
    stack = np.stack([np.asarray(image) for image in images])
    stack = stack[:, None] if stack.ndim == 3 else stack.transpose(0, 3, 1, 2)
    if len(set(folders)) == 1:
        return stack, None, ()
    classes = tuple(sorted(set(folders)))
    return stack, np.array([classes.index(f) for f in folders]), classes


def _images(
    path: Path,
    value: np.ndarray,
    labels: np.ndarray | None,
    classes: tuple[str, ...],
    seed: int,
    condition: str | None,
    limit: int | None,
    nbits: int,
) -> DataSplits:
    if condition and labels is None:
        raise DataError(f"condition={condition!r}, but {path} has no labels: give npz 'labels', or sub-folders named by class")
    flat = np.ascontiguousarray(value).reshape(len(value), -1)
    _, keep = np.unique(flat, axis=0, return_index=True)
    keep.sort()
    dropped = len(value) - len(keep)
    train, validation, test = (keep[i] for i in split_indices(len(keep), seed))
    train = train[:limit]
    parts = [torch.from_numpy(np.ascontiguousarray(value[i])) >> (8 - nbits) for i in (train, validation, test)]
    rows = contexts([labels[i] for i in (train, validation, test)] if labels is not None else [], len(classes), condition)
    notes = [f"split by seed {seed}: {len(train):,} training, {len(validation):,} validation and {len(test):,} test images"]
    if dropped:
        notes.insert(0, f"{dropped:,} exact duplicate images dropped")
    return DataSplits(path.stem, "image", parts[0], parts[1], parts[2], classes=classes, levels=2**nbits, notices=tuple(notes), **rows)
