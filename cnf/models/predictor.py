"""What a model that predicts is, and what it returns."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cnf.errors import ConfigError, DataError
from cnf.solvers import Stats

__all__ = ["HEADS", "Prediction", "Predictor"]

HEADS = ("linear", "state")


class Prediction(NamedTuple):
    """Outputs (N, outputs), the features that they were read from (N, \\*state), and what the solve cost."""

    outputs: Tensor
    features: Tensor
    stats: Stats


class Predictor(nn.Module):
    """Base of the models that predict: events in, ``outputs`` numbers (logits, or a regression's values) out.

    Args:
        event_shape: (D,) or (C, H, W).
        outputs: numbers predicted.
        state_shape: of the features.
        head: ``"linear"``, a linear layer on the flattened features; ``"state"``, the first entries of the features
            themselves, so that nothing but the features' own map can fit.
        levels: grey levels of uint8 images, which become k/(levels − 1) in [0, 1]; None where all events are floats.

    Raises:
        ConfigError: for sizes below one, an unknown head, or more outputs than the features have.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        outputs: int,
        state_shape: tuple[int, ...],
        head: str = "linear",
        levels: int | None = None,
    ):
        super().__init__()
        if not event_shape or any(n < 1 for n in event_shape):
            raise ConfigError(f"event_shape={event_shape}; expected the shape of one event, such as (2,) or (1, 28, 28)")
        if outputs < 1:
            raise ConfigError(f"outputs={outputs}; expected at least 1")
        if head not in HEADS:
            raise ConfigError(f"head={head!r} is unknown: expected {' or '.join(map(repr, HEADS))}")
        size = math.prod(state_shape)
        if head == "state" and outputs > size:
            raise ConfigError(f"head='state' reads outputs={outputs} off a state of {size} numbers: augment it, or use 'linear'")
        if levels is not None and levels < 2:
            raise ConfigError(f"levels={levels}; expected at least 2 grey levels, or None")
        self.event_shape, self.state_shape, self.outputs, self.levels = tuple(event_shape), tuple(state_shape), outputs, levels
        self.head = nn.Linear(size, outputs) if head == "linear" else None

    @property
    def dim(self) -> int:
        """Number of dimensions of an event."""
        return math.prod(self.event_shape)

    @property
    def like(self) -> Tensor:
        """A tensor of the type and on the device that the model computes in."""
        return next(self.parameters())

    def numbers(self, x: Tensor) -> Tensor:
        """Events (N, \\*event) as numbers: uint8 images become k/(levels − 1).

        Raises:
            DataError: for another shape, integers without ``levels``, or floats of another precision than the weights'.
        """
        if x.ndim == 0 or tuple(x.shape[1:]) != self.event_shape or len(x) == 0:
            raise DataError(f"x has shape {tuple(x.shape)}; expected (N, {', '.join(map(str, self.event_shape))}), N at least 1")
        if x.is_floating_point():
            floats, own = (torch.float32, torch.float64), self.like.dtype
            if x.dtype != own and x.dtype in floats and own in floats:
                raise DataError(f"x has type {x.dtype}, but the model computes in {own}: give x.to({own}), or convert the model")
            return x
        if x.dtype != torch.uint8 or self.levels is None:
            raise DataError(f"x has type {x.dtype}; expected floats" + (", or uint8 grey levels" if self.levels else ""))
        return x.to(self.like.dtype) / (self.levels - 1)

    def read(self, features: Tensor) -> Tensor:
        """The outputs (N, outputs) of features (N, \\*state)."""
        flat = features.flatten(1)
        out: Tensor = flat[:, : self.outputs] if self.head is None else self.head(flat)
        return out

    def predict(self, x: Tensor) -> Prediction:
        """Outputs, features and cost at events (N, \\*event).

        Raises:
            DataError: for events of another shape or type.
            SolverError: where an ODE could not be solved.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The outputs (N, outputs) at events (N, \\*event)."""
        return self.predict(x).outputs
