"""Jacobian of a flow by the forward variational ODE, and its log-determinant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from cnf.continuous import CNF
from cnf.errors import ConfigError
from cnf.multiscale import Carried, Multiscale
from cnf.sensitivity.paths import Carry, carry, chunk_size, path_end, require_points, units
from cnf.solvers import Solver
from cnf.transforms import Sequential, Transform

__all__ = ["jacobian", "log_det"]

Pair = tuple[Tensor, Tensor]


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
    (:class:`~cnf.transforms.Sequential`, :class:`~cnf.multiscale.Multiscale`, :class:`~cnf.multiscale.Carried`)
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
    require_points(x)
    dim = x.shape[1:].numel()
    size = chunk_size(chunk, dim, x.numel())
    push = _Push(context, solver, back)
    values, columns = [], []
    for first in range(0, dim, size):
        value, tangents = push(transform, x, units(x, first, min(size, dim - first)))
        values.append(value)
        columns.append(tangents.flatten(2))
    return values[0], torch.cat(columns).permute(1, 2, 0)


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


class _Push:
    """Propagation of points x (N, \\*event) and tangents v (K, N, \\*event) through a transform."""

    def __init__(self, context: Tensor | None, solver: Solver | None, back: bool):
        self.context, self.solver, self.back = context, solver, back

    def __call__(self, transform: Transform, x: Tensor, v: Tensor) -> Pair:
        if isinstance(transform, CNF):
            a = transform.start(x)
            out = self.block(transform, Carry(x, v, self.end(transform, a, x) if self.back else a))
            return out.x, out.v
        if isinstance(transform, Carried):
            return self.carried(transform, x, v)
        if isinstance(transform, Sequential):
            return self.chain(transform, x, v)
        if isinstance(transform, Multiscale):
            return self.scales_back(transform, x, v) if self.back else self.scales(transform, x, v)
        if any(isinstance(m, CNF) for m in transform.modules()):
            raise ConfigError(
                f"transform has a {type(transform).__name__} with blocks inside: expected CNF, Sequential or "
                "Multiscale, or transforms without an ODE; take the Jacobian of its parts"
            )
        return self.plain(transform, x, v)

    def block(self, block: CNF, at: Carry) -> Carry:
        """Propagate through one block, from the augmented time, if any, at the side of entry."""
        end = block.end_time(at.x)
        zero = torch.zeros_like(end)
        return carry(block, at, (end, zero) if self.back else (zero, end), self.context, self.solver)

    def end(self, block: CNF, a: Tensor | None, x: Tensor) -> Tensor | None:
        """Return the augmented time at the end of a block, where the inverse starts."""
        return None if a is None else path_end(block, a, x, self.solver)

    def carried(self, chain: Carried, x: Tensor, v: Tensor) -> Pair:
        """Propagate through a chain whose blocks share one augmented time."""
        parts = [cast(Transform, part) for part in chain.transforms]
        a = chain.start(x, self.back)
        ends = []
        for part in parts if self.back else ():
            a = self.end(part, a, x) if isinstance(part, CNF) else chain.between(part, a)
            ends.append(a)
        for part in reversed(parts) if self.back else parts:
            entered = ends.pop() if self.back else a
            if isinstance(part, CNF):
                x, v, a = self.block(part, Carry(x, v, entered))
            else:
                x, v = self(part, x, v)
                a = chain.between(part, entered)
        return x, v

    def chain(self, chain: Sequential, x: Tensor, v: Tensor) -> Pair:
        """Propagate through the transforms, first to last or (``back``) last to first."""
        parts = [cast(Transform, part) for part in chain.transforms]
        for part in reversed(parts) if self.back else parts:
            x, v = self(part, x, v)
        return x, v

    def scales(self, chain: Multiscale, x: Tensor, v: Tensor) -> Pair:
        """Propagate through the scales, factoring out half of the channels after all but the last."""
        left, leaving = [], []
        for i, scale in enumerate(chain.scales):
            x, v = self(cast(Transform, scale), x, v)
            out, dout = x, v
            if i + 1 < len(chain.scales):
                x, out = chain.split(x)
                v, dout = (half.unflatten(0, v.shape[:2]) for half in chain.split(v.flatten(0, 1)))
            left.append(out.flatten(1))
            leaving.append(dout.flatten(2))
        return torch.cat(left, 1), torch.cat(leaving, 2)

    def scales_back(self, chain: Multiscale, z: Tensor, v: Tensor) -> Pair:
        """Propagate z (N, D) through the inverses of the scales, last to first."""
        sizes = [int(torch.Size(shape).numel()) for shape in chain.outputs]
        parts = [p.unflatten(1, shape) for p, shape in zip(z.split(sizes, 1), chain.outputs, strict=True)]
        tangents = [p.unflatten(2, shape) for p, shape in zip(v.split(sizes, 2), chain.outputs, strict=True)]
        x, v = parts[-1], tangents[-1]
        for i, scale in reversed(list(enumerate(chain.scales))):
            if i + 1 < len(chain.scales):
                x = chain.split.inverse(x, parts[i])
                v = chain.split.inverse(v.flatten(0, 1), tangents[i].flatten(0, 1)).unflatten(0, v.shape[:2])
            x, v = self(cast(Transform, scale), x, v)
        return x, v

    def plain(self, transform: Transform, x: Tensor, v: Tensor) -> Pair:
        """Propagate through a transform without an ODE, all tangents as rows of one batch."""
        k, n = v.shape[:2]
        context = self.context
        if context is not None and context.ndim == 2:
            context = context.repeat(k, 1)
        step: Callable[..., Any] = transform.inverse if self.back else transform.forward
        jvp: Any = torch.func.jvp
        value, tangent = jvp(
            lambda y: step(y, context, log_det=False, integrals=False).value,
            (x.repeat(k, *(1,) * (x.ndim - 1)),),
            (v.reshape(k * n, *x.shape[1:]),),
        )
        return value[:n], tangent.unflatten(0, (k, n))
