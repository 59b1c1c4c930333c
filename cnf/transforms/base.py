"""Base classes of transforms."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnf._utils.aliases import warn_deprecated
from cnf._utils.async_checks import deferred
from cnf._utils.errors import DataError
from cnf.solvers import Stats
from cnf.transforms.request import DEFAULT, FORMER, Request, as_request

__all__ = ["DeterministicTransform", "Shape", "Transform", "TransformOutput", "require_floats", "require_unit", "zeros"]

Shape = tuple[int, ...]


class TransformOutput(NamedTuple):
    """Result of a transform: value (N, \\*event'), log_det (N,) of the map in nats, integrals, solver statistics."""

    value: Tensor
    log_det: Tensor
    integrals: dict[str, Tensor]
    stats: Stats


class Transform(nn.Module):
    """Base class of invertible transforms: ``forward`` maps data to noise, ``inverse`` noise to data.

    A custom transform defines ``forward(self, x, request)`` and ``inverse(self, z, request)``, which return a
    :class:`TransformOutput`, and ``latent_shape`` if it changes the shape. It gets copies of points and context, which
    it may overwrite.

    Example:
        >>> class Double(Transform):
        ...     def forward(self, x, request):
        ...         return TransformOutput(2 * x, zeros(x) + 0.6931 * x[0].numel(), {}, Stats())
        >>> Double()(torch.ones(3, 2), DEFAULT).log_det
        tensor([1.3862, 1.3862, 1.3862])
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__module__.partition(".")[0] != "cnf":
            for name in {"forward", "inverse", "_forward", "_inverse"} & vars(cls).keys():
                setattr(cls, name, _guarded(cls, name))

    def forward(self, x: Tensor, request: Request = DEFAULT, **former: Any) -> TransformOutput:
        """Map data x to noise z; log_det is log|det dz/dx| (N,) in nats."""
        return self._run(x, as_request(request, former), reverse=False)

    def inverse(self, z: Tensor, request: Request = DEFAULT, **former: Any) -> TransformOutput:
        """Map noise z to data x; log_det is log|det dx/dz| (N,) in nats."""
        return self._run(z, as_request(request, former), reverse=True)

    def _run(self, x: Tensor, request: Request, reverse: bool) -> TransformOutput:
        raise NotImplementedError(f"{type(self).__name__} has no {'inverse' if reverse else 'forward'}")

    def latent_shape(self, shape: Shape) -> Shape:
        """Return the shape of z for x of event_shape ``shape``."""
        return shape


def _guarded(cls: type, name: str) -> Callable[..., Any]:
    """Wrap a custom transform's method to call it with copies of its tensors, and with the former arguments if it takes them."""
    method = vars(cls)[name]
    former = not {"context", *FORMER}.isdisjoint(inspect.signature(method).parameters)
    if former:
        warn_deprecated(
            f"{cls.__name__}.{name}(x, context, *, noise, log_det, integrals) will be refused by the next release: write "
            f"{name}(self, x, request), with cnf.transforms.Request, and read request.context, request.noise, ..."
        )

    @wraps(method)
    def call(self: Transform, x: Tensor, request: Request = DEFAULT, **given: Any) -> Any:
        if name.startswith("_"):
            return method(self, x.clone())
        request = as_request(request, given)
        context = None if request.context is None else request.context.clone()
        if former:
            return method(self, x.clone(), context, **{option: getattr(request, option) for option in FORMER})
        return method(self, x.clone(), replace(request, context=context))

    return call


class DeterministicTransform(Transform):
    """Base class of transforms without noise and context; subclasses define ``_forward`` and ``_inverse``."""

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _run(self, x: Tensor, request: Request, reverse: bool) -> TransformOutput:
        return TransformOutput(*(self._inverse(x) if reverse else self._forward(x)), {}, Stats())


def require_floats(transform: str, x: Tensor) -> None:
    """Raise a DataError for images of integers."""
    if not x.is_floating_point():
        raise DataError(f"{transform} takes floats in [0, 1], got {x.dtype}: put Dequantize before it")


def require_unit(transform: str, x: Tensor, s: Tensor, domain: str = "[0, 1]") -> None:
    """Raise a DataError for points x of a domain whose image s leaves (0, 1), unless value checks are deferred."""
    if s.numel() and not deferred(s) and not bool(((s > 0) & (s < 1)).all()):
        low, high = (float(v) for v in x.detach().aminmax())
        fault = "holds NaN" if math.isnan(low) else f"spans [{low:g}, {high:g}]"
        raise DataError(f"{transform} takes x in {domain}, but x {fault}: rescale the data")


def zeros(x: Tensor) -> Tensor:
    """Return a zero log-det (N,) for x (N, \\*event)."""
    return torch.zeros(x.shape[0], dtype=x.dtype if x.is_floating_point() else torch.get_default_dtype(), device=x.device)
