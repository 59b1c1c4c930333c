"""Base class of flows: what follows from a transform and a base density."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from cnf._utils.errors import ConfigError
from cnf._utils.late import late
from cnf.bases import Base, StandardNormal
from cnf.distribution.embedding import ContextEmbedding
from cnf.transforms import Dequantize, Request, Transform, TransformOutput
from cnf.transforms.request import DEFAULT

__all__ = ["Density"]


class Density(nn.Module):
    """Base class of :class:`~cnf.flow.Flow`, as its distribution uses it."""

    event_shape: tuple[int, ...]
    """Shape of one data point."""
    latent_shape: tuple[int, ...]
    """Shape of one latent."""
    transform: Transform
    """Transform from data to noise."""
    base: Base
    """Density of the noise."""
    embedding: ContextEmbedding | None
    """Embedding of the context, before fields and base take it."""

    def evaluate(self, x: Tensor, request: Request = DEFAULT, *, reverse: bool = False, **former: Any) -> TransformOutput:
        """Transform rows of data to latents, or back."""
        raise NotImplementedError

    def distribution(self, context: Tensor | None = None, *, validate_args: bool | None = None) -> Any:
        """Return the distribution for a context."""
        raise NotImplementedError

    @property
    def dim(self) -> int:
        """Number of data dimensions D."""
        return math.prod(self.event_shape)

    @property
    def base_std(self) -> float:
        """Standard deviation of the normal base."""
        if not isinstance(self.base, StandardNormal):
            raise ConfigError(f"base_std is the standard deviation of a normal base, but this flow has a {type(self.base).__name__}")
        return self.base.std

    @property
    def levels(self) -> int | None:
        """Number of grey levels for images; None for vectors."""
        return next((m.levels for m in self.transform.modules() if isinstance(m, Dequantize)), None)

    @property
    def like(self) -> Tensor:
        """A tensor with the flow's floating-point dtype and device; torch's default without weights."""
        return next(self._weights(), torch.zeros(()))

    def _weights(self) -> Iterator[Tensor]:
        return (v for v in chain(self.parameters(), self.buffers()) if v.is_floating_point())

    def base_log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Return log q(z) (N,) in nats."""
        return self.base.log_prob(z, self.embed(context) if self.base.context_dim else context)

    def embed(self, context: Tensor | None) -> Tensor | None:
        """Return what fields and base take for a context (\\*lead, C): the context itself, or its embedding."""
        return context if context is None or self.embedding is None else self.embedding(context)

    def density(self, z: Tensor, log_det: Tensor, context: Tensor | None = None) -> Tensor:
        """Return log p(x) = log q(z) + log|det dz/dx| (N,) in nats, from the output of :meth:`evaluate`."""
        return self.base_log_prob(z, context) + log_det

    def to_bits(self, log_prob: Tensor, floats: bool) -> Tensor:
        """Convert nats to bits/dim: −log p / (D ln 2), plus log2(levels) for a density on [0, 1]."""
        shift = math.log2(self.levels) if floats and self.levels else 0.0
        return -log_prob / (self.dim * math.log(2)) + shift

    def save_pretrained(self, folder: str | Path, **options: Any) -> Path:
        """Write config.json, model.safetensors and a model card; see :func:`cnf.contrib.hub.save_pretrained`."""
        path: Path = late("cnf.contrib.hub", "save_pretrained", "hub")(self, folder, **options)
        return path

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str | torch.device = "cpu", **options: Any) -> Self:
        """Return the flow of a folder or of a repository ``"user/repo"``; see :func:`cnf.contrib.hub.from_pretrained`.

        Raises:
            ConfigError: if the model is a predictor.
        """
        model = late("cnf.contrib.hub", "from_pretrained", "hub")(source, device, **options)
        if not isinstance(model, cls):
            raise ConfigError(f"{source} holds a {type(model).__name__}, not a {cls.__name__}: load it by cnf.load")
        return model
