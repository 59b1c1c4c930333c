"""Toy, tabular and image data and the user's own files, as training, validation and test."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from cnf.datasets.files import PICTURES, load_path
from cnf.datasets.images import IMAGES, load_digits_8x8, load_torchvision
from cnf.datasets.splits import DataSplits
from cnf.datasets.tables import BENCHMARKS, load_benchmark
from cnf.datasets.toy import TOYS, load_picture, load_toy
from cnf.errors import DataError

__all__ = ["DataSplits", "load", "names"]


def names() -> dict[str, str]:
    """Every data set known by name, with a line about it."""
    lines = {"digits": "8x8 digits of scikit-learn, 17 grey levels, no download"}
    lines |= {name: f"{kind} through torchvision" for name, (kind, _, _) in IMAGES.items()}
    lines |= dict.fromkeys(TOYS, "two-dimensional toy density")
    return lines | BENCHMARKS


def load(
    name: str,
    *,
    root: str | Path = "data",
    split_seed: int = 0,
    condition: str | None = None,
    discrete: str = "dequantize",
    limit: int | None = None,
    nbits: int = 8,
    image_size: int | None = None,
    download: bool = True,
) -> DataSplits:
    """A data set by name or path.

    Args:
        name: one of :func:`names`, or a path: .npz, .npy, .csv, a folder of pictures, or one picture (its density).
        root: where named data sets are looked for and downloaded to.
        split_seed: decides the split where none is fixed.
        condition: ``"label"`` for one-hot class contexts.
        discrete: what to do with a column on a lattice: ``"dequantize"``, ``"keep"`` or ``"error"``.
        limit: keep only so many training items.
        nbits: grey levels kept of 8-bit images.
        image_size: crop and resize a folder's pictures to this size.
        download: whether torchvision may download.

    Raises:
        DataError: for anything that cannot be used, saying what and why.

    Example:
        >>> load("digits").event_shape
        (1, 8, 8)
    """
    if condition not in (None, "label"):
        raise DataError(f"condition={condition!r}; expected 'label', or none")
    if not 1 <= nbits <= 8:
        raise DataError(f"nbits={nbits}; expected 1 to 8")
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}; expected at least 1 training item")
    path = Path(name)
    known = names()
    if name not in known:
        if not path.exists():
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise DataError(f"data={name!r} is neither a known data set nor a path that exists: {hint}")
        if path.suffix.lower() in PICTURES:
            return load_picture(path, split_seed, limit)
        return load_path(
            path, seed=split_seed, condition=condition, discrete=discrete, limit=limit, nbits=nbits, image_size=image_size
        )
    if name == "digits":
        return load_digits_8x8(condition, limit)
    if name in IMAGES:
        return load_torchvision(name, Path(root), split_seed, condition, limit, nbits, download)
    if condition:
        raise DataError(f"condition='label', but {name} has no labels")
    return load_toy(name, split_seed, limit) if name in TOYS else load_benchmark(name, Path(root), limit)
