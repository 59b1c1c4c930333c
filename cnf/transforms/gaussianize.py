"""Marginal Gaussianization of images by per-pixel cumulative distribution functions."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from cnf._utils.errors import DataError, require_at_least, require_inside
from cnf.transforms.base import DeterministicTransform, Shape, require_floats, require_unit

__all__ = ["Gaussianize"]


class Gaussianize(DeterministicTransform):
    r"""Per-pixel marginal Gaussianization z = Φ⁻¹(alpha + (1 − 2 alpha) F(x)) (Gaussianization flows, 2003.01941).

    F is the pixel's cumulative distribution function on [0, 1]. Dequantised grey levels are uniform within their bin,
    so F is piecewise linear, with a slope proportional to the bin's probability: images of independent pixels are
    represented exactly, up to alpha and prior. Pixels that nearly always have one level, a narrow spike after a logit,
    need no work from the ODE. F is extended linearly beyond [0, 1].

    Args:
        event_shape: shape of an image.
        levels: number of grey levels, the bins of F.
        alpha: margin in (0, 0.5) that keeps z finite at 0 and 1.
        prior: pseudo-observations added to each pixel's counts, half distributed as the pooled pixels and half
            uniformly, so that no level has probability zero.

    Raises:
        ConfigError: for alpha outside (0, 0.5), a prior that is not positive, or fewer than two levels.
        DataError: for integers, another shape, or x outside :attr:`bounds`.

    Example:
        >>> transform = Gaussianize((1,), 2)
        >>> transform.fit(torch.tensor([[0.2], [0.6], [0.7], [0.9]]))
        >>> [round(float(m), 3) for m in transform.mass[0]]  # counts 1 and 3, and one pseudo-observation
        [0.275, 0.725]
    """

    mass: Tensor

    def __init__(self, event_shape: Shape, levels: int, alpha: float = 1e-4, prior: float = 1.0):
        super().__init__()
        require_at_least(2, levels=levels)
        require_inside(0, 0.5, alpha=alpha)
        require_inside(0, math.inf, prior=prior)
        self.event_shape, self.levels, self.alpha, self.prior = tuple(event_shape), levels, alpha, prior
        self.register_buffer("mass", torch.full((*event_shape, levels), 1 / levels))

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Domain bounds of each pixel, slightly beyond [0, 1], (*event_shape) each."""
        margin = self.alpha / (1 - 2 * self.alpha) / self.levels
        return -margin / self.mass[..., 0], 1 + margin / self.mass[..., -1]

    def fit(self, x: Tensor) -> None:
        """Estimate the marginals of dequantised data (N, \\*event) in [0, 1]; see :meth:`fit_batches`."""
        self.fit_batches([x])

    @torch.no_grad()
    def fit_batches(self, batches: Iterable[Tensor]) -> None:
        """Estimate the marginals of dequantised data in [0, 1] from batches (n, \\*event)."""
        counts = torch.zeros(self.mass.shape, dtype=torch.float64, device=self.mass.device)
        for batch in batches:
            self._check(batch)
            bins = self._bins(batch.to(self.mass.device)).flatten(1)
            cells = bins + self.levels * torch.arange(bins.shape[1], device=bins.device)
            counts += torch.bincount(cells.flatten(), minlength=counts.numel()).reshape(counts.shape)
        if not counts.any():
            raise DataError("x has no rows, expected at least one to estimate the marginals")
        pooled = counts.reshape(-1, self.levels).sum(0)
        counts += self.prior * (0.5 * pooled / pooled.sum() + 0.5 / self.levels)
        self.mass.copy_(counts / counts.sum(-1, keepdim=True))

    def _check(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != self.event_shape:
            raise DataError(f"x has shape {tuple(x.shape)}, expected (N, {', '.join(map(str, self.event_shape))})")
        require_floats("Gaussianize", x)

    def _bins(self, x: Tensor) -> Tensor:
        return (x.detach() * self.levels).floor().clamp(0, self.levels - 1).long()

    def _pieces(self) -> tuple[Tensor, Tensor]:
        """Return F at the right edge of every bin and the bin probabilities, in float64 for the precision of 1 − F."""
        mass = self.mass.double()
        mass = mass / mass.sum(-1, keepdim=True)
        return mass.cumsum(-1), mass

    @staticmethod
    def _piece(bins: Tensor, ends: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        """Return F at the left edge of each value's bin, and the bin's probability."""
        index = bins[..., None]
        return torch.take_along_dim((ends - mass)[None], index, -1)[..., 0], torch.take_along_dim(mass[None], index, -1)[..., 0]

    def _log_slope(self, z: Tensor, mass: Tensor) -> Tensor:
        """Return ln dz/dx summed over the event, (N,)."""
        # dz/ds = 1 / φ(z), ds/dx = (1 − 2 alpha) mass levels
        slope = (mass * (self.levels * (1 - 2 * self.alpha))).log()
        return (slope + 0.5 * z.square() + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check(x)
        bins = self._bins(x)
        left, mass = self._piece(bins, *self._pieces())
        s = self.alpha + (1 - 2 * self.alpha) * (left + mass * (x.double() * self.levels - bins))
        require_unit("Gaussianize", x, s)
        z = torch.special.ndtri(s)
        return z.to(x), self._log_slope(z, mass).to(x)

    def _inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        deep = z.double()
        u = (torch.special.ndtr(deep) - self.alpha) / (1 - 2 * self.alpha)
        ends, mass = self._pieces()
        every = ends.expand(*z.shape, self.levels).contiguous()
        bins = torch.searchsorted(every, u[..., None].detach().contiguous(), right=True)[..., 0]
        bins = bins.clamp(max=self.levels - 1)
        left, width = self._piece(bins, ends, mass)
        x = (bins + (u - left) / width) / self.levels
        return x.to(z), -self._log_slope(deep, width).to(z)
