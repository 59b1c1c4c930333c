"""Flow = transform + base: log-likelihood, samples, bits/dim."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from cnf.continuous import CNF
from cnf.errors import ConfigError, DataError
from cnf.noise import Noise, draw
from cnf.transforms import Dequantize, Sequential, Standardize, Transform, Transformed

__all__ = ["Flow", "FlowDistribution"]


class Flow(nn.Module):
    """A density: ``transform`` carries data to z ~ N(0, base_std² I).

    Args:
        transform: data to noise.
        event_shape: shape of one data point.
        base_std: standard deviation of the base.

    Example:
        >>> from cnf.fields import MLP
        >>> flow = Flow(CNF(MLP(2)), (2,))
        >>> flow.log_prob(flow.sample(5)).shape
        torch.Size([5])
    """

    def __init__(self, transform: Transform, event_shape: tuple[int, ...], *, base_std: float = 1.0):
        super().__init__()
        if base_std <= 0:
            raise ConfigError(f"base_std={base_std}; expected a positive number")
        self.transform = transform
        self.event_shape = tuple(event_shape)
        self.latent_shape = transform.latent_shape(self.event_shape)
        self.base_std = base_std

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

    @torch.no_grad()
    def fit_statistics(self, x: Tensor) -> None:
        """Set every Standardize before the first block to the mean and standard deviation of what reaches it.

        Args:
            x: training data (N, \\*event); images are dequantised with fixed noise.
        """
        chain = self.transform.transforms if isinstance(self.transform, Sequential) else [self.transform]
        for i, module in enumerate(chain):
            if isinstance(module, CNF):
                return
            if isinstance(module, Standardize):
                module.fit(x)
            x = module(x, noise=Noise(0, "statistics").child(i)).value

    def _check(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != self.event_shape:
            raise DataError(f"x has shape {tuple(x.shape)}; expected (N, {', '.join(map(str, self.event_shape))})")

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
        self._check(x)
        return self.transform.forward(x, context, noise=noise, log_det=log_det, integrals=integrals)

    def base_log_prob(self, z: Tensor) -> Tensor:
        """log q(z), (N,) nats."""
        dim = z[0].numel() if len(z) else self.dim
        constant = dim * (0.5 * math.log(2 * math.pi) + math.log(self.base_std))
        return -0.5 * (z / self.base_std).square().flatten(1).sum(1) - constant

    def log_prob(self, x: Tensor, context: Tensor | None = None, *, noise: Noise | None = None) -> Tensor:
        """log p(x), (N,) nats: of uint8 images a bound on the pixels' log probability, of floats the density there."""
        out = self.evaluate(x, context, noise=noise, integrals=False)
        return self.base_log_prob(out.value) + out.log_det

    def bits_per_dim(self, x: Tensor, context: Tensor | None = None, *, noise: Noise | None = None) -> Tensor:
        """Bits per dimension (N,); floats in [0, 1] count with the data set's levels.

        Raises:
            DataError: for a flow that is not one of images.
        """
        if self.levels is None:
            raise DataError("bits_per_dim is for images (a flow with Dequantize): vectors have log_prob, in nats")
        return self.to_bits(self.log_prob(x, context, noise=noise), x.is_floating_point())

    def to_bits(self, log_prob: Tensor, floats: bool) -> Tensor:
        """Nats to bits/dim: −log p / (D ln 2), plus log2(levels) for a density on [0, 1]."""
        shift = math.log2(self.levels) if floats and self.levels else 0.0
        return -log_prob / (self.dim * math.log(2)) + shift

    def encode(self, x: Tensor, context: Tensor | None = None, *, noise: Noise | None = None) -> Tensor:
        """x to z, without any divergence."""
        return self.evaluate(x, context, noise=noise, log_det=False).value

    def decode(self, z: Tensor, context: Tensor | None = None, *, noise: Noise | None = None) -> Tensor:
        """z to x, without any divergence."""
        return self.transform.inverse(z, context, noise=noise, log_det=False).value

    def _latent(
        self, n: int, context: Tensor | None, noise: Noise | None, temperature: float
    ) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
        """z, the context row by row, and the sample's leading shape."""
        if n < 1 or temperature <= 0:
            raise ConfigError(f"n={n}, temperature={temperature}: expected n >= 1 and a positive temperature")
        lead: tuple[int, ...] = (n,)
        if context is not None and context.ndim == 2:
            lead = (n, context.shape[0])
            context = context.repeat(n, 1)
        like = next((p for p in self.parameters()), torch.zeros(()))
        shape = (math.prod(lead), *self.latent_shape)
        z = draw(noise, "latent", "normal", shape, dtype=like.dtype, device=like.device)
        return z * (self.base_std * temperature), context, lead

    def rsample(
        self, n: int, context: Tensor | None = None, *, noise: Noise | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Samples with gradient: (n, \\*event); with context (M, C): (n, M, \\*event)."""
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
        """Samples (n, \\*event), or (n, M, \\*event) with context (M, C); ``quantize`` gives uint8 pixels."""
        x = self.rsample(n, context, noise=noise, temperature=temperature)
        if self.levels is None:
            if quantize:
                raise ConfigError("quantize=True is for images: this flow has no Dequantize")
            return x
        return Dequantize(self.levels).quantize(x) if quantize else x.clamp(0, 1)

    def sample_and_log_prob(
        self, n: int, context: Tensor | None = None, *, noise: Noise | None = None
    ) -> tuple[Tensor, Tensor]:
        """Samples and their log-density in one solve: (n, \\*event) and (n,)."""
        z, rows, lead = self._latent(n, context, noise, 1.0)
        out = self.transform.inverse(z, rows, noise=noise, integrals=False)
        log_prob = self.base_log_prob(z) - out.log_det
        return out.value.reshape(*lead, *self.event_shape), log_prob.reshape(lead)

    def score(self, x: Tensor, context: Tensor | None = None, *, noise: Noise | None = None) -> Tensor:
        """∇ log p(x), (N, \\*event)."""
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.log_prob(point, context, noise=noise).sum(), point)
        return gradient

    @torch.no_grad()
    def trajectory(self, x: Tensor, times: Tensor, context: Tensor | None = None) -> Tensor:
        """Where x is at each of ``times`` in [0, 1] (0 = data, 1 = latent), in the coordinates of the blocks.

        The chain's blocks share [0, 1] evenly. Transforms without time (Standardize, Logit) are applied first, so the
        path is drawn where the ODE lives.

        Returns:
            (len(times), N, \\*event).

        Raises:
            ConfigError: for times outside [0, 1] or not increasing.
        """
        self._check(x)
        if len(times) == 0 or bool((times.diff() < 0).any()) or float(times[0]) < 0 or float(times[-1]) > 1:
            raise ConfigError(f"times={times.tolist()[:8]}...: expected increasing times in [0, 1]")
        chain = self.transform.transforms if isinstance(self.transform, Sequential) else [self.transform]
        count = len(self.blocks)
        frames: list[Tensor] = []
        done, todo = 0, times.tolist()
        for module in chain:
            if not isinstance(module, CNF):
                x = module(x, context, log_det=False).value
                continue
            now = 0.0
            end = module.end_time(x)
            while todo and todo[0] * count <= done + 1 + 1e-9:
                local = min(1.0, max(0.0, todo.pop(0) * count - done))
                if local > now:
                    x = module.integrate(x, (now * end, local * end), context, log_det=False)[0]
                    now = local
                frames.append(x)
            if now < 1:
                x = module.integrate(x, (now * end, end), context, log_det=False)[0]
            done += 1
        return torch.stack(frames)

    def distribution(self, context: Tensor | None = None) -> FlowDistribution:
        """This flow as a ``torch.distributions.Distribution``; a context (M, C) becomes the batch shape (M,)."""
        return FlowDistribution(self, context)


class FlowDistribution(Distribution):
    """A flow inside torch.distributions: Independent and TransformedDistribution take it."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(self, flow: Flow, context: Tensor | None = None, batch_shape: tuple[int, ...] | None = None):
        self.flow, self.context = flow, context
        shape = tuple(context.shape[:-1]) if context is not None else ()
        super().__init__(torch.Size(batch_shape or shape), torch.Size(flow.event_shape), validate_args=False)

    @property
    def support(self) -> Any:
        """The reals, one per dimension of an event."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """The same flow for a larger batch of contexts."""
        if self.context is None:
            return FlowDistribution(self.flow, None, tuple(batch_shape))
        return FlowDistribution(self.flow, self.context.expand(*batch_shape, self.context.shape[-1]))

    def _rows(self, lead: torch.Size) -> Tensor | None:
        if self.context is None:
            return None
        return self.context.expand(*lead, self.context.shape[-1]).reshape(-1, self.context.shape[-1])

    def log_prob(self, value: Tensor) -> Tensor:
        """log p of ``value`` (\\*sample, \\*batch, \\*event), nats."""
        lead = value.shape[: value.ndim - len(self.event_shape)]
        rows = self.flow.log_prob(value.reshape(-1, *self.event_shape), self._rows(lead))
        return rows.reshape(lead)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 (torch.distributions' own signature)
        """Samples with gradient."""
        lead = torch.Size(sample_shape) + self.batch_shape
        like = next(self.flow.parameters())
        z = torch.randn((lead.numel(), *self.flow.latent_shape), dtype=like.dtype, device=like.device)
        x = self.flow.decode(z * self.flow.base_std, self._rows(lead))
        return x.reshape(*lead, *self.event_shape)
