"""Activations with their derivative, since a tangent pushed through a layer needs both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from torch import Tensor

from cnf.errors import ConfigError

__all__ = ["ACTIVATIONS", "Activation", "activation"]


@dataclass(frozen=True)
class Activation:
    """An elementwise function and the pair (value, derivative), sharing what they can."""

    name: str
    value: Callable[[Tensor], Tensor]
    pair: Callable[[Tensor], tuple[Tensor, Tensor]]


def _tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.tanh(x)
    return y, 1 - y * y


def _softplus(x: Tensor) -> tuple[Tensor, Tensor]:
    return F.softplus(x), torch.sigmoid(x)


def _elu(x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.elu(x)
    return y, torch.where(x > 0, torch.ones_like(x), y + 1)


def _swish(x: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x)
    y = x * s
    return y, s + y * (1 - s)


def _relu(x: Tensor) -> tuple[Tensor, Tensor]:
    return F.relu(x), (x > 0).to(x.dtype)


ACTIVATIONS = {
    a.name: a
    for a in (
        Activation("tanh", torch.tanh, _tanh),
        Activation("softplus", F.softplus, _softplus),
        Activation("elu", F.elu, _elu),
        Activation("swish", F.silu, _swish),
        Activation("relu", F.relu, _relu),
        Activation("square", torch.square, lambda x: (x * x, 2 * x)),
        Activation("identity", lambda x: x, lambda x: (x, torch.ones_like(x))),
    )
}


def activation(name: str) -> Activation:
    """The activation of that name.

    Raises:
        ConfigError: if there is none; the nearest name is suggested.

    Example:
        >>> activation("square").pair(torch.tensor(3.0))
        (tensor(9.), tensor(6.))
    """
    if name not in ACTIVATIONS:
        near = get_close_matches(str(name), ACTIVATIONS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"activation={name!r} is unknown: expected one of {', '.join(ACTIVATIONS)}{hint}")
    return ACTIVATIONS[name]
