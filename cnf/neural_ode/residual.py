"""Residual network, the baseline of neural ODEs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cnf._utils.errors import ConfigError
from cnf.neural_ode.odenet import ODENet, mlp_maps
from cnf.neural_ode.predictor import Prediction, Predictor
from cnf.solvers import Stats
from cnf.solvers.base import SolverOverride

__all__ = ["ResidualNet", "residual_net"]


class ResidualNet(Predictor):
    r"""Residual blocks :math:`h_{k+1} = h_k + f_k(h_k)` with a linear head: the baseline of ANODE (1904.01681).

    Each f_k is an autonomous field of a neural ODE, an MLP that ends in a linear layer. ANODE's released code ends it
    in a relu, which can only increase h, so that this network cannot represent x -> -x either.

    Args:
        event_shape: (D,) or (C, H, W), flattened.
        outputs: number of outputs.
        hidden: width of a block's hidden layer, or the widths of several.
        blocks: number of blocks.
        nonlinearity: activation between the layers of a block.
        zero_init: initialise to the identity (f_k = 0).
        head: see :class:`~cnf.neural_ode.predictor.Predictor`.
        levels: grey levels of uint8 images.

    Raises:
        ConfigError: for sizes below one, no hidden layer, or an unknown nonlinearity.

    Example:
        >>> import torch
        >>> model = ResidualNet((2,), 3, hidden=32, blocks=8)
        >>> model(torch.randn(5, 2)).shape, sum(p.numel() for p in model.parameters())
        (torch.Size([5, 3]), 1305)
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        outputs: int,
        hidden: int | Sequence[int] = 32,
        blocks: int = 3,
        *,
        nonlinearity: str = "relu",
        zero_init: bool = False,
        head: str = "linear",
        levels: int | None = None,
    ):
        widths = (hidden,) if isinstance(hidden, int) else tuple(hidden)
        if blocks < 1 or not widths:
            raise ConfigError(f"hidden={hidden}, blocks={blocks}; expected at least one hidden layer and one block")
        dim = math.prod(event_shape)
        super().__init__(event_shape, outputs, (dim,), head, levels)
        # a name unlike that of the former blocks with a final relu, whose weights would load with another meaning
        self.fields = nn.ModuleList(
            ODENet(*mlp_maps(dim, widths, "ignore"), nonlinearity, zero_init) for _ in range(blocks)
        )

    def predict(self, x: Tensor, *, solver: SolverOverride = None) -> Prediction:
        """Return outputs (N, outputs), features (N, D) and empty solver statistics (no ODE, so that ``solver`` is not used)."""
        h = self.numbers(x).flatten(1)
        t = h.new_zeros(())
        for field in self.fields:
            h = h + field(t, h)
        return Prediction(self.read(h), h, Stats())


def residual_net(
    dim: int, outputs: int = 1, hidden: int | Sequence[int] = 32, blocks: int = 3, **options: Any
) -> ResidualNet:
    """Build a residual network on vectors (N, dim); ``options`` are keyword arguments of :class:`ResidualNet`.

    Raises:
        ConfigError: as :class:`ResidualNet`.
    """
    return ResidualNet((dim,), outputs, hidden, blocks, **options)
