"""Likelihood of every row of a split, with standard errors over rows and over noise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from cnf._utils.errors import ConfigError, DataError, SolverError, require_at_least
from cnf._utils.validation import check_unit_interval, context_rows, match_flow
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.evaluation.items import ItemNoise
from cnf.evaluation.stiffness_batching import sorted_rows
from cnf.flow import Flow
from cnf.ode.divergence import Hutchinson
from cnf.ode.halving import FAILING
from cnf.solvers import Stats
from cnf.solvers.base import SolverOverride
from cnf.transforms import Dequantize, Request
from cnf.transforms.dequantization import TruncatedNormalDequantize, VariationalDequantize

__all__ = ["DEQUANTISATIONS", "Evaluation", "default_batch_size", "evaluate"]

DEQUANTISATIONS = ("uniform", "variational", "truncated-normal", "mid-bin")
OWN = {VariationalDequantize: "variational", TruncatedNormalDequantize: "truncated-normal"}  # part of a flow
MID_BIN_NOTE = "the density at the middle of each grey level is no bound on the pixels' likelihood"
INFLATED_NOTE = "Hutchinson's noise inflates the mean over importance samples: use the exact trace for a bound"


@dataclass(frozen=True)
class Evaluation:
    """Negative log-likelihood of a split, in ``unit`` (bits/dim for images, nats for vectors).

    Rows that cannot be solved (``unsolved``) are NaN in ``per_item`` and ``log_prob``; all other figures are over the
    remaining rows, and :attr:`unsolved_note` reports them.
    """

    mean: float
    standard_error: float
    """Over rows, including their share of the noise; NaN for a single row."""
    noise_standard_error: float | None
    """Over noise draws with the rows fixed; 0 without noise, None for a single draw."""
    unit: str
    per_item: Tensor
    """(N,) float64, in ``unit``."""
    log_prob: Tensor
    """(N,) float64, in nats: of an image's pixels (or its bound), of a vector's density."""
    index: Tensor
    """(N,) indices of the rows in their split."""
    draws: int
    importance: int
    """Number K of samples in each draw's importance-weighted bound; 1 is the plain bound."""
    dequantisation: str
    """``"uniform"``, ``"variational"``, ``"truncated-normal"``, ``"mid-bin"``, or ``"none"`` for floats."""
    bound: bool | None
    """Whether the figure bounds the pixels' from above, in expectation; None for floats, which have a density."""
    nfe: float
    """Evaluations of the field in a batch's solve, averaged over batches."""
    products: float
    """The evaluations among them that compute a derivative for the trace."""
    unsolved: tuple[int, ...] = ()
    """Indices in their split of the rows whose ODE cannot be solved."""
    reason: str = ""
    """Why the first of them cannot be solved."""

    @property
    def unsolved_note(self) -> str | None:
        """Which rows have no likelihood, and why; None if all have one."""
        if not self.unsolved:
            return None
        count = len(self.unsolved)
        shown = ", ".join(map(str, self.unsolved[:10])) + (", ..." if count > 10 else "")
        return f"{count:,} of {len(self.per_item):,} rows cannot be solved and are left out of the mean (rows {shown}): {self.reason}"

    def require_solved(self) -> Evaluation:
        """Return this evaluation.

        Raises:
            SolverError: if a row has no likelihood.
        """
        if self.unsolved:
            raise SolverError(str(self.unsolved_note))
        return self

    @property
    def note(self) -> str | None:
        """Why the figure is not a bound; None if it is one or the data are floats."""
        if self.bound is not False:
            return None
        return MID_BIN_NOTE if self.dequantisation == "mid-bin" else INFLATED_NOTE


def default_batch_size(flow: Flow) -> int:
    """Return the default number of rows of a solve: fewer for larger rows, to bound memory."""
    return max(1, min(4096, 2**18 // flow.dim))


@torch.no_grad()
def evaluate(
    flow: Flow,
    x: Tensor,
    context: Tensor | None = None,
    *,
    draws: int = 1,
    importance: int = 1,
    dequantisation: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    index: Tensor | None = None,
    group: Group = SINGLE_PROCESS,
    steps: Tensor | None = None,
    progress: Callable[[int, int], object] | None = None,
    solver: SolverOverride = None,
) -> Evaluation:
    r"""Evaluate the negative log-likelihood of every row, with sums in double precision.

    Rows whose ODE cannot be solved are reported in ``unsolved`` and in a warning; all others keep their likelihood.

    With ``importance`` K each draw is :math:`\ln \frac1K \sum_k p(x + u_k) / q(u_k)` (1509.00519, with the term
    :math:`-\ln K`): a bound that rises with K to the pixels' log-likelihood. K = 1 is the plain bound. ``"mid-bin"``,
    the figure of RNODE's code (2002.02798), is the density at (k + 1/2)/levels, which is not a bound.

    Args:
        flow: used in its current mode; call ``flow.eval()`` for evaluation.
        x: uint8 images or float vectors (N, \*event); floats in [0, 1] are scaled by the flow's levels.
        context: (N, C), (C,) or None.
        draws: independent noise draws (dequantisation, probe), averaged; 1 is used if there is no noise.
        importance: number K of samples of the dequantisation noise in each draw's bound.
        dequantisation: ``"uniform"``, ``"variational"``, ``"truncated-normal"`` or ``"mid-bin"``; the flow's if None.
        seed: of the noise.
        batch_size: rows of a solve; by the event's size if None.
        index: (N,) indices of the rows in their split, which determine their noise; 0, 1, ... if None.
        group: processes that all call this with the same arguments: they share the batches, and each gets the whole
            result, bitwise that of a single process (on the same hardware).
        steps: (N, D) for vectors: uniform noise on [0, step) is added to each value in each draw; 0 for values without
            a step. The mean of the draws' log-densities is a lower bound on ln of the mean density over a step.
        progress: called with the number of this process's finished solves and of all its solves, before the first and
            after each (such as :meth:`cnf._utils.progress.Progress.update`).
        solver: solver of every block, or a function of the block; the blocks' own if None.

    Raises:
        SolverError: if a solve fails without naming rows, for more than 16 rows of a batch, or for all; on all ranks.
        DataError: for no rows, or float images outside [0, 1].
        ConfigError: for numbers below one, or a dequantisation or weighting that flow or data do not support.

    Example:
        >>> from cnf import FlowConfig, SolverConfig, build
        >>> flow = build(FlowConfig.of(hidden=(8,)), SolverConfig(), (1, 2, 2), levels=4).eval()
        >>> evaluation = evaluate(flow, torch.randint(0, 4, (5, 1, 2, 2), dtype=torch.uint8), importance=3)
        >>> evaluation.unit, evaluation.dequantisation, evaluation.bound, tuple(evaluation.per_item.shape)
        ('bits/dim', 'uniform', True, (5,))
    """
    if len(x) == 0:
        raise DataError("x has no rows, expected at least one to evaluate")
    require_at_least(1, draws=draws, importance=importance, batch_size=batch_size)
    kind = _kind(flow, x, dequantisation)
    if steps is not None and bool((steps > 0).any()):
        if flow.levels is not None or steps.shape != x.shape:
            raise ConfigError(f"steps has shape {tuple(steps.shape)}, expected that of x, {tuple(x.shape)}, for vectors only")
        kind = "uniform"
    else:
        steps = None
    if flow.levels is not None:
        check_unit_interval(x)
    spread = kind in ("uniform", *OWN.values())
    if importance > 1 and not spread:
        raise ConfigError(f"importance={importance} needs dequantisation noise, but dequantisation is {kind!r}: use importance=1")
    probed = any(isinstance(getattr(m, "divergence", None), Hutchinson) for m in flow.modules())
    draws = draws if spread or probed else 1
    size = batch_size or default_batch_size(flow)
    index = torch.arange(len(x)) if index is None else index.cpu()
    table = torch.zeros(draws, len(x), dtype=torch.float64)
    parts = sorted_rows(flow, x, context, size=size, group=group).split(size)
    work = [(draw, rows) for draw in range(draws) for rows in parts]
    cost = torch.zeros(2, len(work), importance, dtype=torch.float64)
    done, solves = 0, group.owned(len(work)) * importance
    report = progress or (lambda done, total: None)
    report(done, solves)
    reason = ""
    with group.together():
        for number, (draw, rows) in enumerate(work):
            if not group.owns(number):
                continue
            samples = []
            for sample in range(importance):
                noise, points = ItemNoise(seed, index[rows].tolist(), draw, sample), x[rows]
                if steps is not None:
                    u = noise.draw("dequantize", "uniform", points.shape, dtype=x.dtype, device=x.device)
                    points = points + steps[rows].to(x) * u
                value, stats, why = _solve(flow, points, context_rows(context, rows), noise, kind, solver)
                samples.append(value)
                cost[:, number, sample] = torch.tensor([stats.nfe, stats.products])
                reason = reason or why
                done += 1
                report(done, solves)
            table[draw, rows] = reduce(torch.logaddexp, samples) - math.log(importance)
    table, cost = group.sum(table), group.sum(cost)
    log_prob = table.mean(0)
    lost = log_prob.isnan()
    unsolved = tuple(index[lost].tolist())
    if unsolved:
        reason = next(filter(None, group.all_gather(reason)), "")
        if len(unsolved) == len(x):
            raise SolverError(f"none of {len(x):,} rows can be solved: {reason}")
    scale = -1 / (flow.dim * math.log(2)) if flow.levels is not None else -1.0
    per_item = scale * log_prob
    solved = per_item[~lost]
    n = len(solved)
    noise_error: float | None = 0.0
    if spread or probed:
        # rows draw independent noise, so their variances add: far steadier than the variance of a few means
        noise_error = abs(scale) * math.sqrt(float(table[:, ~lost].var(0).mean()) / (draws * n)) if draws > 1 else None
    evaluation = Evaluation(
        mean=float(solved.mean()),
        standard_error=float(solved.std()) / math.sqrt(n) if n > 1 else math.nan,
        noise_standard_error=noise_error,
        unit="nats" if flow.levels is None else "bits/dim",
        per_item=per_item,
        log_prob=log_prob,
        index=index,
        draws=draws,
        importance=importance,
        dequantisation=kind,
        bound=None if kind == "none" else spread and not (probed and importance > 1),
        nfe=float(cost[0].mean()),
        products=float(cost[1].mean()),
        unsolved=unsolved,
        reason=reason,
    )
    if unsolved:
        warnings.warn(str(evaluation.unsolved_note), stacklevel=3)  # the caller's line, outside no_grad
    return evaluation


def _kind(flow: Flow, x: Tensor, wanted: str | None) -> str:
    """Return the dequantisation of this evaluation."""
    if wanted is not None and wanted not in DEQUANTISATIONS:
        raise ConfigError(f"dequantisation must be one of {', '.join(DEQUANTISATIONS)}, got {wanted!r}")
    if flow.levels is None or x.is_floating_point():
        if wanted is not None:
            raise ConfigError(f"dequantisation={wanted!r} is for uint8 images, got {x.dtype}: leave it out")
        return "none"
    own = next((name for m in flow.modules() for kind, name in OWN.items() if isinstance(m, kind)), "uniform")
    if wanted in OWN.values() and own != wanted:
        raise ConfigError(f"dequantisation={wanted!r}, but this flow was built without it: use 'uniform' or 'mid-bin'")
    return wanted or own


def _solve(
    flow: Flow, x: Tensor, context: Tensor | None, noise: ItemNoise, kind: str, solver: SolverOverride
) -> tuple[Tensor, Stats, str]:
    """Return :func:`_log_prob` of the rows that can be solved, NaN for at most FAILING others, and why the first cannot."""
    keep, reason = list(range(len(x))), ""
    value, stats = torch.full((len(x),), math.nan, dtype=torch.float64), Stats()
    while keep:
        try:
            value[keep], stats = _log_prob(flow, x[keep], context_rows(context, keep), noise.select(keep), kind, solver)
            break
        except SolverError as error:
            reason = reason or error.cause or str(error)
            if not error.rows or len(x) - len(keep) + len(error.rows) > FAILING:
                raise
            keep = [row for i, row in enumerate(keep) if i not in error.rows]
    return value, stats, reason


def _log_prob(
    flow: Flow, x: Tensor, context: Tensor | None, noise: ItemNoise, kind: str, solver: SolverOverride
) -> tuple[Tensor, Stats]:
    """Return log p (N,), float64 on the CPU, on the pixels' scale for images, and the statistics of the solve."""
    x, context = match_flow(x, context, flow.like)
    shift = 0.0
    if flow.levels is not None and kind not in OWN.values():
        if kind == "mid-bin":
            x = (x.to(flow.like.dtype) + 0.5) / flow.levels
        elif kind == "uniform":  # outside the flow, whose own dequantisation may be learned
            x = Dequantize(flow.levels)(x, Request(noise=noise)).value.to(flow.like.dtype)
        shift = -flow.dim * math.log(flow.levels)
    out = flow.evaluate(x, Request(context, noise, integrals=False, solver=solver))
    # in double precision, since squares overflow float32 far from the data
    return flow.density(out.value.double(), out.log_det.double(), None if context is None else context.double()).cpu() + shift, out.stats
