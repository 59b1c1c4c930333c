"""Gradient of one batch, whole or in micro-batches, or the reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cnf._utils.errors import SolverError
from cnf.losses import Objective
from cnf.random import Noise
from cnf.solvers import Stats

__all__ = ["Gradient", "culprit", "gradient", "micro_batches", "pieces", "tensor_cores"]


@dataclass
class Gradient:
    """Metrics of a batch; the gradient itself is left in the parameters' ``grad``."""

    names: tuple[str, ...] = ()
    """Names of the figures: the objective's terms, nfe and nfe_backward."""
    figures: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Means over the batch, float64."""
    failure: str = ""
    """Why there is no gradient; "" if there is one."""


@contextmanager
def tensor_cores(tf32: bool) -> Iterator[None]:
    """Context manager that sets TF32 (10-bit mantissa) for float32 products and convolutions on a GPU."""
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
    """Split ``rows`` into at most ``count`` slices of equal size, the last one possibly smaller.

    Example:
        >>> list(pieces(7, 3))
        [slice(0, 3, None), slice(3, 6, None), slice(6, 7, None)]
    """
    size = math.ceil(rows / max(1, min(count, rows)))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def micro_batches(
    x: Tensor, context: Tensor | None, noise: Noise, count: int
) -> Iterator[tuple[Tensor, Tensor | None, Noise]]:
    """Split a batch into ``count`` micro-batches, each with its rows of the batch's noise."""
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
        noise: of the whole batch: a micro-batch draws its own rows of it.
        count: number of micro-batches: the same gradient in the memory of one of them.
        limit: evaluations of one forward solve above which the batch is dropped, before its backward pass.
        limit_backward: evaluations of its backward pass above which it is dropped.
        adjoint: treat an ``AssertionError`` in the backward pass as a failed solve, which torchdiffeq reports that way.
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
                # a gradient may lie in a CUDA graph's memory, which the next micro-batch overwrites; the clone
                # accumulates from here on
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
    # filled on the device: a copy from the host would synchronise
    found.figures = torch.cat([joined, *(joined.new_full((1,), count) for count in counts)])
    return found


def _mean(values: list[tuple[int, float]]) -> float:
    """Return the weighted mean of (value, share) pairs; exact if all values are equal."""
    first = values[0][0]
    return first if all(v == first for v, _ in values) else sum(v * share for v, share in values)


def culprit(model: nn.Module, figures: dict[str, float], norm: float, place: str = "") -> str:
    """Return which loss term is not finite, or which parameter's gradient (``place``) and in which block."""
    wrong = [f"{name} {value:g}" for name, value in figures.items() if not math.isfinite(value)]
    if wrong:
        return ", ".join(wrong)
    blocks = {id(p): i for i, block in enumerate(getattr(model, "blocks", ()), 1) for p in block.parameters()}
    where = ""
    if place:
        number = blocks.get(id(model.get_parameter(place)))
        where = f": not finite at {place}" + (f", in block {number} of {max(blocks.values())}" if number else "")
    return f"loss {figures['loss']:g}, gradient norm {norm:g}{where}"
