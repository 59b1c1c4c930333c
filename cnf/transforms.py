"""Invertible maps with their log|det|: the chain that leads from data to noise."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.errors import ConfigError, DataError
from cnf.noise import Noise, child, draw
from cnf.solvers import Stats

__all__ = ["CenterShift", "Dequantize", "Logit", "Sequential", "Squeeze", "Standardize", "Transform", "Transformed"]

Shape = tuple[int, ...]


class Transformed(NamedTuple):
    """A transform's result: value (N, \\*event'), log_det (N,) of the map just applied in nats, integrals, cost."""

    value: Tensor
    log_det: Tensor
    integrals: dict[str, Tensor]
    stats: Stats


class Transform(nn.Module):
    """Base: ``forward`` leads from data to noise, ``inverse`` back.

    With ``log_det=False`` no divergence is evaluated and log_det is zero; with ``integrals=False`` a CNF leaves its
    regularisers out.
    """

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        noise: Noise | None = None,
        log_det: bool = True,
        integrals: bool = True,
    ) -> Transformed:
        """Data to noise."""
        raise NotImplementedError

    def inverse(
        self,
        z: Tensor,
        context: Tensor | None = None,
        *,
        noise: Noise | None = None,
        log_det: bool = True,
        integrals: bool = True,
    ) -> Transformed:
        """Noise to data; log_det is that of x over z."""
        raise NotImplementedError

    def latent_shape(self, shape: Shape) -> Shape:
        """The shape of z for events of ``shape``."""
        return shape


class _Plain(Transform):
    """A transform without noise, context, integrals or cost: subclasses give two maps."""

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        noise: Noise | None = None,
        log_det: bool = True,
        integrals: bool = True,
    ) -> Transformed:
        """Data to noise."""
        return Transformed(*self._forward(x), {}, Stats())

    def inverse(
        self,
        z: Tensor,
        context: Tensor | None = None,
        *,
        noise: Noise | None = None,
        log_det: bool = True,
        integrals: bool = True,
    ) -> Transformed:
        """Noise to data."""
        return Transformed(*self._inverse(z), {}, Stats())


class Sequential(Transform):
    """Transforms one after another; child i draws from ``noise.child(i)``, integrals of one name are summed."""

    def __init__(self, transforms: Iterable[Transform]):
        super().__init__()
        self.transforms = nn.ModuleList(transforms)

    def _chain(
        self, x: Tensor, context: Tensor | None, noise: Noise | None, log_det: bool, integrals: bool, back: bool
    ) -> Transformed:
        total = torch.zeros(x.shape[0], dtype=_float(x), device=x.device)
        sums: dict[str, Tensor] = {}
        stats = Stats()
        numbered = list(enumerate(self.transforms))
        for i, module in reversed(numbered) if back else numbered:
            transform = cast(Transform, module)
            step = transform.inverse if back else transform.forward
            x, one, parts, cost = step(x, context, noise=child(noise, i), log_det=log_det, integrals=integrals)
            total = total + one
            stats = stats + cost
            for name, value in parts.items():
                sums[name] = sums[name] + value if name in sums else value
        return Transformed(x, total, sums, stats)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        noise: Noise | None = None,
        log_det: bool = True,
        integrals: bool = True,
    ) -> Transformed:
        """Data to noise, first to last."""
        return self._chain(x, context, noise, log_det, integrals, back=False)

    def inverse(
        self,
        z: Tensor,
        context: Tensor | None = None,
        *,
        noise: Noise | None = None,
        log_det: bool = True,
        integrals: bool = True,
    ) -> Transformed:
        """Noise to data, last to first."""
        return self._chain(z, context, noise, log_det, integrals, back=True)

    def latent_shape(self, shape: Shape) -> Shape:
        """Through every child in turn."""
        for transform in self.transforms:
            shape = cast(Transform, transform).latent_shape(shape)
        return shape


class Standardize(_Plain):
    """(x - mean) / std, per dimension; the statistics are buffers and travel with the weights.

    Raises:
        ConfigError: at a std that is not positive (a constant column has no density).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())
        self._check()

    def _check(self) -> None:
        bad = (~(self.std > 0)).nonzero()
        if len(bad):
            raise ConfigError(f"std is {self.std[tuple(bad[0])]} at index {bad[0].tolist()}; expected a positive number")

    def fit(self, x: Tensor) -> None:
        """Take mean and std of the data (N, \\*event)."""
        self.mean.copy_(x.double().mean(0))
        self.std.copy_(x.double().std(0))
        self._check()

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.mean.to(x), self.std.to(x)
        return (x - mean) / std, (-std.log().sum()).expand(x.shape[0])

    def _inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.mean.to(z), self.std.to(z)
        return z * std + mean, std.log().sum().expand(z.shape[0])


class Dequantize(Transform):
    """uint8 k becomes (k + u) / levels with u uniform on [0, 1): log_det = -D ln levels. Floats pass unchanged.

    So log_prob of uint8 images bounds the log probability of the pixels from below (in expectation over u), and log_prob
    of floats in [0, 1] is the density there.

    Args:
        levels: number of grey levels of the data set, such as 256; never the largest value seen.

    Raises:
        ConfigError: for fewer than 2 or more than 256 levels.
        DataError: at pixels of ``levels`` or more, or an integer type other than uint8.
    """

    def __init__(self, levels: int = 256):
        super().__init__()
        if not 2 <= levels <= 256:
            raise ConfigError(f"levels={levels}; expected 2 to 256 grey levels")
        self.levels = levels

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        noise: Noise | None = None,
        log_det: bool = True,
        integrals: bool = True,
    ) -> Transformed:
        """uint8 to floats in [0, 1)."""
        if x.is_floating_point():
            return Transformed(x, x.new_zeros(x.shape[0]), {}, Stats())
        if x.dtype != torch.uint8:
            raise DataError(f"images of type {x.dtype}: expected uint8 grey levels, or floats in [0, 1]")
        if x.numel() and int(x.max()) >= self.levels:
            raise DataError(f"a pixel is {int(x.max())}, but levels={self.levels}: expected 0 to {self.levels - 1}")
        dtype = _float(x)
        u = draw(noise, "dequantize", "uniform", x.shape, dtype=dtype, device=x.device)
        value = (x.to(dtype) + u) / self.levels
        shift = -x[0].numel() * torch.log(torch.tensor(float(self.levels), dtype=dtype, device=x.device))
        return Transformed(value, shift.expand(x.shape[0]), {}, Stats())

    def inverse(
        self,
        z: Tensor,
        context: Tensor | None = None,
        *,
        noise: Noise | None = None,
        log_det: bool = True,
        integrals: bool = True,
    ) -> Transformed:
        """Floats stay floats; :meth:`quantize` gives the pixels."""
        return Transformed(z, z.new_zeros(z.shape[0]), {}, Stats())

    def quantize(self, x: Tensor) -> Tensor:
        """Floats in [0, 1] to uint8 grey levels."""
        return (x * self.levels).floor().clamp(0, self.levels - 1).to(torch.uint8)


class Logit(_Plain):
    r"""logit(s), s = alpha + (1 - 2 alpha) x (Real NVP, 1605.08803): from [0, 1] to the real line.

    Args:
        alpha: margin in (0, 0.5), which keeps the borders finite.

    Raises:
        ConfigError: for alpha outside (0, 0.5).
        DataError: for x outside [0, 1], which would give NaN.

    Example:
        >>> y = Logit(0.05)(torch.tensor([[0.5]]))
        >>> float(y.value), round(float(y.log_det), 4)
        (0.0, 1.2809)
    """

    def __init__(self, alpha: float):
        super().__init__()
        if not 0 < alpha < 0.5:
            raise ConfigError(f"alpha={alpha}; expected a number in (0, 0.5), such as 0.05 or 1e-6")
        self.alpha = alpha

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not x.is_floating_point():
            raise DataError(f"the logit transform takes floats in [0, 1], not {x.dtype}: put Dequantize before it")
        low, high = (float(v) for v in x.detach().aminmax()) if x.numel() else (0.0, 0.0)
        if not (low >= 0 and high <= 1):
            raise DataError(f"the logit transform takes x in [0, 1], but x spans [{low:g}, {high:g}]: rescale the data")
        scale = 1 - 2 * self.alpha
        s = self.alpha + scale * x
        y = torch.log(s) - torch.log1p(-s)
        # ds/dx = scale and dy/ds = 1 / (s (1 - s))
        log_det = (torch.log(x.new_tensor(scale)) - torch.log(s) - torch.log1p(-s)).flatten(1).sum(1)
        return y, log_det

    def _inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        scale = 1 - 2 * self.alpha
        x = (torch.sigmoid(z) - self.alpha) / scale
        log_det = (F.logsigmoid(z) + F.logsigmoid(-z) - torch.log(z.new_tensor(scale))).flatten(1).sum(1)
        return x, log_det


class CenterShift(_Plain):
    """x - 1/2, what the published codes use in place of the logit where alpha <= 0."""

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x - 0.5, x.new_zeros(x.shape[0])

    def _inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z + 0.5, z.new_zeros(z.shape[0])


class Squeeze(_Plain):
    """(C, H, W) to (4C, H/2, W/2): channel 4c + 2·(row offset) + (column offset) (Real NVP, 1605.08803).

    Raises:
        DataError: for sizes that are not even.
    """

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim != 4 or x.shape[2] % 2 or x.shape[3] % 2:
            raise DataError(f"squeeze halves height and width, but x has shape {tuple(x.shape)}: give even sizes")
        return F.pixel_unshuffle(x, 2), x.new_zeros(x.shape[0], dtype=_float(x))

    def _inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return F.pixel_shuffle(z, 2), z.new_zeros(z.shape[0], dtype=_float(z))

    def latent_shape(self, shape: Shape) -> Shape:
        """Four times the channels, half the size."""
        return (4 * shape[0], shape[1] // 2, shape[2] // 2)


def _float(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.get_default_dtype()
