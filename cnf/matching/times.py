"""At which times a field is matched: often where the loss is large, so that its gradient is steady."""

from __future__ import annotations

import torch
from torch import Tensor

from cnf.errors import ConfigError
from cnf.noise import Noise, draw, number

__all__ = ["TimeDistribution", "stratified"]

BINS = 32
EVEN = 0.1  # share of the times that are drawn evenly, whatever the loss
MEMORY = 0.8  # of the running mean, from one measurement to the next


def stratified(noise: Noise | None, rows: int, groups: int | None = None) -> Tensor:
    """Evenly spread numbers in [0, 1), (rows,) float64 on the CPU: of the joint batch of n one row each gets (i + u)/n, i = 0 ... n - 1 in
    random order, u one for all (2107.00630). With ``groups`` only so many numbers differ.

    Example:
        >>> u = stratified(Noise(0), 4).sort().values
        >>> bool(torch.allclose(u.diff(), torch.full((3,), 0.25, dtype=torch.float64)))
        True
    """
    start, total = (0, None) if noise is None else (noise.start, noise.total)
    count = total or rows
    # in whatever order the data come, sorted by class, say, no row's time depends on what it is
    place = draw(noise, "order", "uniform", (count,), dtype=torch.float64, batch_dim=None).argsort()[start : start + rows].double()
    if groups is not None and groups < count:
        place, count = (place * groups / count).floor(), groups
    return (place + number(noise, "time")) / count


class TimeDistribution:
    """A density of times on [0, 1], constant on each of some bins: even at first, then learned from losses.

    The gradient of a mean over times varies least where they are drawn in proportion to the root mean square of what they
    give; what is measured now and then is averaged over time. Everything is on the CPU, in float64, and is known without
    waiting for a device.

    Example:
        >>> times = TimeDistribution(2)
        >>> times.learn(torch.tensor([0.2, 0.8]), torch.tensor([3.0, 1.0]))
        >>> t, density = times.quantile(torch.tensor([0.0, 0.5, 0.99]).double())
        >>> [round(float(p), 3) for p in density]
        [1.45, 1.45, 0.55]
    """

    def __init__(self, bins: int = BINS):
        if bins < 1:
            raise ConfigError(f"bins={bins}; expected at least 1")
        self.square = torch.full((bins,), torch.nan, dtype=torch.float64)
        """The running mean of the squared loss in each bin; NaN where nothing is known."""

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
        """Times (N,) of numbers u in [0, 1), rising with them, and the density there."""
        shares = self.shares
        ends = torch.cat([shares.new_zeros(1), shares.cumsum(0)])
        place = torch.searchsorted(ends, u, right=True).sub(1).clamp(0, len(shares) - 1)
        within = ((u - ends[place]) / shares[place]).clamp(0, 1)
        return (place + within) / len(shares), shares[place] * len(shares)

    def learn(self, t: Tensor, loss: Tensor) -> None:
        """Take up losses (N,) measured at times t (N,): see :meth:`sums`."""
        self.take(*self.sums(t, loss))

    def sums(self, t: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of squared losses and their number in each bin, for :meth:`take`; those of several processes add up."""
        place = (t.double().cpu() * len(self.square)).long().clamp(0, len(self.square) - 1)
        loss = loss.double().cpu()
        good = loss.isfinite()
        total = torch.zeros_like(self.square).index_add_(0, place[good], loss[good].square())
        return total, torch.zeros_like(self.square).index_add_(0, place[good], torch.ones_like(loss[good]))

    def take(self, total: Tensor, count: Tensor) -> None:
        """Move the running means by what :meth:`sums` gave."""
        found = torch.where(count > 0, total / count.clamp(min=1), self.square)
        self.square = torch.where(self.square.isnan(), found, MEMORY * self.square + (1 - MEMORY) * found)
