"""Activation functions with their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnf._utils.errors import unknown_name

__all__ = ["ACTIVATIONS", "Activation", "activation"]


@dataclass(frozen=True)
class Activation:
    """Elementwise function: ``value`` returns σ(x), ``pair`` returns (σ(x), σ'(x)) with shared intermediates."""

    name: str
    value: Callable[[Tensor], Tensor]
    pair: Callable[[Tensor], tuple[Tensor, Tensor]]


# tanh x = x P(x²) / Q(x²) for |x| ≤ 9, fitted by least squares: relative error 2e-8, 4e-7 in float32 arithmetic
_P = (0.9999999794679185, 0.13381035062677948, 0.003495599029118064, 2.060924978447063e-05, 1.3354870747605892e-08)
_Q = (1.0, 0.4671435066738577, 0.025877024428877897, 0.0003285652135269641, 7.776648783146224e-07)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        total = total * x + c
    return total


class _RationalTanh(torch.autograd.Function):
    """tanh and its derivative 1 - tanh² in float32 by products and one division.

    With the tanh that torch.compile generates for a CPU, a kernel of 256 x 64 values takes 22 to 42 µs, as long as their product
    with a 64 x 64 matrix; with this one it takes 5 µs.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clamp(-9, 9)
        y = (x * _polynomial(_P, x * x) / _polynomial(_Q, x * x)).clamp(-1, 1)
        return y, 1 - y * y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        y, slope = ctx.saved_tensors
        total: Tensor = slope * (gradients[0] - 2 * y * gradients[1])
        return total


def _tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting() and not torch._C._are_functorch_transforms_active()
    if compiled and x.dtype == torch.float32 and x.is_cpu:  # under torch.func, a second derivative of the function below fails
        rational: Any = _RationalTanh
        value, slope = rational.apply(x)
        return value, slope
    y = torch.tanh(x)
    # 1 - y² in one operation: a Python scalar and two operations take twice the time on a CPU
    return y, torch.ops.aten.tanh_backward.default(y.new_ones(()), y)


class _Softplus(torch.autograd.Function):
    """Softplus ln(1 + e^x) and its derivative σ(x); saves only the derivative for the backward pass.

    CPUs do not vectorise the log1p of torch's softplus: at 64 channels it takes 4.5 ms, a 3x3 convolution 1.8 ms. This
    version computes ln(1 + e^x) = max(x, 0) - ln(1 - σ(-|x|)), with an absolute error of half an ulp of 1.
    """

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.clamp_min(0) - (1 - torch.sigmoid(-x.abs())).log(), torch.sigmoid(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])  # for _Dual
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Tensor | None:
        (slope,) = ctx.saved_tensors
        value, other = gradients
        total = None if value is None else slope * value
        if other is not None:
            bent = other * (slope * (1 - slope))
            total = bent if total is None else total + bent
        return total


class _Dual(_Softplus):
    """Softplus with a forward-mode rule, which torch.compile does not support."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor, Tensor]:
        (slope,) = ctx.saved_tensors
        moved = slope * tangents[0]
        return moved, (1 - slope) * moved


def _softplus(x: Tensor) -> tuple[Tensor, Tensor]:
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._are_functorch_transforms_active():
        # nested torch.func.jvp silently loses the outer derivative in the jvp rule of any autograd.Function
        return F.softplus(x), torch.sigmoid(x)
    pair: Any = _Softplus if compiling else _Dual
    value, slope = pair.apply(x)
    return value, slope


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
        Activation("softplus", lambda x: _softplus(x)[0], _softplus),
        Activation("elu", F.elu, _elu),
        Activation("swish", F.silu, _swish),
        Activation("relu", F.relu, _relu),
        Activation("square", torch.square, lambda x: (x * x, 2 * x)),
        Activation("identity", lambda x: x, lambda x: (x, torch.ones_like(x))),
    )
}


def activation(name: str) -> Activation:
    """Return the activation called ``name``.

    Raises:
        ConfigError: for an unknown name; the message suggests the nearest one.

    Example:
        >>> activation("square").pair(torch.tensor(3.0))
        (tensor(9.), tensor(6.))
    """
    if name not in ACTIVATIONS:
        raise unknown_name("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]
