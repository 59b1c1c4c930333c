"""Data of cnf.fit: tensors, arrays, DataFrames, torch Datasets and DataLoaders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from cnf._utils.errors import ConfigError, DataError
from cnf._utils.validation import require_unmasked
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.random import Noise
from cnf.training.batches import Batches

__all__ = ["DatasetBatches", "StreamBatches", "pair", "rows_of", "split"]

FITTED = 10_000  # rows of a Dataset to which statistics are fitted


def rows_of(data: Any, name: str = "train") -> Tensor:
    """Return a tensor, array or DataFrame of numbers as a tensor.

    Raises:
        DataError: for a column that is not numeric, which is named, or other data.
    """
    if isinstance(data, Tensor):
        return data.detach()
    if hasattr(data, "columns") and hasattr(data, "dtypes"):
        for column, kind in zip(data.columns, data.dtypes, strict=True):
            if not (getattr(kind, "kind", "O") in "fiub" or str(kind) in ("Int64", "Float64", "boolean")):
                raise DataError(f"column {column!r} of {name} has type {kind}; expected numbers: leave it out, or encode it (one-hot)")
        data = data.to_numpy(dtype="float64", na_value=np.nan)
    require_unmasked(name, data)
    values = np.asarray(data)
    if values.dtype.kind not in "fiub":
        raise DataError(f"{name} has type {values.dtype}; expected numbers")
    if values.dtype == np.uint16:
        values = values.astype(np.int64)
    if values.dtype.itemsize > 8 or not values.dtype.isnative:  # which torch does not take
        values = values.astype(f"{values.dtype.kind}{min(values.dtype.itemsize, 8)}")
    return torch.from_numpy(np.require(values, requirements=("C", "W")))  # pandas may give a view that must not be written


def pair(data: Any, context: Any, name: str = "train") -> tuple[Tensor, Tensor | None]:
    """Return x and its context: from (x, context), or columns of a DataFrame by name, or a second array."""
    if isinstance(data, tuple | list) and len(data) == 2 and context is None:
        data, context = data
    if isinstance(data, TensorDataset):
        data, context = (*data.tensors, context)[:2]
    if hasattr(data, "columns") and isinstance(context, str | list | tuple):
        names = [context] if isinstance(context, str) else list(context)
        if missing := [n for n in names if n not in list(data.columns)]:
            raise DataError(f"context names {missing[0]!r}, which is no column of {name}: expected some of {list(data.columns)}")
        data, context = data.drop(columns=names), data[names]
    elif isinstance(context, str):
        raise DataError(f"context={context!r} names a column, but {name} is no DataFrame: give an array with a row for each of its rows")
    x = rows_of(data, name)
    found = None if context is None else rows_of(context, f"context of {name}")
    if found is not None and len(found) != len(x):
        raise DataError(f"context has {len(found)} rows, but {name} has {len(x)}: expected one for each")
    if not len(x):
        raise DataError(f"{name} has no rows")
    return x, found


def split(rows: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of training and validation rows, ``share`` of them at random.

    Raises:
        ConfigError: for a share outside (0, 1), or too few rows.
    """
    count = max(1, round(share * rows))
    if not 0 < share < 1 or count >= rows:
        raise ConfigError(f"validation={share} of {rows} rows; expected a share between 0 and 1 that leaves rows to train on")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return order[count:].sort().values, order[:count].sort().values


class DatasetBatches(Batches):
    """Batches of a map-style torch Dataset, fetched by index: as of a tensor, a function of (seed, step).

    Args:
        dataset: of x, or pairs (x, context).
        size: rows of the joint batch.
        seed: of the order and the noise.
        device: of the batches.
        group: processes that share each batch.
        dtype: of floating-point batches.
        collate: joins a list of items.
    """

    def __init__(
        self, dataset: Dataset[Any], size: int, seed: int, device: torch.device, group: Group = SINGLE_PROCESS,
        dtype: torch.dtype = torch.float32, collate: Callable[[list[Any]], Any] = default_collate,
    ):  # fmt: skip
        self.dataset, self.collate = cast(Any, dataset), collate
        self.device, self.dtype, self.seed, self.flip, self.group = device, dtype, seed, False, group
        self.length = len(self.dataset)
        if not self.length:
            raise DataError("train has no rows")
        self._resize(size)
        chosen = torch.randperm(self.length, generator=torch.Generator().manual_seed(seed))[:FITTED].sort().values
        self.x, self.context = self.fetch(chosen)  # whose statistics are those of the data

    def fetch(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return x and context of some rows."""
        indices = rows.tolist()
        many = getattr(self.dataset, "__getitems__", None)
        return convert(self.collate(many(indices) if many else [self.dataset[i] for i in indices]), self.device, self.dtype)


class StreamBatches(Batches):
    """Batches in the order of an iterable: of a DataLoader with its own sampler, or an iterable Dataset.

    The order is the iterable's, so that a resumed run takes other batches than one that was never stopped.

    Args:
        loader: yields batches; iterated again when it ends.
        seed: of the noise.
        device: of the batches.
        dtype: of floating-point batches.
    """

    def __init__(self, loader: Any, seed: int, device: torch.device, dtype: torch.dtype = torch.float32):
        self.loader, self.device, self.dtype, self.seed, self.group = loader, device, dtype, seed, SINGLE_PROCESS
        self._iterator: Iterator[Any] = iter(loader)
        self._known: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.x, self.context = self._next()[:2]
        self._iterator = iter(loader)
        self.size = len(self.x)

    def _next(self) -> tuple[Tensor, Tensor | None]:
        for _ in range(2):
            for batch in self._iterator:
                return convert(batch, self.device, self.dtype)
            self._iterator = iter(self.loader)
        raise DataError("train yields no batches")

    def __call__(self, step: int) -> tuple[Tensor, Tensor | None, Noise]:
        """Return the batch of a step: the next one, or one of the latest two."""
        if step not in self._known:
            if self._known and step < max(self._known):
                raise DataError(f"the batch of step {step} is gone: the order of these data is their own")
            self._known = {**dict(list(self._known.items())[-1:]), step: self._next()}
        x, context = self._known[step]
        self.size = len(x)
        return x, context, Noise(self.seed, "train", step)


def convert(batch: Any, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return x and context of a collated batch, floats in ``dtype``."""
    parts: Sequence[Any] = batch if isinstance(batch, tuple | list) else (batch,)
    if not 1 <= len(parts) <= 2 or not all(isinstance(part, Tensor) for part in parts):
        raise DataError(f"a batch of train is {type(batch).__name__} of {[type(p).__name__ for p in parts]}; expected x or (x, context)")
    x, *rest = (part.to(device, dtype) if part.is_floating_point() else part.to(device) for part in parts)
    return x, rest[0] if rest else None


def reproducible(data: Any) -> bool:
    """Return whether the order of a Dataset or DataLoader is ours to choose: items by index, shuffled or in order."""
    if isinstance(data, DataLoader):
        return not isinstance(data.dataset, IterableDataset) and data.batch_size is not None and type(data.sampler) in (RandomSampler, SequentialSampler)
    return not isinstance(data, IterableDataset)
