"""Memory of the backward pass, and advice on running out of it."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cnf.errors import CNFError, TrainingError
from cnf.noise import Noise

if TYPE_CHECKING:
    from cnf.training.loop import Trainer

__all__ = ["available", "exhausted", "fitting", "kept_bytes"]

RESERVE = 1.5  # factor over the saved tensors, for stages, workspaces and fragmentation


def kept_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Return the bytes that ``forward`` saves for the backward pass, without weights and recomputed tensors.

    Example:
        >>> x = torch.zeros(1000, requires_grad=True)
        >>> kept_bytes(nn.Identity(), lambda: x.exp())
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


def exhausted(error: BaseException) -> bool:
    """Return whether an error reports that the GPU or the CPU is out of memory.

    Example:
        >>> exhausted(MemoryError()), exhausted(RuntimeError("size mismatch"))
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
def fitting(trainer: Trainer, x: Tensor, context: Tensor | None, noise: Noise) -> Iterator[None]:
    """Context manager that turns an out-of-memory error into a TrainingError with advice.

    Raises:
        TrainingError: with the number of micro-batches (``--accumulate``) that would fit.
    """
    try:
        yield
        return
    except CNFError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not exhausted(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    # outside the handler, whose traceback keeps the tensors alive
    trainer.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
    raise TrainingError(f"step {trainer.step}: out of memory: {reason}. {_advice(trainer, x, context, noise)}") from None


def _advice(trainer: Trainer, x: Tensor, context: Tensor | None, noise: Noise) -> str:
    count, rows = max(1, trainer.config.accumulate), len(x)
    solver, finer = trainer.info.config.solver, ""
    if not solver.adaptive and solver.gradient == "direct":
        finer = ", or --gradient checkpoint in a new run"
    now = math.ceil(rows / count)
    if now == 1:
        return f"A single row does not fit: take a smaller model{finer}"
    few = max(1, min(now // 4, 16))
    try:
        each = kept_bytes(
            trainer.flow,
            lambda: trainer.objective.evaluate(x[:few], None if context is None else context[:few], noise.rows(0, rows)),
        ) / few
    except (MemoryError, RuntimeError):  # even these rows do not fit or cannot be solved
        each = 0.0
    free = available(trainer.device)
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
        f"A {'micro-batch' if count > 1 else 'batch'} of {now:,} rows{measured}: --accumulate {wanted} takes {size:,} rows at a time"
        + (f" ({each * size / 2**20:,.0f} MiB)" if each else "")
        + f", with the same gradient (--resume --accumulate {wanted} continues this run){finer}"
    )
