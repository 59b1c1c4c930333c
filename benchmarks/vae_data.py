"""Images for benchmarks/vae_flows.py: named sets of cnf, and the files that FFJORD's code for autoencoders reads.

Below the data root that code has (``vae_lib``, 1810.01367):

    MNIST_static/binarized_mnist_train.amat, ..._valid.amat, ..._test.amat        text, one image of 784 zeros and ones a line
    OMNIGLOT/chardata.mat                                                         grey 28x28, drawn anew as binary images at each step
    Freyfaces/freyfaces.pkl                                                       1,965 faces of 28x20, 256 grey levels
    Caltech101Silhouettes/caltech101_silhouettes_28_split1.mat                    binary 28x28

Without the .amat files MNIST is cnf's own (torchvision's), each pixel binarised once at random with its grey level as
probability. Omniglot's validation part and all parts of Frey faces are drawn by ``seed``, as there.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cnf.data import load
from cnf.errors import DataError

__all__ = ["NAMES", "Images", "load_images"]

Array = Any
FILES = {
    "omniglot": Path("OMNIGLOT/chardata.mat"),
    "freyfaces": Path("Freyfaces/freyfaces.pkl"),
    "caltech": Path("Caltech101Silhouettes/caltech101_silhouettes_28_split1.mat"),
}
NAMES = ("digits", "mnist", "fashion-mnist", *FILES)
AMAT = ("train", "valid", "test")
OMNIGLOT_VALIDATION, FREY_PARTS = 1345, (1565, 200, 200)
FREY = (1, 28, 20)
ALLOWED = (("_reconstruct", "multiarray"), ("ndarray", "numpy"), ("dtype", "numpy"), ("scalar", "multiarray"), ("encode", "_codecs"))


class Images(NamedTuple):
    """Images (N, 1, H, W) in [0, 1] of the three parts."""

    train: Tensor
    validation: Tensor
    test: Tensor
    levels: int = 2
    redrawn: bool = False
    """The training images are grey, and each step draws binary ones from them."""


def load_images(name: str, root: str | Path = "data", seed: int = 0) -> Images:
    """Return one of :data:`NAMES`.

    Raises:
        DataError: for a file that is missing, or holds something else.
    """
    root = Path(root)
    readers: dict[str, Callable[[Path, int], Images]] = {"omniglot": _omniglot, "freyfaces": _frey_faces, "caltech": _caltech}
    if name in readers:
        path = root / FILES[name]
        if not path.is_file():
            raise DataError(f"{name} was not found: {str(path)!r} is no file; expected the layout of FFJORD's code below --data-root={str(root)!r}")
        return readers[name](path, seed)
    files = [root / "MNIST_static" / f"binarized_mnist_{part}.amat" for part in AMAT]
    if name == "mnist" and any(file.exists() for file in files):
        return Images(*(_binary(_text(file), str(file)) for file in files))
    splits = load(name, root=root)
    levels = splits.levels or 256
    return Images(*(_draw(x.float() / (levels - 1), i) for i, x in enumerate((splits.train, splits.validation, splits.test))))


def _draw(grey: Tensor, seed: int) -> Tensor:
    """Return binary images, each pixel 1 with the probability of its grey level."""
    return (torch.rand(grey.shape, generator=torch.Generator().manual_seed(seed)) < grey).float()


def _text(path: Path) -> Array:
    try:
        return np.loadtxt(path, dtype=np.float32, ndmin=2)
    except (OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}; expected lines of 784 zeros and ones") from None


def _square(x: Array, path: str) -> Tensor:
    """Return rows (N, 784) as images (N, 1, 28, 28) in [0, 1]."""
    x = np.asarray(x, dtype=np.float32)
    if x.ndim != 2 or x.shape[1] != 784 or not len(x) or not (x.min() >= 0 and x.max() <= 1):
        raise DataError(f"{path!r} has an array of shape {x.shape}; expected rows of 784 numbers between 0 and 1")
    return torch.from_numpy(np.ascontiguousarray(x)).reshape(-1, 1, 28, 28)


def _binary(x: Array, path: str) -> Tensor:
    images = _square(x, path)
    if not bool(((images == 0) | (images == 1)).all()):
        raise DataError(f"{path!r} has values between 0 and 1; expected zeros and ones")
    return images


def _matlab(path: Path, *names: str) -> list[Array]:
    from scipy.io import loadmat  # type: ignore[import-untyped]

    try:
        found = loadmat(path)
    except Exception as error:  # scipy raises many types for damaged files
        raise DataError(f"{str(path)!r} cannot be read as a MATLAB file: {error}") from None
    if missing := [name for name in names if name not in found]:
        raise DataError(f"{str(path)!r} has no array {missing[0]!r}; expected {', '.join(names)}")
    return [found[name] for name in names]


def _omniglot(path: Path, seed: int) -> Images:
    train, test = (_square(x.T, str(path)).mT.contiguous() for x in _matlab(path, "data", "testdata"))  # by columns
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    if len(train) <= OMNIGLOT_VALIDATION:
        raise DataError(f"{str(path)!r} has {len(train):,} training images; expected more than the {OMNIGLOT_VALIDATION:,} of the validation part")
    kept, held_out = train[order[:-OMNIGLOT_VALIDATION]], train[order[-OMNIGLOT_VALIDATION:]]
    return Images(kept, _draw(held_out, 1), _draw(test, 2), redrawn=True)


def _caltech(path: Path, seed: int) -> Images:
    parts = _matlab(path, "train_data", "val_data", "test_data")
    return Images(*((1 - _binary(x, str(path)).mT).contiguous() for x in parts))  # by columns, with silhouettes of 0


class _Arrays(pickle.Unpickler):
    """Reads pickled NumPy arrays, and refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function that arrays need."""
        if (name, module.rpartition(".")[2]) not in ALLOWED or module.partition(".")[0] not in ("numpy", "_codecs"):
            raise pickle.UnpicklingError(f"it holds {module}.{name}, and only arrays are read")
        return super().find_class(module, name)


def _frey_faces(path: Path, seed: int) -> Images:
    try:
        with path.open("rb") as file:
            found = _Arrays(file, encoding="latin1").load()  # a list or tuple whose first entry has the images
        x = np.asarray(found[0] if isinstance(found, list | tuple) else found)
    except Exception as error:  # pickle raises many types for damaged files
        raise DataError(f"{str(path)!r} cannot be read: {error}") from None
    size, count = FREY[1] * FREY[2], sum(FREY_PARTS)
    if x.size != count * size or not np.issubdtype(x.dtype, np.number) or x.min() < 0 or x.max() > 255 or x.max() <= 1:
        raise DataError(f"{str(path)!r} has an array of shape {x.shape}; expected {count:,} faces of {size} grey levels, 0 to 255")
    order = np.random.RandomState(seed).permutation(count)
    images = torch.from_numpy(x.reshape(count, *FREY)[order].astype(np.float32) / 255)
    return Images(*images.split(FREY_PARTS), levels=256)
