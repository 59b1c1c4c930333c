"""Folders of images (sub-folders are classes) and of custom splits (train, validation, test)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cnf._utils.errors import DataError
from cnf._utils.progress import progress
from cnf.data.arrays import dark
from cnf.data.pictures import FORMATS, SUFFIXES, open_picture
from cnf.data.rows import Array
from cnf.data.splits import Rows

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ARRAYS", "Listing", "list_folder", "part_entries", "read_folder", "rgb", "stack_pictures"]

ARRAYS = (".npy", ".npz")
RESIZE = "image_size=S crops the centre and resizes"
_PART = re.compile(r"(train|training|validation|valid|val|testing|test)(?![a-z])")


def part_entries(folder: Path, endings: tuple[str, ...] = ARRAYS) -> dict[str, list[Path]]:
    """Return files with these ``endings`` and sub-folders by part, from their names.

    Names begin with train (training), val (valid, validation) or test (testing).
    """
    parts: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir(), key=_natural):
        match = _PART.match(entry.name.lower())
        if match and (entry.is_dir() or entry.name.lower().endswith(endings)):
            word = match[1]
            part = "validation" if word.startswith("val") else "train" if word.startswith("train") else "test"
            parts.setdefault(part, []).append(entry)
    return parts


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return a sort key that orders batch_10 after batch_9."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", path.name)]


@dataclass
class Listing:
    """Contents of a folder.

    Attributes:
        pictures: image files (:data:`~cnf.data.pictures.SUFFIXES`), sorted by (sub-folder and) name.
        labels: sub-folder name of each image, or None if the images are in the folder itself.
        arrays: .npy and .npz files in the folder itself.
        others: names of all other files.
    """

    pictures: list[Path]
    labels: list[str] | None
    arrays: list[Path]
    others: list[str]


def list_folder(folder: Path) -> Listing:
    """List a folder and its sub-folders (one level).

    Raises:
        DataError: for images both in the folder and in sub-folders, or an unreadable folder.
    """
    try:
        files, subs = _entries(folder)
        inside = [(sub.name, p) for sub in subs for p in _entries(sub)[0]]
    except OSError as error:
        raise DataError(f"folder {str(folder)!r} cannot be read: {error}") from None
    loose = [p for p in files if p.suffix.lower() in SUFFIXES]
    labelled = [(label, p) for label, p in inside if p.suffix.lower() in SUFFIXES]
    if loose and labelled:
        raise DataError(
            f"folder {str(folder)!r} must hold either images or one sub-folder of images for each class, got both: "
            f"{loose[0].name} and {labelled[0][0]}"
        )
    others = [p.name for p in [*files, *(p for _, p in inside)] if p.suffix.lower() not in (*SUFFIXES, *ARRAYS)]
    return Listing(
        loose or [p for _, p in labelled],
        None if loose or not labelled else [label for label, _ in labelled],
        [p for p in sorted(files, key=_natural) if p.suffix.lower() in ARRAYS],
        others,
    )


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files and sub-folders of a folder, sorted by name, without a ``stat`` call for each."""
    with os.scandir(folder) as entries:
        kinds = sorted((e.name, e.is_dir()) for e in entries if not e.name.startswith("."))
    return [folder / n for n, is_folder in kinds if not is_folder], [folder / n for n, is_folder in kinds if is_folder]


def rgb(picture: Image.Image) -> Array:
    """Convert an image to RGB, uint8 (1, 3, H, W)."""
    return np.asarray(picture.convert("RGB")).transpose(2, 0, 1)[None]


def centre_square(picture: Image.Image, size: int) -> Image.Image:
    """Crop the central square and resize it to ``size`` (bicubic, antialiased)."""
    from PIL import Image

    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)


def read_folder(folder: Path, image_size: int | None = None) -> Rows:
    """Read the PNG, JPEG, WebP, BMP and TIFF images of a folder, or of its sub-folders with their names as labels.

    Images are decoded one by one into one uint8 array, grey if all of them are, otherwise RGB. With ``image_size`` each
    is cropped to its central square and resized (bicubic, antialiased); without, all must have the same size.

    Raises:
        DataError: for no images, images both in the folder and in sub-folders, mixed sizes, or an unreadable image.
    """
    listing = list_folder(folder)
    if not listing.pictures:
        hint = ""
        if listing.arrays:
            hint = f" (for {listing.arrays[0].name}, give the file itself; files named train... and test... are a split)"
        elif listing.others:
            hint = f" ({listing.others[0]} is not one)"
        raise DataError(f"folder {str(folder)!r} holds no image; expected {', '.join(SUFFIXES)} files, or sub-folders of them{hint}")
    images, notices = stack_pictures(listing.pictures, image_size, str(folder))
    ignored = [*listing.others, *(p.name for p in listing.arrays)]
    if ignored:
        notices.append(f"{len(ignored):,} files that are no {FORMATS} image were ignored ({ignored[0]}, ...)")
    notices += dark(images)
    return Rows(images, np.array(listing.labels) if listing.labels else None, notices=notices)


def stack_pictures(files: Sequence[Path], image_size: int | None, name: str, advice: str = RESIZE) -> tuple[Array, list[str]]:
    """Decode images one by one into uint8 (N, 1 or 3, H, W), as :func:`read_folder` does; also return notices.

    Args:
        files: the images.
        image_size: crop and resize to this size; None if all have one size.
        name: their folder, for messages.
        advice: what to do about images of another size.

    Raises:
        DataError: for mixed sizes, an unreadable image, or more images than fit into memory.
    """
    images, size = np.empty((0, 1, 0, 0), dtype=np.uint8), (0, 0)
    mixed = transparent = 0
    for i, file in enumerate(progress(files, f"decoding {name}", len(files))):
        picture = open_picture(file)
        transparent += "A" in picture.getbands() or "transparency" in picture.info
        grey = picture.mode in ("1", "L", "LA")
        picture = picture.convert("L" if grey else "RGB")
        if image_size is not None:
            picture = centre_square(picture, image_size)
        if i == 0:
            size = picture.size
            shape = (len(files), 1 if grey else 3, size[1], size[0])
            try:
                images = np.empty(shape, dtype=np.uint8)
            except MemoryError:
                raise DataError(f"{len(files):,} images of {size[0]}x{size[1]} (in {name!r}) exceed the memory; {RESIZE}") from None
        if picture.size != size:
            got = [f"{w}x{h} in {os.path.relpath(path, name)!r}" for (w, h), path in ((size, files[0]), (picture.size, file))]
            raise DataError(f"images of {name!r} must have one size, got {got[0]} and {got[1]}; {advice}")
        mixed += grey == (images.shape[1] == 3)
        if not grey and images.shape[1] == 1:  # the first colour image: earlier grey images become RGB
            images = np.repeat(images, 3, axis=1)
        pixels = np.asarray(picture)
        images[i] = pixels if grey else pixels.transpose(2, 0, 1)
    notices = []
    if image_size is not None:
        notices.append(f"images cropped to the central square and resized to {image_size}x{image_size}")
    if mixed:
        notices.append("grey and colour images are mixed: all read as RGB")
    if transparent:
        notices.append(f"{transparent:,} images have transparency, which is ignored: their hidden colours show")
    return images, notices
