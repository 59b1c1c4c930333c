"""Linear maps of the layers: fully connected, convolution, transposed convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cnf._utils.errors import ConfigError

__all__ = ["Conv", "Linear", "channels_last"]


def channels_last(x: Tensor) -> Tensor:
    """Return images, planes or convolution weights (..., C, h, w) in channels-last memory format."""
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)  # torch.func.vmap does not support memory_format


@dataclass(frozen=True)
class Linear:
    """Fully connected map with weights (out, in)."""

    inputs: int
    outputs: int
    spatial = 0
    input_axis = 1  # input axis of the weight

    def module(self, extra: int = 0) -> Any:
        """Return the torch layer with ``extra`` more inputs."""
        return nn.Linear(self.inputs + extra, self.outputs)

    def weight_shape(self) -> tuple[int, ...]:
        """Return the shape of the weight."""
        return (self.outputs, self.inputs)

    def size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial size of the output: that of the input, ()."""
        return size

    def apply(self, weight: Tensor, x: Tensor) -> Tensor:
        """Return W x, without bias."""
        return F.linear(x, weight)

    def split(self, weight: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """Split the weight into that of the first ``at`` inputs and that of the others."""
        return weight[:, :at], weight[:, at:]


@dataclass(frozen=True)
class Conv:
    """Convolution or transposed convolution with weights (out, in, k, k), transposed (in, out, k, k)."""

    inputs: int
    outputs: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    transposed: bool = False
    spatial = 2

    @property
    def input_axis(self) -> int:
        """Axis of the weight's input channels."""
        return 0 if self.transposed else 1

    @staticmethod
    def of_stride(inputs: int, outputs: int, stride: int) -> Conv:
        """Return the convolution for a published stride: 1 = 3x3, 0 = 1x1, 2 = 4x4 with stride 2, -2 = its transpose.

        Raises:
            ConfigError: for any other stride.
        """
        known = {1: (3, 1, 1, False), 0: (1, 1, 0, False), 2: (4, 2, 1, False), -2: (4, 2, 1, True)}
        if stride not in known:
            raise ConfigError(f"strides must contain only 1 (3x3), 0 (1x1), 2 (down) and -2 (up), got {stride}")
        return Conv(inputs, outputs, *known[stride])

    def module(self, extra: int = 0) -> Any:
        """Return the torch layer with ``extra`` more input channels."""
        kind = nn.ConvTranspose2d if self.transposed else nn.Conv2d
        return kind(self.inputs + extra, self.outputs, self.kernel, self.stride, self.padding)

    def weight_shape(self) -> tuple[int, ...]:
        """Return the shape of the weight."""
        first = (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)
        return (*first, self.kernel, self.kernel)

    def size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial size of the output for an input of spatial ``size``."""
        if self.transposed:
            return tuple((n - 1) * self.stride - 2 * self.padding + self.kernel for n in size)
        return tuple((n + 2 * self.padding - self.kernel) // self.stride + 1 for n in size)

    def apply(self, weight: Tensor, x: Tensor) -> Tensor:
        """Return W x, without bias."""
        op = F.conv_transpose2d if self.transposed else F.conv2d
        if x.device.type == "cpu" and not self.transposed and weight.shape[1] == 1:
            # add a zero channel: torch does not recognise one channel as channels-last and is three times slower
            x, weight = (channels_last(F.pad(v, (0, 0, 0, 0, 0, 1))) for v in (x, weight))
        return op(x, weight, stride=self.stride, padding=self.padding)

    def split(self, weight: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """Split the weight into that of the first ``at`` input channels and that of the others."""
        if self.transposed:
            return weight[:at], weight[at:]
        return weight[:, :at], weight[:, at:]
