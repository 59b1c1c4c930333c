"""The gradient of one batch, whole or in micro-batches, and why there is none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cnf.errors import SolverError
from cnf.noise import Noise
from cnf.objectives import Objective
from cnf.solvers import Stats

__all__ = ["Gradient", "culprit", "gradient", "micro_batches", "pieces", "tensor_cores"]


@dataclass
class Gradient:
    """What a batch gave beside its gradient, which is left in the parameters' ``grad``."""

    names: tuple[str, ...] = ()
    """Of the figures: the objective's terms, nfe and nfe_backward."""
    figures: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Means over the batch, in double precision."""
    failure: str = ""
    """Why there is no gradient; "" where there is one."""


@contextmanager
def tensor_cores(tf32: bool) -> Iterator[None]:
    """Inside, a GPU's float32 products are rounded to TF32 (10 bits after the point), or, convolutions too, not at all."""
    parts: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [part.allow_tf32 for part in parts]
    try:
        for part in parts:
            part.allow_tf32 = tf32
        yield
    finally:
        for part, was in zip(parts, before, strict=True):
            part.allow_tf32 = was


def pieces(rows: int, count: int) -> Iterator[slice]:
    """``rows`` in ``count`` pieces (in fewer, if they are fewer) of one size, but for the last.

    Example:
        >>> list(pieces(7, 3))
        [slice(0, 3, None), slice(3, 6, None), slice(6, 7, None)]
    """
    size = math.ceil(rows / max(1, min(count, rows)))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def micro_batches(
    x: Tensor, context: Tensor | None, noise: Noise, count: int
) -> Iterator[tuple[Tensor, Tensor | None, Noise]]:
    """A batch in ``count`` micro-batches, each with its rows of the noise of all; a batch in one piece as it is."""
    for rows in pieces(len(x), count):
        if rows == slice(0, len(x)):
            yield x, context, noise
        else:
            yield x[rows], None if context is None else context[rows], noise.rows(rows.start, len(x))


def gradient(
    objective: Objective,
    x: Tensor,
    context: Tensor | None,
    noise: Noise,
    *,
    count: int = 1,
    limit: float = math.inf,
    limit_backward: float = math.inf,
    adjoint: bool = False,
) -> Gradient:
    """Add the gradient of the mean loss of x (N, \\*event) to the parameters' ``grad``.

    Args:
        objective: in training mode.
        x: the batch.
        context: (N, C) or None.
        noise: of the whole batch: a micro-batch draws its rows of it.
        count: micro-batches: the same gradient, in the memory of one of them.
        limit: evaluations of one forward solve above which the batch is given up, before its backward pass.
        limit_backward: evaluations in its backward pass above which it is given up.
        adjoint: whether an ``AssertionError`` in the backward pass is a solve's that failed, which torchdiffeq says so.
    """
    total, found = len(x), Gradient()
    costs: list[tuple[Stats, float]] = []
    means: list[Tensor] = []
    for part in micro_batches(x, context, noise, count):
        share = len(part[0]) / total
        stats = Stats()
        try:
            terms, stats = objective.evaluate(*part)
            if stats.nfe > limit:
                found.failure = f"{stats.nfe:,} evaluations, {limit:,.0f} at most: the solve runs away{stats.costliest()}"
                return found
            mean = terms["loss"].mean()
            (mean if share == 1 else mean * share).backward()
            if share < 1 and not means and x.is_cuda:
                # a gradient may lie in a CUDA graph's memory, which the next micro-batch is computed in; from here on it is added to
                for p in objective.parameters():
                    p.grad = None if p.grad is None else p.grad.clone()
        except SolverError as error:
            found.failure = str(error)
            return found
        except AssertionError as error:
            if not adjoint:
                raise
            found.failure = f"the adjoint's solve failed{stats.stalled()}: {' '.join(str(error).split())[:200]}"
            return found
        means.append(torch.stack([value.detach().mean().double() * share for value in terms.values()]))
        costs.append((stats, share))
    found.names = (*terms, "nfe", "nfe_backward")
    counts = [_mean([(getattr(stats, name), share) for stats, share in costs]) for name in found.names[-2:]]
    if counts[1] > limit_backward:
        found.failure = f"{counts[1]:,.0f} evaluations in the backward pass, {limit_backward:,.0f} at most: it runs away"
        return found
    joined = torch.stack(means).sum(0)
    # filled where they are: copied from here, each would wait for the device
    found.figures = torch.cat([joined, *(joined.new_full((1,), count) for count in counts)])
    return found


def _mean(values: list[tuple[int, float]]) -> float:
    """The mean of numbers weighed by shares; exact where they are the same."""
    first = values[0][0]
    return first if all(v == first for v, _ in values) else sum(v * share for v, share in values)


def culprit(model: nn.Module, figures: dict[str, float], norm: float, place: str = "") -> str:
    """Which loss term is not finite, or the gradient of which parameter (``place``) of which block, in words."""
    wrong = [f"{name} {value:g}" for name, value in figures.items() if not math.isfinite(value)]
    if wrong:
        return ", ".join(wrong)
    blocks = {id(p): i for i, block in enumerate(getattr(model, "blocks", ()), 1) for p in block.parameters()}
    where = ""
    if place:
        number = blocks.get(id(model.get_parameter(place)))
        where = f": not finite at {place}" + (f", in block {number} of {max(blocks.values())}" if number else "")
    return f"loss {figures['loss']:g}, gradient norm {norm:g}{where}"
