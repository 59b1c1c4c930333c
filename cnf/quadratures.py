"""What is integrated along the path beside the point: log-det, energies, Jacobian norms, running costs.

Values are raw: the integral over t of the SUM over the block's dimensions, non-negative in both directions of time (the
log-det apart, which has its sign).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from cnf.divergence import Bound, Linearization
from cnf.errors import ConfigError

__all__ = ["Directional", "JacobianFrobenius", "Kinetic", "Quadrature", "RunningCost", "StepError", "TotalDerivative", "check_names"]


class Quadrature(Protocol):
    """An integrand with a name; ``need`` lists what it takes from the linearization (``"div"``, ``"jac_sq"``)."""

    name: str
    need: frozenset[str]

    def __call__(self, t: Tensor, x: Tensor, linearization: Linearization, field: Bound) -> Tensor:
        """The integrand (N,) at time t () and point x (N, \\*event)."""


class Kinetic:
    r"""Kinetic energy :math:`\int \|f\|^2 dt` (RNODE, 2002.02798, eq. 17)."""

    name = "kinetic"
    need: frozenset[str] = frozenset()

    def __call__(self, t: Tensor, x: Tensor, linearization: Linearization, field: Bound) -> Tensor:
        return _square(linearization.dx)


class JacobianFrobenius:
    r"""Squared Frobenius norm :math:`\int \|\partial f / \partial x\|_F^2 dt`, from the trace's own product where it is an
    estimate (RNODE, 2002.02798, eq. 16)."""

    name = "jacobian"
    need: frozenset[str] = frozenset({"jac_sq"})

    def __call__(self, t: Tensor, x: Tensor, linearization: Linearization, field: Bound) -> Tensor:
        assert linearization.jac_sq is not None
        return linearization.jac_sq


class Directional:
    r"""Directional derivative along the path :math:`\int \|J f\|^2 dt`: a true jvp, where the published codes pull back."""

    name = "directional"
    need: frozenset[str] = frozenset()

    def __call__(self, t: Tensor, x: Tensor, linearization: Linearization, field: Bound) -> Tensor:
        return _square(field.jvp(t, x, linearization.dx[None])[1][0])


class TotalDerivative:
    r"""The path's acceleration :math:`\int \|J f + \partial f / \partial t\|^2 dt`; zero means straight lines at constant speed."""

    name = "total_derivative"
    need: frozenset[str] = frozenset()

    def __call__(self, t: Tensor, x: Tensor, linearization: Linearization, field: Bound) -> Tensor:
        return _square(field.jvp(t, x, linearization.dx[None], t_dot=torch.ones_like(t))[1][0])


class StepError:
    r"""The solver's own error :math:`\sum_j |h_j| \, \|E_j\|`, E_j the local error of step j of a grid (ERNODE, 2105.03918).

    h is the step as a share of the block's time. E_j is the difference to a method of lower order with the same stages; there is one for ``"heun"``, ``"midpoint"``,
    ``"rk4"`` and ``"rk4-classic"``. The grid adds it up; as an integrand it is zero, and so with any other solver.
    """

    name = "step_error"
    need: frozenset[str] = frozenset()

    def __call__(self, t: Tensor, x: Tensor, linearization: Linearization, field: Bound) -> Tensor:
        return x.new_zeros(len(x))


class RunningCost:
    r"""The user's own :math:`\int l(t, x) dt`.

    Args:
        name: its name among the integrals.
        cost: ``cost(t, x) -> (N,)``.

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
                f"running cost {self.name!r} returned shape {tuple(value.shape)}; expected ({x.shape[0]},), one a row"
            )
        return value


def check_names(quadratures: Sequence[Quadrature]) -> None:
    """Refuse two integrals of one name, or one called ``log_det``.

    Raises:
        ConfigError: naming the name.
    """
    names = [q.name for q in quadratures]
    for name in names:
        if name == "log_det" or names.count(name) > 1:
            raise ConfigError(f"quadrature name {name!r} is taken: give each integral its own name")


def _square(v: Tensor) -> Tensor:
    return v.flatten(1).square().sum(1)
