"""Quadratures along the path: energies, Jacobian norms, step error, running costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from cnf._utils.errors import ConfigError
from cnf.ode.divergence import Bound, Linearization

__all__ = ["Directional", "JacobianFrobenius", "Kinetic", "Quadrature", "RunningCost", "StepError", "TotalDerivative", "check_names", "learned_modules"]


class Quadrature(Protocol):
    """Named integrand along the path; ``need`` lists the terms of the linearisation that it reads.

    The terms are ``"div"`` and ``"jac_sq"``. Integrals are over |dt|, and integrands are sums, not means, over the
    block's dimensions: the regularisers are non-negative in both directions of time.
    """

    name: str
    need: frozenset[str]

    def __call__(self, t: Tensor, x: Tensor, linearization: Linearization, field: Bound) -> Tensor:
        """Return the integrand (N,) at time t () and points x (N, \\*event)."""


class Kinetic:
    r"""Kinetic energy :math:`\int \|f\|^2 dt` (RNODE, 2002.02798, eq. 17)."""

    name = "kinetic"
    need: frozenset[str] = frozenset()

    def __call__(self, t: Tensor, x: Tensor, linearization: Linearization, field: Bound) -> Tensor:
        return _square(linearization.dx)


class JacobianFrobenius:
    r"""Squared Frobenius norm :math:`\int \|\partial f / \partial x\|_F^2 dt` (RNODE, 2002.02798, eq. 16).

    A Hutchinson estimate of the trace supplies it from the same Jacobian product.
    """

    name = "jacobian"
    need: frozenset[str] = frozenset({"jac_sq"})

    def __call__(self, t: Tensor, x: Tensor, linearization: Linearization, field: Bound) -> Tensor:
        assert linearization.jac_sq is not None
        return linearization.jac_sq


class Directional:
    r"""Directional derivative :math:`\int \|J f\|^2 dt` along the path, by jvp (the published codes use a vjp)."""

    name = "directional"
    need: frozenset[str] = frozenset()

    def __call__(self, t: Tensor, x: Tensor, linearization: Linearization, field: Bound) -> Tensor:
        return _square(field.jvp(t, x, linearization.dx[None])[1][0])


class TotalDerivative:
    r"""Squared acceleration :math:`\int \|J f + \partial f / \partial t\|^2 dt` of the path.

    It is zero for straight paths at constant speed.
    """

    name = "total_derivative"
    need: frozenset[str] = frozenset()

    def __call__(self, t: Tensor, x: Tensor, linearization: Linearization, field: Bound) -> Tensor:
        return _square(field.jvp(t, x, linearization.dx[None], t_dot=torch.ones_like(t))[1][0])


class StepError:
    r"""Local error of a fixed grid, :math:`\sum_j |h_j| \, \|E_j\|` over its solver steps j (ERNODE, 2105.03918).

    h_j is the step as a fraction of the block's time, E_j the difference to a method of lower order with the same
    stages, available for ``"heun"``, ``"midpoint"``, ``"rk4"`` and ``"rk4-classic"``. The grid solver accumulates it;
    the integrand itself, and hence the integral of any other solver, is zero.
    """

    name = "step_error"
    need: frozenset[str] = frozenset()

    def __call__(self, t: Tensor, x: Tensor, linearization: Linearization, field: Bound) -> Tensor:
        return x.new_zeros(len(x))


class RunningCost:
    r"""User-defined running cost :math:`\int l(t, x) dt`.

    Args:
        name: key among the integrals.
        cost: ``cost(t, x) -> (N,)``.

    Raises:
        ConfigError: on evaluation, for a cost of another shape.

    Example:
        >>> square = RunningCost("distance", lambda t, x: x.square().flatten(1).sum(1))
    """

    need: frozenset[str] = frozenset()

    def __init__(self, name: str, cost: Callable[[Tensor, Tensor], Tensor]):
        self.name, self.cost = name, cost

    def __call__(self, t: Tensor, x: Tensor, linearization: Linearization, field: Bound) -> Tensor:
        value = self.cost(t, x)
        if value.shape != x.shape[:1]:
            raise ConfigError(
                f"running cost {self.name!r} must return shape ({x.shape[0]},), one value per row, got {tuple(value.shape)}"
            )
        return value


def check_names(quadratures: Sequence[Quadrature]) -> None:
    """Raise a ConfigError if the names are not unique or one is ``log_det``."""
    names = [q.name for q in quadratures]
    if "log_det" in names or len(set(names)) < len(names):
        raise ConfigError(f"names of quadratures must be unique and not 'log_det', got {names}")


def learned_modules(quadratures: Sequence[Quadrature]) -> list[nn.Module]:
    """Return the running costs that are modules, whose parameters are trained with the field."""
    return [m for q in quadratures for m in (q, getattr(q, "cost", None)) if isinstance(m, nn.Module)]


def _square(v: Tensor) -> Tensor:
    return v.flatten(1).square().sum(1)
