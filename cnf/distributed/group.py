"""The processes of a run: rows of each rank, the joint gradient, and collective decisions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cnf._utils.errors import CNFError, ConfigError, SolverError, TrainingError
from cnf.distributed.heartbeat import Heartbeat

__all__ = ["SINGLE_PROCESS", "Group"]

T = TypeVar("T")
# most metrics reduced with a gradient; fixed, since a rank whose solve failed does not know how many the others have
FIGURES = 32


class Group:
    r"""The processes (ranks) of one run, each with its rows of every batch; without communication for a single process.

    The gradient of a joint batch of N rows is :math:`\nabla \frac1N \sum_i L_i = \sum_r \frac{N_r}{N} \nabla \bar L_r`,
    the ranks' means weighted by their rows, however unevenly N divides. It is reduced in one flat bucket after the
    backward pass (:meth:`all_reduce_gradients`). DistributedDataParallel reduces its buckets within the backward pass:
    an adjoint solve that fails on one rank would leave the others waiting in a collective for ever, without a step at
    which all could agree to skip the batch. The bucket also works for every kind of gradient (recorded, recomputed or
    adjoint) and for parameters without one. Overlapping communication and computation would save little next to an ODE
    solve (docs/scaling.md).

    Args:
        rank: index of this process.
        size: number of processes.
        local_rank: index of this process on its machine.
        heartbeat: detects lost ranks, if there are several.

    Example:
        >>> [Group(rank, 3).share(8) for rank in range(3)]
        [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, heartbeat: Heartbeat | None = None):
        self.rank, self.size, self.local_rank, self.heartbeat = rank, size, local_rank, heartbeat

    @property
    def main(self) -> bool:
        """Whether this is rank 0, the only one that writes files and prints."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """Return this rank's rows of a joint batch."""
        return slice(self.rank * rows // self.size, (self.rank + 1) * rows // self.size)

    def owns(self, number: int) -> bool:
        """Return whether this rank does the piece of work ``number``.

        Whole batches are assigned, so that each is solved as a single process would.
        """
        return number % self.size == self.rank

    def owned(self, count: int) -> int:
        """Return the number of ``count`` pieces of work, numbered from 0, that this rank does."""
        return len(range(self.rank, count, self.size))

    # -- reductions ----------------------------------------------------------------------------------------------

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over ranks; a value that is zero on all other ranks arrives unchanged."""
        return value if self.size == 1 else self._reduced(value, dist.ReduceOp.SUM)

    def all_max(self, values: Sequence[float]) -> list[float]:
        """Return the maximum of each number over ranks."""
        if self.size == 1:
            return list(values)
        return list(self._reduced(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.MAX).tolist())

    def mean(self, values: Tensor) -> float:
        """Return the mean over the rows (N,) of all ranks, in double precision."""
        if self.size == 1:
            return float(values.double().mean())
        total, count = self.sum(torch.stack([values.double().sum().cpu(), torch.tensor(float(len(values))).double()])).tolist()
        return float(total / count)

    def all_reduce_gradients(
        self, parameters: Iterable[Tensor], share: float, figures: Tensor, failure: str = ""
    ) -> tuple[Tensor, str]:
        """Reduce every ``grad`` to that of the joint batch, on all ranks; a batch that fails on one rank fails on all.

        Args:
            parameters: with the gradients of this rank's mean loss.
            share: this rank's fraction N_r/N of the joint batch.
            figures: (k,) means over this rank's rows.
            failure: why this rank has no gradient.

        Returns:
            The means over the joint batch (k,), and the failures by rank, "" if there are none (else gradients are
            undefined).

        Raises:
            ConfigError: for more figures than FIGURES.
            TrainingError: if a rank is lost.
        """
        if self.size == 1:
            return figures, failure
        if len(figures) > FIGURES:
            raise ConfigError(f"the objective has {len(figures)} terms, but several processes report at most {FIGURES}: drop some")
        own = list(parameters)
        dtype = max((p.dtype for p in own), key=lambda d: d.itemsize)
        device = own[0].device
        tail = torch.zeros(len(own) + 1 + FIGURES, dtype=dtype, device=device)
        if failure:
            tail[len(own)] = 1
            bucket = torch.cat([torch.zeros(sum(p.numel() for p in own), dtype=dtype, device=device), tail])
        else:
            # reduces which parameters have a gradient as well: those without one on any rank keep none
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
        """Return the failures of all ranks in one line ("" if there are none), the same on all ranks."""
        return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(self.all_gather(failure)) if text)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context manager that turns a SolverError on one rank into one on all ranks, on exit.

        Raises:
            SolverError: with the failed ranks.
        """
        failure = ""
        try:
            yield
        except SolverError as error:
            if self.size == 1:
                raise
            failure = str(error)
        if self.size > 1 and self.all_max([float(bool(failure))])[0]:
            raise SolverError(self.reasons(failure))

    # -- objects and decisions -----------------------------------------------------------------------------------

    def all_gather(self, value: T) -> list[T]:
        """Return every rank's value, on all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._call(lambda: dist.all_gather_object(values, value))
        return values

    def gather(self, value: T) -> list[T]:
        """Return every rank's value on rank 0, an empty list elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.main else None
        self._call(lambda: dist.gather_object(value, values, dst=0))
        return values or []

    def on_rank0(self, function: Callable[[], T]) -> T:
        """Call ``function`` on rank 0 and return its result, or raise its exception, on all ranks."""
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
        result: T = outcome[0]
        return result

    def rank0_first(self, function: Callable[[], T]) -> T:
        """Call ``function`` on rank 0, then on the first rank of each machine, then on all others.

        For functions whose first call leaves files on the disk for the others. A CNFError or OSError on one rank is
        raised on all.
        """
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
            for each in self.all_gather(error):
                if each is not None:
                    raise each
        return value[0]

    def check_same(self, values: Mapping[str, object]) -> None:
        """Check that all ranks have the same values, compared as strings.

        Raises:
            ConfigError: with the name, the rank and both values.
        """
        gathered = self.all_gather({name: str(value) for name, value in values.items()})
        for rank, others in enumerate(gathered):
            for name, value in others.items():
                if value != gathered[0].get(name):
                    raise ConfigError(
                        f"{name} is {value} on rank {rank}, but {gathered[0].get(name)} on rank 0: give every process the same files, "
                        "versions and options"
                    )

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Broadcast rank 0's values to every rank."""
        if self.size > 1:
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                self._call(lambda whole=whole: dist.broadcast(whole, src=0))  # type: ignore[misc]
                tensor.copy_(whole)

    # -- shutdown ------------------------------------------------------------------------------------------------

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.all_max([0.0])

    def leave(self) -> None:
        """Leave the group: stop the heartbeat after all ranks have arrived."""
        self.barrier()
        if self.heartbeat is not None:
            self.heartbeat.stop()
        self.barrier()  # rank 0 may host the store of the heartbeats

    def failed(self, error: BaseException) -> bool:
        """Report to the other ranks that this one ends; return whether this rank is the one to print the error."""
        return self.heartbeat is None or self.heartbeat.fail(str(error) or type(error).__name__)

    def _reduced(self, value: Tensor, operation: Any) -> Tensor:
        result = value.detach().clone()
        self._call(lambda: dist.all_reduce(result, op=operation))
        return result

    def _call(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:  # a connection broke or timed out; the error does not name the rank at fault
            who = None if self.heartbeat is None else self.heartbeat.culprit()
            raise TrainingError(
                f"{who or f'rank {self.rank} could not reach the others ({str(error).splitlines()[0]})'}; the last checkpoint is "
                "intact: continue from it with --resume, with any number of processes"
            ) from None


SINGLE_PROCESS = Group()
