"""Distributions and transforms of torch with their tensors as buffers of a module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.distributions.transforms import _InverseTransform
from torch.distributions.utils import lazy_property

from cnf._utils.errors import ConfigError

__all__ = ["Template"]


class Template:
    """A distribution or transform of torch whose tensors are buffers of ``module``, called ``value_<path>``.

    Args:
        module: receives the buffers.
        value: the distribution or transform.
        role: what it is used as, for messages.
        instead: what to do for a value with trained tensors or with modules, for messages.

    Raises:
        ConfigError: for a tensor that requires a gradient, or a module inside.
    """

    def __init__(self, module: nn.Module, value: Distribution | Transform, role: str, instead: str):
        self.kind, names = type(value).__name__, {}

        def register(path: str, tensor: Tensor) -> Tensor:
            if tensor.requires_grad:
                raise ConfigError(
                    f"{role} {self.kind} has a parameter {path!r} that requires a gradient, which would not reach it: detach it, or {instead} "
                    "to train it"
                )
            names[path] = f"value_{path.replace('.', '__')}"
            module.register_buffer(names[path], tensor.clone())
            return tensor.new_empty(0)

        def refuse(path: str, inner: nn.Module) -> None:
            raise ConfigError(f"{role} holds a module ({type(inner).__name__} at {path!r}): {instead} to make a {role} of it")

        self.names = names
        self.value = _mapped(value, register, entries=_essential, refuse=refuse)

    def filled(self, module: nn.Module, like: Tensor | None = None) -> Any:
        """Return the value with the module's buffers, floating-point ones in the dtype and on the device of ``like``."""

        def current(path: str, _: Tensor) -> Tensor:
            tensor: Tensor = getattr(module, self.names[path])
            return tensor if like is None else tensor.to(like) if tensor.is_floating_point() else tensor.to(like.device)

        return _mapped(self.value, current)


def _mapped(
    value: Any,
    change: Callable[[str, Tensor], Tensor],
    path: str = "",
    entries: Callable[[Any], dict[str, Any]] = vars,
    refuse: Callable[[str, nn.Module], None] | None = None,
) -> Any:
    """Return a copy with every tensor replaced by ``change(path, tensor)``; a distribution does not validate values."""
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, nn.Module) and refuse is not None:
        refuse(path, value)
    if type(value) in (list, tuple):
        return type(value)(_mapped(each, change, _joined(path, str(i)), entries, refuse) for i, each in enumerate(value))
    if not isinstance(value, Distribution | Transform):
        return value
    other = copy.copy(value)
    other.__dict__.clear()
    for name, each in entries(value).items():
        other.__dict__[name] = _mapped(each, change, _joined(path, name), entries, refuse)
    if isinstance(other, Distribution):
        other._validate_args = False
    return other


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _essential(value: Distribution | Transform) -> dict[str, Any]:
    """Return the attributes without cached ones, which depend on what the value was used for before."""
    probe = copy.copy(value)
    entries = dict(vars(value))
    probe.__dict__.clear()
    probe.__dict__.update(entries)
    for name in reversed(list(entries)):
        if isinstance(getattr(type(value), name, None), lazy_property):
            del probe.__dict__[name]
            try:
                getattr(probe, name)
            except (AttributeError, RecursionError):  # not computed from the others: a parameter
                probe.__dict__[name] = entries[name]
                continue
            del probe.__dict__[name], entries[name]
    if "_cached_x_y" in entries:
        entries["_cached_x_y"] = None, None
    if "_inv" in entries and not isinstance(value, _InverseTransform):  # made at its first use; an inverse holds its original
        entries["_inv"] = None
    return entries
