"""Flow as a torch.distributions.Distribution."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, register_kl

from cnf._utils.async_checks import tracing
from cnf._utils.errors import ConfigError, DataError
from cnf._utils.late import late
from cnf._utils.validation import as_rows
from cnf._utils.validation import sample_shape as as_shape
from cnf.distribution.density import Density
from cnf.distribution.transform import FlowTransform, reals, shape_of, support
from cnf.random import Noise, SharedNoise

__all__ = ["FlowDistribution", "LatentDistribution"]

KL_SAMPLES = 1024


class LatentDistribution(Distribution):
    """The base density of a flow with its context bound; ``flow(context).base``.

    Args:
        flow: the flow.
        context: (C,), (\\*batch, C) or None.
        batch_shape: to which the batch of the context is expanded.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, flow: Density, context: Tensor | None = None, batch_shape: tuple[int, ...] = ()):
        self.flow, self.context = flow, context
        super().__init__(torch.Size(batch_shape), torch.Size(flow.latent_shape), validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether samples are differentiable."""
        return self.flow.base.has_rsample

    @property
    def support(self) -> Any:
        """The reals for each dimension."""
        return reals(self.flow.latent_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LatentDistribution:
        """Return the same distribution with a larger batch shape."""
        return LatentDistribution(self.flow, self.context, tuple(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log q in nats of ``value`` (\\*sample, \\*batch, \\*event)."""
        given = value.shape[: value.ndim - len(self.event_shape)]
        rows, context, lead = as_rows(value, tuple(self.event_shape), self._context())
        found = self.flow.base.log_prob(rows, context).reshape(lead)
        return found.expand(torch.broadcast_shapes(given, self.batch_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 (torch.distributions' own signature)
        """Draw differentiable samples (\\*sample, \\*batch, \\*event), or without gradient where none is recorded."""
        lead = (*as_shape(sample_shape), *self.batch_shape)
        context = self._context()
        if context is not None and context.ndim > 1:
            context = context.expand(*lead, context.shape[-1]).reshape(math.prod(lead), context.shape[-1])
        base = self.flow.base
        draw = base.rsample if torch.is_grad_enabled() else base.sample
        return draw(math.prod(lead), context, like=self.flow.like).reshape(*lead, *self.event_shape)

    def _context(self) -> Tensor | None:
        """Return the context of the base, None if it takes none."""
        return self.flow.embed(self.context) if self.flow.base.context_dim else None

    def __repr__(self) -> str:
        return f"LatentDistribution({self.flow.base!r}, batch_shape={tuple(self.batch_shape)})"


class FlowDistribution(Distribution):
    """Flow as a torch distribution, usable wherever one of torch's or zuko's is.

    The density, in nats, is that of floats (images: on [0, 1] and the small margin of the logit around it). Samples
    come from torch's global generator and are not clamped, so that log_prob is their density. What is random in the
    blocks, such as the probe of :class:`~cnf.Hutchinson`, is drawn once for the life of the distribution and what
    ``expand`` makes of it, and shared by all points: log_prob is a function of its point.

    Args:
        flow: the density.
        context: (C,) for one distribution, (\\*batch, C) for a batch of them; None for a flow without context.
        batch_shape: shape to which that of the context is expanded.
        validate_args: check values against the support; torch's default if None. If False, log_prob is -inf outside of
            the support and NaN where a value is.
        noise: randomness of the blocks in place of the distribution's own; samples do not depend on it.

    Attributes:
        base: distribution of the latents.
        transform: map from data to latents, :class:`FlowTransform`.

    Raises:
        ConfigError: for a batch shape to which that of the context cannot be expanded.
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
        >>> x, log_p = three.rsample_and_log_prob((5,))
        >>> three.transform.inv(three.base.sample()).shape
        torch.Size([3, 2])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        flow: Density,
        context: Tensor | None = None,
        batch_shape: tuple[int, ...] | None = None,
        validate_args: bool | None = None,
        *,
        noise: Noise | None = None,
    ):
        self.flow, self.context = flow, context
        own = () if context is None else tuple(context.shape[:-1])
        shape = own if batch_shape is None else tuple(batch_shape)
        if len(own) > len(shape) or any(n not in (1, m) for n, m in zip(own[::-1], shape[::-1], strict=False)):
            raise ConfigError(f"batch_shape={shape} does not extend that of the context, {own}")
        self.noise = SharedNoise() if noise is None else noise
        self.base = LatentDistribution(flow, context, shape)
        self.transform = FlowTransform(flow, context, self.noise)
        super().__init__(torch.Size(shape), torch.Size(flow.event_shape), validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether samples are differentiable: those of a base that is trained may not be."""
        return self.flow.base.has_rsample

    @property
    def support(self) -> Any:
        """The reals for each dimension of an event; the interval of Logit, Gaussianize or MarginalTransform if one is first."""
        return support(self.flow)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """Return the same distribution, with the same noise, and a larger batch shape."""
        return FlowDistribution(self.flow, self.context, tuple(batch_shape), self._validate_args, noise=self.noise)

    def __repr__(self) -> str:
        shapes = f"batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)}"
        return f"FlowDistribution({shapes}, context={shape_of(self.context)}, transform={self.transform!r}, base={self.flow.base!r})"

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p in nats of ``value`` (\\*sample, \\*batch, \\*event); a missing batch is broadcast."""
        if not isinstance(value, Tensor):
            raise DataError(f"value is a {type(value).__name__}, expected a torch.Tensor")
        if not value.is_floating_point():
            raise DataError(f"value has type {value.dtype}, expected floats: flow.log_prob bounds the log-probability of pixels")
        if self._validate_args and value.numel():  # torch's check fails for empty values
            self._validate_sample(value)
        elif not tracing(value) and value.numel():
            inside = self.support.check(value) & value.isfinite().flatten(value.ndim - len(self.event_shape)).all(-1)
            if not bool(inside.all()):
                return self._outside(value, inside)
        return self._log_prob(value)

    def _log_prob(self, value: Tensor) -> Tensor:
        given = value.shape[: value.ndim - len(self.event_shape)]
        z, log_det = self.transform.call_and_ladj(value)
        # identical distributions solve each given value once
        return (self.base.log_prob(z) + log_det).expand(torch.broadcast_shapes(given, self.batch_shape))

    def _outside(self, value: Tensor, inside: Tensor) -> Tensor:
        """Return log p with -inf for the points that are not ``inside``, and NaN where they are NaN."""
        n = len(self.event_shape)
        missing = torch.where(value.isnan().flatten(value.ndim - n).any(-1), torch.nan, -torch.inf).to(value)
        if not bool(inside.any()):
            return missing.expand(torch.broadcast_shapes(missing.shape, self.batch_shape))
        found = self._log_prob(torch.where(inside.reshape(*inside.shape, *(1,) * n), value, value[inside][0]))
        return torch.where(inside, found, missing)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 (torch.distributions' own signature)
        """Draw differentiable samples (\\*sample, \\*batch, \\*event)."""
        x: Tensor = self.transform.inv(self.base.rsample(sample_shape))
        return x

    def rsample_and_log_prob(self, sample_shape: Any = torch.Size()) -> tuple[Tensor, Tensor]:  # noqa: B008
        """Draw differentiable samples with log p (\\*sample, \\*batch) in nats, in one solve."""
        z = self.base.rsample(sample_shape)
        x, log_det = self.transform.inv.call_and_ladj(z)
        return x, self.base.log_prob(z) - log_det

    def to_pyro(self) -> Any:
        """Return the distribution for Pyro programs; see :func:`cnf.contrib.pyro.to_pyro`."""
        return late("cnf.contrib.pyro", "to_pyro", "pyro")(self)


def _kl(p: Any, q: Any) -> Tensor:
    """Estimate KL(p || q) in nats, with gradient where p has one, by the mean of log p - log q over KL_SAMPLES samples."""
    if isinstance(p, FlowDistribution):
        x, log_p = p.rsample_and_log_prob((KL_SAMPLES,)) if p.has_rsample else _sampled(p)
    else:
        x = p.rsample((KL_SAMPLES,)) if p.has_rsample else p.sample((KL_SAMPLES,))
        log_p = p.log_prob(x)
    divergence: Tensor = (log_p - q.log_prob(x)).mean(0)
    return divergence


def _sampled(p: FlowDistribution) -> tuple[Tensor, Tensor]:
    x = p.sample((KL_SAMPLES,))
    return x, p.log_prob(x)


for _pair in ((FlowDistribution, FlowDistribution), (FlowDistribution, Distribution), (Distribution, FlowDistribution)):
    register_kl(*_pair)(_kl)
