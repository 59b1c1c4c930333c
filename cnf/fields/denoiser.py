"""A network that guesses the clean image from a noisy one, as the vector field of the path between data and noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cnf.errors import ConfigError, DataError
from cnf.fields.schedule import Schedule
from cnf.fields.unet import UNet

__all__ = ["PERIODS", "Denoiser"]

PERIODS = (1.0, 4.0, 16.0, 64.0)  # of the waves in grey levels; 1 tells where in its level a pixel lies


class Denoiser(UNet):
    r"""The vector field of a denoiser D: on the path x = a x₀ + b z of :class:`~cnf.fields.Schedule`, where x tends
    to :math:`\dot a D + \dot b (x - a D)/b`, D = E[x₀ | x].

    The network F is asked for what has unit size at every scale (2206.00364; s is the root mean square of the data, a buffer
    that :meth:`fit_batches` sets): with r² = a²s² + b², :math:`D = (a s^2/r^2)\, x + (b s/r)\, F(x/r)`, so that

    .. math:: f = \frac{L b}{r} \left( \Big(b - \frac{a s^2}{1 - \sigma}\Big) \frac{x}{r} - \frac{s}{1 - \sigma} F \right),
              \quad L = \ln 1/\sigma,

    which nowhere is a small difference of large numbers; at the data end it is as small as the noise there. F = 0 is the flow
    of N(0, s²). Beside x/r the network sees sines and cosines of the grey level at several periods, which tell it where
    between two levels a pixel lies (2107.00630), each damped as the path's noise blurs it.

    Args:
        channels: of the image.
        schedule: of the path; its noise is that of the data, positive.
        level: distance between two grey levels in x.
        periods: of the waves, in grey levels; none for no waves.
        hidden, depth, attention, context_dim, zero_init: see :class:`~cnf.fields.UNet`.

    Raises:
        ConfigError: for a schedule without noise, or a size that cannot be.

    Example:
        >>> field = Denoiser(1, Schedule(0.01), level=4 / 256, hidden=(8,), depth=1)
        >>> field(torch.tensor(0.3), torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """

    data_std: Tensor

    def __init__(
        self,
        channels: int,
        schedule: Schedule,
        level: float,
        periods: Sequence[float] = PERIODS,
        hidden: Sequence[int] = (64, 96),
        depth: int = 2,
        attention: bool = False,
        context_dim: int = 0,
        zero_init: bool = True,
    ):
        if not schedule.noise:
            raise ConfigError("schedule has no noise: a denoiser needs data that have some, as truncated-normal dequantisation gives them")
        if not level > 0:
            raise ConfigError(f"level={level}; expected the distance between two grey levels, positive")
        super().__init__(
            channels, hidden, depth, attention, context_dim, zero_init, inputs=channels * (1 + 2 * len(periods))
        )
        self.schedule, self.level, self.periods = schedule, level, tuple(periods)
        self.register_buffer("data_std", torch.ones(()))

    @torch.no_grad()
    def fit_batches(self, batches: Iterable[Tensor]) -> None:
        """Take s from the training data, as they enter the path, batch by batch.

        Raises:
            DataError: for no data, values that are not finite, or nothing but zeros.
        """
        total, count = torch.zeros((), dtype=torch.float64, device=self.data_std.device), 0
        for part in batches:
            total, count = total + part.double().square().sum(), count + part.numel()
        mean = float(total) / max(1, count)
        if not 0 < mean < math.inf:
            raise DataError(f"the data's mean square is {mean:g}; expected finite numbers that are not all zero")
        self.data_std.fill_(math.sqrt(mean))

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """dx/dt (N, C, H, W) at x and t () (or (N,), one time a row)."""
        a, b, r = self._scales(t)
        inner = super().forward(t, self._seen(x, a, b, r), context)
        return self._field(x, inner, a, b, r)

    def jvp(
        self, t: Tensor, x: Tensor, v: Tensor, context: Tensor | None = None, *, t_dot: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """f (N, C, H, W) and J v + t_dot ∂f/∂t (K, N, C, H, W); see :meth:`cnf.fields.UNet.jvp`."""
        a, b, r = self._scales(t)
        inner, product = super().jvp(t, self._seen(x, a, b, r), self._seen_tangent(x, v, a, b, r), context)
        product = self._field(v, product, a, b, r)
        if t_dot is not None:
            product = product + self._drift(t, x, context, t_dot)
        return self._field(x, inner, a, b, r), product

    def _scales(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a, b and r, () or (N, 1, 1, 1)."""
        a, b, _, _ = self.schedule(t if t.ndim == 0 else t[:, None, None, None])
        return a, b, (a.square() * self.data_std.to(a).square() + b.square()).sqrt()

    def _field(self, x: Tensor, inner: Tensor, a: Tensor, b: Tensor, r: Tensor) -> Tensor:
        """f of x and F; linear in both together."""
        left, s = 1 - self.schedule.noise, self.data_std.to(x)
        ahead = self.schedule.length * b / r
        return (ahead * (b - a * (s * s / left)) / r) * x - (ahead * (s / left)) * inner.to(x.dtype)

    def _waves(self, x: Tensor, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each period: the phase of x, what it turns by with x, and how much is left of the wave under the noise."""
        found = []
        a = a.clamp(min=0.5)  # where it is smaller, so is the wave
        for period in self.periods:
            turn = 2 * math.pi / (period * self.level * a)
            found.append((x * turn, turn, torch.exp(-0.5 * (turn * b).square())))
        return found

    def _seen(self, x: Tensor, a: Tensor, b: Tensor, r: Tensor) -> Tensor:
        """What the network sees of x (N, C, H, W): x/r, and the waves."""
        parts = [x / r]
        for phase, _, left in self._waves(x, a, b):
            parts += [left * phase.cos(), left * phase.sin()]
        return torch.cat(parts, 1)

    def _seen_tangent(self, x: Tensor, v: Tensor, a: Tensor, b: Tensor, r: Tensor) -> Tensor:
        """The tangents of :meth:`_seen` along v (K, N, C, H, W)."""
        parts = [v / r]
        for phase, turn, left in self._waves(x, a, b):
            speed = left * turn
            parts += [-speed * phase.sin() * v, speed * phase.cos() * v]
        return torch.cat(parts, 2)
