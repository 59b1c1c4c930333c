"""Search for jumps of a function along segments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["HALVINGS", "jumps"]

HALVINGS, ALIKE = 16, 6  # halvings of a segment, and the last ones, in each of which one half holds the whole change
REST = 0.05  # share of the change in the other half: nearly all of a jump, half of it where the function has a slope


def jumps(function: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Return for each segment from a to b (N, \\*event) the height of a jump of the function on it, 0 for none.

    The half of a segment with the larger change is halved again: the change tends to zero with the length where the
    function is continuous, also at kinks, and stays at a jump.

    Returns:
        Heights (N,), relative to the largest value at the ends of the segments.

    Example:
        >>> a, b = -torch.ones(1, 1), torch.full((1, 1), 2.0)
        >>> jumps(torch.sign, a, b), jumps(torch.relu, a, b), jumps(lambda x: torch.sin(1e4 * x), a, b)
        (tensor([2.]), tensor([0.]), tensor([0.]))
    """
    at_a, at_b = function(a), function(b)
    size = torch.maximum(at_a.abs().max(), at_b.abs().max()).clamp(min=torch.finfo(at_a.dtype).tiny)
    found = torch.ones(len(a), dtype=torch.bool, device=a.device)
    change = torch.zeros_like(at_a.flatten(1)[:, 0])
    for step in range(HALVINGS):
        middle = a + (b - a) / 2
        at_middle = function(middle)
        left, right = ((at_middle - end).abs().flatten(1).amax(1) for end in (at_a, at_b))
        change, rest = torch.maximum(left, right), torch.minimum(left, right)
        if step >= HALVINGS - ALIKE:
            found &= rest <= REST * change
        first = (left >= right).reshape(-1, *(1,) * (a.ndim - 1))
        a, at_a = torch.where(first, a, middle), torch.where(first, at_a, at_middle)
        b, at_b = torch.where(first, middle, b), torch.where(first, at_middle, at_b)
    return torch.where(found & change.isfinite(), change / size, 0)
