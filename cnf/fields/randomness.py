"""Random layers inside a solve: one draw per solve, replayed at every evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cnf.random import Noise

__all__ = ["SolveRandomness", "draws_random_numbers"]


def _get(device: torch.device) -> list[Tensor]:
    """Return the states of the generators that an evaluation on this device may use."""
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _set(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1], device)


class SolveRandomness:
    """Random state from which every evaluation of one solve starts.

    Without ``noise`` it is the state of torch's global generators at the first evaluation, which advances them once.
    With ``noise`` it is a function of the noise, and torch's generators are restored. Without ``noise``, the blocks of
    a chain draw in the order of their solves, which ``decode`` reverses: pass the same ``Noise`` to ``encode`` and
    ``decode`` to invert a chain.
    """

    def __init__(self, noise: Noise | None = None):
        self.noise = noise
        self.start: list[Tensor] | None = None

    @contextmanager
    def at(self, device: torch.device) -> Iterator[None]:
        """Run one evaluation from the solve's random state."""
        if torch.compiler.is_compiling():  # fields that draw random numbers are not compiled
            yield
            return
        before = _get(device)
        if self.start is None:
            seed = None if self.noise is None else self.noise.seed_of("field")
            if seed is None:
                self.start = before
                yield
                return
            kinds = [torch.device("cpu"), device][: len(before)]
            self.start = [torch.Generator(kind).manual_seed(seed).get_state() for kind in kinds]
        _set(self.start, device)
        try:
            yield
        finally:
            _set(before, device)


@contextmanager
def draws_random_numbers(device: torch.device) -> Iterator[list[bool]]:
    """Restore the generators after the block; on exit the yielded list holds whether they were advanced."""
    before, moved = _get(device), [False]
    try:
        yield moved
    finally:
        moved[0] = any(not torch.equal(a, b) for a, b in zip(before, _get(device), strict=True))
        _set(before, device)
