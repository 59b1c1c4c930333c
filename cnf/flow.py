"""Flow: a density defined by a transform and a base density."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from cnf._utils.async_checks import outside_inference_mode
from cnf._utils.errors import ConfigError, DataError, require_inside
from cnf._utils.validation import as_rows, check_context, check_points, check_unit_interval, sample_rows
from cnf.bases import Base, as_base
from cnf.bases.base import as_shape
from cnf.distribution import ContextEmbedding, Density, FlowDistribution
from cnf.fields.custom import context_size
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Divergence
from cnf.ode.statistics import fit_statistics
from cnf.ode.trajectory import trajectory
from cnf.random import Noise
from cnf.solvers import Stats
from cnf.solvers.base import SolverOverride
from cnf.transforms import Dequantize, Request, TorchTransform, Transform, TransformOutput
from cnf.transforms.adapter import as_transform
from cnf.transforms.base import Shape
from cnf.transforms.request import DEFAULT, as_request

__all__ = ["Flow", "FlowDistribution"]

DivergenceOverride = Divergence | Callable[[CNF], Divergence] | None


class Flow(Density):
    """Density defined by ``transform`` from data to z ~ ``base``.

    Points have the dtype of the weights; method names follow torch.distributions. ``context`` is (N, C), one row per
    row of x, or (C,) for all rows.

    Args:
        transform: transform from data to noise.
        event_shape: shape of one data point, (D,) or (C, H, W).
        base: density of z: a :class:`~cnf.bases.Base`, or a ``torch.distributions.Distribution`` with the latents' event
            shape (:class:`~cnf.bases.DistributionBase`); N(0, base_std² I) if None.
        base_std: standard deviation of the normal base.
        embedding: network of the context, which is standardised first (:class:`~cnf.distribution.ContextEmbedding`);
            ``nn.Identity()`` only standardises. It is trained and saved with the flow.
        context_dim: size C of the context that the embedding takes.

    Raises:
        ConfigError: for an invalid base_std or event_shape, one that the transform does not accept, both base and
            base_std, a base without density or of another shape, or one of embedding and context_dim alone.
        DataError: from every method, for a point or context of the wrong shape, dtype, device or value.
        SolverError: from every method, if an ODE cannot be solved.

    Example:
        >>> from cnf.fields import MLP
        >>> flow = Flow(CNF(MLP(2)), (2,))
        >>> flow.log_prob(flow.sample(5)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        transform: Transform | torch.distributions.Transform,
        event_shape: tuple[int, ...],
        *,
        base: Base | Distribution | None = None,
        base_std: float = 1.0,
        embedding: nn.Module | None = None,
        context_dim: int | None = None,
    ):
        super().__init__()
        require_inside(0, math.inf, base_std=base_std)
        if (embedding is None) != (context_dim is None):
            raise ConfigError(f"embedding={type(embedding).__name__} and context_dim={context_dim} belong together: give both or neither")
        self.embedding = None if embedding is None or context_dim is None else ContextEmbedding(embedding, context_dim)
        self.event_shape = as_shape(event_shape)
        self.transform: Transform = as_transform(transform)
        self.latent_shape = self.transform.latent_shape(self.event_shape)
        self.base = as_base(base, base_std, self.latent_shape)
        for number, block in enumerate(blocks := self.blocks, 1):
            block.label = f"block {number} of {len(blocks)}"

    @property
    def blocks(self) -> list[CNF]:
        """The CNF blocks, from data to noise."""
        return [m for m in self.transform.modules() if isinstance(m, CNF)]

    @property
    def context_dim(self) -> int | None:
        """Size C of the context, 0 for none; None if only fields or transforms take one that do not declare it."""
        if self.embedding is not None:
            return self.embedding.context_dim
        sizes = [self.base.context_dim, *(context_size(block.field) for block in self.blocks)]
        sizes += [m.context_dim for m in self.transform.modules() if isinstance(m, TorchTransform)]
        return max(filter(None, sizes), default=None if None in sizes else 0)

    def fit_statistics(self, x: Tensor, context: Tensor | None = None, *, batch_size: int = 8192) -> None:
        """Fit the data statistics of the flow to x (N, \\*event), and those of an embedding to a context (N, C).

        See :func:`cnf.ode.statistics.fit_statistics`.
        """
        fit_statistics(self.transform, x, batch_size)
        if self.embedding is not None and context is not None:
            self.embedding.fit(context)

    def forward(
        self, x: Tensor | None = None, context: Tensor | None = None, *, noise: Noise | None = None
    ) -> Tensor | FlowDistribution:
        """Return log_prob for ``flow(x)`` and ``flow(x, context)``, distribution for ``flow()`` and ``flow(context)``.

        A single argument is the context of a conditional flow, and the points of any other flow.

        Raises:
            ConfigError: for a single argument if a custom field does not declare ``context_dim``.
        """
        if x is None:
            return self.distribution(context)
        if context is None and (size := self.context_dim) != 0:
            if size is None:
                raise ConfigError(
                    "flow(v) is ambiguous, points or context, since the field does not state context_dim: call flow.log_prob(x) or "
                    "flow.distribution(context), or set context_dim on the field (0 for none)"
                )
            return self.distribution(x)
        return self.log_prob(x, context, noise=noise)

    def extra_repr(self) -> str:
        """Return event shape and blocks for ``repr``."""
        return f"event_shape={self.event_shape}, latent_shape={self.latent_shape}, blocks={len(self.blocks)}"

    def _check(self, name: str, x: Tensor, shape: tuple[int, ...], context: Tensor | None) -> None:
        """Validate points (\\*lead, \\*shape) and their context."""
        # without weights, compute in the points' dtype
        like = next(self._weights(), x if isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float64) else torch.zeros(()))
        check_points(name, x, shape, like, self.levels if name == "x" else None)
        if context is not None:
            check_context(context, self.context_dim, like)

    def _rows(self, name: str, x: Tensor, shape: Shape, context: Tensor | None) -> tuple[Tensor, Tensor | None, Shape]:
        """Validate points and context; return them as rows, the context embedded, with the leading shape of the result."""
        self._check(name, x, shape, context)
        return as_rows(x, shape, self.embed(context))

    def evaluate(self, x: Tensor, request: Request = DEFAULT, *, reverse: bool = False, **former: Any) -> TransformOutput:
        """Transform data (N, \\*event) to latents, or back; return value, log_det (N,), integrals by name (N,) and cost."""
        request = as_request(request, former)
        x, context, _ = self._rows("z" if reverse else "x", x, self.latent_shape if reverse else self.event_shape, request.context)
        return self._apply_rows(x, replace(request, context=context), reverse)

    def _apply_rows(self, x: Tensor, request: Request, reverse: bool = False) -> TransformOutput:
        """Apply the transform, or its inverse, to validated rows; an empty batch gives an empty result."""
        if x.shape[0] == 0:  # with a gradient to x
            shape, zero = self.event_shape if reverse else self.latent_shape, x.sum() if x.is_floating_point() else 0
            return TransformOutput(self.like.new_zeros(0, *shape) + zero, self.like.new_zeros(0) + zero, {}, Stats())
        return self.transform.inverse(x, request) if reverse else cast(TransformOutput, self.transform(x, request))

    def log_prob(
        self, x: Tensor, context: Tensor | None = None, *, noise: Noise | None = None, solver: SolverOverride = None, divergence: DivergenceOverride = None
    ) -> Tensor:
        """Return log p(x) in nats, (N,) for x (N, \\*event) or (\\*lead) for any leading shape.

        For uint8 images it is a lower bound on the log-probability of the pixels, for floats the log-density there.
        Leading shapes of x and context are broadcast. ``solver`` and ``divergence`` replace those of every block for
        this call; see :class:`~cnf.transforms.Request`.
        """
        x, context, lead = self._rows("x", x, self.event_shape, context)
        request = Request(context, noise, integrals=False, solver=solver, divergence=divergence)
        out = self._apply_rows(x, request)
        return (self.base.log_prob(out.value, context) + out.log_det).reshape(lead)

    def bits_per_dim(
        self, x: Tensor, context: Tensor | None = None, *, noise: Noise | None = None, solver: SolverOverride = None, divergence: DivergenceOverride = None
    ) -> Tensor:
        """Return bits/dim, (\\*lead) for x (\\*lead, \\*event); floats in [0, 1] are scaled to the grey levels.

        Raises:
            DataError: for a flow without Dequantize, or floats outside [0, 1].
        """
        if self.levels is None:
            raise DataError("bits_per_dim is for images (a flow with Dequantize): use log_prob, in nats, for vectors")
        self._check("x", x, self.event_shape, context)
        check_unit_interval(x)
        return self.to_bits(self.log_prob(x, context, noise=noise, solver=solver, divergence=divergence), x.is_floating_point())

    def encode(self, x: Tensor, context: Tensor | None = None, *, noise: Noise | None = None, solver: SolverOverride = None) -> Tensor:
        """Map x (\\*lead, \\*event) to z (\\*lead, \\*latent), without computing the divergence."""
        x, context, lead = self._rows("x", x, self.event_shape, context)
        z = self._apply_rows(x, Request(context, noise, log_det=False, solver=solver)).value
        return z.reshape(*lead, *self.latent_shape)

    def decode(self, z: Tensor, context: Tensor | None = None, *, noise: Noise | None = None, solver: SolverOverride = None) -> Tensor:
        """Map z (\\*lead, \\*latent) to x (\\*lead, \\*event), without computing the divergence."""
        z, context, lead = self._rows("z", z, self.latent_shape, context)
        x = self._apply_rows(z, Request(context, noise, log_det=False, solver=solver), reverse=True).value
        return x.reshape(*lead, *self.event_shape)

    def _latent(
        self, n: int | Sequence[int], context: Tensor | None, noise: Noise | None, temperature: float
    ) -> tuple[Tensor, Tensor | None, Shape]:
        """Return z, the embedded context as rows, and the leading shape of the samples."""
        if context is not None:
            check_context(context, self.context_dim, self.like)
        lead, context = sample_rows(n, self.embed(context))
        base = self.base.rsample if torch.is_grad_enabled() else self.base.sample
        return base(math.prod(lead), context, noise=noise, temperature=temperature, like=self.like), context, lead

    def rsample(
        self, n: int | Sequence[int] = (), context: Tensor | None = None, *, noise: Noise | None = None, temperature: float = 1.0, solver: SolverOverride = None
    ) -> Tensor:
        """Draw differentiable samples; see :meth:`sample`. Images are not clamped to [0, 1].

        Where gradients are recorded, a base without such samples that is trained (a mixture) raises a ConfigError.
        """
        z, rows, lead = self._latent(n, context, noise, temperature)
        out = self._apply_rows(z, Request(rows, noise, log_det=False, solver=solver), reverse=True)
        return out.value.reshape(*lead, *self.event_shape)

    @torch.no_grad()
    def sample(
        self, n: int | Sequence[int] = (), context: Tensor | None = None, *, noise: Noise | None = None, temperature: float = 1.0, quantize: bool = False, solver: SolverOverride = None
    ) -> Tensor:
        """Draw samples (n, \\*event), or (n, M, \\*event) with context (M, C); images in [0, 1].

        Args:
            n: number of samples per row of ``context``, or a sample shape as in torch.distributions.
            context: (C,), or (\\*batch, C); its batch shape follows the sample shape.
            noise: randomness of z; torch's global generator if None.
            temperature: factor of the base's standard deviation (of every component, for a mixture).
            quantize: return uint8 pixels instead of floats.
            solver: solver of every block for this call; see :class:`~cnf.transforms.Request`.
        """
        if quantize and self.levels is None:
            raise ConfigError("quantize=True is for images, but this flow has no Dequantize: leave it out")
        x = self.rsample(n, context, noise=noise, temperature=temperature, solver=solver)
        return x if self.levels is None else Dequantize(self.levels).quantize(x) if quantize else x.clamp(0, 1)

    def sample_and_log_prob(
        self, n: int | Sequence[int] = (), context: Tensor | None = None, *, noise: Noise | None = None, solver: SolverOverride = None, divergence: DivergenceOverride = None
    ) -> tuple[Tensor, Tensor]:
        """Draw samples (n, \\*event) as :meth:`rsample` does, with log-density (n,), or (n, M, ...), in one solve."""
        z, rows, lead = self._latent(n, context, noise, 1.0)
        request = Request(rows, noise, integrals=False, solver=solver, divergence=divergence)
        out = self._apply_rows(z, request, reverse=True)
        return out.value.reshape(*lead, *self.event_shape), (self.base.log_prob(z, rows) - out.log_det).reshape(lead)

    @outside_inference_mode
    def score(
        self, x: Tensor, context: Tensor | None = None, *, noise: Noise | None = None, solver: SolverOverride = None, divergence: DivergenceOverride = None
    ) -> Tensor:
        """Return the score ∇ log p(x) in nats per unit of x, (\\*lead, \\*event) as x; x must be floating-point."""
        self._check("x", x, self.event_shape, context)
        if not x.is_floating_point():
            raise DataError(f"x has type {x.dtype}, expected floats: the score is a derivative")
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            log_prob = self.log_prob(point, context, noise=noise, solver=solver, divergence=divergence)
            (gradient,) = torch.autograd.grad(log_prob.sum(), point)
        return gradient

    def trajectory(
        self, x: Tensor, times: Tensor, context: Tensor | None = None, *, noise: Noise | None = None, solver: SolverOverride = None
    ) -> Tensor:
        """Return x at ``times`` in [0, 1] (0 = data, 1 = latent), (len(times), N, \\*event); see :mod:`cnf.ode.trajectory`.

        Frames are in the blocks' coordinates (after Standardize or Logit), whole images for a multiscale flow.

        Raises:
            ConfigError: for times outside [0, 1] or decreasing, or a flow without such a path.
        """
        x, context, _ = self._rows("x", x, self.event_shape, context)
        return trajectory(self.transform, x, times, context, noise=noise, solver=solver)

    def distribution(self, context: Tensor | None = None, *, validate_args: bool | None = None) -> FlowDistribution:
        """Return this flow as a ``torch.distributions.Distribution``; a context (M, C) gives the batch shape (M,)."""
        if context is not None:
            check_context(context, self.context_dim, self.like)
        elif self.context_dim:
            raise ConfigError(f"context is missing, expected shape ({self.context_dim},) or (N, {self.context_dim}) for this conditional flow")
        return FlowDistribution(self, context, validate_args=validate_args)
