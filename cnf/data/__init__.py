"""Toy, tabular, image and custom data sets, split into training, validation and test sets."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cnf._utils.errors import ConfigError, DataError
from cnf.data import binary, celeba, images, large, pictures, supervised, tabular, tiny_imagenet, toy
from cnf.data.files import load_path
from cnf.data.splits import DataSplits, Options

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
    "tiny-imagenet-200": "tiny-imagenet",
    "tinyimagenet": "tiny-imagenet",
    "frey-faces": "freyfaces",
    "silhouettes": "caltech",
}


_LOADERS: tuple[tuple[str, dict[str, str], Callable[[str, Options], DataSplits]], ...] = (
    ("image", images.NAMES, images.load_images),
    ("image", binary.NAMES, binary.load_published),
    ("celeba", celeba.NAMES, celeba.load_celeba),
    ("image", large.NAMES, large.load_large),
    ("image", tiny_imagenet.NAMES, tiny_imagenet.load_tiny_imagenet),
    ("toy", toy.NAMES, toy.load_toy),
    ("supervised", supervised.NAMES, supervised.load_supervised),
    ("tabular", tabular.NAMES, tabular.load_tabular),
)


def names() -> dict[str, str]:
    """Return the named data sets with a one-line description each (files and folders are loaded by path)."""
    return {name: line for _, sets, _ in _LOADERS for name, line in sets.items()}


def load(name_or_path: str | Path, **options: Any) -> DataSplits:
    """Load a data set by name or path.

    Args:
        name_or_path: one of :func:`names`; an .npz or .npy file; a table (.csv, .tsv, .csv.gz, .parquet, .xlsx); a
            folder of PNG, JPEG, WebP, BMP or TIFF images; a folder with parts called train... and test... (files or
            folders); or one image, optionally as ``picture:path``, whose darkness defines a density in the plane.

    Options:
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
        binarize: binary images, for autoencoders: ``"no"``; ``"once"``: each pixel is 1 with its grey level as probability,
            drawn by ``seed`` (of MNIST the published files, where they are); ``"redraw"``: training images stay grey, and
            each step of the training draws binary ones.
        flip: flip training images horizontally at random; None follows the published protocol, without one no flips.
        sizes: numbers of training, validation and test samples of a toy set.
        hold_out_angle: degrees of a slice around the first axis, of supervised toy sets: no training point is inside,
            and all validation points are.
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
    settings, name, known = Options(**options), str(name_or_path), names()
    plain = name.lower().replace("_", "-")
    plain = _ALIASES.get(plain, plain)
    path = Path(name.removeprefix(PICTURE_PREFIX)).expanduser()
    if name.startswith(PICTURE_PREFIX) or (plain not in known and name.lower().endswith(pictures.SUFFIXES)):
        _refuse_idle(settings, name, "picture")
        return pictures.load_picture(path, settings)
    for kind, sets, loader in _LOADERS:
        if supervised.family(plain) in sets:
            _refuse_idle(settings, name, kind)
            return binary.binarized(loader(plain, settings), settings)
    _refuse_idle(settings, name, "own")
    if path.exists():
        return binary.binarized(load_path(path, settings), settings)
    if path.suffix or len(path.parts) > 1:
        raise DataError(f"data {name!r} does not exist (looked for {str(path.resolve())!r}), nor is it a known name")
    near = get_close_matches(plain, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known names: {', '.join(known)}"
    raise DataError(f"data {name!r} is neither a known name nor a file or folder: {hint}")


# option -> kinds of data that it applies to, and their description in messages
_APPLIES_TO = {
    "nbits": (("image", "celeba", "own"), "images"),
    "flip": (("image", "celeba", "own"), "images"),
    "binarize": (("image", "celeba", "own"), "images"),
    "image_size": (("own", "celeba"), "a folder of images and celeba"),
    "invert": (("picture",), "the density of an image"),
    "sizes": (("toy", "supervised", "picture"), "toy sets"),
    "hold_out_angle": (("supervised",), "supervised toy sets, such as spheres2"),
    "duplicates": (("own", "tabular"), "your own data"),
    "discrete": (("own", "tabular"), "your own tables"),
    "columns": (("own",), "your own tables"),
    "drop_columns": (("own",), "your own tables"),
    "missing": (("own",), "your own tables"),
    "dependent": (("own",), "your own tables"),
    "validation_fraction": (("own",), "your own data"),
    "test_fraction": (("own",), "your own data"),
}


def _refuse_idle(options: Options, name: str, kind: str) -> None:
    """Reject options without effect on this kind of data."""
    if options.condition not in (None, "label", "target") and kind != "own":
        raise ConfigError(f"condition must be None, 'label' or 'target' for {name!r}, got {options.condition!r} (columns are for your own tables)")
    idle = options.changed(option for option, (kinds, _) in _APPLIES_TO.items() if kind not in kinds)
    if idle:
        raise ConfigError(f"{idle}={getattr(options, idle)!r} does not apply to {name!r}; it is for {_APPLIES_TO[idle][1]}")
