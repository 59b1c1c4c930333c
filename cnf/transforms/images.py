"""Transforms of images: dequantisation, logit, centring, squeeze. The logit serves boxes too."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnf._utils.async_checks import deferred
from cnf._utils.errors import ConfigError, DataError, require_inside
from cnf.random import draw
from cnf.solvers import Stats
from cnf.transforms.base import (
    DeterministicTransform,
    Shape,
    Transform,
    TransformOutput,
    require_floats,
    require_unit,
    zeros,
)
from cnf.transforms.request import Request

__all__ = ["Dequantize", "Logit", "Rescale", "Squeeze"]


class Dequantize(Transform):
    """Uniform dequantisation of uint8 grey levels: k -> (k + u) / levels, u ~ U[0, 1), log_det = -D ln levels.

    Floats pass unchanged. log_prob of uint8 images is a lower bound, in expectation over u, of their log probability;
    log_prob of floats in [0, 1] is the density. The result has the module's dtype (``flow.double()`` changes it).

    Args:
        levels: number of grey levels of the data set, such as 256; not the largest value observed.

    Raises:
        ConfigError: for fewer than 2 or more than 256 levels.
        DataError: for pixels of ``levels`` or more, or an integer type other than uint8.

    Example:
        >>> from cnf.random import Noise
        >>> out = Dequantize(17)(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), Request(noise=Noise(0)))
        >>> bool((out.value < 1 / 17).all()), round(float(out.log_det[0]) / 64, 4)
        (True, -2.8332)
    """

    _one: Tensor

    def __init__(self, levels: int = 256):
        super().__init__()
        if not 2 <= levels <= 256:
            raise ConfigError(f"levels must be between 2 and 256, got {levels}")
        self.levels = levels
        # sets the dtype of the pixels: follows .double() and .to(device), not part of the state dict
        self.register_buffer("_one", torch.ones(()), persistent=False)

    def _run(self, x: Tensor, request: Request, reverse: bool) -> TransformOutput:
        """Dequantise uint8 images to floats in [0, 1); floats, and all points on the way back, pass unchanged."""
        if reverse or x.is_floating_point():
            return TransformOutput(x, zeros(x), {}, Stats())
        self.check(x)
        return self._spread(x, request)

    def _spread(self, x: Tensor, request: Request) -> TransformOutput:
        u, log_q = self._noise(x, request)
        # for the largest u, k + u would round up to k + 1, the next grey level
        u = u.clamp(max=1 - 2 * self.levels * torch.finfo(u.dtype).eps)
        total = math.prod(x.shape[1:]) * math.log(self.levels)
        return TransformOutput((x.to(u.dtype) + u) / self.levels, -log_q - total, {}, Stats())

    def _noise(self, x: Tensor, request: Request) -> tuple[Tensor, Tensor]:
        """Return the noise u (N, C, H, W) in [0, 1) and log q(u | x) (N,)."""
        u = draw(request.noise, "dequantize", "uniform", x.shape, dtype=self._one.dtype, device=x.device)
        return u, zeros(u)

    def check(self, x: Tensor) -> None:
        """Validate grey levels; the range is not checked while value checks are deferred."""
        if x.dtype != torch.uint8:
            raise DataError(f"images have type {x.dtype}, expected uint8 grey levels, or floats in [0, 1]")
        if x.numel() and not deferred(x) and int(x.max()) >= self.levels:
            raise DataError(f"pixels must be between 0 and {self.levels - 1} (levels={self.levels}), got {int(x.max())}")

    def quantize(self, x: Tensor) -> Tensor:
        """Quantise floats in [0, 1] to uint8 grey levels; values outside are clamped."""
        # k / levels * levels can round to slightly below k
        k = (x * self.levels + self.levels * torch.finfo(x.dtype).eps).floor()
        return k.clamp(0, self.levels - 1).to(torch.uint8)


def _borders(low: Tensor | float, high: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the borders of a box, as floats of one shape."""
    start, end = torch.broadcast_tensors(torch.as_tensor(low), torch.as_tensor(high))
    if not start.is_meta and not bool((start.isfinite() & end.isfinite() & (start < end)).all()):
        raise ConfigError(f"low={low} and high={high} must be finite borders, low less than high")
    dtype = start.dtype if start.is_floating_point() else torch.get_default_dtype()
    return start.to(dtype).clone(), end.to(dtype).clone()


class Logit(DeterministicTransform):
    r"""Logit transform logit(alpha + (1 - 2 alpha) x) from [0, 1] to the real line (Real NVP, 1605.08803).

    The domain is the slightly larger interval (-margin, 1 + margin), margin = alpha / (1 - 2 alpha): the image of the
    inverse, and the support of a density on the real line that is pulled back. With ``low`` and ``high`` the interval of
    each dimension is [low, high] in place of [0, 1]: a box, outside of which there is no mass with alpha = 0.

    Args:
        alpha: margin in (0, 0.5), which keeps the borders finite; of a box also 0, where points on them move inside by rounding.
        low: lower border of each dimension, a tensor that broadcasts with an event, or a number.
        high: upper border.

    Raises:
        ConfigError: for alpha outside (0, 0.5), or a box whose borders are not finite or in the wrong order.
        DataError: for x outside the domain, which would give NaN, and for integers.

    Example:
        >>> y = Logit(0.05)(torch.tensor([[0.5]]))
        >>> float(y.value), round(float(y.log_det), 4)
        (0.0, 1.2809)
        >>> Logit(0.0, torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 10.0]))(torch.tensor([[0.0, 5.0]])).value
        tensor([[0., 0.]])
    """

    low: Tensor
    width: Tensor

    def __init__(self, alpha: float, low: Tensor | float = 0.0, high: Tensor | float = 1.0):
        super().__init__()
        self.unit = not isinstance(low, Tensor) and not isinstance(high, Tensor) and (low, high) == (0, 1)
        if not (0 < alpha < 0.5 or (alpha == 0 and not self.unit)):
            raise ConfigError(f"alpha must be inside (0, 0.5){'' if self.unit else ', or 0 for a box'}, got {alpha:g}")
        self.alpha = alpha
        start, end = (None, None) if self.unit else _borders(low, high)
        self.register_buffer("low", start)
        self.register_buffer("width", None if start is None or end is None else end - start)

    @property
    def margin(self) -> float:
        """Extension of the domain beyond [0, 1], in widths of the box."""
        return self.alpha / (1 - 2 * self.alpha)

    @property
    def bounds(self) -> tuple[Any, Any]:
        """Domain bounds: numbers for [0, 1], tensors for a box."""
        if self.unit:
            return -self.margin, 1 + self.margin
        return self.low - self.margin * self.width, self.low + (1 + self.margin) * self.width

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        require_floats("Logit", x)
        scale = 1 - 2 * self.alpha
        s = self.alpha + scale * (x if self.unit else (x - self.low) / self.width)
        if not self.alpha:
            eps = torch.finfo(x.dtype).eps
            s = torch.where((s >= 0) & (s <= 1), s.clamp(eps, 1 - eps), s)
        require_unit("Logit", x, s, "[0, 1]" if self.unit else "its box")
        y = torch.log(s) - torch.log1p(-s)
        # ds/dx = scale and dy/ds = 1 / (s (1 - s))
        return y, (self._log_scale(x) - torch.log(s) - torch.log1p(-s)).flatten(1).sum(1)

    def _inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x = (torch.sigmoid(z) - self.alpha) / (1 - 2 * self.alpha)
        log_det = (F.logsigmoid(z) + F.logsigmoid(-z) - self._log_scale(z)).flatten(1).sum(1)
        return x if self.unit else self.low + self.width * x, log_det

    def _log_scale(self, x: Tensor) -> Tensor:
        """Return ln |ds/dx| of each dimension."""
        scale = x.new_full((), math.log(1 - 2 * self.alpha))
        return scale if self.unit else (scale - self.width.log()).expand(x.shape[1:])


class Rescale(DeterministicTransform):
    """Centring map (x - 1/2) · factor of images in [0, 1].

    With factor 1 the published codes use it in place of the logit where alpha <= 0.

    Args:
        factor: positive; 2 maps [0, 1] to [-1, 1].

    Raises:
        ConfigError: for a factor that is not finite and positive.
        DataError: for integers.

    Example:
        >>> Rescale()(torch.tensor([[0.75]])).value
        tensor([[0.2500]])
    """

    def __init__(self, factor: float = 1.0):
        super().__init__()
        require_inside(0, math.inf, factor=factor)
        self.factor = factor

    def _log_det(self, x: Tensor) -> Tensor:
        return zeros(x) + math.log(self.factor) * math.prod(x.shape[1:])

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        require_floats("Rescale", x)
        return (x - 0.5) * self.factor, self._log_det(x)

    def _inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z / self.factor + 0.5, -self._log_det(z)


class Squeeze(DeterministicTransform):
    """Squeeze of (C, H, W) to (4C, H/2, W/2) (Real NVP, 1605.08803).

    The output channel is 4c + 2·(row offset) + (column offset).

    Raises:
        DataError: for an odd height or width (``inverse``: channels not divisible by 4).
        ConfigError: from ``latent_shape``, for such a shape.

    Example:
        >>> Squeeze()(torch.arange(4.0).reshape(1, 1, 2, 2)).value.flatten()
        tensor([0., 1., 2., 3.])
    """

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim != 4 or x.shape[2] % 2 or x.shape[3] % 2:
            raise DataError(f"x has shape {tuple(x.shape)}, expected (N, C, H, W) of even height and width")
        # explicit shape: torch leaves that of zero images unchanged
        return F.pixel_unshuffle(x, 2).reshape(len(x), *self.latent_shape(tuple(x.shape[1:]))), zeros(x)

    def _inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if z.ndim != 4 or z.shape[1] % 4:
            raise DataError(f"z has shape {tuple(z.shape)}, expected (N, 4C, H, W)")
        return F.pixel_shuffle(z, 2).reshape(len(z), z.shape[1] // 4, 2 * z.shape[2], 2 * z.shape[3]), zeros(z)

    def latent_shape(self, shape: Shape) -> Shape:
        """Return (4C, H/2, W/2)."""
        if len(shape) != 3 or shape[1] % 2 or shape[2] % 2:
            raise ConfigError(f"Squeeze takes images (C, H, W) of even height and width, got event_shape {shape}")
        return (4 * shape[0], shape[1] // 2, shape[2] // 2)
