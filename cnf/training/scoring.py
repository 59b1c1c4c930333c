"""Likelihood of a split with every setting that it depends on, and per-row likelihoods as a file."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchdiffeq

from cnf._utils.errors import ConfigError
from cnf._utils.progress import Progress
from cnf._utils.version import __version__
from cnf.config.results import figure
from cnf.data import DataSplits
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.evaluation import Evaluation, evaluate, integral_2d
from cnf.evaluation import check as check_items
from cnf.flow import Flow
from cnf.models import Model
from cnf.models.custom import field_code
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Exact, Hutchinson
from cnf.solvers import Adaptive, ExponentialAdams, FixedGrid, Solver
from cnf.training.batches import choose_rows, fingerprint
from cnf.training.files import write_items
from cnf.training.loop import Trainer
from cnf.transforms import Gaussianize, Logit

__all__ = ["TEST_SEED", "about", "rows_checked", "score", "solver_facts", "trained", "write_scores"]

TEST_SEED = 30_000  # fixed test noise, so that figures compare between runs, and between a subset and the whole split
QUICK_CHECK = 256  # most rows of a default check, which takes a tenth of the scored rows


def about(model: Model, started: float) -> dict[str, Any]:
    """Return the entries of every result on the model, the seconds since ``started`` and the versions."""
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.like.dtype).removeprefix("torch."),
        "device": model.like.device.type,
        "evaluation_seconds": round(time.monotonic() - started, 1),
        "versions": {
            "cnf": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchdiffeq": torchdiffeq.__version__,
        },
    }


def trained(trainer: Trainer, seed: int, data: DataSplits, config: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a finished run's result on its training, its seed and its settings; None for those of a missing validation."""
    validated = math.isfinite(trainer.state.best)
    return {
        "seed": seed,
        "validation": trainer.state.best if validated else None,
        "best_step": trainer.state.best_step if validated else None,
        "steps": trainer.state.step,
        "stopped": trainer.stop_reason() or "max_time",
        "skipped": trainer.state.skipped,
        "seconds": round(trainer.state.seconds, 3),
        "notices": list(data.notices),
        "config": config,
        "data_fingerprint": fingerprint(data),
        "field_code": field_code(),
    }


def rows_checked(rows: int, check: bool) -> int:
    """Return the number of scored rows to solve again: all if ``check``, else a tenth, from 16 to QUICK_CHECK."""
    return rows if check else min(rows, QUICK_CHECK, max(16, rows // 10))


def score(
    flow: Flow,
    data: DataSplits,
    split: str = "test",
    draws: int = 10,
    *,
    importance: int = 1,
    dequantisation: str | None = None,
    items: int | None = None,
    check: bool = False,
    batch_size: int | None = None,
    group: Group = SINGLE_PROCESS,
    quiet: bool = False,
) -> tuple[dict[str, Any], Evaluation]:
    """Evaluate the likelihood of a split.

    Args:
        flow: in evaluation mode.
        data: the run's data.
        split: ``"test"``, ``"validation"`` or ``"train"``.
        draws: noise draws for each row (dequantisation, probe).
        importance: number K of samples in each draw's importance-weighted bound; 1 is the plain bound.
        dequantisation: ``"uniform"``, ``"variational"``, ``"truncated-normal"`` or ``"mid-bin"``; the flow's own if
            None.
        items: number of rows to score, a random subset that is always the same; all if None.
        check: solve all scored rows again at ten times tighter tolerances, and their round trip, instead of some of
            them.
        batch_size: rows of a solve.
        group: processes that all call this with the same arguments and share the work; each gets the result, except the
            integral of a toy density, which only rank 0 gets.
        quiet: report no progress on stderr.

    Returns:
        The result with all settings that it depends on, and the evaluation of each row.

    Raises:
        ConfigError: for ``items`` below 1, or settings that the data or the flow do not support.
        SolverError: if a solve fails.
    """
    started = time.monotonic()
    x: torch.Tensor = getattr(data, split)
    context = getattr(data, f"{split}_context")
    total = len(x)
    index = choose_rows(total, items, TEST_SEED)
    x, context = x[index], None if context is None else context[index]
    quiet = quiet or not group.main
    with Progress(f"{split} likelihood", "solves", quiet=quiet) as work:
        found = evaluate(
            flow, x, context, draws=draws, importance=importance, dequantisation=dequantisation, seed=TEST_SEED,
            batch_size=batch_size, index=index, group=group, progress=work.update,
        )  # fmt: skip
    few = rows_checked(len(x), check)
    with Progress("solver check", "solves", quiet=quiet) as work:
        checked = check_items(
            flow, x[:few], None if context is None else context[:few], dequantisation=dequantisation, seed=TEST_SEED,
            batch_size=batch_size, index=index[:few], group=group, progress=work.update,
        )  # fmt: skip
    metric = "nats" if flow.levels is None else "bits_per_dim"
    result: dict[str, Any] = {
        **figure(metric, found.mean, found.standard_error),
        metric: found.mean,
        "noise_standard_error": found.noise_standard_error,
        "bound": found.bound,
        "note": found.note,
        "unsolved": list(found.unsolved),
        "unsolved_note": found.unsolved_note,
        "data": data.name,
        "split": split,
        "items": len(x),
        "items_of": total,
        "dimensions": flow.dim,
        "levels": flow.levels,
        "dequantisation": found.dequantisation,
        "importance_samples": found.importance,
        "noise_draws": found.draws,
        "alpha": next((m.alpha for m in flow.modules() if isinstance(m, Logit | Gaussianize)), None),
        **solver_facts(flow.blocks),
        "solver_error": checked.difference,
        "solver_error_largest": checked.largest,
        "round_trip_error": checked.round_trip,
        "checked_items": checked.items,
        "nfe": found.nfe,
        "products": found.products,
        **about(flow, started),
    }
    if data.entropy is not None:
        result["true_entropy"] = data.entropy
    if data.kind == "toy" and context is None and group.main:  # conditional densities have one integral for each class
        result["integral"] = integral_2d(flow, extent=1.6 * float((data.test if len(data.test) else x).abs().max()))
    return result, found


def solver_facts(blocks: Sequence[CNF]) -> dict[str, Any]:
    """Return the evaluation solvers and divergence strategies of a model's blocks."""

    def common(values: list[Any]) -> Any:
        """Return the common value, or a list of all values where blocks differ."""
        different = list(dict.fromkeys(values))
        return different[0] if len(different) == 1 else different or None

    solvers = [block.eval_solver for block in blocks]
    traces = [block.divergence for block in blocks]
    adaptive = [s for s in solvers if isinstance(s, Adaptive)]
    grids = [s for s in solvers if isinstance(s, FixedGrid | ExponentialAdams)]
    probes = [d for d in traces if isinstance(d, Hutchinson)]
    return {
        "solver": common([_name(s) for s in solvers]),
        "rtol": common([s.rtol for s in adaptive]),
        "atol": common([s.atol for s in adaptive]),
        "quadrature_tolerance": common([s.quadrature_tolerance for s in adaptive]),
        "grid_steps": common([s.steps for s in grids]),
        "likelihood_tolerance": common([s.tolerance for s in solvers if isinstance(s, ExponentialAdams)]),
        "divergence": common(["exact" if isinstance(d, Exact) else "hutchinson" for d in traces]),
        "probe": common([d.distribution for d in probes]),
        "probes": common([d.probes for d in probes]),
    }


def _name(solver: Solver) -> str:
    """Return the name of a solver's method."""
    if isinstance(solver, ExponentialAdams):
        return f"exponential Adams {solver.order}"
    return solver.method if isinstance(solver, Adaptive | FixedGrid) else repr(solver)


def write_scores(path: Path, found: Evaluation, *, names: Sequence[str] | None = None) -> None:
    """Write the likelihood of every row atomically, in the order of evaluation.

    ``index`` is the row's index in its split, ``nll`` its negative log-likelihood in the figure's unit (bits/dim or
    nats), ``log_prob`` its log-likelihood in nats, ``name`` its name if names are given. A .npz file holds these arrays
    and ``unit``; a .csv file has one column for each, with ``nll`` called ``bits_per_dim`` or ``nats``.

    Args:
        path: ends in .npz or .csv.
        found: the evaluation.
        names: of the rows.

    Raises:
        ConfigError: for another file name ending, or a number of names other than that of the rows.
        CheckpointError: if the file cannot be written.
    """
    if names is not None and len(names) != len(found.per_item):
        raise ConfigError(f"names are {len(names)}, but {len(found.per_item)} items were evaluated")
    arrays = {"index": found.index.numpy(), "nll": found.per_item.numpy(), "log_prob": found.log_prob.numpy()}
    if names is not None:
        arrays["name"] = np.array([str(name) for name in names])
    renamed = {"nll": "nats" if found.unit == "nats" else "bits_per_dim"}
    columns = {renamed.get(key, key): values for key, values in arrays.items()}
    write_items(path, {"unit": np.array(found.unit), **arrays}, columns)
