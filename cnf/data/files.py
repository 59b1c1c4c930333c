"""Custom data: .npz and .npy files, tables, and folders of images or of a split; no file can execute code."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cnf._utils.errors import ConfigError, DataError
from cnf.data.arrays import read_numpy, rows_of_keys
from cnf.data.checks import duplicate_rows
from cnf.data.folders import ARRAYS, part_entries, read_folder
from cnf.data.frames import TABLES, is_table, read_frame
from cnf.data.parts import classes_of, drop_duplicates, split
from cnf.data.prepared import reduce_bits
from cnf.data.rows import Array, is_mapped, keep_rows
from cnf.data.splits import DataSplits, Options, Rows, assemble, encode_labels
from cnf.data.tables import load_table

__all__ = ["load_path", "read_file"]

Parts = dict[str, Rows]  # keys: "all", or "train", "test" and optionally "validation"


def load_path(path: Path, options: Options) -> DataSplits:
    """Read, check and split a custom data set.

    Raises:
        DataError: for unusable data; the message states the fault.
        ConfigError: for options that do not apply to this kind of data.
    """
    name = str(path)
    parts = _read_split(path, options) if path.is_dir() else _read_part(path, options)
    rows = [parts[p] for p in ("all", "train", "validation", "test") if p in parts]
    shapes = {p: parts[p].x.shape[1:] for p in parts}
    if len(set(shapes.values())) > 1:
        raise DataError(f"the parts of {name!r} differ in the shape of a row: {shapes}")
    with_labels = [r.labels is not None for r in rows]
    if any(with_labels) and not all(with_labels):
        raise DataError(f"some parts of {name!r} have labels and others none; expected all or none")
    labels = np.concatenate([r.labels for r in rows]) if all(with_labels) else None
    notices = list(dict.fromkeys(n for r in rows for n in r.notices))
    if labels is not None and options.condition is None:
        try:
            encode_labels(labels)
        except DataError as error:  # the labels are not needed
            labels = None
            notices.append(f"labels not used: {error}")
    if rows[0].kind == "table":
        return load_table(rows, labels, name, options, notices)
    return _images(rows, labels, name, options, notices)


# --- reading ----------------------------------------------------------------------------------------------------


def read_file(path: Path) -> Parts:
    """Read a table or an array file without conversion.

    Raises:
        DataError: for an unreadable file, or one of another kind.
    """
    name, suffix = str(path), path.suffix.lower()
    if is_table(path):
        frame, notices = read_frame(path)
        return {"all": Rows(frame, notices=notices)}
    if suffix in ARRAYS:
        return rows_of_keys(read_numpy(path), name)
    pickled = suffix in (".pkl", ".pickle", ".pt", ".pth")
    sheets = "; save the table as .xlsx or .csv" if suffix in (".xls", ".xlsb", ".ods", ".feather", ".dta", ".sav") else ""
    extra = "; pickled files can run code and are never opened: save the array with numpy.save" if pickled else sheets
    raise DataError(f"{name!r} is no known kind of data; expected .npz, .npy, {', '.join(TABLES)}, .png, .jpg, .webp, .bmp, .tif or a folder{extra}")


def _read_part(path: Path, options: Options) -> Parts:
    if path.is_dir():
        return {"all": read_folder(path, options.image_size)}
    if options.image_size is not None:
        raise ConfigError(f"image_size={options.image_size} does not apply to {str(path)!r}; it is for a folder of images")
    return read_file(path)


def _read_split(folder: Path, options: Options) -> Parts:
    """Read a folder with files or sub-folders called train... and test..., or any other folder as one part.

    If there are other sub-folders, all sub-folders are classes (one may be called "train").
    """
    try:
        by_part = part_entries(folder)
        if "train" not in by_part:  # tables only then: next to folders of images a table may hold labels
            by_part = part_entries(folder, (*ARRAYS, *TABLES))
        ours = {entry for entries in by_part.values() for entry in entries}
        others = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".") and p not in ours]
    except OSError as error:
        raise DataError(f"folder {str(folder)!r} cannot be read: {error}") from None
    if "train" not in by_part or len(by_part) < 2 or others:
        return _read_part(folder, options)
    if "test" not in by_part:
        given = ", ".join(p.name for p in sorted(ours))
        raise DataError(
            f"folder {str(folder)!r} gives its own split by {given} but no test part; rename val... to test..., and validation "
            "is split off the training part"
        )
    parts = {}
    for part, entries in by_part.items():
        if len(entries) > 1:
            several = ", ".join(p.name for p in entries)
            raise DataError(f"folder {str(folder)!r} has several {part} parts: {several}; expected one")
        inner = _read_part(entries[0], options)
        if list(inner) != ["all"]:
            raise DataError(f"{str(entries[0])!r} is a {part} part with its own split; give that file itself")
        parts[part] = inner["all"]
    return parts


# --- assembly ---------------------------------------------------------------------------------------------------


def _images(rows: list[Rows], labels: Array | None, name: str, options: Options, notices: list[str]) -> DataSplits:
    columns_given = options.condition not in (None, "label", "target")
    idle = options.changed(("columns", "drop_columns", "missing", "dependent")) or ("condition" if columns_given else None)
    if idle:
        raise ConfigError(f"{idle}={getattr(options, idle)!r} is for tables, and {name!r} holds images")
    pieces = [r.x for r in rows]
    sizes = [len(x) for x in pieces]
    kept, said = drop_duplicates(duplicate_rows(pieces, labels), sizes, options)
    parts, notice = split(sizes, kept, options)
    starts = np.cumsum([0, *sizes])
    images = []
    for i in (1, 2):  # before the training rows, since keep_rows overwrites the others of a memory map
        parts[i] = np.sort(parts[i])
        number = int(np.searchsorted(starts, parts[i][0], side="right")) - 1
        own = parts[i] - starts[number]
        images.append(pieces[number] if len(own) == sizes[number] else np.array(pieces[number][own]))
    train, parts[0] = keep_rows(pieces[0], parts[0])
    if options.nbits != 8 and is_mapped(train):
        notices.append(f"nbits={options.nbits}: the training images are read into memory; those of 8 bits are mapped")
    reduced = [reduce_bits(x, options.nbits) for x in (train, *images)]
    notices = [*notices, *said, notice]
    return assemble(name, "image", reduced, options, **classes_of(labels, parts), levels=2**options.nbits, notices=notices)
