"""Evaluation: the mean likelihood of a split, its standard error, and how far the solver can be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cnf.flow import Flow
from cnf.noise import Noise

__all__ = ["Evaluation", "evaluate", "integral_2d", "round_trip_error", "solver_error"]


@dataclass(frozen=True)
class Evaluation:
    """A split's negative log-likelihood, in ``unit`` (bits/dim for images, nats for vectors)."""

    mean: float
    standard_error: float  # over items
    noise_standard_error: float  # over noise draws; 0 where there is but one, or no noise
    unit: str
    per_item: Tensor  # (N,)
    draws: int
    nfe: float  # mean evaluations of a batch's solve


@torch.no_grad()
def evaluate(
    flow: Flow, x: Tensor, context: Tensor | None = None, *, draws: int = 1, seed: int = 0, batch_size: int = 512
) -> Evaluation:
    """The negative log-likelihood of every item, no batch dropped, by seed.

    Args:
        flow: in whatever mode it is; evaluation means ``flow.eval()``.
        x: uint8 images or float vectors (N, \\*event).
        context: (N, C) or None.
        draws: noise draws an item (dequantisation, probe), averaged.
        seed: of the noise.
        batch_size: items solved together.
    """
    rows, nfe = [], []
    for draw in range(draws):
        parts = []
        for number, start in enumerate(range(0, len(x), batch_size)):
            batch = x[start : start + batch_size]
            rows_context = None if context is None else context[start : start + batch_size]
            noise = Noise(seed, f"evaluation/{draw}", number)
            out = flow.evaluate(batch, rows_context, noise=noise, integrals=False)
            log_prob = flow.base_log_prob(out.value) + out.log_det
            parts.append(-log_prob if flow.levels is None else flow.to_bits(log_prob, batch.is_floating_point()))
            nfe.append(out.stats.nfe)
        rows.append(torch.cat(parts).double().cpu())
    table = torch.stack(rows)
    per_item = table.mean(0)
    n = len(per_item)
    return Evaluation(
        mean=float(per_item.mean()),
        standard_error=float(per_item.std() / math.sqrt(n)) if n > 1 else math.nan,
        noise_standard_error=float(table.mean(1).std() / math.sqrt(draws)) if draws > 1 else 0.0,
        unit="nats" if flow.levels is None else "bits/dim",
        per_item=per_item,
        draws=draws,
        nfe=sum(nfe) / max(1, len(nfe)),
    )


@torch.no_grad()
def solver_error(flow: Flow, x: Tensor, context: Tensor | None = None, *, noise: Noise | None = None) -> float:
    """How much the mean likelihood of a batch moves when its solver is refined (twice the steps, or ten times tighter).

    The same noise is used twice, so give ``noise``. In bits/dim for images and nats per dimension for vectors; the mode of
    ``flow`` says which solver is measured.
    """
    before = flow.log_prob(x, context, noise=noise)
    kept = [(block.solver, block.eval_solver) for block in flow.blocks]
    try:
        for block in flow.blocks:
            block.solver, block.eval_solver = block.solver.refined(), block.eval_solver.refined()
        after = flow.log_prob(x, context, noise=noise)
    finally:
        for block, (solver, eval_solver) in zip(flow.blocks, kept, strict=True):
            block.solver, block.eval_solver = solver, eval_solver
    difference = abs(float((after - before).mean())) / flow.dim
    return difference / math.log(2) if flow.levels is not None else difference


@torch.no_grad()
def round_trip_error(flow: Flow, x: Tensor, context: Tensor | None = None, *, noise: Noise | None = None) -> float:
    """max |x - inverse(forward(x))| over a batch; of uint8 images in units of the [0, 1] scale, in addition to the noise."""
    if not x.is_floating_point():
        assert flow.levels is not None
        x = (x.float() + 0.5) / flow.levels
    z = flow.encode(x, context, noise=noise)
    return float((flow.decode(z, context, noise=noise) - x).abs().max())


@torch.no_grad()
def integral_2d(flow: Flow, extent: float = 8.0, resolution: int = 400) -> float:
    """∫ p over the square [-extent, extent]², by the midpoint rule: 1 for a density that lives inside."""
    side = 2 * extent / resolution
    ticks = torch.linspace(-extent + side / 2, extent - side / 2, resolution)
    grid = torch.cartesian_prod(ticks, ticks)
    total = sum((float(flow.log_prob(part).double().exp().sum()) for part in grid.split(20_000)), 0.0)
    return total * side**2
