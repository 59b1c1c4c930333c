"""Transforms of torch.distributions and zuko as transforms of a flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cnf._utils.distributions import Template
from cnf._utils.errors import ConfigError
from cnf.solvers import Stats
from cnf.transforms.base import Shape, Transform, TransformOutput
from cnf.transforms.request import Request

__all__ = ["TorchTransform", "as_transform"]

TorchBase = torch.distributions.Transform


class TorchTransform(Transform):
    """A ``torch.distributions.Transform``, or a zuko one, as a transform from data to noise; ``Sequential`` makes it.

    The tensors of a torch transform become buffers, which follow ``.to()`` and are not trained. A module whose call with
    a context returns a torch transform (zuko's lazy transforms) is trained with the flow.

    Args:
        transform: a bijective torch transform, or such a module.
        context_dim: size of the context that the module takes; 0 for none, None if unknown.

    Raises:
        ConfigError: for anything else, or a transform with tensors that require a gradient.

    Example:
        >>> from torch.distributions.transforms import ExpTransform
        >>> logarithm = TorchTransform(ExpTransform().inv)
        >>> logarithm(torch.ones(1, 2)).value
        tensor([[0., 0.]])
    """

    def __init__(self, transform: TorchBase | nn.Module, context_dim: int | None = 0):
        super().__init__()
        self.context_dim = context_dim
        self.template: Template | None = None
        if isinstance(transform, TorchBase):
            if not transform.bijective:
                raise ConfigError(f"transform {type(transform).__name__} is not bijective, and a flow needs its inverse")
            self.template = Template(self, transform, "transform", "write a cnf.transforms.Transform")
        elif isinstance(transform, nn.Module):
            self.module = transform
        else:
            raise ConfigError(f"transform is a {type(transform).__name__}, expected a torch.distributions.Transform or a module that returns one")

    def bound(self, context: Tensor | None = None, like: Tensor | None = None) -> TorchBase:
        """Return the torch transform for a context (N, C), (C,) or None."""
        made: TorchBase = self.module(context) if self.template is None else self.template.filled(self, like)
        return made

    def _run(self, x: Tensor, request: Request, reverse: bool) -> TransformOutput:
        made = self.bound(request.context, x)
        made = made.inv if reverse else made
        if not request.log_det:
            return TransformOutput(made(x), x.new_zeros(len(x)), {}, Stats())
        both: Any = getattr(made, "call_and_ladj", None)  # zuko's: one pass where torch takes two
        y, log_det = both(x) if both is not None else (value := made(x), made.log_abs_det_jacobian(x, value))
        return TransformOutput(y, log_det.flatten(1).sum(1) if log_det.ndim > 1 else log_det, {}, Stats())

    def latent_shape(self, shape: Shape) -> Shape:
        """Return the shape of z, where the transform states it."""
        try:
            return tuple(self.bound().forward_shape(shape))
        except (TypeError, ValueError, RuntimeError, AttributeError):  # needs a context, or does not state shapes
            return shape

    def extra_repr(self) -> str:
        """Return the transform's class for ``repr``."""
        return "" if self.template is None else self.template.kind


def as_transform(transform: Any) -> Any:
    """Return a transform of a flow: this one, or :class:`TorchTransform` of one of torch or zuko.

    Raises:
        ConfigError: for anything else.
    """
    if isinstance(transform, TorchBase):
        return TorchTransform(transform)
    if isinstance(transform, nn.Module) and not isinstance(transform, Transform) and hasattr(type(transform), "inv"):
        return TorchTransform(transform, context_dim=_takes_context(transform))
    if not isinstance(transform, Transform):
        hint = ": a module that returns dx/dt is a field, so write cnf.CNF(module)" if isinstance(transform, nn.Module) else ""
        raise ConfigError(f"transform is a {type(transform).__name__}, expected a transform of cnf, torch.distributions or zuko{hint}")
    return transform


def _takes_context(module: nn.Module) -> int | None:
    """Return 0 for a lazy transform that takes no context, None where that is unknown."""
    return 0 if any(kind.__name__ == "UnconditionalTransform" for kind in type(module).__mro__) else None
