"""Downsampled ImageNet and CelebA-HQ, read from arrays or folders under the data root."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cnf._utils.errors import DataError
from cnf._utils.progress import progress
from cnf.data.arrays import as_images, read_numpy
from cnf.data.folders import Listing, list_folder, part_entries, rgb
from cnf.data.pictures import FORMATS, open_picture
from cnf.data.prepared import find_prepared, prepare, reduce_bits, stamp
from cnf.data.rows import Array, hold_out, is_mapped, keep_rows
from cnf.data.splits import DataSplits, Options, assemble

__all__ = ["NAMES", "load_large"]

NAMES = {
    "imagenet32": "ImageNet downsampled to 32x32, 1.33 million pictures; arrays or folders in root/imagenet32",
    "imagenet64": "ImageNet downsampled to 64x64, 1.33 million pictures; arrays or folders in root/imagenet64",
    "celebahq256": "CelebA-HQ at 256x256, 30,000 faces (published at nbits=5); arrays or folders in root/celebahq256",
}


@dataclass(frozen=True)
class _Set:
    """Protocol of a large image set."""

    size: int  # height and width of an image
    held_out: int  # training images held out for validation, since the published validation set is the test set
    flip: bool  # whether the published protocol flips training images
    published: tuple[tuple[int, int], ...]  # known sizes of the training and test set


# two downsampling methods share the name: arXiv 1707.08819, and PixelRNN (arXiv 1601.06759)
_IMAGENET = ((1_281_167, 50_000), (1_281_149, 49_999))
_SETS = {
    "imagenet32": _Set(32, 5_000, False, _IMAGENET),
    "imagenet64": _Set(64, 5_000, False, _IMAGENET),
    "celebahq256": _Set(256, 1_000, True, ((27_000, 3_000),)),
}


def load_large(name: str, options: Options) -> DataSplits:
    """Load one of :data:`NAMES`, decoding it on first use into ``root/name/prepared``.

    Raises:
        DataError: for missing or damaged files, or images of another size or number of channels.
    """
    spec, folder = _SETS[name], options.folder / name
    by_part = part_entries(folder) if folder.is_dir() else {}
    if "test" not in by_part and "validation" in by_part:
        by_part["test"] = by_part.pop("validation")  # papers report on the published validation set
    if "train" not in by_part or "test" not in by_part:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) if folder.is_dir() else "no such folder"
        raise DataError(
            f"{name} needs files or folders called train... and val... (or test...) in {str(folder.resolve())!r}, .npy or .npz "
            f"arrays or {FORMATS} images, got {there or 'nothing'}. data/README.md lists the layouts"
        )
    images, notices = {}, []
    for part, entries in by_part.items():
        images[part], said = _read_part(name, part, entries, folder, spec.size, options.nbits)
        notices += said
    train, test = images["train"], images["test"]
    counts = len(train), len(test)
    if counts not in spec.published:
        known = " or ".join(f"{a:,} and {b:,}" for a, b in spec.published)
        notices.append(f"{counts[0]:,} training and {counts[1]:,} test images, where {known} are published: figures do not compare")
    if "validation" in images:
        validation = images["validation"]
        notices.append("split as the folder gives it")
    else:
        held = min(spec.held_out, len(train) // 10)
        if held < 1:
            raise DataError(f"{name} has {len(train)} training images; expected at least 10")
        rest, taken = hold_out(len(train), held, options.split_seed)
        validation = np.array(train[np.sort(taken)])
        train, _ = keep_rows(train, rest)
        notices.append(
            f"the published validation set is the test set; validation is split off the training set by split_seed {options.split_seed}"
        )
    parts = [train, validation, test]
    return assemble(name, "image", parts, options, levels=2**options.nbits, notices=notices, flip=spec.flip)


def _read_part(name: str, part: str, entries: list[Path], folder: Path, size: int, nbits: int) -> tuple[Array, list[str]]:
    """Read the images of one part, uint8 (N, 3, size, size), and notices."""
    shape, mark = (3, size, size), stamp(entries, size)
    prepared, stem = folder / "prepared", f"{part}-{size}x{size}-{nbits}bit"
    images = find_prepared(prepared, stem, mark, shape)
    if images is not None:  # avoids listing a million files
        return images, [f"{part}: decoded by an earlier run"]
    pictures, arrays = [], []
    for entry in entries:
        listing = list_folder(entry) if entry.is_dir() else Listing([], None, [entry], [])
        pictures += listing.pictures
        arrays += listing.arrays
    if bool(pictures) == bool(arrays):
        kinds = "both images and arrays" if arrays else "neither"
        raise DataError(f"{name}: {', '.join(p.name for p in entries)} in {str(folder)!r} must hold either images or arrays, got {kinds}")
    if len(arrays) == 1 and arrays[0].suffix.lower() == ".npy":
        images = _array(arrays[0], size)
        if nbits == 8 or not is_mapped(images):
            return reduce_bits(images, nbits), []

    def from_arrays() -> Iterator[Array]:
        for path in arrays:
            images = _array(path, size)
            for start in range(0, len(images), 4096):
                yield images[start : start + 4096]

    def from_pictures() -> Iterator[Array]:
        for path in progress(pictures, f"decoding {name} ({part})", len(pictures)):
            picture = open_picture(path)
            if picture.size != (size, size):
                raise DataError(
                    f"image {str(path)!r} is {picture.width}x{picture.height}; {name} has {size}x{size}. Load, crop and resize "
                    f"your own images by data={str(path.parent)!r} with image_size={size}"
                )
            yield rgb(picture)

    images, notices = prepare(prepared, stem, mark, from_arrays if arrays else from_pictures, shape, nbits)
    return images, [f"{part}: {notice}" for notice in notices]


def _array(path: Path, size: int) -> Array:
    """Read uint8 images (N, 3, size, size), stored as images or as rows of 3 size² values, channel by channel."""
    arrays = read_numpy(path)
    keys = [k for k in ("images", "x", "data") if k in arrays]
    if len(keys) != 1:
        raise DataError(f"{str(path)!r} holds the keys {sorted(arrays)}; expected exactly one of 'images', 'x', 'data'")
    x = arrays[keys[0]]
    if x.ndim == 2 and x.shape[1] == 3 * size * size:
        x = x.reshape(-1, 3, size, size)
    if x.ndim != 4 or x.dtype != np.uint8:
        raise DataError(f"{str(path)!r} must hold uint8 images (N, {size}, {size}, 3), got {x.dtype} of shape {x.shape}")
    images, _ = as_images(x, str(path))
    if images.shape[1:] != (3, size, size):
        raise DataError(f"{str(path)!r} must hold images (channels, height, width) = {(3, size, size)}, got {images.shape[1:]}")
    return images
