"""The transform of a flow as a torch.distributions.Transform."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from cnf._utils.errors import DataError
from cnf._utils.validation import as_rows
from cnf.distribution.density import Density
from cnf.random import Noise
from cnf.transforms import Dequantize, Gaussianize, Logit, MarginalTransform, Request, iter_leaves

__all__ = ["FlowTransform", "LazyTransform", "reals", "shape_of", "support"]


class FlowTransform(torch.distributions.Transform):
    """The map of a flow from data to latents with its context bound, as a torch transform; ``flow(context).transform``.

    Points are (\\*lead, \\*event) for any leading shape, which is broadcast with that of the context. ``.inv`` maps latents
    to data, and :meth:`call_and_ladj` returns a value with its log-determinant from one solve, as in zuko.

    Args:
        flow: the flow.
        context: (C,), (\\*batch, C) or None.
        noise: randomness of the blocks (a probe); torch's global generator if None.
        reverse: map latents to data.

    Example:
        >>> from cnf import CNF, Flow
        >>> from cnf.fields import MLP
        >>> transform = Flow(CNF(MLP(2, context_dim=3)), (2,))(torch.ones(3)).transform
        >>> z, log_det = transform.call_and_ladj(torch.zeros(5, 4, 2))
        >>> z.shape, log_det.shape, transform.inv(z).shape
        (torch.Size([5, 4, 2]), torch.Size([5, 4]), torch.Size([5, 4, 2]))
    """

    bijective = True

    def __init__(self, flow: Density, context: Tensor | None = None, noise: Noise | None = None, reverse: bool = False):
        super().__init__()
        self.flow, self.context, self.noise, self.reverse = flow, context, noise, reverse

    @property
    def domain(self) -> Any:  # type: ignore[override]
        """The reals for each dimension, or the interval on which the data are."""
        return reals(self.flow.latent_shape) if self.reverse else support(self.flow)

    @property
    def codomain(self) -> Any:  # type: ignore[override]
        """The reals for each dimension, or the interval on which the data are."""
        return support(self.flow) if self.reverse else reals(self.flow.latent_shape)

    @property
    def inv(self) -> FlowTransform:
        """The inverse transform."""
        return FlowTransform(self.flow, self.context, self.noise, not self.reverse)

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """Return the transform itself: a cached value would be wrong after a change of the weights."""
        return self

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value (\\*lead, \\*event') and the log-determinant (\\*lead,) in nats, in one solve."""
        return self._apply(x, self.reverse)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log|det ∂y/∂x| (\\*lead,) in nats; it takes a solve from x, and y is not used."""
        return self._apply(x, self.reverse)[1]

    def forward_shape(self, shape: Any) -> torch.Size:
        """Return the shape of the value for x of a shape."""
        return self._shape(shape, self.reverse)

    def inverse_shape(self, shape: Any) -> torch.Size:
        """Return the shape of x for a value of a shape."""
        return self._shape(shape, not self.reverse)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FlowTransform):
            return False
        return self.flow is other.flow and self.context is other.context and self.noise is other.noise and self.reverse == other.reverse

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        leaves = ", ".join(type(leaf).__name__ for leaf, _ in iter_leaves(self.flow.transform))
        return f"FlowTransform([{leaves}]{', inverse' if self.reverse else ''}, context={shape_of(self.context)})"

    def _call(self, x: Tensor) -> Tensor:
        return self._apply(x, self.reverse, log_det=False)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._apply(y, not self.reverse, log_det=False)[0]

    def _apply(self, x: Tensor, reverse: bool, log_det: bool = True) -> tuple[Tensor, Tensor]:
        before, after = self._shapes(reverse)
        if x.ndim < len(before) or tuple(x.shape[x.ndim - len(before) :]) != before:
            raise DataError(f"{'z' if reverse else 'x'} has shape {tuple(x.shape)}, expected (*lead, {', '.join(map(str, before))})")
        rows, context, lead = as_rows(x, before, self.context)
        out = self.flow.evaluate(rows, Request(context, self.noise, log_det=log_det, integrals=False), reverse=reverse)
        return out.value.reshape(*lead, *after), out.log_det.reshape(lead) if log_det else out.log_det

    def _shapes(self, reverse: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        shapes = tuple(self.flow.event_shape), tuple(self.flow.latent_shape)
        return shapes[::-1] if reverse else shapes

    def _shape(self, shape: Any, reverse: bool) -> torch.Size:
        before, after = self._shapes(reverse)
        if len(shape) < len(before) or tuple(shape[len(shape) - len(before) :]) != before:
            raise ValueError(f"shape is {tuple(shape)}, expected one that ends in {before}")
        return torch.Size((*shape[: len(shape) - len(before)], *after))


class LazyTransform(nn.Module):
    """Transform of a flow as a lazy transform of zuko: a module whose call with a context returns a torch transform.

    Args:
        flow: the flow, whose base is not used.

    Example:
        >>> from cnf import CNF, Flow
        >>> from cnf.fields import MLP
        >>> block = LazyTransform(Flow(CNF(MLP(2, context_dim=3)), (2,)))
        >>> block(torch.ones(3))(torch.zeros(5, 2)).shape  # zuko.flows.Flow([block, ...], base) takes it
        torch.Size([5, 2])
    """

    def __init__(self, flow: Density):
        super().__init__()
        self.flow = flow

    def forward(self, c: Tensor | None = None) -> FlowTransform:
        """Return the transform from data to latents for a context."""
        made: FlowTransform = self.flow.distribution(c).transform
        return made


def reals(shape: tuple[int, ...]) -> Any:
    """Return the constraint of real events of a shape."""
    return constraints.independent(cast(Any, constraints.real), len(shape))


def support(flow: Density) -> Any:
    """Return the constraint of a flow's data: the reals, or the interval of Logit, Gaussianize or MarginalTransform if one is first."""
    first = next((leaf for leaf, _ in iter_leaves(flow.transform) if not isinstance(leaf, Dequantize)), None)
    one = constraints.interval(*first.bounds) if isinstance(first, Logit | Gaussianize | MarginalTransform) else constraints.real
    return constraints.independent(cast(Any, one), len(flow.event_shape))


def shape_of(context: Tensor | None) -> tuple[int, ...] | None:
    """Return the shape of a context; None without."""
    return None if context is None else tuple(context.shape)
