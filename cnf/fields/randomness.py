"""Random layers inside a solve: one draw per solve, replayed wherever an evaluation is repeated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cnf.noise import Noise

__all__ = ["SolveRandomness", "draws_random_numbers"]


def _get(device: torch.device) -> list[Tensor]:
    """States of the generators that an evaluation on this device may draw from."""
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _set(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1], device)


class SolveRandomness:
    """Random state in which every evaluation of one solve starts.

    Without ``noise`` it is that of torch's generators at the first evaluation, which leaves them as it moved them: a solve draws
    once. With one it is a function of the noise, and torch's generators are left as they are. Without, the blocks of a chain draw
    in the order in which they are solved, which ``decode`` reverses: give ``encode`` and ``decode`` the same ``Noise`` to invert a chain.

    Args:
        noise: as handed to the block.
    """

    def __init__(self, noise: Noise | None = None):
        self.noise = noise
        self.start: list[Tensor] | None = None

    @contextmanager
    def at(self, device: torch.device) -> Iterator[None]:
        """Run one evaluation."""
        if torch.compiler.is_compiling():  # a field that draws is not compiled
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
    """Run something and leave the generators as they were; the yielded list then holds whether they were moved."""
    before, moved = _get(device), [False]
    try:
        yield moved
    finally:
        moved[0] = any(not torch.equal(a, b) for a, b in zip(before, _get(device), strict=True))
        _set(before, device)
