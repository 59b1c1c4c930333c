"""Data of cnf.fit for a model: training batches, validation and test rows, and a fingerprint."""

from __future__ import annotations

import dataclasses
import warnings
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cnf._utils.errors import ConfigError, DataError
from cnf._utils.validation import check_context, check_points
from cnf.data import DataSplits
from cnf.data.checks import repetition
from cnf.data.dependence import dependent_columns
from cnf.data.lattice import lattice_step
from cnf.distributed import Group
from cnf.flow import Flow
from cnf.neural_ode import Predictor
from cnf.training.batches import Batches, Validation, fingerprint
from cnf.training.data import DatasetBatches, StreamBatches, pair, reproducible, split

__all__ = ["FitData", "training_data"]

Pair = tuple[Tensor, Tensor | None]
CHECKED = 20_000  # rows, about, that are searched for columns without density


@dataclass(frozen=True)
class FitData:
    """Data of a training: batches, validation rows, fingerprint of both, and a data set of the rows that are scored."""

    batches: Batches
    validation: Validation | None
    fingerprint: str
    scored: DataSplits


def training_data(
    model: nn.Module, train: Any, validation: Any, test: Any, context: Any, batch_size: int, seed: int, group: Group
) -> FitData:
    """Return the data of :func:`cnf.fit`, whose arguments these are."""
    known = None
    if isinstance(test, float):
        raise ConfigError(f"test={test} must be rows, of the kind of validation: take them out of train yourself, so that they are known")
    if isinstance(train, DataSplits):
        if given := [name for name, value in (("validation", validation), ("test", test), ("context", context)) if value is not None]:
            raise ConfigError(f"{given[0]} is part of the data set {train.name!r} that train is: leave it out")
        known = train
        _require_levels(model, known)
        train = known.train, known.train_context
        validation, test = ((x, c) if len(x) else None for x, c in ((known.validation, known.validation_context), (known.test, known.test_context)))
    names = context if isinstance(context, str | list | tuple) and hasattr(train, "columns") else None
    like = next((v for v in (*model.parameters(), *model.buffers()) if v.is_floating_point()), torch.zeros(()))
    batches, held_out, mark = _batches(model, train, validation, context, batch_size, seed, group, flip=known is not None and known.flip)
    tested = None if test is None else _test_rows(*_rows(test, "test", names), model, like)
    checked = None if held_out is None else (held_out.x.cpu(), None if held_out.context is None else held_out.context.cpu())
    return FitData(batches, held_out, mark, _scored(model, batches.x[:0].cpu(), checked, tested, known))


def _test_rows(x: Tensor, context: Tensor | None, model: nn.Module, like: Tensor) -> Pair:
    """Return test rows on the CPU; what is wrong with them is reported before the training, after which they are scored."""
    x, context = _prepared(x.to(like.device), None if context is None else context.to(like.device), model, like)
    if isinstance(model, Flow | Predictor):
        check_points("test", x, tuple(model.event_shape), like, model.levels)
    if isinstance(model, Predictor) and context is None:
        raise DataError("test has no targets: give (x, targets), as in train")
    if isinstance(model, Flow) and context is not None:
        check_context(context, model.context_dim, like)
    return x.cpu(), None if context is None else context.cpu()


def _require_levels(model: nn.Module, data: DataSplits) -> None:
    if isinstance(model, Flow | Predictor) and model.levels != data.levels:
        raise DataError(f"{data.name!r} has levels={data.levels}, but the model has levels={model.levels}: build the model with levels={data.levels}")


def _scored(model: nn.Module, none: Tensor, validation: Pair | None, test: Pair | None, known: DataSplits | None) -> DataSplits:
    """Return the validation and test rows as a data set; rows of arrays are named by their checksum, so that runs on the same ones compare."""
    (x, c), (last, d) = validation or (none, None), test or (none, None)
    levels = model.levels if isinstance(model, Flow | Predictor) else None
    if known is None:
        rows = x if test is None else last
        name = f"arrays {zlib.crc32(rows.contiguous().flatten().view(torch.uint8).numpy().data):08x}"
        known = DataSplits(name, "table" if levels is None else "image", none, none, none, levels=levels)
    return dataclasses.replace(known, train=none, train_context=None, validation=x, validation_context=c, test=last, test_context=d)


def _batches(
    model: nn.Module, train: Any, validation: Any, context: Any, batch_size: int, seed: int, group: Group, flip: bool = False
) -> tuple[Batches, Validation | None, str]:
    """Return the training batches, the validation rows, and the fingerprint of the data."""
    like = next((v for v in (*model.parameters(), *model.buffers()) if v.is_floating_point()), torch.zeros(()))
    device, dtype = like.device, like.dtype
    if isinstance(train, Dataset | DataLoader) and not hasattr(train, "tensors"):
        if isinstance(validation, float):
            raise ConfigError(f"validation={validation} takes a share of tensors, arrays or DataFrames: give a separate Dataset")
        if context is not None:
            raise ConfigError("context is part of a Dataset's items, (x, context): leave it out")
        held_out = None if validation is None else _held_out(*_rows(validation, "validation"), model, like)
        if not reproducible(train):
            if group.size > 1:
                raise ConfigError("several processes need data by index: give a map-style Dataset")
            loader = train if isinstance(train, DataLoader) else DataLoader(train, batch_size)
            return StreamBatches(loader, seed, device, dtype), held_out, "stream"
        dataset: Any = train
        options: dict[str, Any] = {}
        if isinstance(train, DataLoader):
            dataset, batch_size, options = train.dataset, train.batch_size or batch_size, {"collate": train.collate_fn}
        if hasattr(dataset, "tensors"):
            return _batches(model, dataset, validation, None, batch_size, seed, group)
        batches = DatasetBatches(dataset, batch_size, seed, device, group, dtype, **options)
        some = batches.x.cpu()
        return batches, held_out, f"{batches.length} {fingerprint(DataSplits('data', 'table', some, some[:0], some[:0]))}"
    x, c = _prepared(*pair(train, context), model, like)
    if isinstance(validation, float):
        rows, held = split(len(x), validation, seed)
        held_out = Validation(x[held].to(device), None if c is None else c[held].to(device), torch.arange(len(held)))
        x, c = x[rows], None if c is None else c[rows]
    else:
        names = context if isinstance(context, str | list | tuple) and hasattr(train, "columns") else None
        held_out = None if validation is None else _held_out(*_rows(validation, "validation", names), model, like)
    other = (x[:0], None) if held_out is None else (held_out.x.cpu(), None if held_out.context is None else held_out.context.cpu())
    levels = model.levels if isinstance(model, Flow | Predictor) else None
    if isinstance(model, Flow) and levels is None and x.ndim == 2:
        _warn_without_density(x)
    data = DataSplits("data", "table" if levels is None else "image", x, other[0], x[:0], c, other[1], levels=levels, flip=flip)
    return Batches(data, batch_size, seed, device, group, dtype), held_out, fingerprint(data)


def _warn_without_density(x: Tensor) -> None:
    """Warn of columns of rows (N, D) that are constant, discrete, often equal, or determined by others: the likelihood is unbounded."""
    rows = x[:: max(1, len(x) // CHECKED)].double().numpy()
    if not np.isfinite(rows).all():  # an error elsewhere
        return
    said, names = [], [f"column {j}" for j in range(rows.shape[1])]
    for name, column in zip(names, rows.T, strict=True):
        if column.min() == column.max() and len(column) > 1:
            said.append(f"{name} is constant at {column[0]:g}")
        elif lattice_step(column, torch.finfo(x.dtype).eps):
            said.append(f"{name} has {len(np.unique(column)):,} distinct values in {len(column):,} rows")
        elif fact := repetition(column, name):
            said.append(fact)
    said += [relation for _, relation in dependent_columns(rows, names)]
    if said:
        more = f" and {len(said) - 5} more" if len(said) > 5 else ""
        warnings.warn(
            f"the training data have no density, so that the likelihood can grow without bound: {'; '.join(said[:5])}{more}. Drop such "
            "columns, or add noise to discrete ones, as cnf.DensityEstimator does", stacklevel=5,
        )  # fmt: skip


def _rows(data: Any, name: str, context: Any = None) -> tuple[Tensor, Tensor | None]:
    """Return validation or test data as tensors."""
    if isinstance(data, DataLoader):
        data = data.dataset
    if isinstance(data, Dataset) and not hasattr(data, "tensors"):
        batches = DatasetBatches(data, 1, 0, torch.device("cpu"))
        return batches.fetch(torch.arange(batches.length))
    return pair(data, context, name)


def _prepared(x: Tensor, context: Tensor | None, model: nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Convert rows to the model's types: integers stay for images, and for targets of a module."""
    if isinstance(model, Flow | Predictor):
        if not x.is_floating_point() and model.levels is None:
            x = x.to(like.dtype)
        if tuple(x.shape[1:]) != tuple(model.event_shape):
            raise DataError(f"rows have shape {tuple(x.shape[1:])}; expected event_shape={tuple(model.event_shape)}")
        if isinstance(model, Flow) and context is None and model.context_dim:
            raise DataError(f"the flow is conditional: give context=, (N, {model.context_dim})")
        if context is not None:
            outputs = model.outputs if isinstance(model, Predictor) else 0
            classes = outputs and not context.is_floating_point() and context.ndim == 1
            if classes and int(context.max()) >= outputs:
                raise DataError(f"a target is class {int(context.max())}, but the predictor has {outputs} outputs")
            context = torch.nn.functional.one_hot(context.long(), outputs) if classes else context
            context = (context[:, None] if context.ndim == 1 else context).to(like.dtype)
    x = x.to(like.dtype) if x.is_floating_point() else x
    return x, context.to(like.dtype) if context is not None and context.is_floating_point() else context


def _held_out(x: Tensor, context: Tensor | None, model: nn.Module, like: Tensor) -> Validation:
    x, context = _prepared(x, context, model, like)
    return Validation(x.to(like.device), None if context is None else context.to(like.device), torch.arange(len(x)))
