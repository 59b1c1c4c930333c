"""Joining the processes that torchrun started, and leaving them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist

from cnf.distributed.group import ALONE, Group
from cnf.distributed.heartbeat import Heartbeat
from cnf.errors import ConfigError, TrainingError

__all__ = ["join", "launched", "muted", "speaks"]

# of one collective; the others wait in one while rank 0 downloads, writes and draws. The heartbeat notices deaths long before
TIMEOUT = timedelta(hours=6)
COMING = timedelta(minutes=10)  # for every process to begin; who ended before that has no heartbeat yet
# small figures and messages travel as CPU tensors, gradients from where they are
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def launched() -> tuple[int, int]:
    """Rank and number of processes as torchrun's environment says (RANK, WORLD_SIZE); (0, 1) without it.

    Raises:
        ConfigError: for an environment that says half of it.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    rank = os.environ.get("RANK", "0" if size == "1" else "")
    if not (size.isdecimal() and rank.isdecimal() and int(rank) < int(size)):
        raise ConfigError(f"the environment has RANK={rank!r}, WORLD_SIZE={size!r}: start several processes by torchrun, or unset both")
    return int(rank), int(size)


def speaks() -> bool:
    """Whether this process is rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def muted() -> Iterator[None]:
    """Inside, what ranks other than 0 print goes nowhere: N processes, one reader."""
    if speaks():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


@contextmanager
def join(device: str) -> Iterator[Group]:
    """The group of the processes that torchrun started, left again at the end; ALONE without torchrun.

    GPUs reduce by NCCL, CPUs by gloo. Afterwards ``"cuda"`` means the GPU of this process (its LOCAL_RANK). At the end all
    wait for each other; where one ends by an exception, the others are told and end as well.

    Args:
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        ConfigError: for a numbered GPU, fewer GPUs than processes, or an environment that torchrun did not make.
        TrainingError: where a process does not come.

    Example:
        >>> with join("cpu") as group:
        ...     group.size
        1
    """
    rank, size = launched()
    if size == 1:
        yield ALONE
        return
    group = _start(device, rank, size)
    try:
        yield group
    except BaseException as error:
        if group.failed(error) and rank:  # rank 0's own program tells the reader
            print(f"rank {rank}: {error or type(error).__name__}", file=sys.stderr, flush=True)
        if device == "cpu":  # NCCL's might wait for those that are gone
            dist.destroy_process_group()
        raise
    group.leave()
    dist.destroy_process_group()


def _start(device: str, rank: int, size: int) -> Group:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE={size}, but {', '.join(missing)} is not set: start several processes by torchrun, or unset it")
    local = int(os.environ["LOCAL_RANK"])
    if device not in BACKENDS:
        raise ConfigError(f"--device {device} in {size} processes: expected cpu or cuda, of which each takes its own")
    if device == "cuda":
        if local >= (count := torch.cuda.device_count()):
            raise ConfigError(f"--device cuda: process {local} of this machine has no GPU of its own, there are {count}: take --nproc-per-node {max(1, count)}")
        torch.cuda.set_device(local)
    # Its functions take the group as a default argument. First imported once there is a group (as torch.optim does, late), it
    # would keep the group and its threads alive, and a thread that outlives the interpreter aborts the process.
    importlib.import_module("torch.distributed.nn.functional")
    store = _meet(rank, size)
    dist.init_process_group(BACKENDS[device], store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # a connection of its own: a call that waits in the group's would hold the heartbeat up
    heartbeat = Heartbeat(rank, size, _named(dist.TCPStore(host, port, is_master=False, timeout=COMING)))  # type: ignore[attr-defined]
    heartbeat.start()
    return Group(rank, size, local, heartbeat)


def _named(store: dist.Store) -> dist.Store:  # type: ignore[name-defined]
    """The store under a name that no earlier attempt of torchrun's has used."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"cnf/{attempt}", store)  # type: ignore[attr-defined]


def _meet(rank: int, size: int) -> dist.Store:  # type: ignore[name-defined]
    """The store of the run, once every rank has come to it.

    Raises:
        TrainingError: naming who has not.
    """
    place, names = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", [f"come/{other}" for other in range(size)]
    seconds = COMING.total_seconds()
    try:
        store = _named(next(dist.rendezvous("env://", rank, size, timeout=COMING))[0])  # type: ignore[attr-defined]
        store.set(names[rank], "yes")
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        raise TrainingError(f"the {size} processes did not meet at {place} within {seconds:g} s: {reason}") from None
    try:
        store.wait(names, COMING)
    except RuntimeError:
        missing = ", ".join(str(other) for other, name in enumerate(names) if not store.check([name]))
        raise TrainingError(
            f"rank {missing} of {size} did not come within {seconds:g} s: see what it said when it ended, and whether its machine "
            f"reaches {place}"
        ) from None
    return store
