"""Loaded data sets, their options, and the split of rows into training, validation and test sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cnf._utils.errors import ConfigError, DataError
from cnf.data.rows import Array, is_mapped
from cnf.data.schema import TableColumn

__all__ = ["Array", "DataSplits", "Options", "Rows", "assemble", "encode_labels", "split_rows"]

Kind = Literal["toy", "image", "table"]

MINIMUM_ROWS = 10
MAXIMUM_CLASSES = 1000


@dataclass(frozen=True, eq=False)
class DataSplits:
    """Data set split into training, validation and test rows, with metadata.

    Attributes:
        name: name or path of the data set.
        kind: ``"toy"`` (points in the plane), ``"image"`` or ``"table"``.
        train, validation, test: uint8 (N, C, H, W) for images, float32 (N, D) otherwise. ``train`` of a set of 2 GiB or
            more may be a memory map of its file: an ordinary tensor that loads only the rows that are read.
        train_context, validation_context, test_context: context of each row, float32: one-hot labels
            (N, len(classes)), regression targets (N, targets) or encoded conditions of a table (N, C); or None.
        classes: label names in the order of the one-hot columns; set whenever the data set has labels.
        columns: column names of a table.
        levels: number of grey levels of an image channel; None for vectors.
        train_levels: grey levels of ``train`` alone, from which each step draws binary images (``binarize="redraw"``); None if
            they are ``levels``.
        entropy: exact differential entropy in nats if known, else None.
        notices: one sentence for each change to the data that should be reported.
        flip: whether training images are flipped horizontally at random.
        table: classified columns of a custom table.
        report: description of these columns, one line each.

    Example:
        >>> from cnf.data import load
        >>> digits = load("digits")
        >>> digits.event_shape, digits.levels, len(digits.test)
        ((1, 8, 8), 17, 540)
    """

    name: str
    kind: Kind
    train: Tensor
    validation: Tensor
    test: Tensor
    train_context: Tensor | None = None
    validation_context: Tensor | None = None
    test_context: Tensor | None = None
    classes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    levels: int | None = None
    entropy: float | None = None
    notices: tuple[str, ...] = ()
    flip: bool = False
    table: tuple[TableColumn, ...] = ()
    report: str = ""
    train_levels: int | None = None

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one row or image."""
        return tuple(self.train.shape[1:])

    @property
    def context_dim(self) -> int:
        """Number of context columns C (classes, targets or encoded conditions); 0 without context."""
        return 0 if self.train_context is None else int(self.train_context.shape[1])


@dataclass(frozen=True)
class Options:
    """Validated options of :func:`cnf.data.load`, which documents them."""

    root: str | Path = "data"
    seed: int = 0
    split_seed: int = 0
    condition: str | None = None
    discrete: str = "dequantize"
    duplicates: str = "drop"
    download: bool = True
    limit: int | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    nbits: int = 8
    image_size: int | None = None
    invert: bool = False
    flip: bool | None = None
    binarize: str = "no"
    sizes: tuple[int, int, int] = (50_000, 5_000, 10_000)
    hold_out_angle: float | None = None
    columns: str | Sequence[str] | None = None
    drop_columns: str | Sequence[str] | None = None
    missing: str = "error"
    dependent: str = "error"
    table: tuple[TableColumn, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {getattr(self, name)!r}")
        for name, least in (("seed", 0), ("split_seed", 0), ("limit", 1), ("image_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if not 1 <= self.nbits <= 8:
            raise ConfigError(f"nbits must be between 1 and 8, got {self.nbits}")
        fractions = (self.validation_fraction, self.test_fraction)
        if not (min(fractions) > 0.0 and sum(fractions) < 1.0):
            raise ConfigError(f"validation_fraction and test_fraction must be positive with a sum below 1, got {fractions[0]} and {fractions[1]}")
        if self.hold_out_angle is not None and not 0 < self.hold_out_angle < 360:
            raise ConfigError(f"hold_out_angle must be above 0 and below 360 degrees, got {self.hold_out_angle}")
        if len(self.sizes) != 3 or min(self.sizes) < 1:
            raise ConfigError(f"sizes must be three positive numbers (training, validation, test), got {self.sizes}")

    @property
    def folder(self) -> Path:
        """Folder of the named data sets."""
        return Path(self.root).expanduser()

    def changed(self, names: Iterable[str]) -> str | None:
        """Return the first of these options that differs from its default, or None."""
        return next((name for name in names if getattr(self, name) != getattr(Options, name)), None)


_CHOICES = {"missing": ("error", "drop"), "dependent": ("error", "keep"), "discrete": ("dequantize", "keep", "error"), "duplicates": ("drop", "keep"), "binarize": ("no", "once", "redraw")}


@dataclass
class Rows:
    """Rows of a reader, before checks and split.

    Attributes:
        x: (N, D) numbers, a pandas frame with unconverted cells, or uint8 images (N, C, H, W).
        labels: (N,) integers or strings, or None.
        notices: one sentence for each change made by the reader.
    """

    x: Any  # an array, or a pandas frame
    labels: Array | None = None
    notices: list[str] = field(default_factory=list)

    @property
    def kind(self) -> Kind:
        """``"image"`` for arrays of four dimensions, else ``"table"``."""
        return "image" if self.x.ndim == 4 else "table"


def split_rows(n: int, options: Options) -> tuple[list[Array], str]:
    """Return the row numbers of a random train, validation and test split by ``split_seed``, and a notice.

    Raises:
        DataError: for fewer than ten rows, or fewer than two training rows.
    """
    if n < MINIMUM_ROWS:
        raise DataError(f"the data set has {n} rows (duplicates dropped, unless duplicates='keep'); expected at least {MINIMUM_ROWS} to split")
    test, validation = (max(1, round(n * f)) for f in (options.test_fraction, options.validation_fraction))
    order = np.random.default_rng(options.split_seed).permutation(n)
    parts = [order[test + validation :], order[test : test + validation], order[:test]]
    if len(parts[0]) < 2:
        raise DataError(f"{n} rows leave fewer than two for training; lower validation_fraction or test_fraction")
    return parts, f"split at random by split_seed {options.split_seed}"


def encode_labels(labels: Array) -> tuple[Array, tuple[str, ...]]:
    """Return class indices (N,) and class names, sorted (numerically for integers).

    Raises:
        DataError: for labels that are neither integers nor strings, or too many classes.
    """
    if labels.dtype.kind == "f" and np.array_equal(labels, np.rint(labels)):
        labels = labels.astype(np.int64)
    if labels.dtype.kind not in "iubU":
        raise DataError(f"labels must be integers or strings, one for each row, got dtype {labels.dtype}")
    values, codes = np.unique(labels, return_inverse=True)
    if len(values) > MAXIMUM_CLASSES:
        raise DataError(f"labels must have at most {MAXIMUM_CLASSES} classes, got {len(values)} (a continuous quantity belongs among the columns)")
    return codes.reshape(-1), tuple(str(v) for v in values)


def assemble(
    name: str,
    kind: Kind,
    parts: Sequence[Array],
    options: Options,
    *,
    codes: Sequence[Array] | None = None,
    targets: Sequence[Array] | None = None,
    given: Sequence[Array] | None = None,
    classes: tuple[str, ...] = (),
    notices: Sequence[str] = (),
    flip: bool = False,
    **metadata: Any,
) -> DataSplits:
    """Build the :class:`DataSplits`: apply ``limit`` and ``condition``, convert to tensors, report the sizes.

    Args:
        name, kind, classes, notices, flip, metadata: see :class:`DataSplits`.
        parts: training, validation and test rows.
        options: see :func:`cnf.data.load`.
        codes, targets, given: class indices, regression targets or encoded conditions of each part.

    Raises:
        DataError: if ``condition`` requests labels (targets) and there are none, or a part is empty.
    """
    train, validation, test = parts
    for which, part in (("training", train), ("validation", validation), ("test", test)):
        if len(part) == 0:
            raise DataError(f"the {which} part of {name!r} is empty; expected at least one row")
    said = [*notices, f"{len(train):,} training, {len(validation):,} validation, {len(test):,} test rows"]
    if options.limit is not None and options.limit < len(train):
        kept = np.random.default_rng(options.split_seed).permutation(len(train))[: options.limit]
        train = train[kept]
        codes, targets, given = (x if x is None else [x[0][kept], *x[1:]] for x in (codes, targets, given))
        said.append(f"only {options.limit:,} of the training rows are used (limit), chosen by split_seed {options.split_seed}")
    contexts: list[Tensor | None] = [None, None, None]
    if given is not None:
        contexts = [_tensor(c) for c in given]
    elif options.condition == "label":
        if codes is None:
            raise DataError(
                f"--condition label or --objective classification needs labels, and {name!r} has none; give an .npz file with the key 'labels', "
                "a folder whose sub-folders are the classes, or a table with a column label (--condition COLUMNS takes any columns)"
            )
        eye = torch.eye(len(classes))
        contexts = [eye[torch.from_numpy(np.asarray(c, dtype=np.int64))] for c in codes]
    if options.condition == "target":
        if targets is None:
            raise DataError(f"--objective regression needs targets, and {name!r} has none; the sets identity, flip, spheres1, spheres2, ..., separable2 and shifted-sines have")
        contexts = [_tensor(y) for y in targets]
    return DataSplits(
        name,
        kind,
        _tensor(train),
        _tensor(validation),
        _tensor(test),
        contexts[0],
        contexts[1],
        contexts[2],
        classes=classes,
        notices=tuple(said),
        flip=flip if options.flip is None else options.flip,
        **metadata,
    )


def _tensor(x: Array) -> Tensor:
    """Convert to a tensor, uint8 or float32; everything except a uint8 memory map is copied."""
    if is_mapped(x) and x.dtype == np.uint8:
        return torch.from_numpy(x)
    return torch.from_numpy(np.array(x, dtype=np.uint8 if x.dtype == np.uint8 else np.float32, order="C"))
