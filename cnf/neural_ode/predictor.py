"""Base class of predictors, and their result."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cnf._utils.errors import ConfigError, DataError
from cnf.solvers import Stats
from cnf.solvers.base import SolverOverride

__all__ = ["HEADS", "Prediction", "Predictor"]

HEADS = ("linear", "state")


class Prediction(NamedTuple):
    """Outputs (N, outputs), the features (N, \\*state) that they are computed from, and solver statistics."""

    outputs: Tensor
    features: Tensor
    stats: Stats


class Predictor(nn.Module):
    """Base class of predictors, which map inputs (N, \\*event) to ``outputs`` numbers: logits or regression values.

    Args:
        event_shape: (D,) or (C, H, W).
        outputs: number of outputs.
        state_shape: shape of the features.
        head: ``"linear"``, a linear layer on the flattened features; ``"state"``, the first entries of the features, so
            that only the map to the features is trained.
        levels: grey levels of uint8 images, scaled to k/(levels − 1) in [0, 1]; None if all inputs are floats.

    Raises:
        ConfigError: for sizes below one, an unknown head, or more outputs than the features have with head ``"state"``.
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
        """Number of dimensions of an input."""
        return math.prod(self.event_shape)

    @property
    def like(self) -> Tensor:
        """Tensor with the dtype and device of the model's computations."""
        return next(self.parameters())

    def numbers(self, x: Tensor) -> Tensor:
        """Convert inputs (N, \\*event) to floats; uint8 images become k/(levels − 1).

        Raises:
            DataError: for another shape, no rows, integers without ``levels``, or floats of another precision than the
                weights.
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
        """Compute the outputs (N, outputs) from features (N, \\*state)."""
        flat = features.flatten(1)
        out: Tensor = flat[:, : self.outputs] if self.head is None else self.head(flat)
        return out

    def predict(self, x: Tensor, *, solver: SolverOverride = None) -> Prediction:
        """Return outputs, features and solver statistics for inputs (N, \\*event).

        ``solver`` replaces a neural ODE's own for this call: a solver, or a function of the model that returns one.

        Raises:
            DataError: for inputs of another shape or dtype.
            SolverError: if an ODE cannot be solved.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (N, outputs) for inputs (N, \\*event)."""
        return self.predict(x).outputs
