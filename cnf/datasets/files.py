"""The user's own data: .npz, .npy, .csv, a folder of pictures or of a split. Nothing read here can execute code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cnf.datasets.arrays import read_numpy, rows_of_keys
from cnf.datasets.checks import as_numbers, dequantize, duplicate_rows, require_usable
from cnf.datasets.folders import ARRAYS, part_entries, read_folder
from cnf.datasets.prepared import reduce_bits
from cnf.datasets.rows import Array, hold_out, is_mapped, keep_rows
from cnf.datasets.splits import DataSplits, Options, Rows, assemble, encode_labels, split_rows
from cnf.datasets.text import read_csv
from cnf.errors import ConfigError, DataError

__all__ = ["load_path"]

Parts = dict[str, Rows]  # all of it under "all", or "train", "test" and perhaps "validation"


def load_path(path: Path, options: Options) -> DataSplits:
    """Read, check, split.

    Raises:
        DataError: for anything that is not a usable data set, saying what is wrong.
        ConfigError: for ``image_size`` or ``nbits`` where it means nothing.
    """
    name = str(path)
    parts = _read_split(path, options) if path.is_dir() else None
    if parts is None:
        parts = {"all": read_folder(path, options.image_size)} if path.is_dir() else _read_file(path, options)
    rows = [parts[p] for p in ("all", "train", "validation", "test") if p in parts]
    shapes = {p: parts[p].x.shape[1:] for p in parts}
    if len(set(shapes.values())) > 1:
        raise DataError(f"the parts of {name!r} differ in the shape of an item: {shapes}")
    with_labels = [r.labels is not None for r in rows]
    if any(with_labels) and not all(with_labels):
        raise DataError(f"some parts of {name!r} have labels and others none; expected all or none")
    labels = np.concatenate([r.labels for r in rows if r.labels is not None]) if all(with_labels) else None
    notices = list(dict.fromkeys(n for r in rows for n in r.notices))
    if labels is not None and options.condition is None:
        try:
            encode_labels(labels)
        except DataError as error:  # nothing that is asked for needs them
            labels = None
            notices.append(f"labels not used: {error}")
    if rows[0].kind == "table":
        return _table(rows, labels, name, options, notices)
    return _images(rows, labels, name, options, notices)


# --- reading ----------------------------------------------------------------------------------------------------


def _read_file(path: Path, options: Options) -> Parts:
    name = str(path)
    if options.image_size is not None:
        raise ConfigError(f"image_size={options.image_size} means nothing for {name!r}; it is for a folder of pictures")
    suffix = path.suffix.lower()
    if suffix == ".csv":
        table, columns = read_csv(path)
        return {"all": Rows(table, columns=columns)}
    if suffix in ARRAYS:
        return rows_of_keys(read_numpy(path), name)
    pickled = suffix in (".pkl", ".pickle", ".pt", ".pth")
    extra = "; pickled files can run code and are never opened: save the array with numpy.save" if pickled else ""
    raise DataError(f"{name!r} is no known kind of data; expected .npz, .npy, .csv, .png, .jpg, .webp, .bmp, .tif or a folder{extra}")


def _read_split(folder: Path, options: Options) -> Parts | None:
    """The parts of a folder with files or sub-folders called train... and test...; None where it is no such folder.

    Where there are other sub-folders beside, they all are classes (one of them may well be called "train").
    """
    try:
        found = part_entries(folder)
        ours = {entry for entries in found.values() for entry in entries}
        others = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".") and p not in ours]
    except OSError as error:
        raise DataError(f"folder {str(folder)!r} cannot be read: {error}") from None
    if "train" not in found or len(found) < 2 or others:
        return None
    if "test" not in found:
        given = ", ".join(p.name for p in sorted(ours))
        raise DataError(
            f"folder {str(folder)!r} gives its own split by {given} but no test part; expected train..., test... and "
            "perhaps val...: rename the latter to test, and validation will be split off the training part"
        )
    parts = {}
    for part, entries in found.items():
        if len(entries) > 1:
            several = ", ".join(p.name for p in entries)
            raise DataError(f"folder {str(folder)!r} has several {part} parts: {several}; expected one")
        if entries[0].is_dir():
            parts[part] = read_folder(entries[0], options.image_size)
            continue
        inner = _read_file(entries[0], options)
        if list(inner) != ["all"]:
            raise DataError(
                f"{str(entries[0])!r} is a {part} part and brings a split of its own; give that file itself"
            )
        parts[part] = inner["all"]
    return parts


# --- finishing --------------------------------------------------------------------------------------------------


def _table(rows: list[Rows], labels: Array | None, name: str, options: Options, notices: list[str]) -> DataSplits:
    if options.nbits != 8 or options.flip is not None:
        raise ConfigError(f"nbits and flip mean nothing for {name!r}, which is a table")
    kinds = [r.x.dtype for r in rows]
    epsilon = max(float(np.finfo(k if k in (np.float16, np.float32) else np.float64).eps) for k in kinds)
    table = np.concatenate([as_numbers(r.x, name) for r in rows])
    columns = rows[0].columns or tuple(f"column {j}" for j in range(table.shape[1]))
    require_usable(table, columns, name)
    kept, said = _drop_duplicates(duplicate_rows([table], labels), [len(r.x) for r in rows], options)
    parts, notice = _split([len(r.x) for r in rows], kept, options)
    # lattices are looked for, and noise is drawn, among the rows that are used
    table, labels = table[kept], None if labels is None else labels[kept]
    place = np.empty(1 + int(kept.max()), dtype=np.int64)
    place[kept] = np.arange(len(kept))
    parts = [place[i] for i in parts]
    table, noised = dequantize(table, columns, options, epsilon, name)
    return assemble(
        name,
        "table",
        [table[i] for i in parts],
        options,
        **_classes(labels, parts),
        columns=columns,
        notices=[*notices, *said, *noised, notice],
    )


def _images(rows: list[Rows], labels: Array | None, name: str, options: Options, notices: list[str]) -> DataSplits:
    pieces = [r.x for r in rows]
    sizes = [len(x) for x in pieces]
    kept, said = _drop_duplicates(duplicate_rows(pieces, labels), sizes, options)
    parts, notice = _split(sizes, kept, options)
    starts = np.cumsum([0, *sizes])
    images = []
    for i in (1, 2):  # first, because keeping the training rows of a memory map overwrites the others
        parts[i] = np.sort(parts[i])
        number = int(np.searchsorted(starts, parts[i][0], side="right")) - 1
        own = parts[i] - starts[number]
        images.append(pieces[number] if len(own) == sizes[number] else np.array(pieces[number][own]))
    train, parts[0] = keep_rows(pieces[0], parts[0])
    if options.nbits != 8 and is_mapped(train):
        notices.append(f"nbits={options.nbits}: the training images are read into memory; those of 8 bits are mapped")
    return assemble(
        name,
        "image",
        [reduce_bits(x, options.nbits) for x in (train, *images)],
        options,
        **_classes(labels, parts),
        levels=2**options.nbits,
        notices=[*notices, *said, notice],
    )


def _drop_duplicates(repeated: Array, sizes: list[int], options: Options) -> tuple[Array, list[str]]:
    """The rows to keep, and what to say. A split that was given stays as it is."""
    count, everything = int(repeated.sum()), np.arange(len(repeated))
    if not count:
        return everything, []
    if len(sizes) == 1 and options.duplicates == "drop":
        notice = f"{count:,} exact duplicate rows dropped before splitting: they would leak into the test set"
        return everything[~repeated], [notice]
    if len(sizes) == 1:
        notice = f"{count:,} exact duplicate rows kept (duplicates='keep'): those that fall into two splits leak"
    else:
        test = int(repeated[-sizes[-1] :].sum())
        notice = f"{count:,} exact duplicate rows kept, since the split is given; {test:,} of them in the test part"
    return everything, [notice]


def _split(sizes: list[int], kept: Array, options: Options) -> tuple[list[Array], str]:
    """Row numbers of train, validation and test, and what was done.

    Args:
        sizes: of what was given: all in one, train and test, or the three parts.
        kept: rows that are no dropped duplicates.
    """
    if len(sizes) == 1:
        chosen, notice = split_rows(len(kept), options)
        return [kept[i] for i in chosen], notice
    fixed = ["test_fraction"] if len(sizes) == 2 else ["test_fraction", "validation_fraction"]
    if len(sizes) == 3 and options.limit is None:
        fixed.append("split_seed")
    for option in fixed:
        if getattr(options, option) != getattr(Options(), option):
            raise ConfigError(f"{option}={getattr(options, option)} means nothing here, since the data bring their own split")
    ends = np.cumsum(sizes)
    if min(sizes) == 0:
        part = ("train", "validation", "test")[sizes.index(0)] if len(sizes) == 3 else ("train", "test")[sizes.index(0)]
        raise DataError(f"the {part} part that was given is empty; expected at least one row")
    if len(sizes) == 3:
        return [np.arange(e - n, e) for e, n in zip(ends, sizes, strict=True)], "split as it is given"
    held = max(1, round(sizes[0] * options.validation_fraction))
    if sizes[0] < held + 2:
        raise DataError(f"{sizes[0]} training rows are too few to hold some out for validation; expected at least 3")
    train, validation = hold_out(sizes[0], held, options.split_seed)
    notice = f"test set as it is given; validation split off the training part by split_seed {options.split_seed}"
    return [train, validation, np.arange(ends[0], ends[1])], notice


def _classes(labels: Array | None, parts: list[Array]) -> dict[str, Any]:
    """The labels of each part, and the names of the classes, as :func:`assemble` takes them."""
    if labels is None:
        return {}
    codes, classes = encode_labels(labels)
    return {"codes": [codes[i] for i in parts], "classes": classes}
