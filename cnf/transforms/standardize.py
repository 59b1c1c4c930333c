"""Standardisation by the training data's mean and standard deviation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cnf._utils.errors import ConfigError, DataError, constant_column
from cnf.transforms.base import DeterministicTransform

__all__ = ["Standardize"]


class Standardize(DeterministicTransform):
    """Standardisation (x - mean) / std per dimension; the statistics are buffers, saved with the weights.

    Args:
        mean: of event_shape, or broadcastable to it, such as (C, 1, 1) for statistics per channel.
        std: of mean's shape, positive.

    Raises:
        ConfigError: for different shapes, a mean that is not finite, or a std that is not finite and positive.
        DataError: for integers.

    Example:
        >>> whiten = Standardize(torch.zeros(2), torch.ones(2))
        >>> whiten.fit(torch.tensor([[0.0, 10.0], [2.0, 30.0]]))
        >>> whiten.mean, whiten.std
        (tensor([ 1., 20.]), tensor([ 1.4142, 14.1421]))
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        if mean.shape != std.shape:
            raise ConfigError(f"mean has shape {tuple(mean.shape)} and std {tuple(std.shape)}, expected the same shape")
        for name, value, good in (("mean", mean, mean.isfinite()), ("std", std, (std > 0) & std.isfinite())):
            if not good.is_meta and (where := _first(~good)) is not None:
                expected = "finite" if name == "mean" else "positive and finite"
                raise ConfigError(f"{name} must be {expected}, got {float(value[tuple(where)]):g} at index {where}")
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def fit(self, x: Tensor) -> None:
        """Compute mean and standard deviation of data (N, \\*event); see :meth:`fit_batches`."""
        self.fit_batches([x])

    @torch.no_grad()
    def fit_batches(self, batches: Iterable[Tensor]) -> None:
        """Compute mean and standard deviation (divisor N - 1) of data in batches (n, \\*event).

        Raises:
            DataError: for another shape, fewer than two rows, non-finite values, or a constant dimension, which has no
                density.
        """
        count, mean, square = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for batch in batches:
            part = batch.to(self.mean.device, torch.float64)
            if part.shape[1:] != self.mean.shape:
                raise DataError(f"x has shape {tuple(part.shape)}, expected (N, {', '.join(map(str, self.mean.shape))})")
            if len(part) == 0:
                continue
            total, own = count + len(part), part.mean(0)
            shift = own - mean.to(own)
            # each batch's sum of squares about its own mean, plus the term for the distance of the means
            square = square.to(own) + (part - own).square().sum(0) + shift.square() * (count * len(part) / total)
            mean = mean.to(own) + shift * (len(part) / total)
            count = total
        if count < 2:
            raise DataError(f"x must have at least 2 rows for a standard deviation, got {count}")
        if (where := _first(~(mean.isfinite() & square.isfinite()))) is not None:
            raise DataError(f"x holds NaN or infinity in dimension {where}: remove or replace such rows")
        std = (square / (count - 1)).sqrt()
        # the mean of a constant column is rounded, which leaves a std of about eps |mean|
        floor = 4 * torch.finfo(torch.float64).eps * mean.abs()
        if (where := _first(~((std > floor) & (std.to(self.std) > 0)))) is not None:
            raise constant_column(f"dimension {where}", float(mean[tuple(where)]))
        self.mean.copy_(mean)
        self.std.copy_(std)

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, std and the sum of ln std over the event, in x's dtype."""
        if not x.is_floating_point():  # in which the statistics would be rounded
            raise DataError(f"x has type {x.dtype}, expected floats: use x.to({self.mean.dtype})")
        mean, std = self.mean.to(x), self.std.to(x)
        try:
            whole = std.expand(x.shape[1:])
        except RuntimeError:
            raise DataError(f"x has shape {tuple(x.shape)}, expected (N, {', '.join(map(str, self.mean.shape))})") from None
        return mean, std, whole.log().sum()

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std, logs = self._factors(x)
        return (x - mean) / std, (-logs).expand(x.shape[0])

    def _inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, std, logs = self._factors(z)
        return z * std + mean, logs.expand(z.shape[0])


def _first(bad: Tensor) -> list[int] | None:
    """Return the index of the first True, or None."""
    where = bad.nonzero()
    return [int(i) for i in where[0]] if len(where) else None
