"""Convolutional vector field that sums nets at several squeeze levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf._utils.errors import ConfigError
from cnf.fields.base import FusedField, SolveField, structure
from cnf.fields.networks import ConvField
from cnf.fields.precomputed import PrecomputedField

__all__ = ["SqueezeSum"]


class SqueezeSum(FusedField):
    """f(t, x) = Σ_s unsqueeze_s(f_s(t, squeeze_s(x))): a sum of nets, net s on the image squeezed s times.

    The field of FFJORD's multiscale-parallel model (code of 1810.01367): net s takes 4^s C channels of an image 2^s
    times smaller, so that the receptive field doubles from one net to the next.

    Args:
        nets: the nets; net s maps (N, 4^s C, H/2^s, W/2^s) to the same shape.

    Raises:
        ConfigError: without nets, or for an image whose sides are not multiples of 2^(len(nets) - 1).

    Example:
        >>> import torch
        >>> field = SqueezeSum([ConvField(4**s, (8,)) for s in range(3)])
        >>> field(torch.tensor(0.0), torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, nets: Sequence[ConvField]):
        super().__init__()
        if not nets:
            raise ConfigError("nets is empty: expected one net for each squeeze level")
        self.nets = nn.ModuleList(nets)
        self.context_dim = max(cast(int, net.context_dim) for net in nets)
        self.time_rows = all(net.time_rows for net in nets)
        self.built = structure(self)

    def zero_(self) -> None:
        """Set the output of every net to zero."""
        for net in self.nets:
            cast(ConvField, net).zero_()

    def precompute(self, x: Tensor, context: Tensor | None = None) -> _Sum:
        """Return this field for one solve at points like x with one context, t-independent parts precomputed."""
        unit = 2 ** (len(self.nets) - 1)
        if x.shape[2] % unit or x.shape[3] % unit:
            raise ConfigError(
                f"height and width of x must be multiples of {unit} (the field squeezes {len(self.nets) - 1} times), got shape "
                f"{tuple(x.shape)}"
            )
        return _Sum([cast(ConvField, net).precompute(_squeeze(x, s), context) for s, net in enumerate(self.nets)])

    def called(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """Return dx/dt by calling the nets as modules."""
        return sum((_unsqueeze(net(t, _squeeze(x, s), context), s) for s, net in enumerate(self.nets)), torch.zeros_like(x))


class _Sum(SolveField):
    """Sum of precomputed nets."""

    own_jvp = True

    def __init__(self, nets: Sequence[PrecomputedField]):
        self.nets = tuple(nets)

    def __call__(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        total = self.nets[0](t, x)
        for s, net in enumerate(self.nets[1:], 1):
            total = total + _unsqueeze(net(t, _squeeze(x, s)), s)
        return total

    def jvp(
        self, t: Tensor, x: Tensor, v: Tensor, context: Tensor | None = None, *, t_dot: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        dx, product = self.nets[0].jvp(t, x, v, t_dot=t_dot)
        for s, net in enumerate(self.nets[1:], 1):
            tangents = _squeeze(v.flatten(0, 1), s).unflatten(0, v.shape[:2])
            one, pushed = net.jvp(t, _squeeze(x, s), tangents, t_dot=t_dot)
            dx = dx + _unsqueeze(one, s)
            product = product + _unsqueeze(pushed.flatten(0, 1), s).unflatten(0, v.shape[:2])
        return dx, product


# repeated squeezes by 2: one squeeze by 2^s orders the channels differently from the published nets
def _squeeze(x: Tensor, times: int) -> Tensor:
    for _ in range(times):
        x = F.pixel_unshuffle(x, 2)
    return x


def _unsqueeze(x: Tensor, times: int) -> Tensor:
    for _ in range(times):
        x = F.pixel_shuffle(x, 2)
    return x
