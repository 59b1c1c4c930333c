"""Magnus expansion of a block's Jacobian."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cnf._utils.errors import ConfigError, require_at_least
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Bound
from cnf.sensitivity.paths import TangentState, clock, integrate_tangents, require_points, unit_tangents
from cnf.solvers import FixedGrid, Solver
from cnf.transforms import Request

__all__ = ["MagnusSolution", "magnus"]


class MagnusSolution(NamedTuple):
    """Result of the Magnus expansion.

    ``z`` (N, \\*event); ``jacobian`` (N, D, D), the product of the steps' exponentials; ``terms`` (order, steps, N, D,
    D), Ω₁, Ω₂, … of every step; ``log_det`` (N,) = tr Ω₁ summed over the steps, in nats: all later terms are sums of
    commutators, whose trace is zero.
    """

    z: Tensor
    jacobian: Tensor
    terms: Tensor
    log_det: Tensor


def magnus(
    block: CNF,
    x: Tensor,
    context: Tensor | None = None,
    *,
    order: int = 2,
    steps: int = 8,
    nodes: int = 4,
    solver: Solver | None = None,
) -> MagnusSolution:
    r"""Compute the Jacobian ∂x(T)/∂x(0) of a block as a product of exponentials, one per step.

    Each is a truncated Magnus expansion (AFFJORD, 2306.02731, eq. 43-46),
    :math:`Y = \exp(\Omega_1 + \Omega_2 + \Omega_3 + \dots)` with

    .. math::
        \Omega_1 = \int A, \quad \Omega_2 = \tfrac12 \iint [A_1, A_2], \quad
        \Omega_3 = \tfrac16 \iiint ([A_1, [A_2, A_3]] + [A_3, [A_2, A_1]]), \qquad t_1 > t_2 > t_3.

    Truncated after Ω₁ a step of length h has error O(h³), after Ω₂ O(h⁵), after Ω₃ still O(h⁵) (the size of Ω₄), but
    usually smaller. A is evaluated at the Gauss-Legendre ``nodes`` of a step and interpolated; the nested integrals of
    the interpolant are exact. The interpolation error is orthogonal to polynomials of degree below ``nodes``, so that
    with three nodes or more it contributes O(h⁷) or less. The D x D matrices of a step's nodes are stored: this is for
    small D.

    Args:
        block: a CNF.
        x: floats (N, \*event).
        context: (N, C), (C,) or None.
        order: number of terms, 1 to 3.
        steps: equal steps over [0, T].
        nodes: Gauss-Legendre nodes per step, at least 3.
        solver: solver of the path between nodes; None for two steps of dopri5, more accurate than h⁵.

    Raises:
        ConfigError: for order, steps or nodes out of range.
        DataError: for x that is not a batch of floats.
        SolverError: if a solve fails.

    Example:
        >>> from cnf.fields import MLP
        >>> from cnf.sensitivity import log_det
        >>> block, x = CNF(MLP(2)).double(), torch.randn(5, 2, dtype=torch.float64)
        >>> out = magnus(block, x, order=3)
        >>> out.terms.shape, bool(torch.allclose(out.log_det, log_det(block, x, solver=FixedGrid("dopri5", 32))))
        (torch.Size([3, 8, 5, 2, 2]), True)
    """
    require_points(x, block)
    if order not in (1, 2, 3):
        raise ConfigError(f"order must be 1, 2 or 3, got {order}")
    require_at_least(1, steps=steps)
    require_at_least(3, nodes=nodes)
    end = block.end_time(x)
    h = end / steps
    fractions, tables = _tables(nodes)
    weights = [torch.as_tensor(table, dtype=x.dtype, device=x.device) for table in tables]
    request = Request(context, solver=solver or FixedGrid("dopri5", 2))
    at = TangentState(x, x.new_zeros(0, *x.shape), block.initial_augmented_time(x))
    now = torch.zeros_like(end)
    product: Tensor | None = None
    terms = []
    for i in range(steps):
        matrices = []
        for c in (*fractions, 1.0):
            then = h * (i + float(c))
            at, now = integrate_tangents(block, at, (now, then), request), then
            if c < 1:
                matrices.append(_matrix(block, now, at, context))
        omegas = _terms(h * torch.stack(matrices), weights[:order])
        factor = torch.linalg.matrix_exp(omegas.sum(0))
        product = factor if product is None else factor @ product
        terms.append(omegas)
    assert product is not None
    stacked = torch.stack(terms, 1)
    trace = stacked[0].diagonal(dim1=-2, dim2=-1).sum((0, -1))
    return MagnusSolution(at.x, product, stacked, trace)


def _matrix(block: CNF, t: Tensor, at: TangentState, context: Tensor | None) -> Tensor:
    """Return A = ∂f/∂x (N, D, D)."""
    bound = Bound(block.field, context)
    columns = [bound.jvp(clock(t, at.a), at.x, unit)[1].flatten(2) for unit in unit_tangents(at.x)]
    return torch.cat(columns).permute(1, 2, 0)


def _bracket(a: Tensor, b: Tensor) -> Tensor:
    return a @ b - b @ a


def _terms(a: Tensor, weights: list[Tensor]) -> Tensor:
    """Return Ω₁, Ω₂, Ω₃ (order, N, D, D) from h A at the nodes (m, N, D, D)."""
    out = [torch.einsum("i,inab->nab", weights[0], a)]
    if len(weights) > 1:
        inner = torch.einsum("ij,jnab->inab", weights[1], a)
        out.append(0.5 * _bracket(a, inner).sum(0))
    if len(weights) > 2:
        # with c[i,j,k] the integral of L_i(t1) L_j(t2) L_k(t3): each bracket with its outermost matrix factored out
        pairs = _bracket(a[:, None], a[None])  # [A_j, A_k]
        late = torch.einsum("ijk,jknab->inab", weights[2], pairs)
        early = torch.einsum("ijk,jinab->knab", weights[2], pairs)
        out.append((_bracket(a, late) + _bracket(a, early)).sum(0) / 6)
    return torch.stack(out)


@cache
def _tables(nodes: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return Gauss-Legendre nodes on [0, 1], and the integrals of products of their Lagrange polynomials.

    The integrals are over 1 > t1 > t2 > t3 > 0, of one, two and three polynomials.
    """
    x = (np.polynomial.legendre.leggauss(nodes)[0] + 1) / 2
    # nested Gauss-Legendre rules, exact for these degrees: coefficients in powers of t lose all digits at ten nodes
    g, w = np.polynomial.legendre.leggauss(2 * nodes)
    g, w = (g + 1) / 2, w / 2

    def lagrange(t: np.ndarray) -> np.ndarray:
        factors = [[(t - x[j]) / (x[i] - x[j]) for j in range(nodes) if j != i] for i in range(nodes)]
        return np.stack([np.prod(row, 0) for row in factors])

    t1 = g
    t2 = t1[:, None] * g
    t3 = t2[..., None] * g
    third = np.einsum("kabc,c,ab->kab", lagrange(t3), w, t2)
    second = np.einsum("jab,b,a->ja", lagrange(t2), w, t1)
    first = lagrange(t1) * w
    both = np.einsum("jab,kab,b,a->jka", lagrange(t2), third, w, t1)
    return x, (first.sum(1), first @ second.T, np.einsum("ia,jka->ijk", first, both))
