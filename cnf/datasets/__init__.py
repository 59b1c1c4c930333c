"""Toy, tabular, image and custom data sets, split into training, validation and test sets."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from cnf.datasets import celeba, images, large, pictures, supervised, tabular, toy
from cnf.datasets.files import load_path
from cnf.datasets.splits import DataSplits, Options
from cnf.errors import ConfigError, DataError
from cnf.schema import TableColumn

__all__ = ["DataSplits", "load", "names"]

PICTURE_PREFIX = "picture:"
_ALIASES = {
    "cifar-10": "cifar10",
    "fashionmnist": "fashion-mnist",
    "hash": "hash-gaussian",
    "imagenet-32": "imagenet32",
    "imagenet-64": "imagenet64",
    "celeba-hq": "celebahq256",
    "celebahq": "celebahq256",
    "celeba-hq-256": "celebahq256",
}


def names() -> dict[str, str]:
    """Return the named data sets with a one-line description each (files and folders are loaded by path)."""
    return images.NAMES | celeba.NAMES | large.NAMES | toy.NAMES | supervised.NAMES | tabular.NAMES


def load(
    name_or_path: str | Path,
    *,
    root: str | Path = "data",
    seed: int = 0,
    split_seed: int = 0,
    condition: str | None = None,
    discrete: str = "dequantize",
    duplicates: str = "drop",
    download: bool = True,
    limit: int | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    nbits: int = 8,
    image_size: int | None = None,
    invert: bool = False,
    flip: bool | None = None,
    sizes: tuple[int, int, int] = (50_000, 5_000, 10_000),
    columns: str | Sequence[str] | None = None,
    drop_columns: str | Sequence[str] | None = None,
    missing: str = "error",
    dependent: str = "error",
    table: tuple[TableColumn, ...] = (),
) -> DataSplits:
    """Load a data set by name or path.

    Args:
        name_or_path: one of :func:`names`; an .npz or .npy file; a table (.csv, .tsv, .csv.gz, .parquet, .xlsx); a
            folder of PNG, JPEG, WebP, BMP or TIFF images; a folder with parts called train... and test... (files or
            folders); or one image, optionally as ``picture:path``, whose darkness defines a density in the plane.
        root: folder of the named data sets, also the download target (data/README.md gives the layout).
        seed: seed of toy samples and of the dequantisation noise of discrete columns.
        split_seed: seed of random splits and of the rows that ``limit`` keeps; separate from ``seed``, so that runs
            share their test set.
        condition: ``"label"`` for one-hot contexts, ``"target"`` for regression targets, or comma-separated names of
            table columns to condition on: p(other columns | these).
        discrete: treatment of columns on a lattice: ``"dequantize"`` (one step of uniform noise), ``"keep"`` or
            ``"error"``.
        duplicates: treatment of exact duplicate rows of custom data: ``"drop"`` before splitting, or ``"keep"``.
        download: allow torchvision to download.
        limit: maximum number of training rows.
        validation_fraction, test_fraction: fractions of custom data.
        nbits: bits kept of 8-bit images, 1 to 8; ``levels`` becomes 2**nbits.
        image_size: centre-crop and resize the images of a folder, or CelebA's, to this size.
        invert: for the density of an image: make light dense instead of dark.
        flip: flip training images horizontally at random; None follows the published protocol, without one no flips.
        sizes: numbers of training, validation and test samples of a toy set.
        columns, drop_columns: table columns to keep or to drop; comma-separated text, or a list.
        missing: treatment of table rows with missing values: ``"error"`` or ``"drop"``.
        dependent: treatment of linearly dependent table columns: ``"error"`` or ``"keep"``.
        table: columns of a trained model (``DataSplits.table``); the table is read with the same column types.

    Raises:
        DataError: for unusable data; the message states the fault and a remedy.
        ConfigError: for an invalid option, or one that does not apply to this data set.

    Example:
        >>> load("digits").event_shape
        (1, 8, 8)
    """
    options = Options(
        str(root), seed, split_seed, condition, discrete, duplicates, download, limit,
        validation_fraction, test_fraction, nbits, image_size, invert, flip, sizes, columns, drop_columns, missing, dependent, table,
    )  # fmt: skip
    name = str(name_or_path)
    known = names()
    plain = name.lower().replace("_", "-")
    plain = _ALIASES.get(plain, plain)
    is_picture = name.startswith(PICTURE_PREFIX) or (plain not in known and name.lower().endswith(pictures.SUFFIXES))
    path = Path(name.removeprefix(PICTURE_PREFIX)).expanduser()
    if plain in images.NAMES | celeba.NAMES | large.NAMES:
        kind = "image"
    else:
        kind = "toy" if is_picture or plain in toy.NAMES | supervised.NAMES else "tabular" if plain in tabular.NAMES else "own"
    _refuse_idle(options, name, kind, plain if plain in celeba.NAMES else "picture" if is_picture else "")
    if is_picture:
        return pictures.load_picture(path, options)
    if plain in images.NAMES:
        return images.load_images(plain, options)
    if plain in celeba.NAMES:
        return celeba.load_celeba(options)
    if plain in large.NAMES:
        return large.load_large(plain, options)
    if plain in toy.NAMES:
        return toy.load_toy(plain, options)
    if plain in supervised.NAMES:
        return supervised.load_supervised(plain, options)
    if plain in tabular.NAMES:
        return tabular.load_tabular(plain, options)
    if path.exists():
        return load_path(path, options)
    if path.suffix or len(path.parts) > 1:
        raise DataError(f"data {name!r} does not exist (looked for {str(path.resolve())!r}), nor is it a known name")
    near = get_close_matches(plain, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known names: {', '.join(known)}"
    raise DataError(f"data {name!r} is neither a known name nor a file or folder: {hint}")


# option -> kinds of data that it applies to (image, toy, tabular, own; celeba is one image set, picture one kind of
# toy set), and their description in messages
_MEANT_FOR = {
    "nbits": (("image", "own"), "images"),
    "flip": (("image", "own"), "images"),
    "image_size": (("own", "celeba"), "a folder of pictures and celeba"),
    "invert": (("picture",), "the density of a picture"),
    "sizes": (("toy",), "toy sets"),
    "duplicates": (("own", "tabular"), "your own data"),
    "discrete": (("own", "tabular"), "your own tables"),
    "columns": (("own",), "your own tables"),
    "drop_columns": (("own",), "your own tables"),
    "missing": (("own",), "your own tables"),
    "dependent": (("own",), "your own tables"),
    "validation_fraction": (("own",), "your own data"),
    "test_fraction": (("own",), "your own data"),
}


def _refuse_idle(options: Options, name: str, kind: str, special: str) -> None:
    """Reject options without effect on this kind of data."""
    if options.condition not in (None, "label", "target") and kind != "own":
        raise ConfigError(f"condition={options.condition!r} is not known; expected None, 'label' or 'target' (columns are for your own tables)")
    for option, (kinds, what) in _MEANT_FOR.items():
        value = getattr(options, option)
        if value != getattr(Options(), option) and kind not in kinds and special not in kinds:
            raise ConfigError(f"{option}={value!r} means nothing for {name!r}; it is for {what}")
