"""Right-hand sides in torchdiffeq's calling convention, which count evaluations and steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cnf.solvers.base import RHS, Counter, State

__all__ = ["Function", "GridFunction", "StepCallback", "StepFunction", "UnsteppedFunction"]

PER_STEP = 20  # evaluations that scipy's implicit methods may take for one of max_steps
StepCallback = Callable[[Tensor, State, Tensor], Any]


class Function:
    """Right-hand side in torchdiffeq's calling convention, counting evaluations and steps."""

    def __init__(self, rhs: RHS, dtype: torch.dtype, max_steps: int, callbacks: Mapping[str, StepCallback]):
        self.rhs, self.dtype, self.max_steps, self.counter = rhs, dtype, max_steps, Counter()
        self.attempt: tuple[Tensor, State, Tensor] | None = None
        self.callbacks = callbacks

    def __call__(self, s: Tensor, y: State) -> State:
        self.counter.count()
        return self.rhs(s.to(self.dtype), y)

    def _step(self, s: Tensor, y: State, h: Tensor) -> None:
        taken = self.counter.accepted + self.counter.rejected
        # torchdiffeq restarts its own count at every output time
        assert taken < self.max_steps, f"max_num_steps exceeded ({taken}>={self.max_steps})"
        self.attempt = s, y, h
        self._call("callback_step", s, y, h)

    def _call(self, name: str, s: Tensor, y: State, h: Tensor) -> None:
        if name in self.callbacks:
            self.callbacks[name](s, y, h)


class GridFunction(Function):
    """The same for methods on a grid, which accept every step."""

    def callback_step(self, s: Tensor, y: State, h: Tensor) -> None:
        """Count a step."""
        self._step(s, y, h)
        self.counter.accepted += 1


class StepFunction(Function):
    """The same for methods with step control."""

    def callback_step(self, s: Tensor, y: State, h: Tensor) -> None:
        """Note a step that is tried."""
        self._step(s, y, h)

    def callback_step_adjoint(self, s: Tensor, y: State, h: Tensor) -> None:
        """Note a step of the backward solve."""
        self.counter.attempt = s, h

    def callback_accept_step(self, s: Tensor, y: State, h: Tensor) -> None:
        """Count an accepted step."""
        self.counter.accepted += 1
        self._call("callback_accept_step", s, y, h)

    def callback_reject_step(self, s: Tensor, y: State, h: Tensor) -> None:
        """Count a rejected step."""
        self.counter.rejected += 1
        self._call("callback_reject_step", s, y, h)


class UnsteppedFunction(Function):
    """The same for scipy's methods, which tell no steps: evaluations are limited in their place."""

    def __call__(self, s: Tensor, y: State) -> State:
        most = PER_STEP * self.max_steps
        assert self.counter.nfe < most, f"{most} evaluations exceeded"
        return super().__call__(s, y)
