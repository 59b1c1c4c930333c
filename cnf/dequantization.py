"""Variational dequantisation: a small flow for the noise that spreads grey levels, learned with the model."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.errors import ConfigError, DataError
from cnf.noise import Noise, draw
from cnf.solvers import Stats
from cnf.transforms import Dequantize, Transformed

__all__ = ["VariationalDequantize"]

MAX_LOG_SCALE = 3.0  # of one coupling: a scale between 1/20 and 20 is more than the noise inside a grey level calls for


class VariationalDequantize(Dequantize):
    r"""uint8 k becomes (k + u) / levels with u ~ q(u | k) learned: log_det = -D ln levels - log q(u | k) (Flow++, 1902.00275).

    In expectation over u, log_prob of uint8 images is the bound :math:`E_q[\ln p(k, u) - \ln q(u | k)] \le \ln P(k)`, tight
    where q is the posterior :math:`p(u | k)` that the model itself implies; uniform noise is the special case q = 1. Floats
    pass unchanged, so densities and samples are those of the rest of the flow.

    The noise flow carries uniform e to :math:`v = \mathrm{logit}(e)`, then through couplings that move one colour of a
    checkerboard by :math:`v \leftarrow v\, e^{s} + m`, s and m being a small convolutional network of the pixels (all of them)
    and of the other colour's noise, and then to :math:`u = \sigma(v)`. Its density is exact,
    :math:`\ln q = -\sum_i (s_i + \ln \sigma'(v_i) - \ln \sigma'(\mathrm{logit}\, e_i))`. The networks' last layers start at zero,
    where u = e: training begins at the plain bound. A context does not enter the noise: the bound holds all the same.

    Args:
        levels: number of grey levels of the data set, as for :class:`~cnf.transforms.Dequantize`.
        channels: channels C of the images.
        hidden: channels of the networks' two hidden layers.
        couplings: number of couplings; with two, every pixel's noise may depend on its neighbours'.

    Raises:
        ConfigError: for levels, channels, hidden or couplings that cannot be.
        DataError: for images of another type or number of channels, or pixels of ``levels`` or more.

    Example:
        >>> dequantize = VariationalDequantize(levels=17, channels=1)
        >>> pixels = torch.randint(0, 17, (5, 1, 8, 8), dtype=torch.uint8)
        >>> out = dequantize(pixels, noise=Noise(0))
        >>> plain = Dequantize(17)(pixels, noise=Noise(0))  # untrained, it is plain dequantisation
        >>> bool(torch.allclose(out.value, plain.value)), bool(torch.allclose(out.log_det, plain.log_det))
        (True, True)
    """

    def __init__(self, levels: int = 256, channels: int = 1, hidden: int = 32, couplings: int = 2):
        super().__init__(levels)
        if min(channels, hidden, couplings) < 1:
            raise ConfigError(f"channels={channels}, hidden={hidden}, couplings={couplings}: each must be at least 1")
        self.channels = channels
        self.networks = nn.ModuleList(_network(2 * channels, hidden, 2 * channels) for _ in range(couplings))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        noise: Noise | None = None,
        log_det: bool = True,
        integrals: bool = True,
    ) -> Transformed:
        """uint8 to floats in [0, 1]."""
        if x.is_floating_point():
            return super().forward(x)
        self.check(x)
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise DataError(f"images have shape {tuple(x.shape)}; expected (N, {self.channels}, H, W)")
        dtype = self._one.dtype
        e = draw(noise, "dequantize", "uniform", x.shape, dtype=dtype, device=x.device)
        u, log_q = self.spread(x, e)
        # as in Dequantize: k + u must not be rounded up into the next grey level
        u = u.clamp(max=1 - 2 * self.levels * torch.finfo(dtype).eps)
        total = math.prod(x.shape[1:]) * math.log(self.levels)
        return Transformed((x.to(dtype) + u) / self.levels, -log_q - total, {}, Stats())

    def spread(self, pixels: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """The learned noise u (N, C, H, W) in [0, 1] that uniform ``e`` becomes, and log q(u | pixels) (N,), nats."""
        # uniform draws are multiples of the spacing eps / 2, zero among them: half a step off the ends, so logit is finite
        e = e.clamp(torch.finfo(e.dtype).eps / 4, 1 - torch.finfo(e.dtype).eps / 2)
        v = start = torch.log(e) - torch.log1p(-e)
        total = torch.zeros_like(v)
        k = (pixels.to(e.dtype) + 0.5) * (2 / self.levels) - 1
        for number, network in enumerate(self.networks):
            moved = _checkerboard(v, number)
            # where v is moved the network must not see it: there it gets zero, the middle of the noise
            raw, shift = network(torch.cat([k, torch.tanh(v / 2) * ~moved], 1)).to(v).chunk(2, 1)
            scale = MAX_LOG_SCALE * torch.tanh(raw / MAX_LOG_SCALE) * moved
            v = v * scale.exp() + shift * moved
            total = total + scale
        log_q = -(total + _log_slope(v) - _log_slope(start))
        return torch.sigmoid(v), log_q.flatten(1).sum(1)


def _network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Three 3x3 convolutions, the last one zero."""
    last = nn.Conv2d(hidden, outputs, 3, padding=1)
    nn.init.zeros_(last.weight)
    assert last.bias is not None
    nn.init.zeros_(last.bias)
    first, second = nn.Conv2d(inputs, hidden, 3, padding=1), nn.Conv2d(hidden, hidden, 3, padding=1)
    return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)


def _checkerboard(x: Tensor, number: int) -> Tensor:
    """The pixels (1, 1, H, W) that coupling ``number`` moves; the first moves that of the first row and column."""
    rows = torch.arange(x.shape[2], device=x.device)[:, None]
    columns = torch.arange(x.shape[3], device=x.device)[None]
    return ((rows + columns + number) % 2 == 0)[None, None]


def _log_slope(v: Tensor) -> Tensor:
    """ln of the sigmoid's derivative."""
    return F.logsigmoid(v) + F.logsigmoid(-v)
