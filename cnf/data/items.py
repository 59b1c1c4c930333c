"""Rows and images to score: nothing is split or dequantised, and dropped only rows with missing values, where training did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cnf._utils.errors import DataError
from cnf.data.columns import Columns, by_schema, own_names
from cnf.data.files import read_file
from cnf.data.folders import Listing, list_folder, stack_pictures
from cnf.data.pictures import SUFFIXES
from cnf.data.prepared import reduce_bits
from cnf.data.schema import TableColumn, conditions, data_columns, encode, plain_table, snap
from cnf.data.splits import Array, Rows, encode_labels
from cnf.data.tables import as_frame, off_lattice
from cnf.data.unseen import blank_unseen, gaps

if TYPE_CHECKING:
    import pandas as pd

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
        unseen: by row, the cells that the columns of training cannot hold, such as a new category; such a row has no numbers.
        incomplete: by row, the values that are missing.
        cells: the columns of the model as they are in the files; None for images.
    """

    x: Tensor
    names: list[str]
    labels: list[str | None]
    notices: list[str]
    context: Tensor | None = None
    steps: Tensor | None = None
    unseen: dict[int, str] = field(default_factory=dict)
    incomplete: dict[int, str] = field(default_factory=dict)
    cells: pd.DataFrame | None = None


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
        DataError: for unreadable files, or rows or images of another kind or shape than the model's.

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
    unseen: dict[int, str] = {}
    incomplete: dict[int, str] = {}
    cells: list[pd.DataFrame] = []
    schema = tuple(table) or plain_table(columns or [f"column {j}" for j in range(event_shape[0])])
    for path in paths:
        rows, called = _read(path, image_size, event_shape)
        if levels:
            x = _image(rows.x, event_shape, levels, path, called)
        else:
            table_columns, odd = _rows(rows, schema, path, cells)
            lacking, beyond = gaps(table_columns.joint, (*table_columns.names, *table_columns.given))
            odd = beyond | odd
            unseen |= {len(names) + row: said for row, said in odd.items()}
            incomplete |= {len(names) + row: said for row, said in lacking.items() if row not in odd}
            _fill(table_columns, [*odd, *lacking])
            x, step, said = _scored(table_columns, path)
            steps.append(np.broadcast_to(step, x.shape))
            if table_columns.given:
                contexts.append(encode(schema, table_columns.given))
            notices += [*table_columns.notices, *said]
        parts.append(x)
        names += called or [f"{path}:{i}" for i in range(len(x))]
        labels += [None] * len(x) if rows.labels is None else _label_names(rows.labels)
        # dark images are expected if the model's own scale is not 8-bit
        own = levels is not None and not _is_power(levels)
        notices += [line for line in rows.notices if not (own and line.startswith("the highest grey level"))]
        if levels and called and x.shape[1] > rows.x.shape[1]:
            notices.append(f"the grey images of {str(path)!r} are read as RGB, as those among colour images are")
    if not names:
        raise DataError(f"{', '.join(map(str, paths)) or 'no file'}: no rows or images to score")
    x = np.ascontiguousarray(np.concatenate(parts))
    context, spread_over = (torch.from_numpy(np.concatenate(p).astype(np.float32)) if p else None for p in (contexts, steps))
    return Items(torch.from_numpy(x), names, labels, list(dict.fromkeys(notices)), context, spread_over, unseen, incomplete, _joined(cells))


def _joined(cells: Sequence[pd.DataFrame]) -> pd.DataFrame | None:
    """Return the cells of all files, by the row's number among the items; a column keeps its type if all files agree on it."""
    import pandas as pd

    if not cells:
        return None
    mixed = [column for column in cells[0] if len({part[column].dtype for part in cells}) > 1]
    return pd.concat([part.astype(dict.fromkeys(mixed, object)) for part in cells], ignore_index=True)


def _read(path: Path, image_size: int | None, event_shape: tuple[int, ...]) -> tuple[Rows, list[str]]:
    """Read the rows or images of a path without conversion; also return the names of image files."""
    name = str(path)
    if not path.exists():
        raise DataError(f"{name!r} does not exist")
    if path.is_dir() or path.suffix.lower() in SUFFIXES:
        listing = list_folder(path) if path.is_dir() else Listing([path], None, [], [])
        files = listing.pictures
        if not files:
            hint = f" (give {listing.arrays[0].name} itself)" if listing.arrays else ""
            raise DataError(f"folder {name!r} holds no image; expected {', '.join(SUFFIXES)} files{hint}")
        advice = f"resize them to the model's {event_shape[2]}x{event_shape[1]}" if len(event_shape) == 3 else "and the model has rows, not images"
        x, notices = stack_pictures(files, image_size, name, advice)
        return Rows(x, np.array(listing.labels) if listing.labels else None, notices), [str(f) for f in files]
    parts = read_file(path)
    if set(parts) != {"all"}:
        raise DataError(f"{name!r} must hold one array of rows or images, under the key 'x', got a split ({', '.join(parts)})")
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
        what = "is an image file, of 256 grey levels" if pictures else f"has grey levels up to {x.max()}"
        raise DataError(
            f"{name!r} {what}, but the model has {levels}, from 0 to {levels - 1}, which bit reduction cannot produce; give "
            "an array (.npy, .npz) on the model's own scale, or train on images like these"
        )
    return x


def _rows(rows: Rows, schema: Sequence[TableColumn], path: Path, cells: list[pd.DataFrame]) -> tuple[Columns, dict[int, str]]:
    """Return the columns of a table that the model uses, and by row the cells that they cannot hold; append the cells."""
    name, width = str(path), len(data_columns(schema))
    if getattr(rows.x, "ndim", 2) == 4:
        raise DataError(f"{name!r} holds images, but the model has rows of {width} numbers")
    frame = as_frame(rows, name)
    label = next((c.name for c in conditions(schema) if c.name == "label"), None)
    if label and rows.labels is not None and label not in frame.columns:
        frame = frame.set_axis([c.name for c in data_columns(schema)], axis=1).assign(label=rows.labels) if frame.shape[1] == width else frame
    unseen: dict[int, str] = {}

    def prepare(used: pd.DataFrame) -> pd.DataFrame:
        cells.append(used[[c.name for c in schema if c.role != "left out"]])
        blanked, said = blank_unseen(used, schema, name)
        unseen.update(said)
        return blanked

    return by_schema(frame, schema, name, prepare), unseen


def _fill(columns: Columns, rows: Sequence[int]) -> None:
    """Fill rows that have no numbers with numbers that a column of training may hold, in place."""
    columns.table[rows] = [c.origin for c in data_columns(columns.schema)]
    for name, values in columns.given.items():
        columns.given[name] = values.copy()  # a view of the file's table
        columns.given[name][rows] = 0.0


def _scored(columns: Columns, path: Path) -> tuple[Array, Array, list[str]]:
    """Return the rows in float32, the dequantisation step of each column (0 for values off its lattice), and notices."""
    modelled = data_columns(columns.schema)
    odd = off_lattice(modelled, columns.table)
    notices = [f"column {c!r} of {str(path)!r} has values between the steps of training: scored as they are, without noise" for c in odd]
    x = columns.table.astype(np.float32)
    step = np.zeros(len(modelled))
    for j, column in enumerate(modelled):
        if column.dequantised and column.name not in odd:
            x[:, j], step[j] = snap(column, columns.table[:, j]), column.step
    if step.any():
        dequantised = ", ".join(repr(modelled[j].name) for j in np.flatnonzero(step))
        notices.append(
            f"columns {dequantised} are dequantised like the training rows: uniform noise over one step, the mean over draws; the figure is a "
            "density, of a step of 1 also the probability"
        )
    return x, step, notices
