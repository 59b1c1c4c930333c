"""Memory of the backward pass, and advice on running out of it."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cnf._utils.errors import CNFError, TrainingError
from cnf.random import Noise
from cnf.solvers import FixedGrid, Solver

__all__ = ["available", "is_oom", "micro_batch_advice", "oom_advice", "saved_tensor_bytes"]

RESERVE = 1.5  # factor over the saved tensors, for stages, workspaces and fragmentation


def saved_tensor_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Return the bytes that ``forward`` saves for the backward pass, without weights and recomputed tensors.

    Example:
        >>> x = torch.zeros(1000, requires_grad=True)
        >>> saved_tensor_bytes(nn.Identity(), lambda: x.exp())
        4000
    """
    kept: dict[int, int] = {}
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # keep the result alive while counting: a freed storage's address may be reused and counted twice
        result = forward()
    del result
    return sum(kept.values())


def is_oom(error: BaseException) -> bool:
    """Return whether an error reports that the GPU or the CPU is out of memory.

    Example:
        >>> is_oom(MemoryError()), is_oom(RuntimeError("size mismatch"))
        (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        part in text for part in ("can't allocate memory", "not enough memory", "out of memory", "cuda_error_out_of_memory")
    )


def available(device: torch.device) -> int | None:
    """Return the free bytes on a device, or None if unknown.

    Example:
        >>> (available(torch.device("cpu")) or 1) > 0
        True
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found += [1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable")]
        import resource  # the limit of this process (ulimit -v)

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            with open("/proc/self/statm", encoding="ascii") as file:
                found.append(max(0, limit - resource.getpagesize() * int(file.read().split()[0])))
    except (OSError, ValueError, ImportError, IndexError):
        pass
    return min(found, default=None)


@contextmanager
def oom_advice(step: int, advice: Callable[[], str], release: Callable[[], object]) -> Iterator[None]:
    """Context manager that turns an out-of-memory error into a TrainingError with ``advice``.

    Args:
        step: of the training.
        advice: returns what to do, after the memory was released.
        release: drops what the step has allocated.

    Raises:
        TrainingError: with the error and the advice.
    """
    try:
        yield
        return
    except CNFError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_oom(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    # outside the handler, whose traceback keeps the tensors alive
    release()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    raise TrainingError(f"step {step}: out of memory: {reason}. {advice()}") from None


def micro_batch_advice(
    objective: Any, x: Tensor, context: Tensor | None, noise: Noise, count: int, solvers: Sequence[Solver] = (), dashes: str = ""
) -> str:
    """Return how many micro-batches would fit.

    Args:
        objective: the loss, with its model.
        x, context, noise: the batch.
        count: micro-batches of the step that did not fit.
        solvers: the training solvers.
        dashes: prefix of settings.
    """
    rows, option, finer = len(x), f"{dashes}accumulate", ""
    if any(isinstance(solver, FixedGrid) and solver.gradient == "direct" for solver in solvers):
        finer = f", or {dashes}gradient checkpoint in a new run"
    now = math.ceil(rows / count)
    if now == 1:
        return f"A single row does not fit: take a smaller model{finer}"
    few = max(1, min(now // 4, 16))
    try:
        part = x[:few], None if context is None else context[:few], noise.rows(0, rows)
        each = saved_tensor_bytes(objective, lambda: objective.evaluate(*part)) / few
    except (MemoryError, RuntimeError):  # even these rows do not fit or cannot be solved
        each = 0.0
    free = available(x.device)
    wanted = 2 * count
    measured = ""
    if each:
        measured = f" keeps about {each * now / 2**20:,.0f} MiB for its backward pass"
        if free is not None:
            measured += f", and {free / 2**20:,.0f} MiB are free"
            wanted = max(wanted, math.ceil(RESERVE * each * rows / max(free, 1)))
    wanted = min(rows, 1 << (wanted - 1).bit_length())
    size = math.ceil(rows / wanted)
    return (
        f"A {'micro-batch' if count > 1 else 'batch'} of {now:,} rows{measured}: {option} {wanted} takes {size:,} rows at a time"
        + (f" ({each * size / 2**20:,.0f} MiB)" if each else "")
        + f", with the same gradient (resuming with {option} {wanted} continues this run){finer}"
    )
