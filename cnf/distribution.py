"""Flow as a torch.distributions.Distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from cnf._utils.errors import DataError
from cnf.bases import Base
from cnf.transforms import Dequantize, Gaussianize, Logit, MarginalTransform, Transform, iter_leaves

__all__ = ["FlowDistribution"]


class Density(Protocol):
    """Interface of :class:`~cnf.flow.Flow` that its distribution uses."""

    event_shape: tuple[int, ...]
    transform: Transform
    base: Base

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return log p(x) in nats, leading shapes broadcast."""

    def rsample(self, n: Sequence[int] = (), context: Tensor | None = None) -> Tensor:
        """Draw differentiable samples (\\*n, \\*batch of the context, \\*event)."""


class FlowDistribution(Distribution):
    """Flow as a torch distribution, usable in Independent, TransformedDistribution and ``expand``.

    The density, in nats, is that of floats (images: on [0, 1] and the small margin of the logit around it). Samples
    come from torch's global generator and are not clamped, so that log_prob is their density.

    Args:
        flow: the density.
        context: (C,) for one distribution, (\\*batch, C) for a batch of them; None for a flow without context.
        batch_shape: batch shape for a flow without context, as set by ``expand``.
        validate_args: check values against the support; torch's default if None.

    Raises:
        ValueError: from ``log_prob``, for values outside the support if arguments are validated.
        DataError: from ``log_prob``, for integers; ``flow.log_prob`` bounds the log-probability of pixels.

    Example:
        >>> from cnf.fields import MLP
        >>> from cnf.ode.continuous import CNF
        >>> from cnf.flow import Flow
        >>> flow = Flow(CNF(MLP(2, context_dim=3)), (2,))
        >>> three = flow.distribution(torch.eye(3))
        >>> three.batch_shape, three.event_shape, three.sample((5,)).shape
        (torch.Size([3]), torch.Size([2]), torch.Size([5, 3, 2]))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        flow: Density,
        context: Tensor | None = None,
        batch_shape: tuple[int, ...] = (),
        validate_args: bool | None = None,
    ):
        self.flow, self.context = flow, context
        shape = tuple(context.shape[:-1]) if context is not None else batch_shape
        super().__init__(torch.Size(shape), torch.Size(flow.event_shape), validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether samples are differentiable: those of a base that is trained may not be."""
        return self.flow.base.has_rsample

    @property
    def support(self) -> Any:
        """The reals for each dimension of an event; the interval of Logit, Gaussianize or MarginalTransform if one is first."""
        first = next((leaf for leaf, _ in iter_leaves(self.flow.transform) if not isinstance(leaf, Dequantize)), None)
        one = constraints.interval(*first.bounds) if isinstance(first, Logit | Gaussianize | MarginalTransform) else constraints.real
        return constraints.independent(cast(Any, one), len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """Return the same distribution with a larger batch shape."""
        shape = tuple(batch_shape)
        context = None if self.context is None else self.context.expand(*shape, self.context.shape[-1])
        return FlowDistribution(self.flow, context, shape, validate_args=self._validate_args)

    def __repr__(self) -> str:
        return f"FlowDistribution(batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)})"

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p in nats of ``value`` (\\*sample, \\*batch, \\*event); a missing batch is broadcast."""
        if not isinstance(value, Tensor):
            raise DataError(f"value is a {type(value).__name__}, expected a torch.Tensor")
        if not value.is_floating_point():
            raise DataError(f"value has type {value.dtype}, expected floats: flow.log_prob bounds the log-probability of pixels")
        if self._validate_args and value.numel():  # torch's check fails for empty values
            self._validate_sample(value)
        given = value.shape[: value.ndim - len(self.event_shape)]
        # identical distributions solve each given value once
        return self.flow.log_prob(value, self.context).expand(torch.broadcast_shapes(given, self.batch_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 (torch.distributions' own signature)
        """Draw differentiable samples (\\*sample, \\*batch, \\*event)."""
        shared = self.context is None or self.context.ndim == 1
        return self.flow.rsample((*sample_shape, *(self.batch_shape if shared else ())), self.context)
