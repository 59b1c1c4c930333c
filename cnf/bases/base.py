"""Base class of base densities, and the standard normal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cnf._utils.errors import ConfigError, DataError, require_inside
from cnf.random import Noise, draw

__all__ = ["Base", "StandardNormal", "as_shape"]


class Base(nn.Module):
    """Base class of the densities q(z) of a flow's latents.

    A custom base defines ``log_prob``, and ``_draw`` to be sampled. It computes in the dtype of z, or of ``like``.

    Args:
        event_shape: shape of one latent; an integer D is (D,).

    Raises:
        ConfigError: for an invalid event_shape.

    Example:
        >>> class Laplace(Base):
        ...     def log_prob(self, z, context=None):
        ...         return -(z.abs() + math.log(2)).flatten(1).sum(1)
        ...
        ...     def _draw(self, n, context, noise, temperature, like):
        ...         u = draw(noise, "latent", "uniform", (n, *self.event_shape), dtype=like.dtype, device=like.device) - 0.5
        ...         return -temperature * u.sign() * torch.log1p(-2 * u.abs())
        >>> Laplace(2).sample(3, noise=Noise(0)).shape
        torch.Size([3, 2])
    """

    context_dim: int = 0
    """Size C of the context that the density depends on; 0 for none."""
    fitted: bool = False
    """Whether the density was fitted to latents of data, so that the transforms before it must keep their statistics."""

    def __init__(self, event_shape: int | Sequence[int]):
        super().__init__()
        self.event_shape = as_shape((event_shape,) if isinstance(event_shape, int) else event_shape)

    @property
    def has_rsample(self) -> bool:
        """Whether samples have a gradient in all trained parameters of the base."""
        return True

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Return log q(z) (N,) in nats for z (N, \\*event); context is (N, C), (C,) or None."""
        raise NotImplementedError(f"{type(self).__name__} has no log_prob")

    @torch.no_grad()
    def sample(
        self, n: int, context: Tensor | None = None, *, noise: Noise | None = None, temperature: float = 1.0, like: Tensor | None = None
    ) -> Tensor:
        """Draw z (n, \\*event).

        Args:
            n: number of samples.
            context: (n, C), (C,) or None.
            noise: source of randomness, of which the samples are a pure function; torch's global generator if None.
            temperature: factor of the standard deviation, of every component for a mixture.
            like: tensor with the dtype and device of the samples; those of the base's parameters if None.

        Raises:
            ConfigError: for a temperature that is not positive, or other than 1 if the density has no scale.
        """
        return self._sample(n, context, noise, temperature, like)

    def rsample(
        self, n: int, context: Tensor | None = None, *, noise: Noise | None = None, temperature: float = 1.0, like: Tensor | None = None
    ) -> Tensor:
        """Draw reparameterised z (n, \\*event); see :meth:`sample`.

        Raises:
            ConfigError: if the samples have no gradient in trained parameters (:attr:`has_rsample`).
        """
        if not self.has_rsample:
            raise ConfigError(
                f"samples of a trained {type(self).__name__} are not differentiable: sample under torch.no_grad(), or freeze the base by "
                "flow.base.requires_grad_(False)"
            )
        return self._sample(n, context, noise, temperature, like)

    def _sample(self, n: int, context: Tensor | None, noise: Noise | None, temperature: float, like: Tensor | None) -> Tensor:
        require_inside(0, math.inf, temperature=temperature)
        if like is None:
            like = next((v for v in (*self.parameters(), *self.buffers()) if v.is_floating_point()), torch.zeros(()))
        return self._draw(n, context, noise, temperature, like)

    def _draw(self, n: int, context: Tensor | None, noise: Noise | None, temperature: float, like: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} cannot be sampled: define _draw(n, context, noise, temperature, like)")

    def _check(self, z: Tensor) -> None:
        """Validate the shape of z."""
        if tuple(z.shape[1:]) != self.event_shape:
            raise DataError(f"z has shape {tuple(z.shape)}, expected (N, {', '.join(map(str, self.event_shape))})")

    def extra_repr(self) -> str:
        """Return the event shape for ``repr``."""
        return f"event_shape={self.event_shape}"


class StandardNormal(Base):
    """Normal density N(0, std² I).

    Args:
        event_shape: shape of one latent; an integer D is (D,).
        std: standard deviation.

    Raises:
        ConfigError: for an invalid event_shape, or a std that is not positive and finite.
        DataError: from ``log_prob``, for z of another shape.

    Example:
        >>> StandardNormal(2).log_prob(torch.zeros(1, 2))
        tensor([-1.8379])
    """

    def __init__(self, event_shape: int | Sequence[int], std: float = 1.0):
        super().__init__(event_shape)
        require_inside(0, math.inf, std=std)
        self.std = std

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Return log q(z) (N,) in nats for z (N, \\*event)."""
        self._check(z)
        constant = math.prod(self.event_shape) * (0.5 * math.log(2 * math.pi) + math.log(self.std))
        return -0.5 * (z / self.std).square().flatten(1).sum(1) - constant

    def _draw(self, n: int, context: Tensor | None, noise: Noise | None, temperature: float, like: Tensor) -> Tensor:
        z = draw(noise, "latent", "normal", (n, *self.event_shape), dtype=like.dtype, device=like.device)
        return z * (self.std * temperature)

    def extra_repr(self) -> str:
        """Return event shape and standard deviation for ``repr``."""
        return f"{super().extra_repr()}, std={self.std:g}"


def as_shape(event_shape: Sequence[int]) -> tuple[int, ...]:
    """Return an event shape as a tuple of positive integers.

    Raises:
        ConfigError: for anything else.
    """
    if not isinstance(event_shape, Sequence) or not event_shape or any(n < 1 for n in event_shape):
        raise ConfigError(f"event_shape must be the shape of one point, such as (2,) or (1, 8, 8), got {event_shape}")
    return tuple(event_shape)
