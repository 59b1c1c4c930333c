"""Request: the arguments of one call of a transform, except its points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import GetAttrKey, register_pytree_node

from cnf._utils.aliases import warn_deprecated
from cnf._utils.errors import ConfigError
from cnf.random import Noise
from cnf.solvers import Solver
from cnf.solvers.base import SolverOverride, solver_of

__all__ = ["DEFAULT", "AugmentedTime", "Request", "as_request"]


class AugmentedTime:
    """Augmented time that one block hands to the next (AFFJORD): a block starts from it and stores its own end value.

    Args:
        end: end time () of the block.
        value: a (1, k) where the block is entered.
    """

    def __init__(self, end: Tensor, value: Tensor):
        self.end, self.value = end, value


@dataclass(frozen=True, eq=False)
class Request:
    """Options of one call of a transform, passed down a chain unchanged but for the noise.

    Example:
        >>> from cnf import CNF, FixedGrid
        >>> from cnf.fields import MLP
        >>> block = CNF(MLP(2)).eval()
        >>> block(torch.zeros(3, 2), Request(log_det=False, solver=FixedGrid("rk4", 2))).stats.nfe
        8
    """

    context: Tensor | None = None
    """(N, C), one row per point, or (C,) for all."""
    noise: Noise | None = None
    """Source of randomness; None is torch's global generator."""
    log_det: bool = True
    """Compute log_det; without it no divergence is evaluated and the returned log_det is undefined."""
    integrals: bool = True
    """Integrate the blocks' quadratures (they also need ``log_det``)."""
    solver: SolverOverride = None
    """Solver of every block for this call, or a function that returns the solver of a block; None: the block's own."""
    divergence: Any = None
    """Divergence strategy of every block for this call, or a function of the block; None: the block's own."""
    steer: bool = True
    """Sample the end time of blocks with ``steer`` in training; False takes their mean T."""
    augmented_time: AugmentedTime | None = None
    """Augmented time that a block continues, set by :class:`~cnf.ode.multiscale.SharedAugmentedTime`."""

    def child(self, i: int) -> Request:
        """Return the request of child ``i`` of a chain, which draws from ``noise.child(i)``."""
        return self if self.noise is None else replace(self, noise=self.noise.child(i))

    def solver_of(self, block: Any) -> Solver:
        """Return the solver of a block for this call."""
        return solver_of(block, self.solver)

    def divergence_of(self, block: Any) -> Any:
        """Return the divergence strategy of a block for this call."""
        given = self.divergence
        if given is None:
            return block.divergence
        if isinstance(given, type) or not (hasattr(given, "linearize") or callable(given)):
            raise ConfigError(f"divergence must be a strategy such as Exact(), or a function of the block that returns one, got {given!r}")
        return given if hasattr(given, "linearize") else given(block)


DEFAULT = Request()
FORMER = ("noise", "log_det", "integrals")  # keyword arguments of transforms before Request


def as_request(request: Any, former: Mapping[str, Any]) -> Request:
    """Return the request of a call, converted with a warning from the former arguments (context, noise=, ...)."""
    if isinstance(request, Request) and not former:
        return request
    if unknown := former.keys() - {"context", *FORMER}:
        raise TypeError(f"a transform takes no argument {min(unknown)!r}: call transform(x, Request(...))")
    warn_deprecated(
        "the arguments (x, context, *, noise, log_det, integrals) of a transform will be refused by the next release: write "
        "transform(x, Request(context=..., noise=..., ...)), with cnf.transforms.Request"
    )
    return replace(request, **former) if isinstance(request, Request) else Request(**{"context": request, **former})


def _flatten(request: Request) -> tuple[list[Tensor | None], tuple[Any, ...]]:
    return [request.context], tuple(getattr(request, name) for name in _OTHERS)


# torch.func, torch.export and tree_map see the context's tensor; the rest is a constant
_OTHERS = [each.name for each in fields(Request)][1:]
register_pytree_node(
    Request,
    _flatten,
    lambda children, others: Request(*children, *others),
    flatten_with_keys_fn=lambda request: ([(GetAttrKey("context"), request.context)], _flatten(request)[1]),
)
