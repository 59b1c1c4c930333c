"""Rows and images to score: nothing is split, dropped or dequantised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnf.datasets.arrays import read_numpy, rows_of_keys
from cnf.datasets.checks import require_finite
from cnf.datasets.columns import Columns, by_schema, own_names
from cnf.datasets.folders import ARRAYS, list_folder, stack_pictures
from cnf.datasets.frames import TABLES, is_table, read_frame
from cnf.datasets.pictures import SUFFIXES
from cnf.datasets.prepared import reduce_bits
from cnf.datasets.splits import Array, Rows, encode_labels
from cnf.datasets.tables import as_frame, off_lattice
from cnf.errors import DataError
from cnf.schema import TableColumn, conditions, data_columns, encode, plain_table, snap

__all__ = ["Items", "own_names", "read_items"]


@dataclass(frozen=True, eq=False)
class Items:
    """Rows or images to score.

    Attributes:
        x: rows (N, D) in float32, or images (N, C, H, W) in uint8.
        names: name of each row or image.
        labels: class name of each row or image; None without a label.
        notices: one sentence for each change to the data.
        context: (N, C) context of a table with conditions; None otherwise.
        steps: (N, D) dequantisation steps of a table, 0 for columns without noise; None for images.
    """

    x: Tensor
    names: list[str]
    labels: list[str | None]
    notices: list[str]
    context: Tensor | None = None
    steps: Tensor | None = None


def read_items(
    paths: Sequence[Path],
    event_shape: tuple[int, ...],
    levels: int | None = None,
    *,
    columns: Sequence[str] = (),
    image_size: int | None = None,
    table: Sequence[TableColumn] = (),
) -> Items:
    """Read .npz and .npy files, tables, images and folders of images, in order, in the input format of a model.

    Args:
        paths: files and folders.
        event_shape: event shape of the model: (D,) or (C, H, W).
        levels: grey levels of the model's images; 8-bit values are reduced to 2**n levels, as in training. None for
            rows.
        columns: names of the model's columns; a table with a header is read by name.
        image_size: centre-crop and resize image files to this size first.
        table: columns of the trained model, whose types a table is read with; if empty, ``columns`` as numbers.

    Returns:
        The rows or images; an image file is named by its path, a row or image of an array by its file and index.

    Raises:
        DataError: for unreadable files, non-finite values, or rows or images of another kind or shape than the model's.

    Example:
        >>> read_items([Path("new.csv")], (3,)).names[:2]  # doctest: +SKIP
        ['new.csv:0', 'new.csv:1']
    """
    parts: list[Array] = []
    names: list[str] = []
    labels: list[str | None] = []
    notices: list[str] = []
    contexts: list[Array] = []
    steps: list[Array] = []
    schema = tuple(table) or plain_table(columns or [f"column {j}" for j in range(event_shape[0])])
    for path in paths:
        rows, called = _read(path, image_size)
        if levels:
            x = _image(rows.x, event_shape, levels, path, called)
        else:
            found = _rows(rows, schema, path)
            x, said = _finite(found, path), [*found.notices]
            odd_columns = off_lattice(data_columns(schema), found.table)
            for j, column in enumerate(data_columns(schema)):
                if column.dequantised and column.name not in odd_columns:
                    x[:, j] = snap(column, found.table[:, j])
            step = np.array([c.step if c.dequantised and c.name not in odd_columns else 0.0 for c in data_columns(schema)])
            steps.append(np.broadcast_to(step, x.shape))
            said += [f"column {c!r} of {str(path)!r} has values between the steps of training: scored as they are, without noise" for c in odd_columns]
            if step.any():
                spread = ", ".join(repr(c.name) for c, one in zip(data_columns(schema), step, strict=True) if one)
                said.append(
                    f"columns {spread} are scored as training saw them: spread over one step by uniform noise, the mean over draws; "
                    "the figure is a density, of a step of 1 also the probability"
                )
            if found.given:
                contexts.append(encode(schema, found.given))
            notices += said
        parts.append(x)
        names += called or [f"{path}:{i}" for i in range(len(x))]
        labels += [None] * len(x) if rows.labels is None else _label_names(rows.labels)
        # dark images are expected if the model's own scale is not 8-bit
        odd = levels is not None and not _is_power(levels)
        notices += [line for line in rows.notices if not (odd and line.startswith("the highest grey level"))]
        if levels and called and x.shape[1] > rows.x.shape[1]:
            notices.append(f"the grey pictures of {str(path)!r} are read as RGB, as those among colour pictures are")
    if not names:
        raise DataError(f"{', '.join(map(str, paths)) or 'no file'}: no items to score")
    x = np.ascontiguousarray(np.concatenate(parts))
    context, spread_over = (torch.from_numpy(np.concatenate(p).astype(np.float32)) if p else None for p in (contexts, steps))
    return Items(torch.from_numpy(x), names, labels, list(dict.fromkeys(notices)), context, spread_over)


def _read(path: Path, image_size: int | None) -> tuple[Rows, list[str]]:
    """Read the rows or images of a path without conversion; also return the names of image files."""
    name, suffix = str(path), path.suffix.lower()
    if not path.exists():
        raise DataError(f"{name!r} does not exist")
    if path.is_dir() or suffix in SUFFIXES:
        found = list_folder(path) if path.is_dir() else None
        files = found.pictures if found else [path]
        if not files:
            hint = f" (give {found.arrays[0].name} itself)" if found and found.arrays else ""
            raise DataError(f"folder {name!r} holds no image; expected {', '.join(SUFFIXES)} files{hint}")
        x, notices = stack_pictures(files, image_size, name)
        labels = np.array(found.labels) if found and found.labels else None
        return Rows(x, labels, (), notices), [str(f) for f in files]
    if is_table(path):
        frame, notices = read_frame(path)
        return Rows(frame, None, tuple(frame.columns), notices), []
    if suffix not in ARRAYS:
        raise DataError(
            f"{name!r} is no known kind of data; expected .npz, .npy, {', '.join(TABLES)}, .png, .jpg, .webp, .bmp, .tif or a folder"
        )
    parts = rows_of_keys(read_numpy(path), name)
    if set(parts) != {"all"}:
        raise DataError(f"{name!r} brings a split ({', '.join(parts)}): give one array of items, under the key 'x'")
    return parts["all"], []


def _label_names(labels: Array) -> list[str | None]:
    """Return labels as class names of a data set."""
    try:
        codes, classes = encode_labels(labels)
    except DataError:  # not classes; a conditional model rejects them later
        return [str(v) for v in labels]
    return [classes[code] for code in codes]


def _is_power(levels: int) -> bool:
    return levels & (levels - 1) == 0


def _image(x: Array, event_shape: tuple[int, ...], levels: int, path: Path, pictures: list[str]) -> Array:
    """Convert to uint8 images on the model's grey levels."""
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


def _rows(rows: Rows, schema: Sequence[TableColumn], path: Path) -> Columns:
    """Return the columns of a table that the model uses."""
    name, width = str(path), len(data_columns(schema))
    if getattr(rows.x, "ndim", 2) == 4:
        raise DataError(f"{name!r} holds images, but the model has rows of {width} numbers")
    frame = as_frame(rows, name)
    label = next((c.name for c in conditions(schema) if c.name == "label"), None)
    if label and rows.labels is not None and label not in frame.columns:
        frame = frame.set_axis([c.name for c in data_columns(schema)], axis=1).assign(label=rows.labels) if frame.shape[1] == width else frame
    return by_schema(frame, schema, name)


def _finite(found: Columns, path: Path) -> Array:
    """Return the modelled columns in float32.

    Raises:
        DataError: for values that are not finite in float32, including those of conditions.
    """
    require_finite(found.joint, (*found.names, *found.given), str(path), scored=True)
    return found.table.astype(np.float32)
