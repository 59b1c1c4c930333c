"""Derivatives dz/dθ of a block by constant, piecewise constant and time-dependent parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cnf._utils.errors import ConfigError
from cnf.ode.continuous import CNF
from cnf.sensitivity.along import Along, Values
from cnf.sensitivity.paths import chunk_size, require_points, unit_rows
from cnf.solvers import Solver
from cnf.solvers.base import State

__all__ = ["parameter_jacobian", "piecewise_jacobian", "response"]

END = "sqrt_end_time"  # a parameter of the whole block, not of a point in time


def parameter_jacobian(
    block: CNF,
    x: Tensor,
    context: Tensor | None = None,
    *,
    names: Sequence[str] | None = None,
    chunk: int | None = None,
    solver: Solver | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Return z and ∂z/∂θ of a block's constant parameters, by forward sensitivity.

    :math:`dS/dt = A\, S + \partial f/\partial\theta,\ S(0) = 0` is integrated together with the state (AFFJORD,
    2306.02731, eq. 11), ``chunk`` columns at a time. All parameters of the block are covered: those of the field, of
    the augmented time, and a learned end time.

    Args:
        block: a CNF.
        x: floats (N, \*event).
        context: (N, C), (C,) or None.
        names: parameter names from ``block.named_parameters()``; None for all that require a gradient.
        chunk: columns integrated at once; None chooses by memory.
        solver: None uses the block's own solver in its present mode.

    Returns:
        z (N, \*event), and by name ∂z/∂θ (N, \*event, \*θ.shape).

    Raises:
        ConfigError: for names that are not parameters of the block, no names, or a chunk below one.
        DataError: for x that is not a batch of floats.
        SolverError: if a solve fails.

    Example:
        >>> from cnf.fields import MLP
        >>> block = CNF(MLP(2, hidden=(8,), layer="concat"))
        >>> z, s = parameter_jacobian(block, torch.randn(5, 2), names=["field.layers.0.core.bias"])
        >>> s["field.layers.0.core.bias"].shape
        torch.Size([5, 2, 8])
    """
    if names is None:
        names = [name for name, p in block.named_parameters() if p.requires_grad]
    z, pieces = _pieces(block, x, [{}], context, names, chunk, solver)
    return z, {name: value[0] for name, value in pieces.items()}


def piecewise_jacobian(
    block: CNF,
    x: Tensor,
    pieces: Sequence[Values],
    context: Tensor | None = None,
    *,
    names: Sequence[str] | None = None,
    chunk: int | None = None,
    solver: Solver | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Return z and ∂z/∂θ_k of parameters that are constant on each of K equal pieces of [0, T].

    :math:`\partial z/\partial\theta_k = \int_{t_k}^{t_{k+1}} Y(T)\, Y(t)^{-1} (\partial f/\partial\theta)(t)\, dt`
    (AFFJORD, 2306.02731, app. C): forward sensitivity within piece k, whose columns then follow the cable rule to T.

    Args:
        pieces: parameters of each piece by name; the block's own are used for missing names.
        names: parameters to differentiate by; None for all that require a gradient, except a learned end time.
        block, x, context, chunk, solver: as for :func:`parameter_jacobian`.

    Returns:
        z (N, \*event), and by name (K, N, \*event, \*θ.shape).

    Raises:
        ConfigError: without pieces, for the end time, or values of another shape; other errors as
            :func:`parameter_jacobian`.

    Example:
        >>> from cnf.fields import MLP
        >>> block = CNF(MLP(2, hidden=(8,), layer="concat"))
        >>> bias = "field.layers.1.core.bias"
        >>> pieces = [{bias: torch.zeros(2)}, {bias: torch.ones(2)}]
        >>> z, s = piecewise_jacobian(block, torch.randn(5, 2), pieces, names=[bias])
        >>> s[bias].shape
        torch.Size([2, 5, 2, 2])
    """
    if not pieces:
        raise ConfigError("pieces is empty, expected the parameters of at least one piece: [{}] for the block's own")
    if names is None:
        names = [name for name, p in block.named_parameters() if p.requires_grad and name != END]
    if END in {*names, *(name for piece in pieces for name in piece)}:
        raise ConfigError(f"{END!r} belongs to the whole block, not to a piece: differentiate by it with parameter_jacobian")
    return _pieces(block, x, pieces, context, names, chunk, solver)


def response(
    block: CNF,
    x: Tensor,
    perturbation: Callable[[Tensor], Values],
    context: Tensor | None = None,
    *,
    parameters: Callable[[Tensor], Values] | None = None,
    solver: Solver | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Return z and its first-order response to a time-dependent parameter perturbation δθ(t).

    :math:`\delta z = \int_0^T Y(T)\, Y(t)^{-1} (\partial f/\partial\theta)(t)\, \delta\theta(t)\, dt` (AFFJORD,
    2306.02731, eq. 13), computed without the inverse from
    :math:`d\,\delta x/dt = A\, \delta x + (\partial f/\partial\theta)\, \delta\theta(t)`. Where θ(t) is a sum of
    coefficients times functions φ_j(t), the response to φ_j in one entry is the derivative by that coefficient. A
    learned initial augmented time is perturbed by δθ(0). Gradients with respect to tensors captured by the two
    functions need a solver with ``gradient="direct"``.

    Args:
        perturbation: returns δθ by name at t () in [0, T]; the same names at every t.
        parameters: returns θ by name at t, the point of linearisation; None, or a missing name, uses the block's own.
        block, x, context, solver: as for :func:`parameter_jacobian`.

    Returns:
        z and δz, (N, \*event) each.

    Raises:
        ConfigError: for the end time, or values of another shape; other errors as :func:`parameter_jacobian`.

    Example:
        >>> from cnf.fields import MLP
        >>> block = CNF(MLP(2, hidden=(8,), layer="concat"))
        >>> z, dz = response(block, torch.randn(5, 2), lambda t: {"field.layers.1.core.bias": t.cos() * torch.ones(2)})
        >>> dz.shape
        torch.Size([5, 2])
    """
    require_points(x, block)
    along = Along(block, context, solver)
    zero = torch.zeros_like(block.end_time(x))
    base = parameters or (lambda t: {})
    for values in (perturbation(zero), base(zero)):
        along.check(values)
        if END in values:
            raise ConfigError(f"{END!r} belongs to the whole block, not to a time t: differentiate by it with parameter_jacobian")

    def direction(t: Tensor) -> Values:
        return {name: value[None] for name, value in perturbation(t).items()}

    point, tangents = along.begin(x, base(zero), direction(zero))
    point, tangents = along.integrate(point, tangents, (0.0, 1.0), base, direction)
    return point[0], tangents[0][0]


def _pieces(
    block: CNF,
    x: Tensor,
    pieces: Sequence[Values],
    context: Tensor | None,
    names: Sequence[str],
    chunk: int | None,
    solver: Solver | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return z and its derivatives by each piece's parameters, in chunks of columns that each solve the path again."""
    require_points(x, block)
    along = Along(block, context, solver, pieces)
    along.check(dict.fromkeys(names))
    for piece in pieces:
        along.check(piece)
    if not names:
        raise ConfigError("names is empty, expected at least one of the block's parameters")
    shapes = [along.own[name].shape for name in names]
    sizes = [shape.numel() for shape in shapes]
    size = chunk_size(chunk, sum(sizes), max(x.numel(), sum(sizes)))

    def unflatten(flat: Tensor) -> Values:
        parts = zip(names, flat.split(sizes, -1), shapes, strict=True)
        return {name: part.reshape(*part.shape[:-1], *shape) for name, part, shape in parts}

    def run(k: int, point: State, tangents: State, unit: Values) -> tuple[State, State]:
        shares = k / len(pieces), (k + 1) / len(pieces)
        return along.integrate(point, tangents, shares, lambda t: pieces[k], lambda t: unit)

    start, _ = along.begin(x, pieces[0], {})
    z: Tensor | None = None
    rows = []
    for k in range(len(pieces)):
        row = []
        for unit in map(unflatten, unit_rows(sum(sizes), size, x)):
            point, tangents = along.begin(x, pieces[0], unit) if k == 0 else (start, along.zero_tangents(start, unit))
            point, tangents = run(k, point, tangents, unit)
            for later in range(k + 1, len(pieces)):
                point, tangents = run(later, point, tangents, {})
            row.append(tangents[0])
            z = point[0] if z is None else z
        rows.append(torch.cat(row))  # (P, N, *event)
        if k + 1 < len(pieces):
            start, _ = run(k, start, (), {})
    assert z is not None
    return z, dict(unflatten(torch.stack(rows).movedim(1, -1)))
