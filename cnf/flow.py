"""Flow = transform + base: log-likelihood, samples, bits/dim."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from cnf.continuous import CNF
from cnf.deferral import deferred
from cnf.distribution import FlowDistribution
from cnf.errors import ConfigError, DataError
from cnf.noise import Noise, draw
from cnf.trajectory import trajectory
from cnf.transforms import Dequantize, Gaussianize, Standardize, Transform, Transformed, leaves
from cnf.transforms.base import placed

__all__ = ["Flow", "FlowDistribution"]


class Flow(nn.Module):
    """A density: ``transform`` carries data to z ~ N(0, base_std² I).

    Points are of the weights' floating type; the method names are those of torch.distributions. ``context`` is (N, C), one
    row for each row of x, or (C,) for all.

    Args:
        transform: data to noise.
        event_shape: shape of one data point, (D,) or (C, H, W).
        base_std: standard deviation of the base.

    Raises:
        ConfigError: for a base_std or an event_shape that cannot be, or one that the transform does not take.
        DataError: from every method, for a shape, type or value of its point or context that does not fit.
        SolverError: from every method, where an ODE could not be solved.

    Example:
        >>> from cnf.fields import MLP
        >>> flow = Flow(CNF(MLP(2)), (2,))
        >>> flow.log_prob(flow.sample(5)).shape
        torch.Size([5])
    """

    def __init__(self, transform: Transform, event_shape: tuple[int, ...], *, base_std: float = 1.0):
        super().__init__()
        if not 0 < base_std < math.inf:
            raise ConfigError(f"base_std={base_std}; expected a positive number")
        if not isinstance(event_shape, Sequence) or not event_shape or any(n < 1 for n in event_shape):
            raise ConfigError(f"event_shape={event_shape}; expected the shape of one point, such as (2,) or (1, 8, 8)")
        self.transform = transform
        self.event_shape = tuple(event_shape)
        self.latent_shape = transform.latent_shape(self.event_shape)
        self.base_std = base_std
        for number, block in enumerate(blocks := self.blocks, 1):
            block.label = f"block {number} of {len(blocks)}"

    @property
    def dim(self) -> int:
        """Number of data dimensions D."""
        return math.prod(self.event_shape)

    @property
    def levels(self) -> int | None:
        """Grey levels of images; None for vectors."""
        return next((m.levels for m in self.modules() if isinstance(m, Dequantize)), None)

    @property
    def blocks(self) -> list[CNF]:
        """The CNF blocks, data to noise."""
        return [m for m in self.modules() if isinstance(m, CNF)]

    @property
    def context_dim(self) -> int | None:
        """Size C of the context, 0 for none; None where a field of one's own does not say (``field.context_dim``)."""
        sizes = [[c for m in b.field.modules() if (c := getattr(m, "context_dim", None)) is not None] for b in self.blocks]
        return max((max(s) for s in sizes), default=0) if all(sizes) else None

    @property
    def like(self) -> Tensor:
        """A tensor of the type and on the device that the flow computes in."""
        return next((v for v in chain(self.parameters(), self.buffers()) if v.is_floating_point()), torch.zeros(()))

    @torch.no_grad()
    def fit_statistics(self, x: Tensor, *, batch_size: int = 8192) -> None:
        """Fit every Standardize and Gaussianize before the first block to what reaches it, and the block's field if it can be (a denoiser).

        Args:
            x: training data (N, \\*event); images are dequantised with fixed noise.
            batch_size: rows held as floats at once.

        Raises:
            DataError: for fewer than two rows, values that are not finite, or a constant dimension.
        """

        def arriving(at: int) -> Iterator[Tensor]:
            for number, part in enumerate(x.split(batch_size)):
                for leaf, noise in islice(placed(self.transform, Noise(0, "statistics", number)), at):
                    part = leaf(part, noise=noise).value
                yield part

        for i, leaf in enumerate(leaves(self.transform)):
            if any(isinstance(m, CNF) for m in leaf.modules()):
                if hasattr(field := getattr(leaf, "field", None), "fit_batches"):
                    cast(Any, field).fit_batches(arriving(i))
                return
            if isinstance(leaf, Standardize | Gaussianize):
                leaf.fit_batches(arriving(i))

    def _check(self, name: str, x: Tensor, shape: tuple[int, ...], context: Tensor | None) -> None:
        """Refuse points (N, \\*shape) and contexts that do not fit, before a solve makes a riddle of them."""
        if tuple(x.shape[1:]) != shape or x.ndim == 0 or len(x) == 0:
            raise DataError(f"{name} has shape {tuple(x.shape)}; expected (N, {', '.join(map(str, shape))}), N at least 1")
        floats, own = (torch.float32, torch.float64), self.like.dtype
        if x.is_floating_point():
            if x.dtype != own and x.dtype in floats and own in floats:
                raise DataError(f"{name} has type {x.dtype}, but the flow computes in {own}: give {name}.to({own}), or convert the flow")
            if not torch.compiler.is_compiling() and not deferred() and not bool(x.isfinite().all()):
                row = int((~x.flatten(1).isfinite().all(1)).nonzero()[0])
                raise DataError(f"{name} holds NaN or infinity, first in row {row}: remove or replace such rows")
        elif self.levels is None or name != "x":
            raise DataError(f"{name} has type {x.dtype}; expected floats")
        if context is not None:
            self._check_context(context, len(x))

    def _check_context(self, context: Tensor, rows: int | None) -> None:
        shape, size = tuple(context.shape), self.context_dim
        if size == 0:
            raise ConfigError(f"context has shape {shape}, but this flow was built without context (context_dim=0)")
        if not context.is_floating_point():
            raise DataError(f"context has type {context.dtype}; expected floats, a label as a one-hot row")
        wide = size is None or shape[-1:] == (size,)
        if context.ndim not in (1, 2) or not wide or (context.ndim == 2 and rows is not None and shape[0] != rows):
            width = "C" if size is None else size
            raise DataError(f"context has shape {shape}; expected ({width},), or ({'M' if rows is None else rows}, {width})")

    def evaluate(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        noise: Noise | None = None,
        log_det: bool = True,
        integrals: bool = True,
    ) -> Transformed:
        """Data to latent with everything that comes along: log_det (N,), integrals by name (N,), cost."""
        self._check("x", x, self.event_shape, context)
        return self.transform.forward(x, context, noise=noise, log_det=log_det, integrals=integrals)

    def base_log_prob(self, z: Tensor) -> Tensor:
        """log q(z), (N,) nats."""
        constant = math.prod(z.shape[1:]) * (0.5 * math.log(2 * math.pi) + math.log(self.base_std))
        return -0.5 * (z / self.base_std).square().flatten(1).sum(1) - constant

    def log_prob(self, x: Tensor, context: Tensor | None = None, *, noise: Noise | None = None) -> Tensor:
        """log p(x), (N,) nats: of uint8 images a bound on the pixels' log probability, of floats the density there."""
        out = self.evaluate(x, context, noise=noise, integrals=False)
        return self.base_log_prob(out.value) + out.log_det

    def bits_per_dim(self, x: Tensor, context: Tensor | None = None, *, noise: Noise | None = None) -> Tensor:
        """Bits per dimension (N,); floats in [0, 1] count with the data set's levels.

        Raises:
            DataError: for a flow that is not one of images, or floats outside [0, 1].
        """
        if self.levels is None:
            raise DataError("bits_per_dim is for images (a flow with Dequantize): vectors have log_prob, in nats")
        self.require_unit_interval(x)
        return self.to_bits(self.log_prob(x, context, noise=noise), x.is_floating_point())

    @staticmethod
    def require_unit_interval(x: Tensor) -> None:
        """Refuse float images that no grey levels can have given.

        Raises:
            DataError: for floats outside [0, 1], where bits/dim mean nothing (the density itself reaches a little further).
        """
        if x.is_floating_point() and x.numel() and not bool(((x >= 0) & (x <= 1)).all()):
            low, high = (float(v) for v in x.detach().aminmax())
            raise DataError(f"x spans [{low:g}, {high:g}]; expected floats in [0, 1], or uint8 grey levels")

    def to_bits(self, log_prob: Tensor, floats: bool) -> Tensor:
        """Nats to bits/dim: −log p / (D ln 2), plus log2(levels) for a density on [0, 1]."""
        shift = math.log2(self.levels) if floats and self.levels else 0.0
        return -log_prob / (self.dim * math.log(2)) + shift

    def encode(self, x: Tensor, context: Tensor | None = None, *, noise: Noise | None = None) -> Tensor:
        """x to z, without any divergence."""
        return self.evaluate(x, context, noise=noise, log_det=False).value

    def decode(self, z: Tensor, context: Tensor | None = None, *, noise: Noise | None = None) -> Tensor:
        """z to x, without any divergence."""
        self._check("z", z, self.latent_shape, context)
        return self.transform.inverse(z, context, noise=noise, log_det=False).value

    def _latent(
        self, n: int, context: Tensor | None, noise: Noise | None, temperature: float
    ) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
        """z, the context row by row, and the sample's leading shape."""
        if n < 1 or not temperature > 0:
            raise ConfigError(f"n={n}, temperature={temperature}: expected n >= 1 and a positive temperature")
        lead: tuple[int, ...] = (n,)
        if context is not None:
            self._check_context(context, None)
            if context.ndim == 2:
                lead = (n, context.shape[0])
                context = context.repeat(n, 1)
        shape = (math.prod(lead), *self.latent_shape)
        z = draw(noise, "latent", "normal", shape, dtype=self.like.dtype, device=self.like.device)
        return z * (self.base_std * temperature), context, lead

    def rsample(
        self, n: int, context: Tensor | None = None, *, noise: Noise | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Samples with gradient: (n, \\*event); with context (M, C): (n, M, \\*event). Images are not clamped to [0, 1]."""
        z, rows, lead = self._latent(n, context, noise, temperature)
        return self.decode(z, rows, noise=noise).reshape(*lead, *self.event_shape)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        *,
        noise: Noise | None = None,
        temperature: float = 1.0,
        quantize: bool = False,
    ) -> Tensor:
        """Samples (n, \\*event), or (n, M, \\*event) with context (M, C); images in [0, 1].

        Args:
            n: how many, of each row of ``context`` where it is (M, C).
            context: (C,) or (M, C).
            noise: where z is drawn from.
            temperature: factor of the base's standard deviation.
            quantize: uint8 pixels in place of floats.
        """
        if quantize and self.levels is None:
            raise ConfigError("quantize=True is for images: this flow has no Dequantize")
        x = self.rsample(n, context, noise=noise, temperature=temperature)
        if self.levels is None:
            return x
        return Dequantize(self.levels).quantize(x) if quantize else x.clamp(0, 1)

    def sample_and_log_prob(
        self, n: int, context: Tensor | None = None, *, noise: Noise | None = None
    ) -> tuple[Tensor, Tensor]:
        """Samples, not clamped, and their log-density in one solve: (n, \\*event) and (n,), or (n, M, ...), with gradient."""
        z, rows, lead = self._latent(n, context, noise, 1.0)
        out = self.transform.inverse(z, rows, noise=noise, integrals=False)
        log_prob = self.base_log_prob(z) - out.log_det
        return out.value.reshape(*lead, *self.event_shape), log_prob.reshape(lead)

    def score(self, x: Tensor, context: Tensor | None = None, *, noise: Noise | None = None) -> Tensor:
        """∇ log p(x), (N, \\*event), nats per unit of x; x must be floats."""
        if not x.is_floating_point():
            raise DataError(f"x has type {x.dtype}; the score is a derivative and takes floats")
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.log_prob(point, context, noise=noise).sum(), point)
        return gradient

    def trajectory(
        self, x: Tensor, times: Tensor, context: Tensor | None = None, *, noise: Noise | None = None
    ) -> Tensor:
        """Return where x is at each of ``times`` in [0, 1] (0 = data, 1 = latent), (len(times), N, \\*event), in the coordinates
        of the blocks (after Standardize or Logit); the frames of a multiscale flow are whole images. See
        :func:`cnf.trajectory.trajectory`.

        Raises:
            ConfigError: for times outside [0, 1] or decreasing, or a flow that has no such path.
        """
        self._check("x", x, self.event_shape, context)
        return trajectory(self.transform, x, times, context, noise=noise)

    def distribution(self, context: Tensor | None = None) -> FlowDistribution:
        """This flow as a ``torch.distributions.Distribution``; a context (M, C) becomes the batch shape (M,)."""
        if context is not None:
            self._check_context(context, None)
        return FlowDistribution(self, context)
