"""Perceptron as vector field, with low-rank updates of its weights for each row (amortised flows of FFJORD, 1810.01367)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from cnf._utils.errors import ConfigError, require_at_least
from cnf.fields.activations import activation
from cnf.fields.base import VectorField, intact

__all__ = ["LowRankMLP"]


class LowRankMLP(VectorField):
    r"""f(t, x) of layers :math:`(W + U V^\top) [x; t] + b + s`, whose U, V and s each row's context holds.

    W and b are shared by all rows; the context is a flat vector of :attr:`context_dim` numbers, with U, V and s of every
    layer in turn, such as a linear map of an encoder's features. A context of zeros is a plain perceptron with time in
    each layer. Rows do not share weights, so that there is no closed-form trace.

    Args:
        dim: dimension D.
        hidden: widths of the hidden layers.
        rank: of the updates.
        nonlinearity: activation between the layers.

    Raises:
        ConfigError: for sizes below one, or, when called, a context of another width.

    Example:
        >>> field = LowRankMLP(2, (8,), rank=1)
        >>> field.context_dim, field(torch.tensor(0.5), torch.zeros(3, 2), torch.zeros(3, 32)).shape
        (32, torch.Size([3, 2]))
    """

    def __init__(self, dim: int, hidden: Sequence[int] = (64, 64), rank: int = 1, nonlinearity: str = "softplus"):
        super().__init__()
        require_at_least(1, dim=dim, rank=rank, **{f"hidden_{i}": h for i, h in enumerate(hidden)})
        sizes = [dim, *hidden, dim]
        self.layers = nn.ModuleList(nn.Linear(a + 1, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.activation = activation(nonlinearity)
        self.rank = rank
        self.updates = self.context_dim = sum(self._sizes())  # number of entries of U, V and s of all layers

    def _sizes(self) -> Iterator[int]:
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            yield from (layer.out_features * self.rank, layer.in_features * self.rank, layer.out_features)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (N, D) at x (N, D), t () and a context (N, C)."""
        if context is None or context.shape[-1] != self.updates:
            found = None if context is None else tuple(context.shape)
            raise ConfigError(f"context has shape {found}; expected (N, {self.updates}): U, V and s of every layer")
        return self._run(t, x, None, None, context)[0]

    def jvp(
        self, t: Tensor, x: Tensor, v: Tensor, context: Tensor | None = None, *, t_dot: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return f and J v + t_dot ∂f/∂t for K stacked tangents, which pass the layers with the point; see :meth:`VectorField.jvp`."""
        if not intact(self) or context is None:
            return super().jvp(t, x, v, context, t_dot=t_dot)
        out, tangent = self._run(t, x, v, t_dot, context)
        assert tangent is not None
        return out, tangent

    def _run(self, t: Tensor, x: Tensor, v: Tensor | None, t_dot: Tensor | None, context: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return f (N, D), and its tangents (K, N, D) along v (K, N, D)."""
        parts, h, d = iter(context.split(list(self._sizes()), -1)), x, v
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            if i:
                h, slope = self.activation.pair(h) if d is not None else (self.activation.value(h), h)
                d = None if d is None else slope * d
            h = torch.cat([h, t.expand(len(x), 1)], 1)
            # U (N, out, rank) and V (N, in, rank), or without N
            u, w, s = next(parts).unflatten(-1, (-1, self.rank)), next(parts).unflatten(-1, (-1, self.rank)), next(parts)
            h = layer(h) + _update(u, w, h) + s
            if d is not None:
                d = torch.cat([d, (t.new_zeros(()) if t_dot is None else t_dot).expand(*d.shape[:-1], 1)], -1)
                d = d @ layer.weight.T + _update(u, w, d)
        return h, d


def _update(u: Tensor, v: Tensor, h: Tensor) -> Tensor:
    """Return U Vᵀ h for rows h (..., N, in)."""
    inner = (h[..., None] * v).sum(-2)
    return (inner[..., None, :] * u).sum(-1)
