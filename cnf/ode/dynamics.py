"""Augmented dynamics of one solve: state, augmented time, log-det and quadratures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from cnf._utils.compilation import compiled
from cnf._utils.validation import context_rows
from cnf.fields.augmented import TimePath
from cnf.fields.autodiff import differentiable_attention
from cnf.fields.base import SolveField
from cnf.ode.divergence import Bound, Divergence, Hutchinson, Linearization, checked_need
from cnf.ode.quadratures import Quadrature, StepError, learned_modules

__all__ = ["AugmentedDynamics", "SampledStage", "field_precision"]

State = tuple[Tensor, ...]


class SampledStage(NamedTuple):
    """Randomly drawn stage of a grid, the only one that evaluates integrands with a separate Jacobian product.

    Their values there are divided by ``share``, the stage's fraction of the stage weights and thus the probability of
    being drawn: an unbiased estimate of the grid's integral, for one Jacobian product per solve.
    """

    step: int
    stage: int
    share: float


@dataclass(eq=False)
class AugmentedDynamics:
    """Augmented dynamics of one solve, d state / ds with t = start + s span.

    The state is x, a if there is a path, the log-det, and the quadratures. A state of the dynamic entries (x, a) alone
    returns their derivatives alone.
    """

    field: SolveField
    """Vector field bound to this solve (see :func:`cnf.fields.custom.precompute`)."""
    path: TimePath | None
    """Augmented time."""
    divergence: Divergence
    quadratures: tuple[Quadrature, ...]
    start: Tensor
    """t () at s = 0."""
    span: Tensor
    """Length () of the time interval, negative for the inverse."""
    context: Tensor | None
    """(N, C) or (C,)."""
    probe: Tensor | None
    """Probe of the divergence, fixed during the solve."""
    log_det: bool
    """Integrate the log-det."""
    autocast: torch.dtype | None = None
    """Dtype of the field's computations, or None for that of x; the state keeps its own."""
    compile: bool | str = False
    """Compile every evaluation or step, or the whole solve ("solve")."""
    sampled_stage: SampledStage | None = None
    """The only stage that evaluates integrands with ``"jac_sq"`` in ``need``; None evaluates them at all stages."""

    def __post_init__(self) -> None:
        self.foreign = tuple(not type(q).__module__.startswith("cnf.") or hasattr(q, "cost") for q in self.quadratures)
        self.custom = self.field.custom or any(self.foreign)
        # a tensor: a number would be compiled in, one graph per value; filled on the device, not copied to it
        self.share = None if self.sampled_stage is None else self.start.new_full((), self.sampled_stage.share)
        errors = [i for i, q in enumerate(self.quadratures) if isinstance(q, StepError)]
        self.step_error = 1 + (self.path is not None) + self.log_det + errors[0] if errors else None  # its index in the state
        self.need = checked_need(frozenset({"div"} if self.log_det else ()).union(*(q.need for q in self.quadratures)))
        if self.compile is True and "div" in self.need:
            # at any t; within the compiled part it would be recomputed at every evaluation
            self.field.keep_kernel(self.start if self.path is None else self.start.new_zeros(self.path.k))

    def weights(self, field: nn.Module) -> list[Tensor]:
        """Return the parameters of the field, the augmented time and learned running costs, without duplicates."""
        modules = (field, *([] if self.path is None else [self.path]), *learned_modules(self.quadratures))
        return list({id(p): p for m in modules for p in m.parameters()}.values())

    def part(self, index: Tensor, field: Callable[[Tensor | None], SolveField]) -> AugmentedDynamics:
        """Return the dynamics of the rows ``index`` (R,), with the field that ``field(context)`` returns for them."""
        other = copy.copy(self)
        other.context = context_rows(self.context, index)
        other.probe = None if self.probe is None else self.probe[:, index]
        other.field = field(other.context)
        return other

    def at(self, s: Tensor, first: int = 0, *, integrals: bool = True) -> list[list[Callable[[State], State]]] | None:
        """Return functions state -> d state / ds at each of s (steps, stages), the steps of a grid from ``first`` on.

        What depends on t alone is computed for all of them in one product; ``integrals`` includes what the divergence
        needs. None if nothing is gained by that.
        """
        if self.path is not None or self.autocast is not None:
            return None
        steps, stages = s.shape
        times = self.start + s.flatten() * self.span
        trace = integrals and bool(self.need) and not isinstance(self.divergence, Hutchinson) and getattr(self.divergence, "closed_form", True)
        fields = self.field.at_times(times, divergence=trace)
        if fields is None:
            return None
        chosen = None if self.sampled_stage is None else (self.sampled_stage.step - first) * stages + self.sampled_stage.stage
        every: list[Callable[[State], State]] = [
            partial(_slopes, self, field, t, omit=chosen is not None and i != chosen)
            # a field at one time ignores t, which integrands alone read
            for i, (field, t) in enumerate(zip(fields, times.unbind() if integrals else [self.start] * len(fields), strict=True))
        ]
        return [every[i * stages : (i + 1) * stages] for i in range(steps)]

    def __call__(self, s: Tensor, state: State, stage: tuple[int, int] | None = None) -> State:
        """Return d state / ds; ``stage`` is the step and stage of a grid, both counted from 0."""
        omit = self.sampled_stage is not None and stage != self.sampled_stage[:2]
        if not self.compile or torch.compiler.is_compiling():
            return _evaluate(self, s, state, omit)
        with differentiable_attention(self.field.custom):  # traced code takes the kernel that is selected outside of it
            return cast(State, compiled(_evaluate)(self, s, state, omit))


def field_precision(kind: torch.dtype | None, x: Tensor) -> AbstractContextManager[None]:
    """Return an autocast context for the field's dtype on x's device; a null context for None."""
    if kind is None:
        return nullcontext()
    # no cache: it would keep the casts of one evaluation, which no other evaluation reuses
    return torch.autocast(x.device.type, kind, cache_enabled=False)


def _evaluate(rhs: AugmentedDynamics, s: Tensor, state: State, omit: bool) -> State:
    """Evaluate the dynamics; ``omit`` sets integrands that only the sampled stage evaluates to zero."""
    return _slopes(rhs, rhs.field, rhs.start + s * rhs.span, state, omit)


def _slopes(rhs: AugmentedDynamics, field: SolveField, t: Tensor, state: State, omit: bool) -> State:
    """Evaluate the dynamics at time t (), with ``field`` in place of that of ``rhs``."""
    span, x = rhs.span, state[0]
    integrals = len(state) > 1 + (rhs.path is not None)
    need: frozenset[str] = frozenset() if not integrals else rhs.need - {"jac_sq"} if omit else rhs.need
    if rhs.path is None:
        time, moved, drift = t, [], None
    else:
        drift = rhs.path(state[1])
        time, moved = state[1][0], [span * drift]
    with field_precision(rhs.autocast, x):
        if need:
            parts = rhs.divergence.linearize(field, time, x, rhs.probe, rhs.context, need)
        else:
            parts = Linearization(field(time, x, rhs.context).to(x.dtype))
        out = [span * parts.dx, *moved]
        if integrals and rhs.log_det:
            out.append(span * cast(Tensor, parts.div))
        if not integrals or not rhs.quadratures:
            return tuple(out)
        bound = Bound(field, rhs.context) if drift is None else Bound(field, rhs.context, time, drift[0])
        # regularisers are non-negative in both directions: |span|, not its sign
        length = span.abs()
        for quadrature, foreign in zip(rhs.quadratures, rhs.foreign, strict=True):
            rare = rhs.share is not None and "jac_sq" in quadrature.need
            if rare and omit:
                out.append(x.new_zeros(len(x)))
                continue
            value = length * quadrature(t, x.clone() if foreign else x, parts, bound)  # user code may modify its input in place
            out.append(value / cast(Tensor, rhs.share) if rare else value)
    return tuple(out)
