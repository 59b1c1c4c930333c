"""Posteriors of autoencoders: CNFs that are the same for all x, or amortised by updates of low rank (FFJORD, 1810.01367)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cnf._utils.errors import ConfigError, require_at_least
from cnf.fields.base import VectorField, intact
from cnf.fields.low_rank import LowRankMLP
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Divergence
from cnf.solvers import Solver
from cnf.transforms import Sequential

__all__ = ["posterior_flow"]


def posterior_flow(
    latent: int, hidden: Sequence[int] = (64, 64), rank: int = 8, blocks: int = 1, solver: Solver | None = None, divergence: Divergence | None = None
) -> tuple[Sequential, int]:
    """Return the flow of a posterior and the width of its context: CNFs with updates of this rank, or for 0 the same for all x.

    Args:
        latent: dimension of z.
        hidden: widths of the fields' hidden layers.
        rank: of the updates; 0 for none.
        blocks: number of CNFs.
        solver, divergence: of each, see :class:`~cnf.CNF`.

    Example:
        >>> flow, width = posterior_flow(2, (8,), rank=1)
        >>> len(flow.transforms), width
        (1, 32)
    """
    require_at_least(1, blocks=blocks)
    fields = [_Amortised(latent, hidden, max(1, rank), i, blocks, rank > 0) for i in range(blocks)]
    return Sequential([CNF(field, divergence, solver) for field in fields]), fields[0].context_dim or 0


class _Amortised(LowRankMLP):
    """Field of block ``place`` of ``blocks``: takes its part of the context, or none at all."""

    def __init__(self, dim: int, hidden: Sequence[int], rank: int, place: int, blocks: int, amortised: bool):
        super().__init__(dim, hidden, rank)
        self.place, self.blocks, self.amortised = place, blocks, amortised
        self.context_dim = self.updates * blocks if amortised else 0

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (N, D)."""
        return super().forward(t, x, self._own(x, context))

    def jvp(
        self, t: Tensor, x: Tensor, v: Tensor, context: Tensor | None = None, *, t_dot: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return dx/dt (N, D) and its tangents (K, N, D)."""
        if not intact(self):
            return VectorField.jvp(self, t, x, v, context, t_dot=t_dot)
        return super().jvp(t, x, v, self._own(x, context), t_dot=t_dot)

    def _own(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return this block's part of the context."""
        if not self.amortised:
            return x.new_zeros(self.updates)
        if context is None:
            raise ConfigError("context is missing: an amortised field takes that of the encoder")
        return context.chunk(self.blocks, -1)[self.place]
