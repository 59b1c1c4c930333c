"""Time of a search: CPU seconds, of which its parts take shares."""

from __future__ import annotations

import math
import time

__all__ = ["Budget"]


class Budget:
    """Clock of a search.

    Counts CPU seconds, or wall-clock seconds where they are fewer (several threads), so that a busy machine does not
    shorten the search.

    Args:
        seconds: available; None for no limit, with which nothing depends on time.
        wall: count wall-clock seconds only, for a GPU.
    """

    def __init__(self, seconds: float | None, wall: bool = False):
        self.limited, self.total, self.wall = seconds is not None, math.inf if seconds is None else seconds, wall
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        wall = time.perf_counter() - self._wall
        return wall if self.wall else min(wall, time.process_time() - self._cpu)

    @property
    def left(self) -> float:
        """Seconds that remain, at least 0; infinite without a limit."""
        return max(0.0, self.total - self.spent)
