"""Heartbeat between the processes of a run, which detects and names a lost one."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

__all__ = ["Heartbeat"]

INTERVAL = 2.0  # seconds between beats
SILENCE = 40.0  # seconds without a beat after which a rank is lost, though no collective has failed
BEATS = 3.5  # missed beats after which a rank is lost once a collective has failed
GRACE = 5.0  # seconds for the others to fail for the same reason or to read the failure


class Heartbeat:
    """Thread that writes this rank's heartbeat to the store of the run and reads those of the others.

    A collective with a dead process may block for ever (NCCL) or fail without naming the broken connection (gloo). A
    short timeout is impossible, since the others wait in a collective while rank 0 writes and plots. Missing beats
    detect a death instead. A lost rank ends this process with a message that names it, a failed one with that rank's
    own message.

    torch.distributed.monitored_barrier in a thread of its own cannot replace this. Measured with three processes: of a
    frozen rank 1 only rank 0 learns the name (rank 2 is told to look at rank 0), a killed rank is reported by its port
    and not by its rank, and a rank that fails has no way to tell the others why.

    Args:
        rank: of this process.
        size: number of processes.
        store: shared by all ranks, and by nothing else in this process (a blocking call would delay the heartbeat).
    """

    def __init__(self, rank: int, size: int, store: dist.Store):  # type: ignore[name-defined]
        self.rank, self.size, self.store = rank, size, store
        self._own: dict[str, Any] = {"beat": 0, "pid": os.getpid(), "host": socket.gethostname(), "state": "alive", "text": ""}
        self.seen: list[dict[str, Any]] = [{} for _ in range(size)]
        """The latest message of each rank."""
        self._changed = [time.monotonic()] * size
        self._broken = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread, after the first beat of every rank."""
        self._write()
        self._read()  # blocks until every rank has beaten once
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread; lost ranks are no longer detected."""
        self._stop.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=2 * INTERVAL)

    def name(self, rank: int) -> str:
        """Return ``rank 1 (pid 123 on host)``."""
        seen = self.seen[rank]
        return f"rank {rank} (pid {seen['pid']} on {seen['host']})" if seen else f"rank {rank}"

    def lost(self, silence: float | None = None) -> str | None:
        """Name the first rank that failed or was silent for ``silence`` seconds; return None if there is none.

        ``silence`` defaults to SILENCE.
        """
        silence = SILENCE if silence is None else silence
        if self._broken >= 3:
            return f"{self.name(0)} is lost, or the launcher of its node: their store does not answer"
        others = [r for r in range(self.size) if r != self.rank and self.seen[r]]
        for rank in others:
            if self.seen[rank]["state"] == "failed":
                return f"{self.name(rank)} failed: {self.seen[rank]['text']}"
        for rank in others:
            if time.monotonic() - self._changed[rank] > silence:
                return f"{self.name(rank)} is lost: it stopped responding"
        return None

    def culprit(self) -> str | None:
        """Return which rank made a collective fail, after waiting for some missed beats; None if all are alive."""
        for _ in range(round((BEATS * INTERVAL + GRACE) / 0.1)):
            if (lost := self.lost(BEATS * INTERVAL)) is not None:
                return lost
            time.sleep(0.1)
        return None

    def fail(self, text: str) -> bool:
        """Report this rank's failure to the others; return whether no lower rank has reported the same.

        Only the lowest rank with a message prints it.
        """
        self.stop()
        self._own |= {"state": "failed", "text": text}
        deadline = time.monotonic() + GRACE
        while self._beat() and time.monotonic() < deadline:
            gone = [time.monotonic() - changed > BEATS * INTERVAL for changed in self._changed]
            states = [seen["state"] for seen in self.seen]
            if any(s == "failed" and self.seen[r]["text"] == text for r, s in enumerate(states[: self.rank])):
                return False
            if all(s == "failed" or g or r == self.rank for r, (s, g) in enumerate(zip(states, gone, strict=True))):
                break
            time.sleep(0.05)
        return True

    def _write(self) -> None:
        self._own["beat"] += 1
        self.store.set(f"beat/{self.rank}", json.dumps(self._own))

    def _read(self) -> None:
        values = self.store.multi_get([f"beat/{rank}" for rank in range(self.size)])
        for rank, value in enumerate(values):
            seen = json.loads(value)
            if seen != self.seen[rank]:
                self.seen[rank], self._changed[rank] = seen, time.monotonic()

    def _beat(self) -> bool:
        """Write and read once; return whether the store answered."""
        try:
            self._write()
            self._read()
        except (RuntimeError, ValueError):  # torch's network errors are RuntimeErrors
            self._broken += 1
            return False
        self._broken = 0
        return True

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._beat()
            # the main thread may be about to end for the same reason with its own exit code
            if self.lost() is None or self._stop.wait(GRACE):
                continue
            self._beat()
            if (lost := self.lost()) is not None:
                alive = [r for r, changed in enumerate(self._changed) if time.monotonic() - changed < SILENCE or r == self.rank]
                if self.rank == min(alive):
                    print(f"failed: {lost}; every process of the run ends", file=sys.stderr, flush=True)
                os._exit(1)  # the main thread may be inside a collective that never returns
