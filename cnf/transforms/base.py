"""Base classes of transforms, and their composition."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from cnf.noise import Noise, child
from cnf.solvers import Stats

__all__ = ["Plain", "Sequential", "Transform", "Transformed", "leaves", "placed", "zeros"]

Shape = tuple[int, ...]


class Transformed(NamedTuple):
    """Result of a transform: value (N, \\*event'), log_det (N,) of the map in nats, integrals, solver statistics."""

    value: Tensor
    log_det: Tensor
    integrals: dict[str, Tensor]
    stats: Stats


class Transform(nn.Module):
    """Base class of invertible transforms: ``forward`` maps data to noise, ``inverse`` noise to data.

    With ``log_det=False`` no divergence is evaluated and the returned log_det is undefined; with ``integrals=False`` a
    CNF omits its regularisers. A subclass of another package gets copies of points and context, which it may overwrite.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__module__.partition(".")[0] != "cnf":
            for name in {"forward", "inverse", "_forward", "_inverse"} & vars(cls).keys():
                setattr(cls, name, _given_copies(vars(cls)[name]))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        noise: Noise | None = None,
        log_det: bool = True,
        integrals: bool = True,
    ) -> Transformed:
        """Map data x to noise z; log_det is log|det dz/dx| (N,) in nats."""
        raise NotImplementedError

    def inverse(
        self,
        z: Tensor,
        context: Tensor | None = None,
        *,
        noise: Noise | None = None,
        log_det: bool = True,
        integrals: bool = True,
    ) -> Transformed:
        """Map noise z to data x; log_det is log|det dx/dz| (N,) in nats."""
        raise NotImplementedError

    def latent_shape(self, shape: Shape) -> Shape:
        """Return the shape of z for x of event_shape ``shape``."""
        return shape


def _given_copies(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of a custom transform to call it with copies of its tensors."""

    @wraps(method)
    def call(self: Transform, *args: Any, **kwargs: Any) -> Any:
        copies = [v.clone() if isinstance(v, Tensor) else v for v in args]
        return method(self, *copies, **{k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()})

    return call


class Plain(Transform):
    """Base class of deterministic transforms without context; subclasses define ``_forward`` and ``_inverse``."""

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        noise: Noise | None = None,
        log_det: bool = True,
        integrals: bool = True,
    ) -> Transformed:
        """Map data to noise."""
        return Transformed(*self._forward(x), {}, Stats())

    def inverse(
        self,
        z: Tensor,
        context: Tensor | None = None,
        *,
        noise: Noise | None = None,
        log_det: bool = True,
        integrals: bool = True,
    ) -> Transformed:
        """Map noise to data."""
        return Transformed(*self._inverse(z), {}, Stats())


class Sequential(Transform):
    """Composition of transforms; child i receives ``noise.child(i)``, integrals of the same name are summed.

    Example:
        >>> from cnf.transforms import CenterShift, Logit
        >>> chain = Sequential([Logit(0.05), CenterShift()])
        >>> chain(torch.full((2, 3), 0.5)).value
        tensor([[-0.5000, -0.5000, -0.5000],
                [-0.5000, -0.5000, -0.5000]])
    """

    def __init__(self, transforms: Iterable[Transform]):
        super().__init__()
        self.transforms = nn.ModuleList(transforms)

    def _chain(
        self, x: Tensor, context: Tensor | None, noise: Noise | None, log_det: bool, integrals: bool, back: bool
    ) -> Transformed:
        total: Tensor | None = None
        sums: dict[str, Tensor] = {}
        stats = Stats()
        numbered = list(enumerate(self.transforms))
        for i, module in reversed(numbered) if back else numbered:
            transform = cast(Transform, module)
            step = transform.inverse if back else transform  # forward by __call__, so that module hooks run
            x, one, parts, cost = step(x, context, noise=child(noise, i), log_det=log_det, integrals=integrals)
            total = one if total is None else total + one
            stats = stats + cost
            for name, value in parts.items():
                sums[name] = sums[name] + value if name in sums else value
        return Transformed(x, zeros(x) if total is None else total, sums, stats)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        noise: Noise | None = None,
        log_det: bool = True,
        integrals: bool = True,
    ) -> Transformed:
        """Apply the transforms, first to last."""
        return self._chain(x, context, noise, log_det, integrals, back=False)

    def inverse(
        self,
        z: Tensor,
        context: Tensor | None = None,
        *,
        noise: Noise | None = None,
        log_det: bool = True,
        integrals: bool = True,
    ) -> Transformed:
        """Apply the inverses, last to first."""
        return self._chain(z, context, noise, log_det, integrals, back=True)

    def latent_shape(self, shape: Shape) -> Shape:
        """Compose the ``latent_shape`` of all transforms."""
        for transform in self.transforms:
            shape = cast(Transform, transform).latent_shape(shape)
        return shape


def leaves(transform: Transform) -> Iterator[Transform]:
    """Iterate over the transforms of a chain in order, descending into nested chains.

    Example:
        >>> from cnf.transforms import CenterShift, Logit
        >>> chain = Sequential([Sequential([Logit(0.05)]), CenterShift()])
        >>> [type(leaf).__name__ for leaf in leaves(chain)]
        ['Logit', 'CenterShift']
    """
    return (leaf for leaf, _ in placed(transform, None))


def placed(transform: Transform, noise: Noise | None) -> Iterator[tuple[Transform, Noise | None]]:
    """Yield each leaf of a chain with the noise that the chain passes to it."""
    if not isinstance(transform, Sequential):
        yield transform, noise
        return
    for i, part in enumerate(transform.transforms):
        yield from placed(cast(Transform, part), child(noise, i))


def zeros(x: Tensor) -> Tensor:
    """Return a zero log-det (N,) for x (N, \\*event)."""
    return torch.zeros(x.shape[0], dtype=x.dtype if x.is_floating_point() else torch.get_default_dtype(), device=x.device)
