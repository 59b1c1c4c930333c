"""Toy, tabular and image data and the user's own files, as training, validation and test sets."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from cnf.datasets import images, pictures, tabular, toy
from cnf.datasets.files import load_path
from cnf.datasets.splits import DataSplits, Options
from cnf.errors import ConfigError, DataError

__all__ = ["DataSplits", "load", "names"]

PICTURE_PREFIX = "picture:"
_ALIASES = {"cifar-10": "cifar10", "fashionmnist": "fashion-mnist", "hash": "hash-gaussian"}


def names() -> dict[str, str]:
    """Every data set known by name, with a line about it (files and folders need no name)."""
    return images.NAMES | toy.NAMES | tabular.NAMES


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
    sizes: tuple[int, int, int] = (50_000, 5_000, 10_000),
) -> DataSplits:
    """Load a data set by name or path.

    Args:
        name_or_path: one of :func:`names`; an .npz, .npy or .csv file; a folder of PNG or JPEG pictures; or one picture,
            also as ``picture:path``, whose darkness is a density in the plane.
        root: where named data sets are looked for and downloaded to (data/README.md gives the layout).
        seed: draws toy points, and the noise that spreads discrete columns.
        split_seed: decides random splits and what ``limit`` keeps; apart from ``seed``, so that runs share their test set.
        condition: ``"label"`` for one-hot contexts.
        discrete: columns on a lattice: ``"dequantize"`` (one step of uniform noise), ``"keep"`` or ``"error"``.
        duplicates: exact duplicate rows of the user's own data: ``"drop"`` before splitting, or ``"keep"``.
        download: whether torchvision may download.
        limit: use only so many training rows.
        validation_fraction, test_fraction: shares of the user's own data.
        nbits: bits kept of 8-bit images.
        image_size: centre-crop and resize a folder's pictures to this size.
        invert: of a picture's density: light is dense instead of dark.
        sizes: points of train, validation and test of a toy set.

    Raises:
        DataError: for data that cannot be used, saying what is wrong and what to try.
        ConfigError: for an option that cannot be, or that means nothing for this data set.

    Example:
        >>> load("digits").event_shape
        (1, 8, 8)
    """
    options = Options(
        str(root), seed, split_seed, condition, discrete, duplicates, download, limit,
        validation_fraction, test_fraction, nbits, image_size, invert, sizes,
    )  # fmt: skip
    name = str(name_or_path)
    known = names()
    plain = name.lower().replace("_", "-")
    plain = _ALIASES.get(plain, plain)
    is_picture = name.startswith(PICTURE_PREFIX) or (plain not in known and name.lower().endswith(pictures.SUFFIXES))
    path = Path(name.removeprefix(PICTURE_PREFIX)).expanduser()
    _refuse_idle(options, name, image=plain in images.NAMES, picture=is_picture, own=plain not in known and not is_picture)
    if is_picture:
        return pictures.load_picture(path, options)
    if plain in images.NAMES:
        return images.load_images(plain, options)
    if plain in toy.NAMES:
        return toy.load_toy(plain, options)
    if plain in tabular.NAMES:
        return tabular.load_tabular(plain, options)
    if path.exists():
        return load_path(path, options)
    if path.suffix or len(path.parts) > 1:
        raise DataError(f"data {name!r} does not exist (looked for {str(path.resolve())!r}), nor is it a known name")
    near = get_close_matches(plain, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known names: {', '.join(known)}"
    raise DataError(f"data {name!r} is neither a known name nor a file or folder: {hint}")


def _refuse_idle(options: Options, name: str, *, image: bool, picture: bool, own: bool) -> None:
    """An option that would do nothing is a mistake, so it is refused."""
    if options.nbits != 8 and not (image or own):
        raise ConfigError(f"nbits={options.nbits} means nothing for {name!r}, which is no set of images")
    if options.image_size is not None and not own:
        raise ConfigError(f"image_size={options.image_size} means nothing for {name!r}; it applies to a folder of pictures")
    if options.invert and not picture:
        raise ConfigError(f"invert=True means nothing for {name!r}; it applies to the density of a picture")
