"""Vector field of a denoiser on the path between data and noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cnf._utils.errors import ConfigError, DataError
from cnf.fields.base import SolveField
from cnf.fields.unet import UNet
from cnf.solvers.adams import Semilinear
from cnf.solvers.interpolant import Interpolant

__all__ = ["PERIODS", "Denoiser"]

PERIODS = (1.0, 4.0, 16.0, 64.0)  # periods of the waves in grey levels; period 1 gives the position between two levels


class Denoiser(UNet):
    r"""Vector field of a denoiser D = E[x₀ | x] on the path x = a x₀ + b z of :class:`~cnf.fields.Interpolant`.

    The field is :math:`f = \dot a D + \dot b (x - a D)/b`. The network F predicts a target of unit size at every scale
    (2206.00364). With s the root mean square of the data, a buffer set by :meth:`fit_batches`, and r² = a²s² + b²:
    :math:`D = (a s^2/r^2)\, x + (b s/r)\, F(x/r)`, so that

    .. math:: f = \frac{L b}{r} \left( \Big(b - \frac{a s^2}{1 - \sigma}\Big) \frac{x}{r} - \frac{s}{1 - \sigma} F \right),
              \quad L = \ln 1/\sigma,

    which has no cancellation of large terms; at the data end it is as small as the noise there. F = 0 gives the flow of
    N(0, s²). In addition to x/r the network takes sines and cosines of the grey level at several periods, which encode
    the position of a pixel between two levels (2107.00630), each damped by the path's noise.

    Args:
        channels: channels of the image.
        interpolant: the path; its noise is that of the data and must be positive.
        level: distance between two grey levels in x.
        periods: periods of the waves in grey levels; empty for none.
        hidden, depth, attention, context_dim, zero_init: see :class:`~cnf.fields.UNet`.

    Raises:
        ConfigError: for an interpolant without noise, or sizes out of range.

    Example:
        >>> field = Denoiser(1, Interpolant(0.01), level=4 / 256, hidden=(8,), depth=1)
        >>> field(torch.tensor(0.3), torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """

    data_std: Tensor

    def __init__(
        self,
        channels: int,
        interpolant: Interpolant,
        level: float,
        periods: Sequence[float] = PERIODS,
        hidden: Sequence[int] = (64, 96),
        depth: int = 2,
        attention: bool = False,
        context_dim: int = 0,
        zero_init: bool = True,
    ):
        if not interpolant.sigma:
            raise ConfigError("interpolant.sigma must be positive for a denoiser, got 0: use truncated-normal dequantisation, whose data have noise")
        if not level > 0:
            raise ConfigError(f"level (the distance between two grey levels) must be positive, got {level}")
        super().__init__(
            channels, hidden, depth, attention, context_dim, zero_init, inputs=channels * (1 + 2 * len(periods))
        )
        self.interpolant, self.level, self.periods = interpolant, level, tuple(periods)
        self.register_buffer("data_std", torch.ones(()))

    @torch.no_grad()
    def fit_batches(self, batches: Iterable[Tensor]) -> None:
        """Set s to the root mean square of the training data, given in batches as they enter the path.

        Raises:
            DataError: for empty, non-finite or all-zero data.
        """
        total, count = torch.zeros((), dtype=torch.float64, device=self.data_std.device), 0
        for part in batches:
            total, count = total + part.double().square().sum(), count + part.numel()
        mean = float(total) / max(1, count)
        if not 0 < mean < math.inf:
            raise DataError(f"the data's mean square is {mean:g}; expected finite numbers that are not all zero")
        self.data_std.fill_(math.sqrt(mean))

    def precompute(self, x: Tensor, context: Tensor | None = None) -> SolveField:
        """Return the field for one solve, with its linear part."""
        field = super().precompute(x, context)
        field.semilinear = self.semilinear
        return field

    def semilinear(self, t: Tensor) -> Semilinear:
        r"""Return the linear part at times t (T,): with :math:`\theta = \arctan b/(a s)`, f is :math:`(\dot r/r) x - r \dot\theta F`.

        Example:
            >>> field = Denoiser(1, Interpolant(0.01), level=4 / 256, hidden=(8,), depth=1)
            >>> field.semilinear(torch.tensor([0.0, 1.0])).angle.mul(2 / torch.pi).round(decimals=3).tolist()
            [0.006, 1.0]
        """
        a, b, da, db = self.interpolant(t.double())
        s = self.data_std.to(a)
        square = (a * s).square() + b.square()
        rate = (a * da * s.square() + b * db) / square
        return Semilinear(square.sqrt(), rate, torch.atan2(b, a * s), s * (a * db - b * da) / square)

    def value(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (N, C, H, W) at x and t (), or t (N,) with one time per row."""
        a, b, r = self._scales(t)
        return self._field(x, super().value(t, self._seen(x, a, b, r), context), a, b, r)

    def tangents(
        self, t: Tensor, x: Tensor, v: Tensor, context: Tensor | None, *, t_dot: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return f (N, C, H, W) and J v + t_dot ∂f/∂t (K, N, C, H, W); see :meth:`cnf.fields.UNet.jvp`."""
        a, b, r = self._scales(t)
        inner, product = super().tangents(t, self._seen(x, a, b, r), self._seen_tangent(x, v, a, b, r), context)
        product = self._field(v, product, a, b, r)
        if t_dot is not None:
            product = product + self._drift(t, x, context, t_dot)
        return self._field(x, inner, a, b, r), product

    def _scales(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a, b and r, () or (N, 1, 1, 1)."""
        a, b, _, _ = self.interpolant(t if t.ndim == 0 else t[:, None, None, None])
        return a, b, (a.square() * self.data_std.to(a).square() + b.square()).sqrt()

    def _field(self, x: Tensor, inner: Tensor, a: Tensor, b: Tensor, r: Tensor) -> Tensor:
        """Return f from x and F; jointly linear in both."""
        left, s = 1 - self.interpolant.sigma, self.data_std.to(x)
        ahead = self.interpolant.length * b / r
        return (ahead * (b - a * (s * s / left)) / r) * x - (ahead * (s / left)) * inner.to(x.dtype)

    def _waves(self, x: Tensor, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return for each period the phase of x, its derivative with respect to x, and the damping by the noise."""
        waves = []
        a = a.clamp(min=0.5)  # for a < 0.5 the noise damps the waves to nearly zero
        for period in self.periods:
            turn = 2 * math.pi / (period * self.level * a)
            waves.append((x * turn, turn, torch.exp(-0.5 * (turn * b).square())))
        return waves

    def _seen(self, x: Tensor, a: Tensor, b: Tensor, r: Tensor) -> Tensor:
        """Return the network's input: x/r and the waves, for x (N, C, H, W)."""
        parts = [x / r]
        for phase, _, left in self._waves(x, a, b):
            parts += [left * phase.cos(), left * phase.sin()]
        return torch.cat(parts, 1)

    def _seen_tangent(self, x: Tensor, v: Tensor, a: Tensor, b: Tensor, r: Tensor) -> Tensor:
        """Return the tangents of :meth:`_seen` along v (K, N, C, H, W)."""
        parts = [v / r]
        for phase, turn, left in self._waves(x, a, b):
            speed = left * turn
            parts += [-speed * phase.sin() * v, speed * phase.cos() * v]
        return torch.cat(parts, 2)
