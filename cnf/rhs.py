"""The right-hand side of one solve: the point's motion with every integrand, in the precision of the field, compiled or not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from cnf.compilation import compiled
from cnf.divergence import Bound, Divergence, Driven, linearize
from cnf.fields.augmented import TimePath
from cnf.fields.custom import CustomField, Field
from cnf.quadratures import Quadrature, StepError

__all__ = ["OneStage", "RightHandSide", "field_precision"]

State = tuple[Tensor, ...]


class OneStage(NamedTuple):
    """The one stage of a grid at which the integrands that take a product of their own are evaluated, drawn at random.

    What they give there is divided by ``share``, the stage's part of all stages' weights and so the probability of its being
    drawn: the integral is then that of the grid in expectation, at the price of one product a solve.
    """

    step: int
    stage: int
    share: float


class RightHandSide:
    """d state / ds of one solve, with t = start + s span: dx/ds, da/ds where there is a path, dl/ds, and the quadratures.

    A state of the dynamic entries alone gets their slopes alone.

    Args:
        field: prepared for this solve (see :func:`cnf.fields.custom.prepared`).
        path: of the augmented time, or None.
        divergence: how the trace is had.
        quadratures: what else is integrated.
        start, span: t at s = 0, and its length, negative on the way back; ().
        context: (N, C), (C,) or None.
        probe: what the divergence needs, held fixed.
        log_det: whether the log-det is wanted.
        autocast: type that the field computes in, or None for that of x; the state stays in its own.
        compile: compile every evaluation.
        once: the stage at which alone the integrands that need ``"jac_sq"`` are evaluated; None is all of them.
    """

    def __init__(
        self,
        field: Field,
        path: TimePath | None,
        divergence: Divergence,
        quadratures: Sequence[Quadrature],
        *,
        start: Tensor,
        span: Tensor,
        context: Tensor | None,
        probe: Tensor | None,
        log_det: bool,
        autocast: torch.dtype | None = None,
        compile: bool = False,
        once: OneStage | None = None,
    ):
        self.field, self.path, self.divergence, self.quadratures = field, path, divergence, tuple(quadratures)
        self.start, self.span, self.context, self.probe, self.log_det = start, span, context, probe, log_det
        self.autocast, self.compile, self.once = autocast, compile, once
        self.foreign = tuple(not type(q).__module__.startswith("cnf.") or hasattr(q, "cost") for q in quadratures)
        self.custom = isinstance(field, CustomField) or any(self.foreign)
        # a tensor: a number would be compiled in, and a graph made for each; filled on its device, not copied to it
        self.share = None if once is None else start.new_full((), once.share)
        errors = [i for i, q in enumerate(self.quadratures) if isinstance(q, StepError)]
        self.step_error = 1 + (path is not None) + log_det + errors[0] if errors else None  # its place in the state
        self.need = frozenset({"div"} if log_det else ()).union(*(q.need for q in self.quadratures))
        if compile and "div" in self.need and (keep := getattr(field, "keep_kernel", None)) is not None:
            # at any time; made within the compiled part, it would be made anew at every evaluation
            keep(start if path is None else start.new_zeros(path.k))

    def weights(self, field: nn.Module) -> list[Tensor]:
        """Parameters of the field, the augmented time's net and learned running costs: each once, though a cost may hold the field."""
        learned = [m for q in self.quadratures for m in (q, getattr(q, "cost", None)) if isinstance(m, nn.Module)]
        modules = (field, *([] if self.path is None else [self.path]), *learned)
        return list({id(p): p for m in modules for p in m.parameters()}.values())

    def part(self, index: Tensor, field: Callable[[Tensor | None], Field]) -> RightHandSide:
        """The right-hand side of the rows ``index`` (R,), with the field that ``field(context)`` prepares for them."""
        other = copy.copy(self)
        if self.context is not None and self.context.ndim == 2:
            other.context = self.context[index]
        other.probe = None if self.probe is None else self.probe[:, index]
        other.field = field(other.context)
        return other

    def __call__(self, s: Tensor, state: State) -> State:
        return self._run(s, state, sampled=self.once is not None)

    def at(self, step: int, stage: int, s: Tensor, state: State) -> State:
        """The same, for a grid that says at which of its stages it is."""
        return self._run(s, state, sampled=self.once is not None and (step, stage) != (self.once.step, self.once.stage))

    def _run(self, s: Tensor, state: State, sampled: bool) -> State:
        if self.compile:
            return cast(State, compiled(_evaluate)(self, s, state, sampled))
        return _evaluate(self, s, state, sampled)


def field_precision(kind: torch.dtype | None, x: Tensor) -> AbstractContextManager[None]:
    """Autocast to a field's type on x's device; nothing for None."""
    if kind is None:
        return nullcontext()
    # no cache: it would keep the casts of one evaluation, which no other one sees
    return torch.autocast(x.device.type, kind, cache_enabled=False)


def _evaluate(rhs: RightHandSide, s: Tensor, state: State, sampled: bool) -> State:
    """One evaluation; ``sampled`` leaves out, as zero, what is evaluated at one stage alone."""
    span, x = rhs.span, state[0]
    t = rhs.start + s * span
    if rhs.path is None:
        time, bound, moved = t, Bound(rhs.field, rhs.context), []
    else:
        drift = rhs.path(state[1])
        time, moved = state[1][0], [span * drift]
        bound = Driven(rhs.field, rhs.context, time, drift[0])
    motion = len(state) == 1 + len(moved)
    need: frozenset[str] = frozenset() if motion else rhs.need - {"jac_sq"} if sampled else rhs.need
    with field_precision(rhs.autocast, x):
        parts = linearize(rhs.field, time, x, rhs.probe, rhs.context, need, rhs.divergence)
    out = [span * parts.dx, *moved]
    if motion:
        return tuple(out)
    if rhs.log_det:
        out.append(span * cast(Tensor, parts.div))
    # regularisers are non-negative both ways, so they take the length of the step, not its sign
    length = span.abs()
    for quadrature, foreign in zip(rhs.quadratures, rhs.foreign, strict=True):
        rare = rhs.share is not None and "jac_sq" in quadrature.need
        if rare and sampled:
            out.append(x.new_zeros(len(x)))
            continue
        with field_precision(rhs.autocast, x):
            value = length * quadrature(t, x.clone() if foreign else x, parts, bound)  # user code may overwrite what it is handed
        out.append(value / cast(Tensor, rhs.share) if rare else value)
    return tuple(out)
