"""Flows from pretrained velocity fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution

from cnf._utils.errors import ConfigError
from cnf.bases import Base
from cnf.fields import VectorField
from cnf.fields.signature import velocity_takes_context
from cnf.flow import Flow
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Divergence
from cnf.solvers import Solver

__all__ = ["from_velocity"]

DIRECTIONS = ("noise-to-data", "data-to-noise")


class _Velocity(VectorField):
    """Velocity v(t, x[, context]) as a field with time from data to noise."""

    custom = True  # the wrapped function is not part of this package

    def __init__(self, v: Callable[..., Tensor], reverse: bool, takes_context: bool):
        super().__init__()
        self.reverse = reverse
        self.v = v
        if not isinstance(v, nn.Module):
            self.networks = nn.ModuleList({id(m): m for m in _modules(v)}.values())
        if not takes_context:
            self.context_dim = 0

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (N, \\*event) at the flow's time t (), 0 at the data."""
        given = () if context is None else (context,)
        return -self.v(1 - t, x, *given) if self.reverse else self.v(t, x, *given)


def from_velocity(
    v: Callable[..., Tensor],
    event_shape: tuple[int, ...],
    time: str | None = None,
    *,
    base: Base | Distribution | None = None,
    base_std: float = 1.0,
    divergence: Divergence | None = None,
    eval_solver: Solver | None = None,
) -> Flow:
    r"""Wrap a trained velocity field as a flow with samples and likelihood, in evaluation mode.

    Points move as dx/dt = v(t, x) for t from 0 to 1. Packages differ in which end is the noise, and the wrong direction
    silently gives a wrong density; ``time`` therefore has no default. torchcfm and flow_matching have noise at t = 0
    (``"noise-to-data"``); this package's own blocks have data there (``"data-to-noise"``).

    ``v`` is called as ``v(t, x)``, or ``v(t, x, context)`` if a context is given, with t a scalar tensor and
    x (N, \*event). Adapters for other conventions:

    ========================================================  ==========================================================
    ``v(x, t)``, flow_matching's models                       ``lambda t, x: v(x, t.expand(len(x)))``
    torchcfm's ``MLP``, of [x, t]                             ``lambda t, x: v(torch.cat([x, t.expand(len(x), 1)], 1))``
    torchcfm's ``torch_wrapper`` and ``UNetModel``            ``v`` itself
    ========================================================  ==========================================================

    Networks that the function refers to become part of the flow: ``flow.to(device)`` moves them.

    Args:
        v: velocity, a module or a function.
        event_shape: shape of one point.
        time: direction, ``"noise-to-data"`` or ``"data-to-noise"``.
        base: density of the noise, as for :class:`~cnf.Flow`; N(0, base_std² I) if None.
        base_std: standard deviation of normal noise.
        divergence: divergence strategy; :class:`~cnf.ode.divergence.Exact` if None.
        eval_solver: solver; that of :class:`~cnf.CNF` if None.

    Raises:
        ConfigError: for a missing or unknown ``time``, or a ``v`` that does not take (t, x).

    Example:
        >>> import torch
        >>> mean, std = 2.0, 0.5  # v carries N(0, 1) at t = 0 to N(2, 0.5²) at t = 1 along straight lines
        >>> def v(t, x):
        ...     return mean + (std - 1) * (x - mean * t) / (1 + (std - 1) * t)
        >>> flow = from_velocity(v, (1,), time="noise-to-data")
        >>> truth = torch.distributions.Normal(mean, std).log_prob(torch.tensor([1.7]))
        >>> bool((flow.log_prob(torch.tensor([[1.7]])) - truth).abs() < 1e-4)
        True
    """
    if time not in DIRECTIONS:
        raise ConfigError(
            "time must be 'noise-to-data' if the noise is at t=0 (torchcfm, flow_matching), or 'data-to-noise' if the data are, "
            f"got {time!r}"
        )
    field = _Velocity(v, time == "noise-to-data", velocity_takes_context(v))
    return Flow(CNF(field, divergence, eval_solver=eval_solver), event_shape, base=base, base_std=base_std).eval()


def _modules(v: Any) -> Iterator[nn.Module]:
    """Yield the networks that a function refers to: by closure, as a global, bound, or held by functools.partial."""
    code = getattr(v, "__code__", None)
    cells = [cell.cell_contents for cell in getattr(v, "__closure__", None) or () if cell != type(cell)()]
    named = [v.__globals__.get(name) for name in code.co_names] if code is not None and hasattr(v, "__globals__") else []
    held = [getattr(v, "__self__", None), *getattr(v, "args", ()), *getattr(v, "keywords", {}).values()]
    held += list(vars(v).values()) if not inspect.isroutine(v) and hasattr(v, "__dict__") else []
    for one in (*cells, *named, *held):
        if isinstance(one, nn.Module):
            yield one
    if isinstance(inner := getattr(v, "func", None), Callable):  # type: ignore[arg-type]
        yield from [inner] if isinstance(inner, nn.Module) else _modules(inner)
