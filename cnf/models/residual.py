"""The residual net that neural ODEs are compared with."""

from __future__ import annotations

import math

from torch import Tensor, nn

from cnf.errors import ConfigError
from cnf.models.predictor import Prediction, Predictor
from cnf.solvers import Stats

__all__ = ["ResidualNet", "residual_net"]


class ResidualNet(Predictor):
    """Blocks x + relu(W₂ relu(W₁ x + b₁) + b₂), then a linear layer: the baseline of ANODE's code (1904.01681).

    Args:
        event_shape: (D,) or (C, H, W), flattened.
        outputs: numbers predicted.
        hidden: width inside a block.
        blocks: how many.
        head: see :class:`~cnf.models.predictor.Predictor`.
        levels: grey levels of uint8 images.

    Raises:
        ConfigError: for sizes below one.

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
        hidden: int = 32,
        blocks: int = 3,
        *,
        head: str = "linear",
        levels: int | None = None,
    ):
        if hidden < 1 or blocks < 1:
            raise ConfigError(f"hidden={hidden}, blocks={blocks}; expected at least 1 of each")
        dim = math.prod(event_shape)
        super().__init__(event_shape, outputs, (dim,), head, levels)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim), nn.ReLU()) for _ in range(blocks)
        )

    def predict(self, x: Tensor) -> Prediction:
        """Outputs (N, outputs) and features (N, D); no ODE, hence no evaluations."""
        h = self.numbers(x).flatten(1)
        for block in self.blocks:
            h = h + block(h)
        return Prediction(self.read(h), h, Stats())


def residual_net(dim: int, outputs: int = 1, hidden: int = 32, blocks: int = 3) -> ResidualNet:
    """The residual net of vectors (N, dim).

    Raises:
        ConfigError: for sizes below one.
    """
    return ResidualNet((dim,), outputs, hidden, blocks)
