"""Image sets with fixed protocols: the 8x8 digits of scikit-learn, and torchvision's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.datasets.splits import DataSplits, contexts
from cnf.errors import DataError

__all__ = ["IMAGES", "load_digits_8x8", "load_torchvision"]

# name -> (torchvision class, images taken from training for validation, flips, classes)
IMAGES = {
    "mnist": ("MNIST", 10_000, False),
    "fashion-mnist": ("FashionMNIST", 10_000, False),
    "cifar10": ("CIFAR10", 5_000, True),
    "svhn": ("SVHN", 5_000, False),
}


def load_digits_8x8(condition: str | None, limit: int | None) -> DataSplits:
    """The 1,797 digits, 17 grey levels; 540 for test and 180 for validation, stratified, whatever the seed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch: Any = load_digits()
    x, y = bunch.images.astype(np.uint8)[:, None], bunch.target
    rest_x, test_x, rest_y, test_y = train_test_split(x, y, test_size=540, random_state=0, stratify=y)
    train_x, val_x, train_y, val_y = train_test_split(rest_x, rest_y, test_size=180, random_state=0, stratify=rest_y)
    train_x, train_y = train_x[:limit], train_y[:limit]
    rows = contexts([train_y, val_y, test_y], 10, condition)
    parts = [torch.from_numpy(np.ascontiguousarray(v)) for v in (train_x, val_x, test_x)]
    note = f"fixed stratified splits: {len(train_x):,} training, 180 validation and 540 test images, 17 grey levels"
    return DataSplits(
        "digits", "image", parts[0], parts[1], parts[2], classes=tuple("0123456789"), levels=17, notices=(note,), **rows
    )


def load_torchvision(
    name: str, root: Path, seed: int, condition: str | None, limit: int | None, nbits: int, download: bool
) -> DataSplits:
    """MNIST, Fashion-MNIST, CIFAR-10 or SVHN, the official test split as test.

    Raises:
        DataError: where the files are neither there nor to be had.
    """
    import torchvision.datasets as sets

    kind, held, flip = IMAGES[name]
    maker: Any = getattr(sets, kind)

    def part(train: bool) -> tuple[Tensor, np.ndarray, list[str]]:
        key: dict[str, Any] = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
        try:
            raw: Any = maker(str(root), download=download, **key)
        except Exception as error:  # torchvision raises whatever its downloader met
            raise DataError(
                f"{name} is not under {root} and could not be downloaded ({type(error).__name__}: {error}): "
                f"put torchvision's files there, or name their folder with --data-root"
            ) from None
        pixels = torch.as_tensor(np.asarray(raw.data))
        if pixels.ndim == 3:
            pixels = pixels[:, None]
        elif name == "cifar10":
            pixels = pixels.permute(0, 3, 1, 2)
        labels = np.asarray(raw.labels if name == "svhn" else raw.targets)
        return (pixels >> (8 - nbits)).contiguous(), labels, [str(c) for c in getattr(raw, "classes", range(10))]

    x, y, classes = part(True)
    test, test_y, _ = part(False)
    order = np.random.default_rng(seed).permutation(len(x))
    validation, train = order[:held], order[held:][:limit]
    rows = contexts([y[train], y[validation], test_y], 10, condition)
    note = (
        f"official test split of {len(test):,}; {held:,} training images kept for validation by split seed {seed}, "
        f"{len(train):,} to train on, {2**nbits} grey levels"
    )
    return DataSplits(
        name, "image", x[train], x[validation], test, classes=tuple(classes), levels=2**nbits, notices=(note,), flip=flip, **rows
    )
