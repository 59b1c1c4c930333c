"""Straight path from data to noise, x = a(t) x₀ + b(t) z."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cnf._utils.errors import ConfigError

__all__ = ["Coefficients", "Interpolant"]


class Coefficients(NamedTuple):
    """a, b and their derivatives in t, each of t's shape."""

    a: Tensor
    b: Tensor
    da: Tensor
    db: Tensor


@dataclass(frozen=True)
class Interpolant:
    r"""Interpolant :math:`x_t = a(t)\, x_0 + b(t)\, z` between data (t = 0) and noise z ~ N(0, I) (t = 1).

    It is a straight line. Without data noise a = 1 - t and b = t, the optimal-transport path of flow matching
    (2210.02747). With data noise :math:`\sigma` the path starts at :math:`x_0 + \sigma z`, as truncated-normal
    dequantisation gives it (2305.03935), and follows the same line to z, uniformly in ln b: :math:`b = \sigma^{1-t}`,
    :math:`a = (1 - b)/(1 - \sigma)`. Scales from :math:`\sigma` to 1 determine the likelihood, and each gets the same
    share of time.

    Args:
        sigma: σ in [0, 1), in units of z.

    Raises:
        ConfigError: for σ outside [0, 1).

    Example:
        >>> a, b, da, db = Interpolant(0.01)(torch.tensor(0.5))
        >>> round(float(b), 6), round(float(a), 6)
        (0.1, 0.909091)
    """

    sigma: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < 1:
            raise ConfigError(f"sigma must be at least 0 and less than 1 (standard deviations of the base), got {self.sigma}")

    @property
    def length(self) -> float:
        """ln 1/σ, the number of e-folds of b along the path; 1 without noise."""
        return -math.log(self.sigma) if self.sigma else 1.0

    def __call__(self, t: Tensor) -> Coefficients:
        """Return the coefficients at times t in [0, 1]."""
        if not self.sigma:
            one = torch.ones_like(t)
            return Coefficients(1 - t, t, -one, one)
        b = torch.exp(self.length * (t - 1))
        db = self.length * b
        left = 1 - self.sigma
        return Coefficients(-torch.expm1(self.length * (t - 1)) / left, b, -db / left, db)

    def time(self, b: Tensor) -> Tensor:
        """Return the times at which the noise level is b > 0, of b's shape; b = 0 has one without data noise, t = 0."""
        return b.log() / self.length + 1 if self.sigma else b

    def likelihood_weight(self, t: Tensor) -> Tensor:
        r"""Return the loss weight :math:`a / (b\,(a \dot b - b \dot a))`; without noise it is infinite at t = 0.

        With it the loss :math:`\|f - \dot x_t\|^2` is, up to constants, the diffusion bound on :math:`-\ln p` in nats
        (2107.00630, eq. 17).
        """
        a, b, da, db = self(t)
        return a / (b * (a * db - b * da))
