"""The processes of one run: whose rows are whose, the gradient of the joint batch, decisions that all share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cnf.distributed.heartbeat import Heartbeat
from cnf.errors import CNFError, ConfigError, SolverError, TrainingError

__all__ = ["ALONE", "Group"]

T = TypeVar("T")
FIGURES = 32  # numbers that may travel with a gradient: a rank whose solve failed does not know how many the others have


class Group:
    r"""The processes (ranks) of one run, each with its rows of every batch; a group of one does nothing at all.

    The gradient of a joint batch of N rows is :math:`\nabla \frac1N \sum_i L_i = \sum_r \frac{N_r}{N} \nabla \bar L_r`, the
    ranks' own means weighed by their rows, however unevenly N divides. It is reduced in one flat bucket after the backward
    pass (:meth:`joint`), and not by DistributedDataParallel, whose buckets leave from within it: an adjoint that fails in
    the middle of its solve, on one rank, would leave the others waiting in a collective for ever, and there would be no
    step at which all could agree to skip the batch. It is also indifferent to how a gradient comes about (recorded,
    recomputed or by an adjoint) and to parameters that get none. What overlapping would save is small beside an ODE solve
    (docs/scaling.md).

    Args:
        rank: number of this process.
        size: number of processes.
        local_rank: its number on its machine.
        heartbeat: tells who is gone, where there is more than one.

    Example:
        >>> [Group(rank, 3).share(8) for rank in range(3)]
        [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, heartbeat: Heartbeat | None = None):
        self.rank, self.size, self.local_rank, self.heartbeat = rank, size, local_rank, heartbeat

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which alone writes files and speaks."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """This rank's rows of a joint batch."""
        return slice(self.rank * rows // self.size, (self.rank + 1) * rows // self.size)

    def owns(self, number: int) -> bool:
        """Whether work of that number is this rank's: whole batches are dealt out, so that each is solved as one process would."""
        return number % self.size == self.rank

    def owned(self, count: int) -> int:
        """Return how many of ``count`` pieces of work, numbered from 0, this rank owns."""
        return len(range(self.rank, count, self.size))

    # -- figures -------------------------------------------------------------------------------------------------

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks; what only one of them has (zero elsewhere) arrives unchanged."""
        return value if self.size == 1 else self._reduced(value, dist.ReduceOp.SUM)

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of each number over ranks."""
        if self.size == 1:
            return list(values)
        found: list[float] = self._reduced(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.MAX).tolist()
        return found

    def mean(self, values: Tensor) -> float:
        """The mean over the rows (N,) of all ranks, in double precision."""
        if self.size == 1:
            return float(values.double().mean())
        total, count = self.sum(torch.stack([values.double().sum().cpu(), torch.tensor(float(len(values))).double()])).tolist()
        return float(total / count)

    def joint(
        self, parameters: Iterable[Tensor], share: float, figures: Tensor, failure: str = ""
    ) -> tuple[Tensor, str]:
        """Make every ``grad`` that of the joint batch, on all ranks alike; a batch that failed on one rank has failed on all.

        Args:
            parameters: with the gradients of this rank's mean loss.
            share: this rank's part N_r/N of the joint batch.
            figures: (k,) means over this rank's rows.
            failure: why this rank has no gradient.

        Returns:
            The means over the joint batch (k,), and who failed and why, "" where nobody did (else gradients are void).

        Raises:
            ConfigError: for more figures than travel with a gradient.
            TrainingError: where a rank is gone.
        """
        if self.size == 1:
            return figures, failure
        if len(figures) > FIGURES:
            raise ConfigError(f"an objective of {len(figures)} terms: at most {FIGURES} can be reported by several processes")
        own = list(parameters)
        dtype = max((p.dtype for p in own), key=lambda d: d.itemsize)
        device = own[0].device
        tail = torch.zeros(len(own) + 1 + FIGURES, dtype=dtype, device=device)
        if failure:
            tail[len(own)] = 1
            bucket = torch.cat([torch.zeros(sum(p.numel() for p in own), dtype=dtype, device=device), tail])
        else:
            # which parameters have a gradient travels too: those that have none anywhere are to keep none
            tail[: len(own)] = torch.tensor([float(p.grad is not None) for p in own], dtype=dtype)
            tail[len(own) + 1 : len(own) + 1 + len(figures)] = figures.to(tail) * share
            parts = [(torch.zeros_like(p) if p.grad is None else p.grad).to(dtype).flatten() * share for p in own]
            bucket = torch.cat([*parts, tail])
        bucket = self._reduced(bucket, dist.ReduceOp.SUM)
        tail = bucket[len(bucket) - len(tail) :]
        *given, failed = tail[: len(own) + 1].tolist()
        if failed:
            return figures, self.reasons(failure)
        start = 0
        for p, count in zip(own, given, strict=True):
            p.grad = bucket[start : start + p.numel()].view_as(p).to(p.dtype) if count else None
            start += p.numel()
        return tail[len(own) + 1 : len(own) + 1 + len(figures)].to(figures), ""

    def reasons(self, failure: str) -> str:
        """Every rank's failure ("" where it has none) in one line, the same everywhere."""
        return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(self.gather(failure)) if text)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, a SolverError on one rank becomes one on all of them, at the end.

        Raises:
            SolverError: naming the ranks.
        """
        failure = ""
        try:
            yield
        except SolverError as error:
            if self.size == 1:
                raise
            failure = str(error)
        if self.size > 1 and self.largest([float(bool(failure))])[0]:
            raise SolverError(self.reasons(failure))

    # -- decisions -----------------------------------------------------------------------------------------------

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on all of them."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        self._call(lambda: dist.all_gather_object(found, value))
        return found

    def collect(self, value: T) -> list[T]:
        """Every rank's value on rank 0, nothing elsewhere."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.main else None
        self._call(lambda: dist.gather_object(value, found, dst=0))
        return found or []

    def first(self, function: Callable[[], T]) -> T:
        """What ``function`` gives on rank 0, or raises there, which alone calls it."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = function()
            except (CNFError, OSError) as error:
                outcome[1] = error
        self._call(lambda: dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu")))
        if outcome[1] is not None:
            raise outcome[1]
        found: T = outcome[0]
        return found

    def in_turn(self, function: Callable[[], T]) -> T:
        """Rank 0 first, then the first of each machine, then all: for what the first one leaves on the disk for the others."""
        if self.size == 1:
            return function()
        turn = 0 if self.main else 1 if self.local_rank == 0 else 2
        value: list[T] = []
        for now in range(3):
            error: Exception | None = None
            if now == turn:
                try:
                    value.append(function())
                except (CNFError, OSError) as caught:
                    error = caught
            found = next((e for e in self.gather(error) if e is not None), None)
            if found is not None:
                raise found
        return value[0]

    def agree(self, values: Mapping[str, object]) -> None:
        """Make sure that all ranks have the same values, told apart by their text.

        Raises:
            ConfigError: naming what differs, and where.
        """
        gathered = self.gather({name: str(value) for name, value in values.items()})
        for rank, others in enumerate(gathered):
            for name, value in others.items():
                if value != gathered[0].get(name):
                    raise ConfigError(
                        f"{name} is {value} on rank {rank}, but {gathered[0].get(name)} on rank 0: every process needs the same "
                        "files, versions and options"
                    )

    @torch.no_grad()
    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Give rank 0's values to every rank."""
        if self.size > 1:
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                self._call(lambda whole=whole: dist.broadcast(whole, src=0))  # type: ignore[misc]
                tensor.copy_(whole)

    # -- the ends ------------------------------------------------------------------------------------------------

    def barrier(self) -> None:
        """Wait for all."""
        self.largest([0.0])

    def leave(self) -> None:
        """Part in good order: nobody is missed from here on."""
        self.barrier()
        if self.heartbeat is not None:
            self.heartbeat.stop()
        self.barrier()  # rank 0 may hold the store that the heartbeats use

    def failed(self, error: BaseException) -> bool:
        """Tell the others that this rank ends; whether the reader has to be told by this one."""
        return self.heartbeat is None or self.heartbeat.fail(str(error) or type(error).__name__)

    def _reduced(self, value: Tensor, operation: Any) -> Tensor:
        result = value.detach().clone()
        self._call(lambda: dist.all_reduce(result, op=operation))
        return result

    def _call(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:  # a connection broke, or the time limit passed: neither says whose fault it is
            who = None if self.heartbeat is None else self.heartbeat.culprit()
            raise TrainingError(
                f"{who or f'rank {self.rank} could not reach the others ({str(error).splitlines()[0]})'}; the last checkpoint "
                "is whole, and --resume continues from there, with any number of processes"
            ) from None


ALONE = Group()
