"""Joining and leaving the process group started by torchrun."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from cnf._utils.errors import ConfigError, TrainingError
from cnf.distributed.group import SINGLE_PROCESS, Group
from cnf.distributed.heartbeat import Heartbeat

__all__ = ["join", "launched"]

# timeout of a collective, in which the others wait while rank 0 downloads, writes and plots; the heartbeat detects lost
# ranks long before
TIMEOUT = timedelta(hours=6)
COMING = timedelta(minutes=10)  # for every process to start; one that ended before has no heartbeat yet
# metrics and messages are reduced on the CPU, gradients on their device
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def launched() -> tuple[int, int]:
    """Return rank and number of processes from torchrun's environment (RANK, WORLD_SIZE); (0, 1) without it."""
    size = os.environ.get("WORLD_SIZE", "1")
    rank = os.environ.get("RANK", "0" if size == "1" else "")
    if not (size.isdecimal() and rank.isdecimal() and int(rank) < int(size)):
        raise ConfigError(f"the environment has RANK={rank!r}, WORLD_SIZE={size!r}: start several processes with torchrun, or unset both")
    return int(rank), int(size)


@contextmanager
def join(device: str) -> Iterator[Group]:
    """Context manager for the group of processes started by torchrun; SINGLE_PROCESS without torchrun.

    GPUs reduce by NCCL, CPUs by gloo. Inside, ``"cuda"`` means this process's GPU (its LOCAL_RANK). On exit all ranks
    wait for each other; an exception on one rank is reported to the others and ends them.

    Args:
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        ConfigError: for a numbered GPU, fewer GPUs than processes, or an environment that is not torchrun's.
        TrainingError: if a process does not join.

    Example:
        >>> with join("cpu") as group:
        ...     group.size
        1
    """
    rank, size = launched()
    if size == 1:
        yield SINGLE_PROCESS
        return
    group = _start(device, rank, size)
    try:
        yield group
    except BaseException as error:
        if group.failed(error) and rank:  # rank 0's program prints its own error
            print(f"rank {rank}: {error or type(error).__name__}", file=sys.stderr, flush=True)
        if device == "cpu":  # destroying NCCL's group may wait for lost ranks
            dist.destroy_process_group()
        raise
    group.leave()
    dist.destroy_process_group()


def _start(device: str, rank: int, size: int) -> Group:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE={size}, but {', '.join(missing)} is not set: start several processes with torchrun, or unset WORLD_SIZE")
    local = int(os.environ["LOCAL_RANK"])
    if device not in BACKENDS:
        raise ConfigError(f"--device must be cpu or cuda for {size} processes, got {device}: each process selects its own GPU")
    if device == "cuda":
        if local >= (count := torch.cuda.device_count()):
            raise ConfigError(f"--device cuda needs one GPU per process, but this machine has {count} for process {local}: use --nproc-per-node {max(1, count)}")
        torch.cuda.set_device(local)
    # Its functions have the group as a default argument: imported after the group exists (torch.optim does so, late),
    # it keeps the group and its threads alive, and a thread that outlives the interpreter aborts the process.
    importlib.import_module("torch.distributed.nn.functional")
    store = _meet(rank, size)
    dist.init_process_group(BACKENDS[device], store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # a separate connection: a blocking call on the group's would delay the heartbeat
    heartbeat = Heartbeat(rank, size, _named(dist.TCPStore(host, port, is_master=False, timeout=COMING)))  # type: ignore[attr-defined]
    heartbeat.start()
    return Group(rank, size, local, heartbeat)


def _named(store: dist.Store) -> dist.Store:  # type: ignore[name-defined]
    """Return the store with a prefix for this attempt of torchrun, not shared with earlier ones."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"cnf/{attempt}", store)  # type: ignore[attr-defined]


def _meet(rank: int, size: int) -> dist.Store:  # type: ignore[name-defined]
    """Return the store of the run after every rank has joined."""
    address, names = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", [f"come/{other}" for other in range(size)]
    seconds = COMING.total_seconds()
    try:
        store = _named(next(dist.rendezvous("env://", rank, size, timeout=COMING))[0])  # type: ignore[attr-defined]
        store.set(names[rank], "yes")
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        raise TrainingError(f"the {size} processes did not meet at {address} within {seconds:g} s: {reason}") from None
    try:
        store.wait(names, COMING)
    except RuntimeError:
        missing = ", ".join(str(other) for other, name in enumerate(names) if not store.check([name]))
        raise TrainingError(
            f"rank {missing} of {size} did not join within {seconds:g} s: see its own output, and check that its machine reaches {address}"
        ) from None
    return store
