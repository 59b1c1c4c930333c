"""A folder of pictures as a data set; sub-folders are the classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cnf.datasets.pictures import SUFFIXES, open_picture
from cnf.datasets.splits import Rows
from cnf.errors import DataError

__all__ = ["read_folder"]


def read_folder(folder: Path, image_size: int | None = None) -> Rows:
    """Read the PNG and JPEG pictures of a folder, or of its sub-folders, whose names are then the labels.

    Pictures are grey only if all of them are; otherwise all become RGB. With ``image_size`` each is cropped to its central
    square and resized (bicubic, antialiased); without, all must have one size.

    Raises:
        DataError: for no pictures, pictures beside sub-folders, mixed sizes, or a picture that cannot be read.
    """
    from PIL import Image

    entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    loose = [p for p in entries if p.is_file() and p.suffix.lower() in SUFFIXES]
    labelled = [(sub.name, p) for sub in entries if sub.is_dir() for p in sorted(sub.iterdir()) if p.suffix.lower() in SUFFIXES]
    if loose and labelled:
        raise DataError(
            f"folder {str(folder)!r} has pictures ({loose[0].name}) beside sub-folders with pictures ({labelled[0][0]}); "
            "expected either pictures only or one sub-folder for each class"
        )
    files = loose or [p for _, p in labelled]
    if not files:
        raise DataError(f"folder {str(folder)!r} holds no picture; expected {', '.join(SUFFIXES)} files, or sub-folders of them")
    pictures: list[Image.Image] = []
    for file in files:
        picture = open_picture(file)
        picture = picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB")
        if image_size is not None:
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            box = (left, top, left + side, top + side)
            picture = picture.crop(box).resize((image_size, image_size), Image.Resampling.BICUBIC)
        if pictures and picture.size != pictures[0].size:
            sizes = ["x".join(map(str, p.size)) for p in (pictures[0], picture)]
            raise DataError(
                f"pictures differ in size: {files[0].name!r} is {sizes[0]}, {file.name!r} is {sizes[1]} (in {str(folder)!r}); "
                "image_size=S crops the centre and resizes"
            )
        pictures.append(picture)
    notices = [] if image_size is None else [f"pictures cropped to the central square and resized to {image_size}x{image_size}"]
    modes = {p.mode for p in pictures}
    if len(modes) > 1:
        notices.append("grey and colour pictures are mixed: all read as RGB")
    stack = np.stack([np.asarray(p.convert("RGB") if len(modes) > 1 else p) for p in pictures])
    images = stack[:, None] if stack.ndim == 3 else stack.transpose(0, 3, 1, 2)
    return Rows(images, np.array([label for label, _ in labelled]) if labelled else None, notices=notices)
