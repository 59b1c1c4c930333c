"""Importance sampling of the times of flow matching, for a gradient of low variance."""

from __future__ import annotations

import torch
from torch import Tensor

from cnf._utils.errors import require_at_least
from cnf.random import Noise, draw, number

__all__ = ["TimeDistribution", "stratified"]

BINS = 32
EVEN = 0.1  # fraction of the times sampled uniformly, whatever the loss
MEMORY = 0.8  # weight of the running mean at each measurement


def stratified(noise: Noise | None, rows: int, groups: int | None = None) -> Tensor:
    """Return stratified numbers in [0, 1), (rows,) float64 on the CPU (2107.00630).

    Each row of the joint batch of n gets its own (i + u)/n, with i = 0 ... n - 1 in random order and one u for all.
    ``groups`` limits the distinct numbers.

    Example:
        >>> u = stratified(Noise(0), 4).sort().values
        >>> bool(torch.allclose(u.diff(), torch.full((3,), 0.25, dtype=torch.float64)))
        True
    """
    start, total = (0, None) if noise is None else (noise.start, noise.total)
    count = total or rows
    # a random order: no row's time depends on its position, as in data sorted by class
    order = draw(noise, "order", "uniform", (count,), dtype=torch.float64, batch_dim=None).argsort()[start : start + rows].double()
    if groups is not None and groups < count:
        order, count = (order * groups / count).floor(), groups
    return (order + number(noise, "time")) / count


class TimeDistribution:
    """Piecewise constant density of times on [0, 1], uniform at first, then learned from losses.

    The gradient of a mean over times has the least variance if they are sampled in proportion to the root mean square
    of the loss, which is a running mean over the measurements. All tensors are float64 on the CPU, without
    synchronisation.

    Example:
        >>> times = TimeDistribution(2)
        >>> times.learn(torch.tensor([0.2, 0.8]), torch.tensor([3.0, 1.0]))
        >>> t, density = times.quantile(torch.tensor([0.0, 0.5, 0.99]).double())
        >>> [round(float(p), 3) for p in density]
        [1.45, 1.45, 0.55]
    """

    def __init__(self, bins: int = BINS):
        require_at_least(1, bins=bins)
        self.square = torch.full((bins,), torch.nan, dtype=torch.float64)
        """Running mean of the squared loss in each bin; NaN before its first measurement."""

    @property
    def shares(self) -> Tensor:
        """The probability of each bin (bins,)."""
        known = self.square.nan_to_num(float(self.square.nanmean().nan_to_num(1.0)))
        size = known.sqrt()
        even = torch.full_like(size, 1 / len(size))
        if not float(size.sum()) > 0:
            return even
        return EVEN * even + (1 - EVEN) * size / size.sum()

    def quantile(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the times (N,) of quantiles u in [0, 1), increasing in u, and the density there."""
        shares = self.shares
        ends = torch.cat([shares.new_zeros(1), shares.cumsum(0)])
        bins = torch.searchsorted(ends, u, right=True).sub(1).clamp(0, len(shares) - 1)
        within = ((u - ends[bins]) / shares[bins]).clamp(0, 1)
        return (bins + within) / len(shares), shares[bins] * len(shares)

    def learn(self, t: Tensor, loss: Tensor) -> None:
        """Update the running means from losses (N,) at times t (N,), see :meth:`sums`."""
        self.take(*self.sums(t, loss))

    def sums(self, t: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of squared losses and their count in each bin, for :meth:`take`.

        Both add up over processes.
        """
        bins = (t.double().cpu() * len(self.square)).long().clamp(0, len(self.square) - 1)
        loss = loss.double().cpu()
        good = loss.isfinite()
        total = torch.zeros_like(self.square).index_add_(0, bins[good], loss[good].square())
        return total, torch.zeros_like(self.square).index_add_(0, bins[good], torch.ones_like(loss[good]))

    def take(self, total: Tensor, count: Tensor) -> None:
        """Update the running means from the totals of :meth:`sums`."""
        mean = torch.where(count > 0, total / count.clamp(min=1), self.square)
        self.square = torch.where(self.square.isnan(), mean, MEMORY * self.square + (1 - MEMORY) * mean)
