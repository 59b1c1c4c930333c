"""Layers with depth-varying weights W(t) = Σ_n b_n(t) W_n in a Chebyshev or Fourier basis (2002.08071, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from cnf._utils.errors import require_at_least, unknown_name
from cnf.fields.maps import Conv, Linear
from cnf.fields.time import Affine, Constants, LayerFactory, TimeLayer, require_one_time

__all__ = ["BASES", "Galerkin", "basis", "galerkin"]


def _chebyshev(u: Tensor, terms: int) -> Tensor:
    r"""Return :math:`T_n(2u - 1)`, by :math:`T_{n+1}(y) = 2y T_n(y) - T_{n-1}(y)`."""
    y = 2 * u - 1
    values = [torch.ones_like(y), y]
    for _ in range(2, terms):
        values.append(2 * y * values[-1] - values[-2])
    return torch.stack(values[:terms])


def _fourier(u: Tensor, terms: int) -> Tensor:
    """Return 1, cos 2πu, sin 2πu, cos 4πu, sin 4πu, ..."""
    values = [torch.ones_like(u)]
    for n in range(1, terms):
        angle = 2 * math.pi * ((n + 1) // 2) * u
        values.append(torch.cos(angle) if n % 2 else torch.sin(angle))
    return torch.stack(values)


BASES: dict[str, Callable[[Tensor, int], Tensor]] = {"chebyshev": _chebyshev, "fourier": _fourier}


def _known(name: str, terms: int) -> None:
    if name not in BASES:
        raise unknown_name("basis", name, BASES)
    require_at_least(1, terms=terms)


def basis(name: str, u: Tensor, terms: int) -> Tensor:
    r"""Return the first ``terms`` functions of a basis on [0, 1] at u (): (terms,).

    ``"chebyshev"``: :math:`T_n(2u - 1)`; ``"fourier"``: 1, cos 2πu, sin 2πu, cos 4πu, sin 4πu, ...

    Raises:
        ConfigError: for an unknown basis or fewer than 1 term.

    Example:
        >>> basis("chebyshev", torch.tensor(0.75), 3)
        tensor([ 1.0000,  0.5000, -0.5000])
    """
    _known(name, terms)
    return BASES[name](u, terms)


class Galerkin(TimeLayer):
    r"""Layer W(t) x + b(t) with :math:`W(t) = \sum_n b_n(t/T) W_n`, and b(t) likewise (2002.08071).

    At initialisation it is constant in t: :math:`W_0` and its bias start like a plain layer, the others at zero.

    Args:
        map: the linear map, :class:`Linear` or :class:`Conv`.
        context_dim: size C of the context; 0 for none.
        context_gate: ignored, since the layer has no gate.
        name: the basis, see :func:`basis`.
        terms: number of basis functions.
        end_time: T.

    Raises:
        ConfigError: for an unknown basis or fewer than 1 term; from a call, for times that differ by row.
    """

    time_weights = True

    def __init__(
        self,
        map: Linear | Conv,
        context_dim: int = 0,
        *,
        context_gate: bool = True,
        name: str = "chebyshev",
        terms: int = 5,
        end_time: float = 1.0,
    ):
        super().__init__(map, context_dim, context_gate=context_gate)
        _known(name, terms)
        self.name, self.terms, self.end_time = name, terms, end_time
        self.weights = nn.Parameter(torch.zeros(terms, *map.weight_shape()))
        self.biases = nn.Parameter(torch.zeros(terms, map.outputs))
        plain = map.module()
        with torch.no_grad():
            self.weights[0], self.biases[0] = plain.weight, plain.bias

    def params_at(self, t: Tensor, constants: Constants, logits: Tensor | None = None) -> Affine:
        require_one_time(t, self.name)
        b = basis(self.name, t / self.end_time, self.terms)
        weight = torch.tensordot(b, self.weights, 1)
        return Affine(weight, None, self._spread(b @ self.biases))


def galerkin(name: str, terms: int, end_time: float = 1.0) -> LayerFactory:
    """Return a factory of layers in a basis over depth; pass it as a field's ``layer``.

    Raises:
        ConfigError: for an unknown basis or fewer than 1 term.

    Example:
        >>> from cnf.fields import MLP
        >>> field = MLP(2, hidden=(8,), layer=galerkin("fourier", 3))
        >>> sum(p.numel() for p in field.parameters())
        126
    """
    _known(name, terms)
    return partial(Galerkin, name=name, terms=terms, end_time=end_time)
