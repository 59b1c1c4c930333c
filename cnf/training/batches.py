"""Training batches as functions of (seed, step), and the fingerprint of the data."""

from __future__ import annotations

import copy
import dataclasses
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from cnf._utils.async_checks import to_device
from cnf._utils.errors import ConfigError, DataError
from cnf.config import RunConfig
from cnf.data import DataSplits
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.random import Noise

__all__ = ["Batches", "Validation", "choose_rows", "fingerprint", "require_values", "shared_settings", "validation_rows"]

LOCAL = ("data_root", "download", "device", "threads")  # options that may differ between machines


@dataclass(frozen=True)
class Validation:
    """Validation rows x (N, \\*event), their context, and their indices in the split, which select their noise."""

    x: Tensor
    context: Tensor | None
    index: Tensor


class Batches:
    """Training batches as a function of the step, reshuffled each epoch; an incomplete last batch is dropped.

    Args:
        data: the splits. The training rows stay on the device (images as uint8) if they fit into half of its free
            memory, and are copied batch by batch otherwise.
        size: rows of the joint batch, at most the number of training rows.
        seed: of the order and the noise.
        device: of the batches.
        group: processes that share each batch: all use the same order, and each takes its own rows.
        dtype: of floating-point batches and of the context.

    Raises:
        ConfigError: for fewer rows than processes.
        DataError: for rows with NaN or infinity, or pixels outside the grey levels. Batches are not checked again.
    """

    def __init__(
        self,
        data: DataSplits,
        size: int,
        seed: int,
        device: torch.device,
        group: Group = SINGLE_PROCESS,
        dtype: torch.dtype = torch.float32,
    ):
        self.device, self.dtype = device, dtype
        self.x = data.train.to(device) if _fits(data.train, device) else data.train
        require_values(self.x, data.train_levels or data.levels)
        self.context = None if data.train_context is None else _cast(data.train_context.to(device), dtype)
        self.length = len(self.x)
        self.seed, self.flip, self.group = seed, data.flip, group
        self._resize(size)

    def resized(self, size: int) -> Batches:
        """Return the same data in batches of ``size`` rows.

        Raises:
            ConfigError: for fewer rows than processes.
        """
        other = copy.copy(self)
        other._resize(size)
        return other

    def _resize(self, size: int) -> None:
        group = self.group
        self.size = min(size, self.length)
        if self.size < group.size:
            raise ConfigError(f"a batch has {self.size} rows, fewer than the {group.size} processes: take a larger --batch-size, or fewer processes")
        self.share, self.joint = group.share(self.size), self.size if group.size > 1 else None
        # cache of the latest epoch's order, not part of the state
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __call__(self, step: int) -> tuple[Tensor, Tensor | None, Noise]:
        """Return the batch of a step: x (N, \\*event), context (N, C) or None, and the noise.

        The N rows are those of this process.
        """
        epoch, place = divmod(step, self.length // self.size)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = epoch, to_device(torch.randperm(self.length, generator=generator), self.x.device)
        rows = self._order[1][place * self.size : (place + 1) * self.size][self.share]
        noise = Noise(self.seed, "train", step, start=self.share.start, total=self.joint)
        x, context = self.fetch(rows)
        if self.flip:
            chosen = noise.draw("flip", "uniform", (len(x),), device=x.device) < 0.5
            x = torch.where(chosen[:, None, None, None], x.flip(3), x)
        return x, context, noise

    def fetch(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return x and context of some rows, on the device."""
        x = _cast(to_device(self.x[rows], self.device).contiguous(), self.dtype)
        return x, None if self.context is None else self.context[to_device(rows, self.device)]


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def require_values(x: Tensor, levels: int | None, chunk: int = 8192) -> None:
    """Check ``chunk`` rows at a time for NaN, infinity, and pixels outside the grey levels.

    Raises:
        DataError: with the first such row.
    """
    if not x.is_floating_point():
        if levels is not None and levels < 256 and (most := max(int(part.max()) for part in x.split(chunk))) >= levels:
            raise DataError(f"a pixel of the training data is {most}, but levels={levels}: expected 0 to {levels - 1}")
        return
    for number, part in enumerate(x.split(chunk)):
        if not bool(part.isfinite().all()):
            row = number * chunk + int((~part.flatten(1).isfinite().all(1)).nonzero()[0])
            raise DataError(f"the training data hold NaN or infinity, first in row {row}: remove or replace such rows")


def _fits(x: Tensor, device: torch.device) -> bool:
    return device.type != "cuda" or 2 * x.nbytes <= torch.cuda.mem_get_info(device)[0]


def fingerprint(data: DataSplits) -> str:
    """Return sizes and CRC-32 checksums (of about 1000 rows each) of the training and validation data."""
    parts = []
    for x in (data.train, data.train_context, data.validation, data.validation_context):
        if x is not None:
            some = x[:: max(1, len(x) // 1000)].contiguous()
            parts.append(f"{len(x)}:{zlib.crc32(some.numpy().tobytes()):08x}")
    return " ".join(parts)


def shared_settings(config: RunConfig, data: DataSplits) -> dict[str, object]:
    """Return what all processes must agree on: options except paths, device and threads, torch's version, the data."""
    parts = [dataclasses.asdict(part) for part in (config.data, config.model, config.solver, config.train)]
    options = {f"--{name.replace('_', '-')}": value for part in parts for name, value in part.items() if name not in LOCAL}
    return {**options, "torch": torch.__version__, "the data's fingerprint": fingerprint(data)}


def choose_rows(total: int, items: int | None, seed: int) -> Tensor:
    """Return sorted indices of ``items`` random rows, fixed by ``seed``; all rows if None.

    Rows are drawn at random because data sets are often sorted.

    Raises:
        ConfigError: for ``items`` below 1.
    """
    if items is not None and items < 1:
        raise ConfigError(f"items={items}; expected at least 1, or None for all")
    if items is None or items >= total:
        return torch.arange(total)
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:items].sort().values


def validation_rows(
    data: DataSplits, items: int | None, seed: int, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return ``items`` random validation rows (all if None), their context, and their indices in the split."""
    index, context = choose_rows(len(data.validation), items, seed), data.validation_context
    return data.validation[index].to(device), None if context is None else context[index].to(device), index
