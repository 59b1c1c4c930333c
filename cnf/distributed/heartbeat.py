"""Who is still there: every process of a run tells the others that it lives, and notices which one does not."""

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
SILENCE = 40.0  # seconds without a beat after which a rank counts as gone, though no collective has failed
BEATS = 3.5  # beats missed, once one has
GRACE = 5.0  # what a rank that failed gives the others to fail for the same reason, or to hear of it


class Heartbeat:
    """A thread that writes this rank's sign of life into the store of the run and reads those of the others.

    A collective that waits for a dead process may wait for ever (NCCL), or fail without saying whose connection broke
    (gloo), and a time limit on collectives cannot be short: the others wait in one while rank 0 writes and draws. So death
    is told from silence. A rank that is gone ends this process, with a message that names it; so does one that failed, in
    its own words.

    Args:
        rank: of this process.
        size: number of processes.
        store: shared by all, used by nobody else in this process (a call that waits would hold it).
    """

    def __init__(self, rank: int, size: int, store: dist.Store):  # type: ignore[name-defined]
        self.rank, self.size, self.store = rank, size, store
        self._own: dict[str, Any] = {"beat": 0, "pid": os.getpid(), "host": socket.gethostname(), "state": "alive", "text": ""}
        self.seen: list[dict[str, Any]] = [{} for _ in range(size)]
        """What each rank last told."""
        self._changed = [time.monotonic()] * size
        self._broken = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin; returns once every rank has."""
        self._tell()
        self._read()  # waits for every rank's first beat
        self._thread.start()

    def stop(self) -> None:
        """End the thread: from here on nobody is missed."""
        self._stop.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=2 * INTERVAL)

    def name(self, rank: int) -> str:
        """``rank 1 (pid 123 on host)``."""
        seen = self.seen[rank]
        return f"rank {rank} (pid {seen['pid']} on {seen['host']})" if seen else f"rank {rank}"

    def lost(self, silence: float | None = None) -> str | None:
        """The first rank that failed, or was silent for so many seconds (SILENCE if None), in words; None where all are well."""
        silence = SILENCE if silence is None else silence
        if self._broken >= 3:
            return f"{self.name(0)} has gone, or the launcher of its node: their store does not answer"
        others = [r for r in range(self.size) if r != self.rank and self.seen[r]]
        for rank in others:
            if self.seen[rank]["state"] == "failed":
                return f"{self.name(rank)} failed: {self.seen[rank]['text']}"
        for rank in others:
            if time.monotonic() - self._changed[rank] > silence:
                return f"{self.name(rank)} has gone: it gives no sign of life"
        return None

    def culprit(self) -> str | None:
        """Whose fault it is that a collective failed: waits until some rank has missed a few beats."""
        for _ in range(round((BEATS * INTERVAL + GRACE) / 0.1)):
            if (found := self.lost(BEATS * INTERVAL)) is not None:
                return found
            time.sleep(0.1)
        return None

    def fail(self, text: str) -> bool:
        """Tell the others why this process ends; whether it should tell the reader too, since no lower rank does."""
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

    def _tell(self) -> None:
        self._own["beat"] += 1
        self.store.set(f"beat/{self.rank}", json.dumps(self._own))

    def _read(self) -> None:
        values = self.store.multi_get([f"beat/{rank}" for rank in range(self.size)])
        for rank, value in enumerate(values):
            seen = json.loads(value)
            if seen != self.seen[rank]:
                self.seen[rank], self._changed[rank] = seen, time.monotonic()

    def _beat(self) -> bool:
        """One beat; whether the store could be reached."""
        try:
            self._tell()
            self._read()
        except (RuntimeError, ValueError):  # torch's network errors are RuntimeErrors
            self._broken += 1
            return False
        self._broken = 0
        return True

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._beat()
            # the main thread may be about to end for the same reason, with an exit code of its own
            if self.lost() is None or self._stop.wait(GRACE):
                continue
            self._beat()
            if (found := self.lost()) is not None:
                alive = [r for r, changed in enumerate(self._changed) if time.monotonic() - changed < SILENCE or r == self.rank]
                if self.rank == min(alive):
                    print(f"failed: {found}; every process of the run ends", file=sys.stderr, flush=True)
                os._exit(1)  # the main thread may be inside a collective that never returns
