"""Training batches as functions of (seed, step), and how a run knows its data again."""

from __future__ import annotations

import copy
import dataclasses
import zlib

import torch
from torch import Tensor

from cnf.datasets import DataSplits
from cnf.deferral import sent
from cnf.distributed import ALONE, Group
from cnf.errors import ConfigError, DataError
from cnf.noise import Noise
from cnf.presets import RunConfig

__all__ = ["Batches", "choose_rows", "fingerprint", "shared_settings", "validation_rows"]

CHUNK = 8192  # rows looked at together
LOCAL = ("data_root", "download", "device", "threads")  # options that may differ between machines


class Batches:
    """The batch of every step, in an order shuffled anew each epoch; what does not fill a batch waits for the next shuffle.

    Args:
        data: the splits; the training rows are kept on the device (images as uint8) where they fit into half of its free
            memory, and fetched batch by batch otherwise.
        size: rows of the joint batch; all there are, if they are fewer.
        seed: decides order and noise.
        device: where batches live.
        group: the processes that share each batch: the order is the same on all of them, and each takes its rows.
        dtype: of batches of floats, and of the context.

    Raises:
        ConfigError: for fewer rows than processes.
        DataError: for rows that hold NaN or infinity, or pixels that are no grey levels: batches are not looked at again.
    """

    def __init__(
        self,
        data: DataSplits,
        size: int,
        seed: int,
        device: torch.device,
        group: Group = ALONE,
        dtype: torch.dtype = torch.float32,
    ):
        self.device, self.dtype = device, dtype
        self.x = data.train.to(device) if _fits(data.train, device) else data.train
        _require_values(self.x, data.levels)
        self.context = None if data.train_context is None else data.train_context.to(device, dtype)
        self.seed, self.flip, self.group = seed, data.flip, group
        self._resize(size)

    def resized(self, size: int) -> Batches:
        """The same data in batches of another size.

        Raises:
            ConfigError: for fewer rows than processes.
        """
        other = copy.copy(self)
        other._resize(size)
        return other

    def _resize(self, size: int) -> None:
        group = self.group
        self.size = min(size, len(self.x))
        if self.size < group.size:
            raise ConfigError(f"a batch has {self.size} rows, fewer than the {group.size} processes: take a larger --batch-size, or fewer processes")
        self.share, self.joint = group.share(self.size), self.size if group.size > 1 else None
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))  # of the latest epoch: a memory, not a state

    def __call__(self, step: int) -> tuple[Tensor, Tensor | None, Noise]:
        """x (N, \\*event), context (N, C) or None, and the noise of a step: this process's rows of the joint batch."""
        epoch, place = divmod(step, len(self.x) // self.size)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = epoch, sent(torch.randperm(len(self.x), generator=generator), self.x.device)
        rows = self._order[1][place * self.size : (place + 1) * self.size][self.share]
        noise = Noise(self.seed, "train", step, start=self.share.start, total=self.joint)
        x = sent(self.x[rows], self.device).contiguous()
        x = x.to(self.dtype) if x.is_floating_point() else x
        if self.flip:
            chosen = noise.draw("flip", "uniform", (len(x),), device=x.device) < 0.5
            x = torch.where(chosen[:, None, None, None], x.flip(3), x)
        return x, None if self.context is None else self.context[sent(rows, self.device)], noise


def _require_values(x: Tensor, levels: int | None) -> None:
    if not x.is_floating_point():
        if levels is not None and levels < 256 and (most := max(int(part.max()) for part in x.split(CHUNK))) >= levels:
            raise DataError(f"a pixel of the training data is {most}, but levels={levels}: expected 0 to {levels - 1}")
        return
    for number, part in enumerate(x.split(CHUNK)):
        if not bool(part.isfinite().all()):
            row = number * CHUNK + int((~part.flatten(1).isfinite().all(1)).nonzero()[0])
            raise DataError(f"the training data hold NaN or infinity, first in row {row}: remove or replace such rows")


def _fits(x: Tensor, device: torch.device) -> bool:
    return device.type != "cuda" or 2 * x.nbytes <= torch.cuda.mem_get_info(device)[0]


def fingerprint(data: DataSplits) -> str:
    """Sizes and checksums (of up to about a thousand rows a part) of what is trained on and what selects."""
    parts = []
    for x in (data.train, data.train_context, data.validation, data.validation_context):
        if x is not None:
            some = x[:: max(1, len(x) // 1000)].contiguous()
            parts.append(f"{len(x)}:{zlib.crc32(some.numpy().tobytes()):08x}")
    return " ".join(parts)


def shared_settings(config: RunConfig, data: DataSplits) -> dict[str, object]:
    """What every process of a run must have alike: all options but for places and threads, torch's version, the data."""
    parts = [dataclasses.asdict(part) for part in (config.data, config.model, config.solver, config.train)]
    options = {f"--{name.replace('_', '-')}": value for part in parts for name, value in part.items() if name not in LOCAL}
    return {**options, "torch": torch.__version__, "the data's fingerprint": fingerprint(data)}


def choose_rows(total: int, items: int | None, seed: int) -> Tensor:
    """Numbers of ``items`` rows in their order: chosen at random, since sets are often sorted, but always the same; all if None.

    Raises:
        ConfigError: for fewer than one item.
    """
    if items is not None and items < 1:
        raise ConfigError(f"items={items}; expected at least 1, or None for all")
    if items is None or items >= total:
        return torch.arange(total)
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:items].sort().values


def validation_rows(
    data: DataSplits, items: int | None, seed: int, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Validation rows, their context and their numbers in the split: so many chosen at random, or all."""
    index, context = choose_rows(len(data.validation), items, seed), data.validation_context
    return data.validation[index].to(device), None if context is None else context[index].to(device), index
