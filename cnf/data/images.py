"""Small image sets: scikit-learn's digits, and MNIST, Fashion-MNIST, CIFAR-10 and SVHN through torchvision."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from cnf._utils.errors import ConfigError, DataError
from cnf.data.binary import static_mnist
from cnf.data.cifar import read_cifar10
from cnf.data.prepared import reduce_bits
from cnf.data.rows import Array, hold_out
from cnf.data.splits import DataSplits, Options, assemble

__all__ = ["DIGITS_LEVELS", "NAMES", "TORCHVISION", "load_images"]

NAMES: dict[str, str] = {
    "digits": "8x8 handwritten digits, 17 grey levels, 1,797 images; ships with scikit-learn (no download)",
    "mnist": "MNIST, 28x28 handwritten digits, 70,000 images; torchvision",
    "fashion-mnist": "Fashion-MNIST, 28x28 pictures of clothes, 70,000 images; torchvision",
    "cifar10": "CIFAR-10, 32x32 colour pictures, 60,000 images; torchvision",
    "svhn": "SVHN, 32x32 colour house numbers, 99,289 images; torchvision",
}
DIGITS_LEVELS = 17

TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "svhn": "SVHN"}
_FOLDER = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw", "cifar10": "cifar-10-batches-py", "svhn": "."}
_SHAPE = {"mnist": (1, 28, 28), "fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32), "svhn": (3, 32, 32)}
_VALIDATION = {"mnist": 10_000, "fashion-mnist": 10_000, "cifar10": 5_000, "svhn": 5_000}
_CLASSES = {
    "fashion-mnist": ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
# raised by torchvision for missing, truncated or damaged files, and for network errors
_FAILURES = (
    RuntimeError, OSError, ValueError, TypeError, LookupError, AssertionError, EOFError, HTTPException, ArithmeticError,
    MemoryError, pickle.UnpicklingError,
)  # fmt: skip


def load_images(name: str, options: Options) -> DataSplits:
    """Load one of :data:`NAMES`.

    Raises:
        DataError: if the files are damaged, or neither in ``root`` nor on the network.
        ConfigError: for ``nbits`` other than 8 with the digits, which have 17 levels.
    """
    return _digits(options) if name == "digits" else _torchvision(name, options)


def _digits(options: Options) -> DataSplits:
    """Load the digits in a fixed protocol: 540 test and 180 validation images, stratified, independent of the seeds."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

    if options.nbits != 8:
        raise ConfigError(f"nbits={options.nbits} does not apply to digits, which have {DIGITS_LEVELS} levels; leave it at 8")
    raw = load_digits()
    images: Array = raw.images.astype(np.uint8)[:, None]
    labels: Array = raw.target.astype(np.int64)
    rest, test = train_test_split(np.arange(len(labels)), test_size=540, random_state=0, stratify=labels)
    train, validation = train_test_split(rest, test_size=180, random_state=0, stratify=labels[rest])
    parts = (train, validation, test)
    notices = ["fixed stratified split (random_state 0), independent of all seeds"]
    codes, classes = [labels[i] for i in parts], tuple("0123456789")
    return assemble("digits", "image", [images[i] for i in parts], options, codes=codes, classes=classes, levels=DIGITS_LEVELS, notices=notices)


def _torchvision(name: str, options: Options) -> DataSplits:
    """Load a torchvision set: the official test set, and validation images split off the training set by split_seed."""
    if name == "mnist" and options.binarize == "once" and (known := static_mnist(options)) is not None:
        return known
    (images, labels), (test, test_labels) = _read(name, True, options), _read(name, False, options)
    held_out = _VALIDATION[name]
    if len(images) <= held_out:
        raise DataError(f"{name} has {len(images)} training images; expected more than {held_out}: files are missing")
    train, validation = hold_out(len(images), held_out, options.split_seed)
    parts = [reduce_bits(x, options.nbits) for x in (images[train], images[validation], test)]
    codes = [labels[train], labels[validation], test_labels]
    notices = [f"official test set; validation split off the training set by split_seed {options.split_seed}"]
    classes = _CLASSES.get(name, tuple("0123456789"))
    return assemble(
        name, "image", parts, options, codes=codes, classes=classes, levels=2**options.nbits, notices=notices, flip=name == "cifar10"
    )


def _read(name: str, train: bool, options: Options) -> tuple[Array, Array]:
    """Read uint8 images (N, C, H, W) and int64 labels (N,) of one official part."""
    from torchvision import datasets  # type: ignore[import-untyped]

    root = options.folder
    # not torchvision's own CIFAR-10 reader, which executes pickles
    make: Any = read_cifar10 if name == "cifar10" else getattr(datasets, TORCHVISION[name])
    part: dict[str, Any] = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
    try:
        try:
            dataset = make(root, download=False, **part)
        except RuntimeError as missing:  # missing or still packed; intact archives are unpacked without a network
            archives = getattr(make, "resources", ())
            faulty = _faulty_archives(archives, root / _FOLDER[name])
            if not options.download and (faulty or not archives):
                raise RuntimeError("; ".join(faulty) or str(missing)) from None
            _refuse_links(name, root, [] if faulty else [file for file, _ in archives])
            dataset = make(root, download=True, **part)
    except PermissionError as error:
        raise DataError(
            f"{name} cannot be unpacked or stored under {str(root.resolve())!r}: {error}. Set root to a folder that can be written"
        ) from error
    except _FAILURES as error:
        where = (root / _FOLDER[name]).resolve()
        tried = "downloading it failed" if options.download else "download=False forbids fetching it"
        raise DataError(
            f"{name} was not found complete in {str(where)!r} (root={str(options.root)!r}) and {tried}: {error or type(error).__name__}. "
            "Put the original files there (data/README.md lists them; delete what is damaged), or let torchvision download them"
        ) from error
    labels = np.asarray(dataset.labels if name == "svhn" else dataset.targets, dtype=np.int64)
    images: Array = np.asarray(dataset.data)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] == 3 and images.shape[1] != 3:
        images = images.transpose(0, 3, 1, 2)
    usual = images.dtype == np.uint8 and images.shape[1:] == _SHAPE[name] and labels.shape == (len(images),)
    if not usual or labels.min(initial=0) < 0 or labels.max(initial=0) > 9:
        raise DataError(
            f"{name} under {str(root.resolve())!r} has {len(images)} {images.dtype} images of shape {images.shape[1:]} and {len(labels)} "
            f"labels; expected {_SHAPE[name]} in uint8, and a label 0 to 9 for each: put the original files there"
        )
    return images, labels


def _faulty_archives(archives: Sequence[tuple[str, str]], folder: Path) -> list[str]:
    """Return a phrase for each archive that is missing or differs from the published file."""
    from torchvision.datasets.utils import check_integrity  # type: ignore[import-untyped]

    faulty = [file for file, md5 in archives if not check_integrity(str(folder / file), md5)]
    return [f"{f} {'differs from the published file' if (folder / f).exists() else 'is missing'}" for f in faulty]


def _refuse_links(name: str, root: Path, intact: Sequence[str] = ()) -> None:
    """Reject symbolic links, since a download would write to their targets; ``intact`` files are not written."""
    for path in (*(root / _FOLDER[name]).glob("*"), *root.glob("*.gz")):
        if path.is_symlink() and path.name not in intact and (path.suffix in (".gz", ".mat") or name != "svhn"):
            raise DataError(f"{str(path)!r} is a link that the download of {name} would overwrite; remove it, or repair its target")
