"""Jacobian of a flow by the forward variational ODE, and its log-determinant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cnf._utils.errors import ConfigError, DataError
from cnf.ode.continuous import CNF
from cnf.sensitivity.paths import TangentState, integrate_tangents, require_points, unit_tangents
from cnf.solvers import Solver
from cnf.transforms import Request, Transform
from cnf.transforms.chain import State, Visit, walk

__all__ = ["jacobian", "log_det", "marginal_log_det"]


def jacobian(
    transform: Transform,
    x: Tensor,
    context: Tensor | None = None,
    *,
    chunk: int | None = None,
    solver: Solver | None = None,
    back: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Return z (N, \*event') and the Jacobian ∂z/∂x (N, D, D) of a transform, rows and columns in flattened order.

    In a block the columns obey the cable rule :math:`dY/dt = A(t)\, Y,\ Y(0) = I,\ A = \partial f/\partial x` along the
    path (AFFJORD, 2306.02731, eq. 11), integrated together with the state by jvps of ``chunk`` unit tangents. No
    divergence or trace is integrated, so its determinant is an independent check of ``log_det``. Chains
    (:class:`~cnf.transforms.Sequential`, :class:`~cnf.ode.multiscale.Multiscale`, :class:`~cnf.ode.multiscale.SharedAugmentedTime`)
    propagate the tangents, transforms without an ODE by ``torch.func.jvp``. On a fixed grid the result is the
    derivative of the discretised map itself. The result is differentiable; call it under ``torch.no_grad()`` to save
    memory.

    Args:
        transform: a block, a chain, or any other transform.
        x: floats (N, \*event); with ``back`` the latent z.
        context: (N, C), (C,) or None.
        chunk: unit tangents integrated at once; every chunk solves the path again. None chooses by memory.
        solver: solver of every block; None uses the block's own in its present mode. The end time is T, not sampled
            (``steer``).
        back: return the Jacobian ∂x/∂z of the inverse.

    Raises:
        ConfigError: for a chunk below one, or blocks nested in a transform that is not a chain.
        DataError: for x that is not a batch of floats.
        SolverError: if a solve fails.

    Example:
        >>> from cnf.fields import MLP
        >>> block = CNF(MLP(2), end_time=0.5)
        >>> z, j = jacobian(block, torch.randn(5, 2))
        >>> j.shape
        torch.Size([5, 2, 2])
    """
    require_points(x, transform)
    request = Request(context, log_det=False, integrals=False, solver=solver, steer=False)
    ends = [walk(transform, (x, unit), request, _push(back), back) for unit in unit_tangents(x, chunk)]
    return ends[0][0], torch.cat([tangents.flatten(2) for _, tangents in ends]).permute(1, 2, 0)


def log_det(
    transform: Transform,
    x: Tensor,
    context: Tensor | None = None,
    *,
    chunk: int | None = None,
    solver: Solver | None = None,
    back: bool = False,
) -> Tensor:
    """Return log|det ∂z/∂x| (N,) in nats of :func:`jacobian` (same arguments), without trace or quadrature.

    Raises:
        ConfigError, DataError, SolverError: as :func:`jacobian`.

    Example:
        >>> from cnf.fields import MLP
        >>> block = CNF(MLP(2)).double().eval()
        >>> x = torch.randn(5, 2, dtype=torch.float64)
        >>> bool(torch.allclose(log_det(block, x), block(x).log_det, atol=1e-4))
        True
    """
    _, j = jacobian(transform, x, context, chunk=chunk, solver=solver, back=back)
    value: Tensor = torch.linalg.slogdet(j)[1]
    return value


def marginal_log_det(
    transform: Transform, x: Tensor, start: Tensor, context: Tensor | None = None, *, chunk: int | None = None, solver: Solver | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return y (N, D) and log|det ∂y/∂x| (N,) in nats of the marginal map of an augmented transform. Experimental.

    The transform acts on [x, a], a beginning at the same ``start`` for every row, and y is the first D entries of the
    result: general augmentation (AFFJORD, 2306.02731, eq. 15-16), where a may depend on x along the path, so that no trace gives the
    log-det. It is the determinant of a D × D part of :func:`jacobian`, at D + k tangents. The map x ↦ y need not be
    injective, and only where it is do these numbers define a density.

    Args:
        transform: from (D + k,) to (D + k,).
        x: points (N, D).
        start: a at the beginning, (k,).
        context, chunk, solver: as of :func:`jacobian`.

    Raises:
        DataError: for x that is not a batch of vectors, or a ``start`` that is not one.
        ConfigError, SolverError: as :func:`jacobian`.

    Example:
        >>> from cnf.fields import MLP
        >>> block = CNF(MLP(3))
        >>> y, value = marginal_log_det(block, torch.randn(5, 2), torch.zeros(1))
        >>> y.shape, value.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """
    require_points(x, transform)
    if not isinstance(start, Tensor):
        raise DataError(f"start is a {type(start).__name__}, expected a torch.Tensor (k,)")
    if x.ndim != 2 or start.ndim != 1:
        raise DataError(f"x has shape {tuple(x.shape)} and start {tuple(start.shape)}; expected points (N, D) and one vector (k,)")
    dim = x.shape[1]
    z, j = jacobian(transform, torch.cat([x, start.to(x).expand(len(x), -1)], 1), context, chunk=chunk, solver=solver)
    value: Tensor = torch.linalg.slogdet(j[:, :dim, :dim])[1]
    return z[:, :dim], value


def _push(reverse: bool) -> Visit:
    """Return the visitor that propagates points x (N, \\*event) and tangents v (K, N, \\*event) through a leaf."""

    def push(transform: Transform, state: State, request: Request) -> State:
        x, v = state
        if isinstance(transform, CNF):
            return _block(transform, x, v, request, reverse)
        if any(isinstance(m, CNF) for m in transform.modules()):
            raise ConfigError(
                f"transform has a {type(transform).__name__} with blocks inside, expected a CNF, Sequential, Multiscale or transforms "
                "without an ODE: take the Jacobian of its parts"
            )
        return _plain(transform, x, v, request, reverse)

    return push


def _block(block: CNF, x: Tensor, v: Tensor, request: Request, reverse: bool) -> State:
    """Propagate through one block, from the augmented time, if any, at the side of entry."""
    end, shared = block.end_time(x), request.augmented_time
    zero = torch.zeros_like(end)
    a = block.initial_augmented_time(x) if shared is None else shared.value
    if a is not None and shared is None and reverse:
        a = block.advance_augmented_time(a, end, request)
    out = integrate_tangents(block, TangentState(x, v, a), (end, zero) if reverse else (zero, end), request)
    if shared is not None and out.a is not None:
        shared.value = out.a
    return out.x, out.v


def _plain(transform: Transform, x: Tensor, v: Tensor, request: Request, reverse: bool) -> State:
    """Propagate through a transform without an ODE, all tangents as rows of one batch."""
    k, n = v.shape[:2]
    if request.context is not None and request.context.ndim == 2:
        request = replace(request, context=request.context.repeat(k, 1))
    step: Callable[..., Any] = transform.inverse if reverse else transform.forward
    jvp: Any = torch.func.jvp
    value, tangent = jvp(
        lambda y: step(y, request).value,
        (x.repeat(k, *(1,) * (x.ndim - 1)),),
        (v.reshape(k * n, *x.shape[1:]),),
    )
    return value[:n], tangent.unflatten(0, (k, n))
