"""Tiny ImageNet: labelled 64x64 images in the folders of its archive."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cnf._utils.errors import DataError
from cnf.data.folders import stack_pictures
from cnf.data.pictures import SUFFIXES
from cnf.data.prepared import reduce_bits
from cnf.data.rows import Array, hold_out
from cnf.data.splits import DataSplits, Options, assemble

__all__ = ["NAMES", "load_tiny_imagenet"]

NAMES = {"tiny-imagenet": "Tiny ImageNet, 64x64 colour pictures in 200 classes, 110,000 labelled images; folders in root/tiny-imagenet-200"}
SHAPE, VALIDATION = (3, 64, 64), 5_000


def load_tiny_imagenet(name: str, options: Options) -> DataSplits:
    """Load ``train/CLASS/images/`` and, as test set, ``val/images/`` with ``val/val_annotations.txt``.

    The labels of the archive's own test part are not public. Validation images are split off the training part by
    ``options.split_seed``.

    Raises:
        DataError: for missing files, images of another size, or labels without a class.
    """
    folder = options.folder / "tiny-imagenet-200"
    annotations = folder / "val" / "val_annotations.txt"
    classes = tuple(sorted(p.name for p in (folder / "train").iterdir() if p.is_dir())) if (folder / "train").is_dir() else ()
    if not classes or not annotations.is_file():
        missing = annotations if classes else folder / "train"
        raise DataError(f"{name} needs {str(missing)!r}, which is missing: unpack tiny-imagenet-200.zip into root={str(options.root)!r}")
    files = [(path, k) for k, label in enumerate(classes) for path in _pictures(folder / "train" / label / "images")]
    train, labels = _read([path for path, _ in files], folder / "train"), np.array([k for _, k in files], dtype=np.int64)
    lines = [line.split() for line in annotations.read_text(encoding="utf-8").splitlines() if line.strip()]
    if wrong := [line for line in lines if len(line) < 2 or line[1] not in classes]:
        raise DataError(f"{str(annotations)!r} has the line {' '.join(wrong[0])[:80]!r}; expected the name of a file and of a class of train/")
    test = _read([folder / "val" / "images" / line[0] for line in lines], folder / "val")
    held_out = min(VALIDATION, len(train) // 10)
    if held_out < 1:
        raise DataError(f"{name} has {len(train)} training images in {str(folder)!r}; expected at least 10")
    kept, validation = hold_out(len(train), held_out, options.split_seed)
    parts = [reduce_bits(x, options.nbits) for x in (train[kept], train[validation], test)]
    codes = [labels[kept], labels[validation], np.array([classes.index(line[1]) for line in lines], dtype=np.int64)]
    notices = [f"the published validation part is the test set; validation is split off the training part by split_seed {options.split_seed}"]
    return assemble(name, "image", parts, options, codes=codes, classes=classes, levels=2**options.nbits, notices=notices)


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []


def _read(files: list[Path], folder: Path) -> Array:
    """Read images as uint8 (N, 3, 64, 64); grey ones become colour."""
    if not files:
        raise DataError(f"{str(folder)!r} holds no image; expected {', '.join(SUFFIXES)} files in folders called images")
    images, _ = stack_pictures(files, None, str(folder), "those of Tiny ImageNet are 64x64: unpack its archive again, or resize the odd files to that")
    images = np.repeat(images, 3, axis=1) if images.shape[1] == 1 else images
    if images.shape[1:] != SHAPE:
        raise DataError(f"{str(folder)!r} holds images of {images.shape[3]}x{images.shape[2]}; expected 64x64: unpack the archive again, or resize them to that")
    return images
