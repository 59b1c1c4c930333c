"""Fit of a flow to a table: column transforms, mixture as base, field that starts at zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cnf.bases import GaussianMixture
from cnf.estimators.training import Data, choose_solver, now, train
from cnf.fields import MLP
from cnf.flow import Flow
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Exact
from cnf.solvers import FixedGrid
from cnf.transforms import MarginalTransform, Request, Sequential, Standardize, Transform

__all__ = ["DensityFit", "fit_density"]

_COMPONENTS = (1, 2, 4, 8, 16, 32, 64)
_ROWS_PER_COMPONENT = 10
_RACE = 0.3  # share of the time for the choice of transforms and components


@dataclass(frozen=True)
class DensityFit:
    """Result of :func:`fit_density`.

    Attributes:
        flow: in evaluation mode.
        parts: validation log-likelihood (nats) by part: marginals alone, mixture, flow.
        start: settings of the start.
        validation: validation log-likelihood of the flow.
        steps: optimiser steps.
        seconds: in all.
    """

    flow: Flow
    parts: dict[str, float]
    start: str
    validation: float
    steps: int
    seconds: float


def fit_density(
    train_rows: Tensor,
    validation: Tensor,
    *,
    minutes: float = 1.0,
    seed: int = 0,
    cells: Sequence[tuple[float, float] | None] | None = None,
    bounds: Sequence[tuple[float, float] | None] | None = None,
    names: Sequence[str] | None = None,
    hidden: Sequence[int] | None = None,
    device: str = "cpu",
    on_progress: Callable[[str], None] | None = None,
    components: int | None = None,
    steps: int | None = None,
) -> DensityFit:
    """Fit a flow to rows (N, D) within a given time; validation rows (M, D) choose its parts.

    Args:
        train_rows, validation: without NaN and infinity.
        minutes: limit.
        seed: of all randomness.
        cells, bounds, names: of the columns; see :class:`~cnf.transforms.MarginalTransform`.
        hidden: widths of the field; 64, 64 if None.
        device: of the training.
        on_progress: is called with lines of progress.
        components: of the mixture; chosen on validation if None.
        steps: limit of the optimiser steps.
    """
    began, seconds, dim = now(), 60 * minutes, train_rows.shape[1]
    best: tuple[float, Transform, GaussianMixture, str] | None = None
    parts: dict[str, float] = {}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        for name, transform in _transforms(dim, train_rows, validation, cells, bounds, names):
            request = Request()
            z, held = transform(train_rows, request).value, transform(validation, request)
            log_det = float(held.log_det.double().mean())
            for count in _candidates(components, len(z)):
                if best is not None and now() - began > _RACE * seconds:
                    break
                base = GaussianMixture.fit(z, count, seed=seed)
                with torch.no_grad():
                    score = float(base.log_prob(held.value).double().mean()) + log_det
                if best is None or score > best[0]:
                    best = score, transform, base, f"{name}, {count} components"
                if count == 1:
                    parts[name] = score
        assert best is not None
        parts["mixture"] = best[0]
        field = MLP(dim, tuple(hidden or (64, 64)), zero_init=True)
        block = CNF(field, Exact(), FixedGrid("rk4", 2), FixedGrid("rk4", 4))
    flow = Flow(Sequential([best[1], block]), (dim,), base=best[2]).to(device)
    data, held_out = Data(train_rows.to(device)), Data(validation.to(device))
    groups = [{"params": list(field.parameters()), "lr": 4e-3}, {"params": list(flow.base.parameters()), "lr": 1e-3}]
    outcome = train(
        flow, data, held_out, groups, seconds=seconds - (now() - began), steps=steps, seed=seed, on_progress=on_progress
    )
    flow.cpu().double()
    choose_solver(flow, Data(validation.double()))
    parts["flow"] = outcome.best
    return DensityFit(flow, parts, best[3], outcome.best, outcome.steps, now() - began)


def _candidates(components: int | None, rows: int) -> tuple[int, ...]:
    if components is not None:
        return (components,)
    return tuple(k for k in _COMPONENTS if k == 1 or k * _ROWS_PER_COMPONENT <= rows)


def _transforms(
    dim: int,
    x: Tensor,
    validation: Tensor,
    cells: Sequence[tuple[float, float] | None] | None,
    bounds: Sequence[tuple[float, float] | None] | None,
    names: Sequence[str] | None,
) -> list[tuple[str, Transform]]:
    """Return the fitted candidates: standardisation, and marginals if they differ from it."""
    plain = Standardize(torch.zeros(dim), torch.ones(dim))
    plain.fit(x)
    marginals = MarginalTransform(dim, cells=cells, bounds=bounds, names=names)
    marginals.fit(x, validation)
    found: list[tuple[str, Transform]] = [] if _bounded(bounds) else [("standardised", plain)]
    if _bounded(bounds) or set(marginals.choices) != {"standardize"}:
        found.append(("marginals", marginals))
    return found


def _bounded(bounds: Sequence[tuple[float, float] | None] | None) -> bool:
    return bounds is not None and any(b is not None and (math.isfinite(b[0]) or math.isfinite(b[1])) for b in bounds)
