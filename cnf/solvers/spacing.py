"""Time grids of solvers: nodes spaced by the noise of the path between data and noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cnf._utils.errors import ConfigError, require_inside
from cnf.solvers.interpolant import Interpolant

__all__ = ["PowerSpacing", "RatioSpacing", "Spacing", "require_spacing"]


class Spacing(Protocol):
    """Time grid: nodes between any two times of a block, in either direction."""

    def times(self, start: Tensor, stop: Tensor, steps: int) -> Tensor:
        """Return monotone times (steps + 1,) from ``start`` () to ``stop`` ()."""


def require_spacing(spacing: Spacing | None) -> Spacing | None:
    """Return a time grid, or None for equal steps.

    Raises:
        ConfigError: for anything else.
    """
    if spacing is not None and (isinstance(spacing, type) or not hasattr(spacing, "times")):
        raise ConfigError(f"spacing must be a time grid such as PowerSpacing(...), or None for equal steps, got {spacing!r}")
    return spacing


@dataclass(frozen=True)
class PowerSpacing:
    r"""Nodes at equal steps of :math:`b^{1/\rho}`, with b(t) the noise level of an interpolant.

    The nodes of an interval are those of the reverse direction in reverse order. Large :math:`\rho` approach equal steps
    of ln b (uniform in t if the data have noise); :math:`\rho = 1` gives equal steps of b (2206.00364 takes 7, of the
    noise-to-signal ratio).

    Args:
        interpolant: the path, such as ``field.interpolant`` of a :class:`~cnf.fields.Denoiser`; t = 0 is its data end.
        rho: ρ > 0.

    Raises:
        ConfigError: for an interpolant of another type, or ρ that is not positive.

    Example:
        >>> spacing = PowerSpacing(Interpolant(0.001), rho=3)
        >>> [round(t, 3) for t in spacing.times(torch.tensor(0.0), torch.tensor(1.0), 3).tolist()]
        [0.0, 0.602, 0.845, 1.0]
    """

    interpolant: Interpolant
    rho: float = 3.0

    def __post_init__(self) -> None:
        if not isinstance(self.interpolant, Interpolant):
            raise ConfigError(f"interpolant must be a cnf.fields.Interpolant, got {self.interpolant!r}")
        require_inside(0, math.inf, rho=self.rho)

    def times(self, start: Tensor, stop: Tensor, steps: int) -> Tensor:
        """Return monotone times (steps + 1,) from ``start`` () to ``stop`` ()."""
        share = torch.linspace(0, 1, steps + 1, dtype=start.dtype, device=start.device)
        low, high = (self.level(t).pow(1 / self.rho) for t in (start, stop))
        inner = self._time(torch.lerp(low, high, share).pow(self.rho))
        # equal levels have one time, which may lie outside the interval
        inner = torch.where(low == high, torch.lerp(start, stop, share), inner)
        return torch.cat([start[None], inner[1:-1], stop[None]])

    def level(self, t: Tensor) -> Tensor:
        """Return the positive quantity whose power has equal steps, of t's shape."""
        return self.interpolant(t).b

    def _time(self, level: Tensor) -> Tensor:
        """Return the time of a level."""
        return self.interpolant.time(level)


@dataclass(frozen=True)
class RatioSpacing(PowerSpacing):
    r"""Nodes at equal steps of :math:`r^{1/\rho}`, with r(t) = b/a the noise-to-signal ratio (2206.00364, eq. 5).

    The ratio is infinite at the noise end, where a = 0, and is bounded there: nodes are those from :math:`s_{max}`
    downwards, but the first one is moved to the end.

    Args:
        interpolant: the path; see :class:`PowerSpacing`.
        rho: ρ > 0.
        s_max: largest ratio, positive.

    Raises:
        ConfigError: for an interpolant of another type, or ρ or s_max that are not positive.

    Example:
        >>> spacing = RatioSpacing(Interpolant(0.001), rho=5, s_max=15)
        >>> [round(t, 3) for t in spacing.times(torch.tensor(1.0), torch.tensor(0.0), 3).tolist()]
        [1.0, 0.956, 0.753, 0.0]
    """

    rho: float = 5.0
    s_max: float = 15.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_inside(0, math.inf, s_max=self.s_max)

    def level(self, t: Tensor) -> Tensor:
        """Return the noise-to-signal ratio, at most s_max, of t's shape."""
        a, b, _, _ = self.interpolant(t)
        return 1 / (a / b).clamp(min=1 / self.s_max)

    def _time(self, level: Tensor) -> Tensor:
        # r = b/a and a = (1 - b)/(1 - σ)
        return self.interpolant.time(level / (1 - self.interpolant.sigma + level))
