"""Dequantisation with truncated normal noise and with learned (variational) noise."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf._utils.errors import DataError, require_at_least, require_inside
from cnf.random import draw
from cnf.solvers import Stats
from cnf.transforms import Dequantize, Request, TransformOutput

__all__ = ["TruncatedNormalDequantize", "VariationalDequantize"]

MAX_LOG_SCALE = 3.0  # per coupling: noise within a grey level needs no scale beyond 1/20 to 20


class TruncatedNormalDequantize(Dequantize):
    r"""Truncated normal dequantisation y = (k + 1/2 + n/(2 τ))/levels, n standard normal truncated at ±τ (2305.03935).

    log_det = -log q(y | k), the noise's density on the scale of [0, 1]. The data density has narrow, nearly normal
    peaks at the centres of the grey levels, as a probability path with normal noise has. log_prob of uint8 images is
    the bound :math:`E_q[\ln p(y) - \ln q(y | k)] \le \ln P(k)`, tight where the model's peaks have that form. Floats
    pass unchanged.

    Args:
        levels: number of grey levels of the data set, as for :class:`~cnf.transforms.Dequantize`.
        tau: truncation in standard deviations of the noise; it spans half a grey level.

    Raises:
        ConfigError: for levels outside 2 to 256, or tau outside (0, 6).
        DataError: for integers other than uint8, or pixels of ``levels`` or more.

    Example:
        >>> from cnf.random import Noise
        >>> dequantize = TruncatedNormalDequantize(levels=17)
        >>> pixels = torch.randint(0, 17, (5, 1, 8, 8), dtype=torch.uint8)
        >>> out = dequantize(pixels, Request(noise=Noise(0)))
        >>> bool((dequantize.quantize(out.value) == pixels).all()), round(dequantize.scale, 6)
        (True, 0.009804)
    """

    def __init__(self, levels: int = 256, tau: float = 3.0):
        super().__init__(levels)
        require_inside(0, 6, tau=tau)
        self.tau = tau

    @property
    def scale(self) -> float:
        """Standard deviation of the noise before truncation, on the scale of [0, 1]."""
        return 1 / (2 * self.tau * self.levels)

    @property
    def mass(self) -> float:
        """Probability of the normal distribution between the truncation points."""
        return math.erf(self.tau / math.sqrt(2))

    @property
    def entropy(self) -> float:
        """Differential entropy of the noise in one pixel, on the scale of [0, 1], in nats."""
        height = math.exp(-self.tau**2 / 2) / math.sqrt(2 * math.pi)
        return math.log(math.sqrt(2 * math.pi * math.e) * self.scale * self.mass) - self.tau * height / self.mass

    def middle(self, x: Tensor) -> Tensor:
        """Return the centres of the grey levels (N, \\*event), without noise; floats pass unchanged."""
        if x.is_floating_point():
            return x
        self.check(x)
        return (x.to(self._one.dtype) + 0.5) / self.levels

    def _spread(self, x: Tensor, request: Request) -> TransformOutput:
        dtype = self._one.dtype
        e = draw(request.noise, "dequantize", "uniform", x.shape, dtype=torch.float64, device=x.device)
        n = (math.sqrt(2) * torch.erfinv(self.mass * (2 * e - 1))).clamp(-self.tau, self.tau)
        # as in Dequantize: avoid rounding into the next grey level
        edge = self.tau * (1 - 4 * self.levels * torch.finfo(dtype).eps)
        n = n.clamp(-edge, edge).to(dtype)
        log_q = -0.5 * n.double().square() - math.log(math.sqrt(2 * math.pi) * self.scale * self.mass)
        return TransformOutput(self.middle(x) + self.scale * n, -log_q.flatten(1).sum(1).to(dtype), {}, Stats())


class VariationalDequantize(Dequantize):
    r"""Variational dequantisation y = (k + u) / levels with learned u ~ q(u | k) (Flow++, 1902.00275).

    log_det = -D ln levels - log q(u | k). In expectation over u, log_prob of uint8 images is the bound
    :math:`E_q[\ln p(k, u) - \ln q(u | k)] \le \ln P(k)`, tight where q is the model's posterior :math:`p(u | k)`;
    uniform noise is the special case q = 1. Floats pass unchanged: their densities, and samples, do not depend on q.

    The noise flow maps uniform e to :math:`v = \mathrm{logit}(e)`, applies couplings :math:`v \leftarrow v\, e^{s} + m`
    to one colour of a checkerboard, where s and m are a small convolutional network's outputs for all pixels and the
    other colour's noise, and returns :math:`u = \sigma(v)`. Its density is exact,
    :math:`\ln q = -\sum_i (s_i + \ln \sigma'(v_i) - \ln \sigma'(\mathrm{logit}\, e_i))`. The networks' last layers are
    initialised to zero, where u = e: training starts at the uniform bound. The context does not enter the noise; the
    bound holds regardless.

    Args:
        levels: number of grey levels of the data set, as for :class:`~cnf.transforms.Dequantize`.
        channels: channels C of the images.
        hidden: channels of the networks' two hidden layers.
        couplings: number of couplings; from two on, the noise of every pixel can depend on its neighbours'.

    Raises:
        ConfigError: for levels outside 2 to 256, or channels, hidden or couplings below one.
        DataError: for images of another dtype or number of channels, or pixels of ``levels`` or more.

    Example:
        >>> from cnf.random import Noise
        >>> dequantize = VariationalDequantize(levels=17, channels=1)
        >>> pixels = torch.randint(0, 17, (5, 1, 8, 8), dtype=torch.uint8)
        >>> out = dequantize(pixels, Request(noise=Noise(0)))
        >>> plain = Dequantize(17)(pixels, Request(noise=Noise(0)))  # before training, equal to uniform dequantisation
        >>> bool(torch.allclose(out.value, plain.value)), bool(torch.allclose(out.log_det, plain.log_det))
        (True, True)
    """

    def __init__(self, levels: int = 256, channels: int = 1, hidden: int = 32, couplings: int = 2):
        super().__init__(levels)
        require_at_least(1, channels=channels, hidden=hidden, couplings=couplings)
        self.channels = channels
        self.networks = nn.ModuleList(_network(2 * channels, hidden, 2 * channels) for _ in range(couplings))

    def _noise(self, x: Tensor, request: Request) -> tuple[Tensor, Tensor]:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise DataError(f"images have shape {tuple(x.shape)}, expected (N, {self.channels}, H, W)")
        return self.spread(x, draw(request.noise, "dequantize", "uniform", x.shape, dtype=self._one.dtype, device=x.device))

    def spread(self, pixels: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Return the learned noise u (N, C, H, W) in [0, 1] of uniform ``e``, and log q(u | pixels) (N,) in nats."""
        # uniform draws are multiples of eps / 2, including zero: clamping half a step off the ends keeps logit finite
        e = e.clamp(torch.finfo(e.dtype).eps / 4, 1 - torch.finfo(e.dtype).eps / 2)
        v = start = torch.log(e) - torch.log1p(-e)
        total = torch.zeros_like(v)
        k = (pixels.to(e.dtype) + 0.5) * (2 / self.levels) - 1
        for number, network in enumerate(self.networks):
            moved = _checkerboard(v, number)
            # entries of v that are transformed are hidden from the network: zero, the centre of the noise
            raw, shift = network(torch.cat([k, torch.tanh(v / 2) * ~moved], 1)).to(v).chunk(2, 1)
            scale = MAX_LOG_SCALE * torch.tanh(raw / MAX_LOG_SCALE) * moved
            v = v * scale.exp() + shift * moved
            total = total + scale
        log_q = -(total + _log_slope(v) - _log_slope(start))
        return torch.sigmoid(v), log_q.flatten(1).sum(1)


def _network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return three 3x3 convolutions, the last one initialised to zero."""
    last = nn.Conv2d(hidden, outputs, 3, padding=1)
    nn.init.zeros_(last.weight)
    assert last.bias is not None
    nn.init.zeros_(last.bias)
    first, second = nn.Conv2d(inputs, hidden, 3, padding=1), nn.Conv2d(hidden, hidden, 3, padding=1)
    return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)


def _checkerboard(x: Tensor, number: int) -> Tensor:
    """Return the mask (1, 1, H, W) of the pixels that coupling ``number`` transforms; the first has pixel (0, 0)."""
    rows = torch.arange(x.shape[2], device=x.device)[:, None]
    columns = torch.arange(x.shape[3], device=x.device)[None]
    return ((rows + columns + number) % 2 == 0)[None, None]


def _log_slope(v: Tensor) -> Tensor:
    """Return the log-derivative of the sigmoid at v."""
    return F.logsigmoid(v) + F.logsigmoid(-v)
