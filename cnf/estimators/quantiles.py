"""Distribution functions, quantiles, means and CRPS of a conditional flow on a conditional mixture."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch
from torch import Tensor

from cnf.bases.conditional import ContextMixture
from cnf.flow import Flow

__all__ = ["cdf", "mean", "quantiles", "sorted_crps"]

_NODES = 9  # Gauss-Hermite nodes of each component, exact for polynomials of degree 17
_PAIRS = 16  # antithetic pairs of each component, for several columns
_BISECTIONS = 60
_REACH = 12.0  # standard deviations
_SOLVES = 16384  # points of one solve


def cdf(flow: Flow, y: Tensor, context: Tensor) -> Tensor:
    """Return F(y | context) (N,) for y (N, 1): that of the base at z(y), since the flow is increasing in one dimension."""
    with torch.no_grad():
        return _base(flow).cdf(flow.encode(y, context), context)


def quantiles(flow: Flow, context: Tensor, levels: Tensor) -> Tensor:
    """Return the quantiles (N, Q) of y (N, 1) at levels (Q,) in (0, 1).

    Bisection inverts the distribution function of the base to rounding, one solve maps the quantiles to y: the error is
    that of the solver.
    """
    with torch.no_grad():
        out = [_quantiles(flow, part, levels) for part in context.split(max(1, _SOLVES // len(levels)))]
    return torch.cat(out) if out else context.new_empty(0, len(levels))


def _quantiles(flow: Flow, context: Tensor, levels: Tensor) -> Tensor:
    log_weights, means, a = _base(flow).parts(context)
    means, precision, weights = means[..., 0], a[..., 0, 0], log_weights.exp()
    low = (means - _REACH / precision).amin(1, keepdim=True).expand(-1, len(levels))
    high = (means + _REACH / precision).amax(1, keepdim=True).expand(-1, len(levels))
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        below = (weights[:, None] * torch.special.ndtr(precision[:, None] * (middle[..., None] - means[:, None]))).sum(2) < levels
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return _decode(flow, (0.5 * (low + high))[..., None], context)[..., 0]


def mean(flow: Flow, context: Tensor) -> Tensor:
    """Return E[y | context] (N, D), by Gauss-Hermite quadrature of each component in one dimension.

    In several dimensions each component takes 16 antithetic pairs of quasi-random points. Both are exact if y is affine
    in the latent.
    """
    base = _base(flow)
    nodes, shares = _nodes(base.event_shape[0])
    nodes, shares = nodes.to(context), shares.to(context)
    size = max(1, _SOLVES // (base.components * len(nodes)))
    out = []
    with torch.no_grad():
        for part in context.split(size):
            log_weights, means, a = base.parts(part)
            white = nodes.T.expand(*means.shape[:2], *nodes.T.shape)
            z = means[..., None] + torch.linalg.solve_triangular(a, white, upper=False)  # (N, K, D, J)
            y = _decode(flow, z.movedim(3, 2).flatten(1, 2), part).unflatten(1, (base.components, len(nodes)))
            out.append((log_weights.exp()[..., None, None] * shares[:, None] * y).sum((1, 2)))
    return torch.cat(out) if out else context.new_empty(0, base.event_shape[0])


def sorted_crps(draws: Tensor, y: Tensor) -> Tensor:
    r"""Return the CRPS (N,) of equally likely, sorted draws (N, M) at y (N,): ∫ (F(t) − 1{t ≥ y})² dt.

    Quantiles at the levels (i − ½)/M give the integral of the pinball losses by the midpoint rule.
    """
    count = draws.shape[1]
    levels = (torch.arange(count, device=draws.device) + 0.5).to(draws) / count
    apart = draws - y[:, None]
    return 2 * (apart * ((apart > 0).to(draws) - levels)).mean(1)


def _decode(flow: Flow, z: Tensor, context: Tensor) -> Tensor:
    """Return y (N, J, D) of latents (N, J, D), J for each row of the context."""
    rows = context[:, None].expand(-1, z.shape[1], -1).flatten(0, 1)
    return flow.decode(z.flatten(0, 1), rows).reshape(z.shape)


def _nodes(dim: int) -> tuple[Tensor, Tensor]:
    """Return nodes (J, D) and weights (J,) of the standard normal."""
    if dim == 1:
        x, w = np.polynomial.hermite_e.hermegauss(_NODES)
        return torch.from_numpy(x)[:, None], torch.from_numpy(w / math.sqrt(2 * math.pi))
    u = torch.quasirandom.SobolEngine(dim, scramble=True, seed=0).draw(_PAIRS, dtype=torch.float64)
    half = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
    return torch.cat([half, -half]), torch.full((2 * _PAIRS,), 0.5 / _PAIRS, dtype=torch.float64)


def _base(flow: Flow) -> ContextMixture:
    return cast(ContextMixture, flow.base)
