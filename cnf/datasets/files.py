"""The user's own data: .npz, .npy, .csv, a folder of pictures. Nothing read here can execute code."""

from __future__ import annotations

import csv
import zipfile
import zlib
from pathlib import Path

import numpy as np

from cnf.datasets.checks import as_numbers, dequantize, duplicate_rows, require_usable
from cnf.datasets.folders import read_folder
from cnf.datasets.images import reduce_bits
from cnf.datasets.splits import Array, DataSplits, Options, Rows, assemble, encode_labels, split_rows
from cnf.errors import ConfigError, DataError

__all__ = ["load_path", "read_csv", "read_numpy"]

_KEYS = ("images", "x", "data")
_PARTS = ("train", "validation", "test")
_READ_ERRORS = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError)


def load_path(path: Path, options: Options) -> DataSplits:
    """Read, check, split.

    Raises:
        DataError: for anything that is not a usable data set, saying what is wrong.
        ConfigError: for ``image_size`` or ``nbits`` where it means nothing.
    """
    name = str(path)
    if path.is_dir():
        rows = read_folder(path, options.image_size)
    elif options.image_size is not None:
        raise ConfigError(f"image_size={options.image_size} means nothing for {name!r}; it applies to a folder of pictures")
    elif path.suffix.lower() == ".csv":
        table, columns = read_csv(path)
        rows = Rows(table, columns=columns)
    elif path.suffix.lower() in (".npy", ".npz"):
        rows = _from_arrays(read_numpy(path), name)
    else:
        pickled = path.suffix.lower() in (".pkl", ".pickle", ".pt", ".pth")
        extra = "; pickled files can run code and are never opened: save the array with numpy.save" if pickled else ""
        raise DataError(f"{name!r} is no known kind of data; expected .npz, .npy, .csv, .png, .jpg or a folder{extra}")
    return _finish(rows, name, options)


def _finish(rows: Rows, name: str, options: Options) -> DataSplits:
    """From rows as read to the data set."""
    x, labels, notices = rows.x, rows.labels, list(rows.notices)
    if labels is not None and labels.shape != (len(x),):
        raise DataError(f"labels of {name!r} have shape {labels.shape}; expected ({len(x)},), one for each row")
    columns = rows.columns
    epsilon = float(np.finfo(x.dtype if x.dtype in (np.float16, np.float32) else np.float64).eps)
    if rows.kind == "table":
        if options.nbits != 8:
            raise ConfigError(f"nbits={options.nbits} means nothing for {name!r}, which is a table")
        x = as_numbers(x, name)
        columns = columns or tuple(f"column {j}" for j in range(x.shape[1]))
        require_usable(x, columns, name)
    sizes = rows.parts
    repeated = duplicate_rows(x, labels)
    count = int(repeated.sum())
    if count and options.duplicates == "drop" and sizes is None:
        x, labels = x[~repeated], None if labels is None else labels[~repeated]
        notices.append(f"{count:,} exact duplicate rows dropped before splitting: they would leak into the test set")
    elif count:
        why = "the file gives its own split" if sizes is not None else "duplicates='keep'"
        notices.append(f"{count:,} exact duplicate rows kept ({why}): those that fall into two splits leak")
    if rows.kind == "table":
        x, found = dequantize(x, columns, options, epsilon, name)
        notices += found
    if sizes is None:
        parts, notice = split_rows(len(x), options)
    else:
        ends = np.cumsum(sizes)
        parts, notice = [np.arange(e - n, e) for e, n in zip(ends, sizes, strict=True)], "split as the file gives it"
    codes, classes = (None, ()) if labels is None else encode_labels(labels)
    image = rows.kind == "image"
    return assemble(
        name,
        rows.kind,
        [reduce_bits(x[i], options.nbits) if image else x[i] for i in parts],
        options,
        codes=None if codes is None else [codes[i] for i in parts],
        classes=classes,
        columns=() if image else columns,
        levels=2**options.nbits if image else None,
        notices=[*notices, notice],
    )


def read_numpy(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file by key, or that of an .npy file under ``"x"``; pickles are refused.

    Raises:
        DataError: if the file is missing, damaged, or holds Python objects.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"x": loaded}
        with loaded:
            return {key: loaded[key] for key in loaded.files}
    except FileNotFoundError:
        raise DataError(f"{str(path)!r} does not exist") from None
    except _READ_ERRORS as error:
        if "pickle" in str(error):
            raise DataError(
                f"{str(path)!r} holds pickled Python objects, which can run code when read and are refused; "
                "save plain numbers: numpy.save(path, numpy.asarray(x, dtype=numpy.float32))"
            ) from None
        raise DataError(f"{str(path)!r} cannot be read as a NumPy file: {error}") from error


def _from_arrays(arrays: dict[str, Array], name: str) -> Rows:
    """Rows from the keys documented in data/README.md."""
    used = {"labels"}
    parts: tuple[int, int, int] | None = None
    labels = arrays.get("labels")
    stems = [k for k in _KEYS if any(f"{k}_{p}" in arrays for p in _PARTS)]
    whole = [k for k in _KEYS if k in arrays]
    if len(stems) + len(whole) != 1:
        wanted = "expected exactly one of 'images', 'x', 'data' (or x_train, x_validation and x_test), optionally 'labels'"
        raise DataError(f"{name!r} holds the keys {sorted(arrays)}; {wanted}")
    if stems:
        keys = [f"{stems[0]}_{p}" for p in _PARTS]
        missing = [k for k in keys if k not in arrays]
        if missing:
            raise DataError(f"{name!r} gives its own split but lacks {', '.join(missing)}; expected {', '.join(keys)}")
        pieces = [arrays[k] for k in keys]
        if len({p.shape[1:] for p in pieces}) != 1 or len({p.dtype for p in pieces}) != 1:
            raise DataError(f"{', '.join(keys)} of {name!r} differ in item shape or dtype: {[(p.shape, str(p.dtype)) for p in pieces]}")
        parts = (len(pieces[0]), len(pieces[1]), len(pieces[2]))
        x = np.concatenate(pieces)
        label_keys = [f"labels_{p}" for p in _PARTS]
        if all(k in arrays for k in label_keys):
            for k, n in zip(label_keys, parts, strict=True):
                if arrays[k].shape != (n,):
                    raise DataError(f"{k} of {name!r} has shape {arrays[k].shape}; expected ({n},), one for each row")
            labels = np.concatenate([arrays[k] for k in label_keys])
        used |= {*keys, *label_keys}
    else:
        x = arrays[whole[0]]
        used.add(whole[0])
    idle = sorted(set(arrays) - used)
    notices = [f"keys of the file that were not used: {', '.join(idle)}"] if idle else []
    return Rows(_channels_first(x, name) if x.ndim in (3, 4) else x, labels, (), parts, notices)


def _channels_first(x: Array, name: str) -> Array:
    """uint8 (N, C, H, W) from (N, H, W), (N, H, W, C) or (N, C, H, W)."""
    if x.dtype != np.uint8:
        raise DataError(
            f"images of {name!r} have dtype {x.dtype}; expected uint8 grey levels 0 to 255 "
            "(from floats in [0, 1]: (255 * x).round().astype('uint8'))"
        )
    if x.ndim == 3:
        return x[:, None]
    first, last = x.shape[1] in (1, 3), x.shape[3] in (1, 3)
    if first == last:
        raise DataError(
            f"images of {name!r} have shape {x.shape}, which does not say where the channels are; "
            "expected (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels"
        )
    return x if first else x.transpose(0, 3, 1, 2)


def read_csv(path: Path) -> tuple[Array, tuple[str, ...]]:
    """A table and its column names. The first row is a header if none of its cells is a number.

    Cells are parted by semicolons or tabs if the first line has any, else by commas.

    Raises:
        DataError: for an unreadable or empty file, rows of unequal length, or a cell that is no number.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            delimiter = next((d for d in ";\t" if d in first), ",")
            rows = [(i, row) for i, row in enumerate(csv.reader(file, delimiter=delimiter), start=1) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{str(path)!r} cannot be read as a csv file: {error}") from error
    columns: tuple[str, ...] = ()
    if rows and not any(_is_number(cell) for cell in rows[0][1]):
        columns = tuple(cell.strip() or f"column {j}" for j, cell in enumerate(rows[0][1]))
        rows = rows[1:]
    if not rows:
        raise DataError(f"{str(path)!r} has no rows of numbers")
    width = len(columns) or len(rows[0][1])
    columns = columns or tuple(f"column {j}" for j in range(width))
    table = np.empty((len(rows), width))
    for k, (i, row) in enumerate(rows):
        if len(row) != width:
            raise DataError(f"row {i} of {str(path)!r} has {len(row)} cells; expected {width}")
        try:
            table[k] = [float(cell) for cell in row]
        except ValueError:
            j = next(j for j, cell in enumerate(row) if not _is_number(cell))
            raise DataError(
                f"row {i}, column {columns[j]!r} of {str(path)!r} is {row[j]!r}; expected a number "
                "(encode categories as integers; if this row is a header, none of its names may be a number)"
            ) from None
    return table, columns


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
