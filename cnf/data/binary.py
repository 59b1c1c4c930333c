"""Image sets of FFJORD's autoencoders (1810.01367), and binary images drawn from grey ones.

Below the data root, the files that FFJORD's code reads:

    MNIST_static/binarized_mnist_train.amat, ..._valid.amat, ..._test.amat        text, one image of 784 zeros and ones a line
    OMNIGLOT/chardata.mat                                                         grey 28x28
    Freyfaces/freyfaces.pkl                                                       1,965 faces of 28x20, 256 grey levels
    Caltech101Silhouettes/caltech101_silhouettes_28_split1.mat                    binary 28x28
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf._utils.errors import ConfigError, DataError
from cnf._utils.untrusted import require_file
from cnf.data.prepared import reduce_bits
from cnf.data.rows import Array, hold_out, optional_module
from cnf.data.splits import DataSplits, Options, assemble

__all__ = ["FIXED", "NAMES", "binarized", "load_published", "static_mnist"]

NAMES: dict[str, str] = {
    "omniglot": "Omniglot, 28x28 grey handwritten characters, 32,415 images; chardata.mat of FFJORD's code",
    "freyfaces": "Frey faces, 28x20, 1,965 images; freyfaces.pkl of FFJORD's code",
    "caltech": "Caltech 101 silhouettes, 28x28, binary, 8,671 images; the .mat file of FFJORD's code",
}
FIXED = ("caltech",)  # sets whose validation part is given
FILES = {
    "omniglot": Path("OMNIGLOT/chardata.mat"),
    "freyfaces": Path("Freyfaces/freyfaces.pkl"),
    "caltech": Path("Caltech101Silhouettes/caltech101_silhouettes_28_split1.mat"),
}
OMNIGLOT_VALIDATION, FREY_VALIDATION, FREY_TEST = 1345, 200, 200
FREY, FACES = (1, 28, 20), 1965
CHUNK = 4096  # images drawn at once
ALLOWED = (("_reconstruct", "multiarray"), ("ndarray", "numpy"), ("dtype", "numpy"), ("scalar", "multiarray"), ("encode", "_codecs"))


def binarized(splits: DataSplits, options: Options) -> DataSplits:
    """Return binary images, as ``options.binarize`` says: 1 with the probability of the grey level, drawn by the seed of the data.

    With ``"redraw"`` training images stay grey, with ``train_levels`` levels. Images of two levels are binary already.

    Raises:
        ConfigError: for vectors.
        DataError: for images of zeros and ones on a scale of more grey levels, of which hardly a pixel would be drawn.
    """
    if options.binarize == "no":
        return splits
    if splits.levels is None:
        raise ConfigError(f"binarize={options.binarize!r} is for images, and {splits.name!r} holds vectors: choose images, or binarize='no'")
    levels = splits.levels
    if levels == 2:
        return splits
    if int(splits.train[:: max(1, len(splits.train) // 10_000)].max()) <= 1:
        raise DataError(
            f"the pixels of {splits.name!r} are 0 and 1 of {levels} grey levels, nearly black, and binarize={options.binarize!r} would draw nearly "
            f"none: make white {levels - 1} in the file"
        )  # fmt: skip
    redrawn = options.binarize == "redraw"
    parts = [_draw(x, levels, options.seed, i) if i or not redrawn else x for i, x in enumerate((splits.train, splits.validation, splits.test))]
    said = f"binary images: a pixel is 1 with its grey level as probability, drawn once by data_seed {options.seed}"
    if redrawn:
        said += ", and of the training images anew at each step"
    return dataclasses.replace(
        splits, train=parts[0], validation=parts[1], test=parts[2], levels=2, train_levels=levels if redrawn else None, notices=(*splits.notices, said)
    )  # fmt: skip


def _draw(grey: Tensor, levels: int, seed: int, part: int) -> Tensor:
    rng = np.random.default_rng([seed, part])
    found = torch.empty_like(grey)
    for start in range(0, len(grey), CHUNK):
        some = grey[start : start + CHUNK].numpy()
        found[start : start + CHUNK] = torch.from_numpy((levels - 1) * rng.random(some.shape) < some)
    return found


def load_published(name: str, options: Options) -> DataSplits:
    """Load one of :data:`NAMES`.

    Raises:
        DataError: for a file that is missing, or holds something else.
        ConfigError: for ``nbits`` other than 8 with binary images.
    """
    readers: dict[str, Callable[[Path, Options], DataSplits]] = {"omniglot": _omniglot, "freyfaces": _frey_faces, "caltech": _caltech}
    path = options.folder / FILES[name]
    if not path.is_file():
        raise DataError(f"{name} was not found: {str(path)!r} is no file, and nothing is downloaded (data/README.md has the layout)")
    require_file(path, DataError)
    return readers[name](path, options)


def static_mnist(options: Options) -> DataSplits | None:
    """Return MNIST as it was binarised once for publications, None without its files.

    Raises:
        DataError: for a file that is missing, or holds something else.
        ConfigError: for options that choose what is fixed there.
    """
    files = [options.folder / "MNIST_static" / f"binarized_mnist_{part}.amat" for part in ("train", "valid", "test")]
    if not any(file.exists() for file in files):
        return None
    if idle := options.changed(("seed", "nbits", *(("split_seed",) if options.limit is None else ()))):
        raise ConfigError(f"{'data_seed' if idle == 'seed' else idle}={getattr(options, idle)!r} does nothing: {str(files[0].parent)!r} has MNIST's binary images and their split")
    parts = [_binary(_text(file), str(file)) for file in files]
    return assemble("mnist-static", "image", parts, options, levels=2, notices=[f"binary images of {str(files[0].parent)!r}, with their split"])


def _text(path: Path) -> Array:
    try:
        require_file(path, DataError)
        return np.loadtxt(path, dtype=np.float32, ndmin=2)
    except (OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}; expected lines of 784 zeros and ones") from None


def _square(x: Array, path: str) -> Array:
    """Return rows (N, 784) of numbers in [0, 1] as images (N, 1, 28, 28)."""
    x = np.asarray(x, dtype=np.float32)
    if x.ndim != 2 or x.shape[1] != 784 or not len(x) or not (x.min() >= 0 and x.max() <= 1):
        raise DataError(f"{path!r} has an array of shape {x.shape}; expected rows of 784 numbers between 0 and 1")
    return x.reshape(-1, 1, 28, 28)


def _binary(x: Array, path: str) -> Array:
    images = _square(x, path)
    if not ((images == 0) | (images == 1)).all():
        raise DataError(f"{path!r} has values between 0 and 1; expected zeros and ones")
    return images.astype(np.uint8)


def _matlab(path: Path, *names: str) -> list[Array]:
    io = optional_module("scipy.io", f"reading {str(path)!r}")
    try:
        found = io.loadmat(path)
    except Exception as error:  # scipy raises many types for damaged files
        raise DataError(f"{str(path)!r} cannot be read as a MATLAB file: {error}") from None
    if missing := [name for name in names if name not in found]:
        raise DataError(f"{str(path)!r} has no array {missing[0]!r}; expected {', '.join(names)}")
    return [found[name] for name in names]


def _omniglot(path: Path, options: Options) -> DataSplits:
    columns = (_square(x.T, str(path)).swapaxes(2, 3) for x in _matlab(path, "data", "testdata"))  # pixels by columns
    grey, test = (reduce_bits(np.rint(255 * x).astype(np.uint8), options.nbits) for x in columns)
    if len(grey) <= OMNIGLOT_VALIDATION:
        raise DataError(f"{str(path)!r} has {len(grey):,} training images; expected more than the {OMNIGLOT_VALIDATION:,} of the validation part")
    train, validation = hold_out(len(grey), OMNIGLOT_VALIDATION, options.split_seed)
    said = [f"official test set; validation split off the training set by split_seed {options.split_seed}"]
    return assemble("omniglot", "image", [grey[train], grey[validation], test], options, levels=2**options.nbits, notices=said)


def _caltech(path: Path, options: Options) -> DataSplits:
    if options.nbits != 8:
        raise ConfigError(f"nbits={options.nbits} does not apply to caltech, which has 2 levels; leave it at 8")
    silhouettes = [1 - _binary(x, str(path)).swapaxes(2, 3) for x in _matlab(path, "train_data", "val_data", "test_data")]  # of zeros, by columns
    return assemble("caltech", "image", silhouettes, options, levels=2, notices=["official split"])


class _Arrays(pickle.Unpickler):
    """Reads pickled NumPy arrays, and refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function that arrays need."""
        if (name, module.rpartition(".")[2]) not in ALLOWED or module.partition(".")[0] not in ("numpy", "_codecs"):
            raise pickle.UnpicklingError(f"it holds {module}.{name}, and only arrays are read")
        return super().find_class(module, name)


def _frey_faces(path: Path, options: Options) -> DataSplits:
    try:
        with path.open("rb") as file:
            found = _Arrays(file, encoding="latin1").load()  # a list or tuple whose first entry has the images
        x = np.asarray(found[0] if isinstance(found, list | tuple) else found)
    except Exception as error:  # pickle raises many types for damaged files
        raise DataError(f"{str(path)!r} cannot be read: {error}") from None
    size = FREY[1] * FREY[2]
    if x.size != FACES * size or not np.issubdtype(x.dtype, np.number) or x.min() < 0 or x.max() > 255 or x.max() <= 1 or (x != np.rint(x)).any():
        raise DataError(f"{str(path)!r} has an array of shape {x.shape}; expected {FACES:,} faces of {size} grey levels, 0 to 255")
    images = reduce_bits(x.reshape(FACES, *FREY).astype(np.uint8), options.nbits)
    rest, test = hold_out(FACES, FREY_TEST, options.split_seed)
    parts = [rest[FREY_VALIDATION:], rest[:FREY_VALIDATION], test]  # hold_out has shuffled the rest
    said = [f"split at random by split_seed {options.split_seed}"]
    return assemble("freyfaces", "image", [images[part] for part in parts], options, levels=2**options.nbits, notices=said)
