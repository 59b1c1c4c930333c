"""Jacobian-vector products by forward-mode automatic differentiation, or by two reverse passes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from cnf._utils.errors import ConfigError

__all__ = ["NORMS", "NoForwardMode", "Operations", "autodiff_jvp", "differentiable_attention", "reverse_jvp"]

# substrings of torch's errors for operations without forward-mode derivative or batching rule
_NO_FORWARD = ("forward AD", "forward mode AD", "forward-mode", "jvp", "setup_context", "functorch", "batching rule", "vmap", "have storage")

# operations whose forward-mode derivative reads what the operation saved (mean and standard deviation, factors of a matrix)
# as if it were constant, so that its own derivative is wrong (seen with torch 2.14); in reverse mode it is right
_NORMALIZING = frozenset({"native_layer_norm", "native_batch_norm"})
_UNRELIABLE = _NORMALIZING | {"_linalg_solve_ex", "_linalg_slogdet", "_linalg_det"}
NORMS = (nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


class Operations(TorchDispatchMode):
    """Context manager that notes whether operations are called whose second derivative is wrong in forward mode.

    Example:
        >>> with Operations() as called:
        ...     _ = nn.functional.layer_norm(torch.ones(2, 3), (3,))
        >>> called.unreliable
        True
    """

    unreliable = normalizes = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operation."""
        name = function.overloadpacket.__name__
        if name != "native_batch_norm" or args[5]:  # with statistics of the batch; running ones are constants
            self.unreliable |= name in _UNRELIABLE
            self.normalizes |= name in _NORMALIZING
        return function(*args, **(kwargs or {}))


class NoForwardMode(ConfigError):
    """An operation of a field has no forward-mode derivative; the divergence falls back to reverse mode."""


def autodiff_jvp(
    function: Callable[[Tensor, Tensor], Tensor], t: Tensor, x: Tensor, v: Tensor, t_dot: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return f(t, x) and J v + t_dot ∂f/∂t for K stacked tangents v (K, N, \\*event), by forward-mode autodiff.

    Raises:
        NoForwardMode: if an operation has no forward-mode derivative.
    """
    if not torch.compiler.is_compiling():
        _load_forward_mode()
    dt = torch.zeros_like(t) if t_dot is None else t_dot.to(t).expand_as(t)

    def push(tangent: Tensor) -> tuple[Tensor, Tensor]:
        jvp: Any = torch.func.jvp
        dx, product = jvp(function, (t, x), (dt, tangent))
        return dx, product

    try:
        if v.shape[0] == 1:
            dx, product = push(v[0])
            product = product[None]
        else:
            vmap: Any = torch.func.vmap
            repeated, product = vmap(push, randomness="same")(v)  # out_dims=None does not nest in another vmap
            dx = repeated[0]
    except (RuntimeError, NotImplementedError) as error:
        text = str(error)
        if isinstance(error, ConfigError) or not any(word in text for word in _NO_FORWARD):
            raise
        raise NoForwardMode(
            f"an operation of the field has no forward-mode derivative ({' '.join(text.split())[:200]}): replace it, or leave out what "
            "takes a derivative along the path"
        ) from None
    return dx.to(x.dtype), product.to(x.dtype)


def reverse_jvp(
    function: Callable[[Tensor, Tensor], Tensor], t: Tensor, x: Tensor, v: Tensor, t_dot: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return f(t, x) and J v + t_dot ∂f/∂t for K stacked tangents v (K, N, \\*event), by reverse mode alone.

    uᵀJ is linear in u, and J v is its derivative in u along v.
    """
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [y if recording and y.requires_grad else y.detach().requires_grad_() for y in (t, x)]
        dx = function(inputs[0], inputs[1])
        if not dx.requires_grad:
            return dx, torch.zeros_like(v)
        u = torch.zeros_like(dx, requires_grad=True)
        pulled = torch.autograd.grad(dx, inputs, u, create_graph=True, materialize_grads=True)
        products = []
        for tangent in v:
            total = (pulled[1] * tangent).sum() + (0 if t_dot is None else (pulled[0] * t_dot).sum())
            if total.requires_grad:
                products.append(torch.autograd.grad(total, u, create_graph=recording, retain_graph=True, materialize_grads=True)[0])
            else:
                products.append(torch.zeros_like(dx))
    product = torch.stack(products)
    return (dx, product) if recording else (dx.detach(), product.detach())


@cache
def _load_forward_mode() -> None:
    """Load torch's forward-mode rules, which warn of torch.jit at their first use in some releases."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.func.jvp(torch.neg, (torch.zeros(1),), (torch.ones(1),))


@contextmanager
def differentiable_attention(needed: bool = True) -> Iterator[None]:
    """Select the math kernel of attention if needed: fused kernels have no forward-mode and no second derivative.

    It is chosen around evaluations that are differentiated alone; sampling and flow matching keep the fused kernel. On one
    CPU core it took 1.5 times as long as the fused one for 8 tokens of width 32, and 2.7 times for 64 of width 64.
    """
    if not needed or torch.compiler.is_compiling():
        yield
        return
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
