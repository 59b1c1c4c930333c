"""Classifier-free guidance of conditional flows."""

from __future__ import annotations

import copy
import math
from typing import SupportsFloat

import torch
from torch import Tensor, nn

from cnf._utils.errors import ConfigError
from cnf.fields import VectorField
from cnf.fields.base import SolveField
from cnf.fields.custom import context_size, protect, stated
from cnf.flow import Flow

__all__ = ["Guided", "guided"]


class Guided(VectorField):
    r"""Field :math:`f(t, x, 0) + w\,(f(t, x, c) - f(t, x, 0))` (classifier-free guidance, 2207.12598), at two evaluations.

    Args:
        field: conditional field, trained with dropped contexts (``FlowMatching(flow, drop_context=0.1)``).
        weight: w; 1 is the field itself, 0 the field without condition, larger values exaggerate the condition.

    Raises:
        ConfigError: for a field without context, or a weight that is not finite.
    """

    def __init__(self, field: nn.Module, weight: float):
        super().__init__()
        if context_size(field) == 0:
            raise ConfigError(f"field {type(field).__name__} takes no context, which guidance needs: train a conditional flow")
        if not isinstance(weight, SupportsFloat) or not math.isfinite(weight):
            raise ConfigError(f"weight must be a finite number, such as 2, got {weight!r}")
        self.field, self.weight = field, weight
        self.context_dim, self.time_rows = context_size(field), bool(stated(field, "time_rows"))
        self.interpolant, self.custom = stated(field, "interpolant"), bool(stated(field, "custom"))

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (N, \\*event)."""
        bound, none = self._bound(context)
        base = bound(t, x, none)
        return base + self.weight * (bound(t, x, context) - base)

    def jvp(
        self, t: Tensor, x: Tensor, v: Tensor, context: Tensor | None = None, *, t_dot: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return f and J v + t_dot ∂f/∂t for K stacked tangents."""
        bound, none = self._bound(context)
        return self._mixed(bound.jvp(t, x, v, none, t_dot=t_dot), bound.jvp(t, x, v, context, t_dot=t_dot))

    @property
    def closed_form(self) -> bool:
        """Whether the field has a closed form."""
        return protect(self.field).closed_form

    def divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return f (N, \\*event) and its exact divergence (N,) in closed form."""
        bound, none = self._bound(context)
        return self._mixed(bound.divergence(t, x, none), bound.divergence(t, x, context))

    def extra_repr(self) -> str:
        """Return the weight for ``repr``."""
        return f"weight={self.weight:g}"

    def _bound(self, context: Tensor | None) -> tuple[SolveField, Tensor]:
        if context is None:
            raise ConfigError("context is missing, which guidance exaggerates")
        return protect(self.field), torch.zeros_like(context)

    def _mixed(self, base: tuple[Tensor, Tensor], full: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        value, other = (b + self.weight * (f - b) for b, f in zip(base, full, strict=True))
        return value, other


def guided(flow: Flow, weight: float) -> Flow:
    """Return a conditional flow with guidance; it shares the weights of ``flow``, which stays as it is.

    Its samples exaggerate the condition, and its log_prob is their density, at twice the evaluations.

    Args:
        flow: conditional flow, trained with ``FlowMatching(flow, drop_context=0.1)``.
        weight: 1 changes nothing; values of 1.5 to 4 are usual for images.

    Raises:
        ConfigError: for a flow without context, or a weight that is not finite.

    Example:
        >>> from cnf import CNF
        >>> from cnf.fields import MLP
        >>> flow = Flow(CNF(MLP(2, context_dim=3)), (2,))
        >>> guided(flow, 2.0).sample(5, torch.tensor([1.0, 0.0, 0.0])).shape
        torch.Size([5, 2])
    """
    shared = {id(tensor): tensor for tensor in (*flow.parameters(), *flow.buffers())}
    other = copy.deepcopy(flow, shared)
    if not other.blocks:
        raise ConfigError("flow has no block to guide")
    for block in other.blocks:
        block.field = Guided(block.field, weight)
    return other
