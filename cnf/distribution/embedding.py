"""Context of a conditional flow, standardised and embedded inside the model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cnf._utils.errors import ConfigError, DataError, require_at_least

__all__ = ["ContextEmbedding"]


class ContextEmbedding(nn.Module):
    """Standardisation of a context (N, C), followed by a network; ``Flow(..., embedding=net, context_dim=C)`` makes it.

    Mean and standard deviation are buffers, 0 and 1 until :meth:`fit`: they are saved with the model, which takes contexts
    in their own units.

    Args:
        network: maps (N, C) to what the fields and the base take as context, (N, C').
        context_dim: size C of the context.

    Raises:
        ConfigError: for a context without entries.

    Example:
        >>> embedding = ContextEmbedding(nn.Linear(2, 8), 2)
        >>> embedding.fit(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))  # a constant entry is centred alone
        >>> embedding.mean, embedding.std, embedding(torch.zeros(7, 2)).shape
        (tensor([1., 5.]), tensor([1.4142, 1.0000]), torch.Size([7, 8]))
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, context_dim: int):
        super().__init__()
        require_at_least(1, context_dim=context_dim)
        self.network, self.context_dim = network, context_dim
        self.register_buffer("mean", torch.zeros(context_dim))
        self.register_buffer("std", torch.ones(context_dim))

    @property
    def fitted(self) -> bool:
        """Whether the statistics are those of data."""
        return bool((self.mean != 0).any() or (self.std != 1).any())

    @torch.no_grad()
    def fit(self, context: Tensor | Iterable[Tensor]) -> None:
        """Set mean and standard deviation to those of contexts (N, C), which may come in batches.

        Raises:
            DataError: for another size, less than two rows, or values that are not finite.
        """
        batches = [context] if isinstance(context, Tensor) else list(context)
        rows = torch.cat([batch.reshape(-1, batch.shape[-1]).double() for batch in batches])
        if rows.shape[1] != self.context_dim or len(rows) < 2 or not bool(rows.isfinite().all()):
            raise DataError(f"context has shape {tuple(rows.shape)}, expected two or more finite rows of {self.context_dim}")
        mean, std = rows.mean(0), rows.std(0)
        self.mean.copy_(mean)
        # the mean of a constant entry is rounded
        self.std.copy_(torch.where(std > 4 * torch.finfo(torch.float64).eps * mean.abs(), std, 1.0).clamp(min=1e-30))

    def forward(self, context: Tensor) -> Tensor:
        """Return the embedded context (\\*lead, C') of (\\*lead, C)."""
        rows = context.reshape(-1, context.shape[-1]).to(self.mean)
        out = self.network((rows - self.mean) / self.std)
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(rows):
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ConfigError(f"embedding returned {shape} for a context of shape {tuple(rows.shape)}, expected ({len(rows)}, C')")
        return out.reshape(*context.shape[:-1], out.shape[1]).to(context.dtype)

    def extra_repr(self) -> str:
        """Return the size of the context for ``repr``."""
        return f"context_dim={self.context_dim}"
