"""Regularisers as the released codes of FFJORD (1810.01367) and RNODE (2002.02798) compute them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cnf._utils.errors import unknown_name
from cnf.ode.divergence import Bound, Linearization

__all__ = ["RELEASED", "Released", "released"]

Integrand = Callable[[Tensor, Tensor, Linearization, Bound], Tensor]


@dataclass(eq=False)
class Released:
    """Released regulariser, evaluated at time t () and points x (N, \\*event) to (N,).

    Values are means over the current block's dimensions, so that a small block weighs as much as a large one.
    "Directional derivative" is the vjp Jᵀf instead of the derivative J f along the path. The regularisers of the papers
    are in :mod:`cnf.ode.quadratures`.

    FFJORD keeps a batch mean as one scalar of the ODE's state, which is the mean over rows of this quadrature's
    integral. RNODE keeps one value per row, as here.
    """

    name: str
    integrand: Integrand
    need: frozenset[str] = frozenset()

    def __call__(self, t: Tensor, x: Tensor, linearization: Linearization, field: Bound) -> Tensor:
        """Return the integrand (N,)."""
        return self.integrand(t, x, linearization, field)


def _mean(v: Tensor) -> Tensor:
    return v.flatten(1).square().mean(1)


def _root_mean(v: Tensor) -> Tensor:
    """Return the root mean square (N,), whose derivative at zero, where fields may start, is zero."""
    norm: Tensor = torch.linalg.vector_norm(v.flatten(1), dim=1)
    return norm / math.sqrt(v.shape[1:].numel())


def _vjp(t: Tensor, x: Tensor, field: Bound) -> Tensor:
    """Return Jᵀf (N, \\*event) by plain autograd, which works inside a checkpointed step."""
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        point = x if recording and x.requires_grad else x.detach().requires_grad_()
        f = field(t, point)
        (product,) = torch.autograd.grad(f, point, f if recording else f.detach(), create_graph=recording)
    return product


def _jacobian(t: Tensor, x: Tensor, field: Bound) -> Tensor:
    """Return J (N, D, D), row by row, in D backward passes as in the released code."""
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        point = x if recording and x.requires_grad else x.detach().requires_grad_()
        f = field(t, point).flatten(1)
        rows = [
            torch.autograd.grad(f[:, i].sum(), point, create_graph=recording, retain_graph=True)[0].flatten(1)
            for i in range(f.shape[1])
        ]
    return torch.stack(rows, 1)


# RNODE (2002.02798's code): a factor 1/2 on all but the Jacobian norm


def _kinetic(t: Tensor, x: Tensor, parts: Linearization, field: Bound) -> Tensor:
    return 0.5 * _mean(parts.dx)


def _jacobian_norm2(t: Tensor, x: Tensor, parts: Linearization, field: Bound) -> Tensor:
    assert parts.jac_sq is not None
    return parts.jac_sq / x.shape[1:].numel()


def _directional(t: Tensor, x: Tensor, parts: Linearization, field: Bound) -> Tensor:
    return 0.5 * _mean(_vjp(t, x, field))


def _total(t: Tensor, x: Tensor, parts: Linearization, field: Bound) -> Tensor:
    time_derivative = field.jvp(t, x, torch.zeros_like(x)[None], t_dot=torch.ones_like(t))[1][0]
    return 0.5 * _mean(_vjp(t, x, field) + time_derivative)


# FFJORD (1810.01367's code)


def _l1(t: Tensor, x: Tensor, parts: Linearization, field: Bound) -> Tensor:
    return parts.dx.flatten(1).abs().mean(1)


def _l2(t: Tensor, x: Tensor, parts: Linearization, field: Bound) -> Tensor:
    return _root_mean(parts.dx)


def _dl2(t: Tensor, x: Tensor, parts: Linearization, field: Bound) -> Tensor:
    return _root_mean(_vjp(t, x, field))


def _frobenius(t: Tensor, x: Tensor, parts: Linearization, field: Bound) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(_jacobian(t, x, field), dim=(1, 2))
    return norm / x.shape[1:].numel()


def _diagonal(t: Tensor, x: Tensor, parts: Linearization, field: Bound) -> Tensor:
    # the first column instead of the diagonal, as released
    return _root_mean(_jacobian(t, x, field)[:, :, 0])


def _off_diagonal(t: Tensor, x: Tensor, parts: Linearization, field: Bound) -> Tensor:
    # all but the first column, without the root, as released
    j = _jacobian(t, x, field)
    d = j.shape[1]
    return (j.square().sum((1, 2)) - j[:, :, 0].square().sum(1)) / (d * (d - 1))


_INTEGRANDS = {
    "kinetic_energy": _kinetic,
    "jacobian_norm2": _jacobian_norm2,
    "directional_penalty": _directional,
    "total_deriv": _total,
    "l1int": _l1,
    "l2int": _l2,
    "dl2int": _dl2,
    "JFrobint": _frobenius,
    "JdiagFrobint": _diagonal,
    "JoffdiagFrobint": _off_diagonal,
}
RELEASED = {name: Released(name, integrand) for name, integrand in _INTEGRANDS.items()}
"""RNODE's four regularisers and FFJORD's six, by command-line name."""
RELEASED["jacobian_norm2"] = Released("jacobian_norm2", _jacobian_norm2, frozenset({"jac_sq"}))


def released(name: str) -> Released:
    """Return a released regulariser by name, a quadrature for :class:`~cnf.CNF` or a loss's ``penalties``.

    With a reverse-mode Hutchinson estimate ``jacobian_norm2`` is RNODE's, from eᵀJ; the forward-mode estimate from J e
    is unbiased as well.

    Raises:
        ConfigError: for an unknown name.

    Example:
        >>> from cnf import CNF
        >>> from cnf.fields import MLP
        >>> block = CNF(MLP(2), quadratures=[released("kinetic_energy"), released("dl2int")])
        >>> sorted(block(torch.randn(5, 2)).integrals)
        ['dl2int', 'kinetic_energy']
    """
    if name not in RELEASED:
        raise unknown_name("regulariser", name, tuple(RELEASED))
    return RELEASED[name]
