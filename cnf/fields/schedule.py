"""The straight path from data to noise, x = a(t) x₀ + b(t) z, and the noise that the data have from the start."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cnf.errors import ConfigError

__all__ = ["Coefficients", "Schedule"]


class Coefficients(NamedTuple):
    """a, b and their derivatives in t, of t's shape."""

    a: Tensor
    b: Tensor
    da: Tensor
    db: Tensor


@dataclass(frozen=True)
class Schedule:
    r"""The points :math:`x_t = a(t)\, x_0 + b(t)\, z` between data (t = 0) and noise z ~ N(0, I) (t = 1), on straight lines.

    Without noise of its own a = 1 - t and b = t, flow matching's optimal-transport path (2210.02747). With noise
    :math:`\sigma` the data enter as :math:`x_0 + \sigma z`, as truncated-normal dequantisation makes them (2305.03935): the line
    is the same, from there to z, and is run through in equal steps of ln b, since what decides the bits happens on scales
    from :math:`\sigma` to one, each of which then gets as much time as any other: :math:`b = \sigma^{1-t}`,
    :math:`a = (1 - b)/(1 - \sigma)`.

    Args:
        noise: sigma in [0, 1), in units of z.

    Raises:
        ConfigError: for a sigma outside [0, 1).

    Example:
        >>> a, b, da, db = Schedule(0.01)(torch.tensor(0.5))
        >>> round(float(b), 6), round(float(a), 6)
        (0.1, 0.909091)
    """

    noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.noise < 1:
            raise ConfigError(f"noise={self.noise}; expected 0 <= noise < 1, in units of the base's standard deviation")

    @property
    def length(self) -> float:
        """ln 1/sigma, the scales that the path runs through; 1 without noise."""
        return -math.log(self.noise) if self.noise else 1.0

    def __call__(self, t: Tensor) -> Coefficients:
        """The coefficients at times t in [0, 1]."""
        if not self.noise:
            one = torch.ones_like(t)
            return Coefficients(1 - t, t, -one, one)
        b = torch.exp(self.length * (t - 1))
        db = self.length * b
        left = 1 - self.noise
        return Coefficients(-torch.expm1(self.length * (t - 1)) / left, b, -db / left, db)

    def likelihood_weight(self, t: Tensor) -> Tensor:
        r"""The weight of :math:`\|f - \dot x_t\|^2` with which the loss is, but for constants, the diffusion's bound on
        :math:`-\ln p` in nats (2107.00630, eq. 17): :math:`a / (b\,(a \dot b - b \dot a))`. Without noise it is infinite at t = 0.
        """
        a, b, da, db = self(t)
        return a / (b * (a * db - b * da))
