"""Items to be scored as they are: nothing is split, dropped, or given noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnf.datasets.arrays import read_numpy, rows_of_keys
from cnf.datasets.checks import as_numbers, column_name
from cnf.datasets.folders import ARRAYS, list_folder, stack_pictures
from cnf.datasets.pictures import SUFFIXES
from cnf.datasets.prepared import reduce_bits
from cnf.datasets.splits import Array, Rows, encode_labels
from cnf.datasets.text import read_csv
from cnf.errors import DataError

__all__ = ["Items", "own_names", "read_items"]


@dataclass(frozen=True, eq=False)
class Items:
    """What a model is to score.

    Attributes:
        x: rows (N, D) in float32, or images (N, C, H, W) in uint8.
        names: of each item.
        labels: of each item, as the classes of a data set are called; None where an item has none.
        notices: what was done to them, a sentence each.
    """

    x: Tensor
    names: list[str]
    labels: list[str | None]
    notices: list[str]


def read_items(
    paths: Sequence[Path],
    event_shape: tuple[int, ...],
    levels: int | None = None,
    *,
    columns: Sequence[str] = (),
    image_size: int | None = None,
) -> Items:
    """Read .npz, .npy and .csv files, pictures, and folders of pictures, in the order given, as a model takes them.

    Args:
        paths: files and folders.
        event_shape: of the model's items: (D,) or (C, H, W).
        levels: grey levels of the model's images; 8-bit values are cut to 2**n of them, as in training. None for rows.
        columns: names of the model's columns: a table with a header is read by name.
        image_size: centre-crop and resize pictures to this size first.

    Returns:
        The items; a picture is called by its path, a row or an image of an array by its file and number.

    Raises:
        DataError: for what cannot be read, values that are not finite, or items not of the model's kind and shape.

    Example:
        >>> read_items([Path("new.csv")], (3,)).names[:2]  # doctest: +SKIP
        ['new.csv:0', 'new.csv:1']
    """
    parts: list[Array] = []
    names: list[str] = []
    labels: list[str | None] = []
    notices: list[str] = []
    for path in paths:
        rows, called = _read(path, image_size)
        x = _image(rows.x, event_shape, levels, path, called) if levels else _rows(rows, event_shape, columns, path)
        parts.append(x)
        names += called or [f"{path}:{i}" for i in range(len(x))]
        labels += [None] * len(x) if rows.labels is None else _label_names(rows.labels)
        # where the model's own scale is not 8-bit, dark is no wonder
        odd = levels is not None and not _is_power(levels)
        notices += [line for line in rows.notices if not (odd and line.startswith("the highest grey level"))]
        if levels and x.shape[1] > rows.x.shape[1]:
            notices.append(f"the grey pictures of {str(path)!r} are read as RGB, as those among colour pictures are")
    if not names:
        raise DataError(f"{', '.join(map(str, paths)) or 'no file'}: no items to score")
    x = np.ascontiguousarray(np.concatenate(parts))
    return Items(torch.from_numpy(x), names, labels, list(dict.fromkeys(notices)))


def own_names(columns: Sequence[str]) -> bool:
    """Whether columns have names of their own, and are not merely numbered.

    Example:
        >>> own_names(["column 0", "column 1"]), own_names(["age", "height"])
        (False, True)
    """
    return any(name != f"column {j}" for j, name in enumerate(columns))


def _read(path: Path, image_size: int | None) -> tuple[Rows, list[str]]:
    """A path's items as they lie there; pictures with their names."""
    name, suffix = str(path), path.suffix.lower()
    if not path.exists():
        raise DataError(f"{name!r} does not exist")
    if path.is_dir() or suffix in SUFFIXES:
        found = list_folder(path) if path.is_dir() else None
        files = found.pictures if found else [path]
        if not files:
            hint = f" (give {found.arrays[0].name} itself)" if found and found.arrays else ""
            raise DataError(f"folder {name!r} holds no picture; expected {', '.join(SUFFIXES)} files{hint}")
        x, notices = stack_pictures(files, image_size, name)
        labels = np.array(found.labels) if found and found.labels else None
        return Rows(x, labels, (), notices), [str(f) for f in files]
    if suffix == ".csv":
        table, columns = read_csv(path)
        return Rows(table, None, columns), []
    if suffix not in ARRAYS:
        raise DataError(
            f"{name!r} is no known kind of data; expected .npz, .npy, .csv, .png, .jpg, .webp, .bmp, .tif or a folder"
        )
    parts = rows_of_keys(read_numpy(path), name)
    if set(parts) != {"all"}:
        raise DataError(f"{name!r} brings a split ({', '.join(parts)}): give one array of items, under the key 'x'")
    return parts["all"], []


def _label_names(labels: Array) -> list[str | None]:
    """Labels as data sets call their classes."""
    try:
        codes, classes = encode_labels(labels)
    except DataError:  # they may not be asked for; where they are, they are no known class
        return [str(v) for v in labels]
    return [classes[code] for code in codes]


def _is_power(levels: int) -> bool:
    return levels & (levels - 1) == 0


def _image(x: Array, event_shape: tuple[int, ...], levels: int, path: Path, pictures: list[str]) -> Array:
    """uint8 images on the model's grey levels."""
    name, size = str(path), "x".join(map(str, event_shape[1:]))
    model = f"the model has {'colour' if event_shape[0] == 3 else 'grey'} images of {size}"
    if x.ndim != 4:
        hint = "; one image is an array (1, height, width)" if x.shape == event_shape[1:] else ""
        raise DataError(f"{name!r} holds rows of {x.shape[-1]} numbers, but {model}{hint}")
    if pictures and x.shape[1] == 1 and event_shape[0] == 3:
        x = np.repeat(x, 3, axis=1)
    if x.shape[1:] != event_shape:
        own = "x".join(map(str, x.shape[2:]))
        raise DataError(f"{name!r} holds {'colour' if x.shape[1] == 3 else 'grey'} images of {own}, but {model}")
    if _is_power(levels):
        return reduce_bits(x, levels.bit_length() - 1)
    if pictures or (len(x) and x.max() >= levels):
        what = "is a picture, of 256 grey levels" if pictures else f"has grey levels up to {x.max()}"
        raise DataError(
            f"{name!r} {what}, but the model has {levels}, from 0 to {levels - 1}, which no dropping of bits makes: give "
            "an array (.npy, .npz) on the model's own scale, or train on images like these"
        )
    return x


def _rows(rows: Rows, event_shape: tuple[int, ...], columns: Sequence[str], path: Path) -> Array:
    """float32 rows, their columns in the model's order."""
    name, width = str(path), event_shape[0]
    if rows.x.ndim == 4:
        raise DataError(f"{name!r} holds images, but the model has rows of {width} numbers")
    table, found = as_numbers(rows.x, name), rows.columns
    named = f" ({', '.join(columns)})" if own_names(columns) else ""
    if table.shape[1] != width:
        raise DataError(f"{name!r} has {table.shape[1]} columns, but the model has {width}{named}")
    if named and own_names(found):
        if set(found) != set(columns):
            odd = next(c for c in found if c not in columns)
            raise DataError(
                f"{name!r} has a column {odd!r}, which the model lacks{named}; without a header they go by their order"
            )
        table = table[:, [found.index(c) for c in columns]]
    with np.errstate(over="ignore"):
        x = table.astype(np.float32)
    bad = np.argwhere(~np.isfinite(x))
    if len(bad):
        row, j = (int(i) for i in bad[0])
        labels = tuple(columns) or found or tuple(f"column {i}" for i in range(width))
        raise DataError(
            f"{name!r} has {len(bad):,} values that are NaN, infinite or beyond float32, the first in row {row} "
            f"({name}:{row}), {column_name(labels, j)}: {table[row, j]:g}; remove those rows or fill them in"
        )
    return x
