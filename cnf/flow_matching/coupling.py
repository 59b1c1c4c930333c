"""Couplings of data and noise."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cnf._utils.errors import ConfigError

__all__ = ["COUPLINGS", "couple"]

COUPLINGS = ("independent", "optimal-transport")


@torch.no_grad()
def couple(x: Tensor, z: Tensor, context: Tensor | None = None, kind: str = "optimal-transport") -> Tensor:
    r"""Permute the rows of z to match those of x: not at all, or to minimise :math:`\sum \|x_i - z_i\|^2`.

    The assignment within a batch approaches optimal transport as the batch grows (2302.00482). With a context, rows are
    assigned within the same context only, so that z stays independent of it; contexts that are all different leave z
    unchanged. A permutation preserves both marginals.

    Args:
        x: data (N, \*event).
        z: noise (N, \*event).
        context: (N, C) or None; (C,), shared by all rows, has no effect.
        kind: ``"independent"`` or ``"optimal-transport"``.

    Raises:
        ConfigError: for another kind, or different shapes of x and z.

    Example:
        >>> x, z = torch.tensor([[0.0], [5.0]]), torch.tensor([[4.0], [1.0]])
        >>> couple(x, z).flatten().tolist()
        [1.0, 4.0]
    """
    if kind not in COUPLINGS:
        raise ConfigError(f"coupling must be {' or '.join(map(repr, COUPLINGS))}, got {kind!r}")
    if x.shape != z.shape:
        raise ConfigError(f"x has shape {tuple(x.shape)} and z {tuple(z.shape)}, expected the same shape")
    if kind == "independent":
        return z
    cost = torch.cdist(x.flatten(1).double(), z.flatten(1).double()).square().cpu().numpy()
    order = np.arange(len(x))
    for rows in _groups(context, len(x)):
        _, chosen = linear_sum_assignment(cost[np.ix_(rows, rows)])
        order[rows] = rows[chosen]
    return z[torch.from_numpy(order).to(z.device)]


def _groups(context: Tensor | None, rows: int) -> list[np.ndarray]:
    """Return the row indices of each context."""
    if context is None or context.ndim == 1:
        return [np.arange(rows)]
    _, kinds = torch.unique(context, dim=0, return_inverse=True)
    numbers = kinds.cpu().numpy()
    return [np.flatnonzero(numbers == kind) for kind in range(int(numbers.max()) + 1)]
