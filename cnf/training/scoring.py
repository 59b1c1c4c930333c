"""The score of a split: a likelihood with everything that it depends on, and the likelihood of every item as a file."""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torchdiffeq

import cnf
from cnf.checkpoint import RunInfo
from cnf.datasets import DataSplits
from cnf.distributed import ALONE, Group
from cnf.divergence import Exact, Hutchinson
from cnf.errors import ConfigError
from cnf.flow import Flow
from cnf.likelihood import Evaluation, evaluate, integral_2d
from cnf.likelihood import check as check_items
from cnf.models import Predictor
from cnf.progress import Progress
from cnf.solvers import Adaptive, FixedGrid
from cnf.training.batches import choose_rows
from cnf.training.files import write_items
from cnf.transforms import Gaussianize, Logit

if TYPE_CHECKING:
    from cnf.training.loop import Trainer

__all__ = ["TEST_SEED", "about", "rows_checked", "score", "trained", "write_scores"]

TEST_SEED = 30_000  # test noise never changes: figures of different runs are comparable, and of subsets with the whole
QUICK_CHECK = 256  # items of a check that was not asked for, at most, and no more than a tenth of what is scored


def about(model: Flow | Predictor, info: RunInfo, started: float) -> dict[str, Any]:
    """What every result says of the model, its seed, the seconds since ``started`` and the versions."""
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.like.dtype).removeprefix("torch."),
        "device": model.like.device.type,
        "evaluation_seconds": round(time.monotonic() - started, 1),
        "seed": info.config.train.seed,
        "versions": {
            "cnf": cnf.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchdiffeq": torchdiffeq.__version__,
        },
    }


def trained(trainer: Trainer) -> dict[str, Any]:
    """What every result of a finished run says of its training."""
    return {
        "validation": trainer.best,
        "best_step": trainer.best_step,
        "steps": trainer.step,
        "stopped": trainer.stop_reason() or "max_time",
        "skipped": trainer.skipped,
        "seconds": round(trainer.seconds, 3),
        "notices": list(trainer.data.notices),
        "config": dataclasses.asdict(trainer.info.config),
    }


def rows_checked(rows: int, check: bool) -> int:
    """How many of the scored rows are solved again: all where that is asked for, a tenth otherwise, within bounds."""
    return rows if check else min(rows, QUICK_CHECK, max(16, rows // 10))


def score(
    flow: Flow,
    info: RunInfo,
    data: DataSplits,
    split: str = "test",
    draws: int = 10,
    *,
    importance: int = 1,
    dequantisation: str | None = None,
    items: int | None = None,
    check: bool = False,
    batch_size: int | None = None,
    group: Group = ALONE,
    quiet: bool = False,
) -> tuple[dict[str, Any], Evaluation]:
    """The likelihood of a split, and everything that it depends on.

    Args:
        flow: in evaluation mode.
        info: the run's settings.
        data: its data.
        split: ``"test"``, ``"validation"`` or ``"train"``.
        draws: noise draws an item (dequantisation, probe).
        importance: samples K of each draw's importance-weighted bound; 1 is the plain bound.
        dequantisation: ``"uniform"``, ``"variational"``, ``"truncated-normal"`` or ``"mid-bin"``; the flow's own if None.
        items: score so many only, chosen at random once and for all; all if None.
        check: solve every scored item at ten times tighter tolerances and there and back, not some of them only.
        batch_size: items solved together.
        group: processes that all call this with the same arguments and share the work; each gets the result (but rank 0 alone
            the integral of a toy density).
        quiet: report no progress on stderr.

    Raises:
        ConfigError: for fewer than one item, or what the data or the flow cannot do.
        SolverError: from a solve that failed.
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
    images = flow.levels is not None
    result: dict[str, Any] = {
        "bits_per_dim" if images else "nats": found.mean,
        "standard_error": None if math.isnan(found.standard_error) else found.standard_error,
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
        **_solvers(flow),
        "solver_error": checked.difference,
        "solver_error_largest": checked.largest,
        "round_trip_error": checked.round_trip,
        "checked_items": checked.items,
        "nfe": found.nfe,
        "products": found.products,
        **about(flow, info, started),
    }
    if data.entropy is not None:
        result["true_entropy"] = data.entropy
    if data.kind == "toy" and context is None and group.main:  # given a class, each density has an integral of its own
        result["integral"] = integral_2d(flow, extent=1.6 * float(data.test.abs().max()))
    return result, found


def _solvers(flow: Flow) -> dict[str, Any]:
    """How the flow is solved in evaluation and how its trace is taken, read from the blocks themselves."""

    def common(values: list[Any]) -> Any:
        """The one value, or all of them where blocks differ."""
        different = list(dict.fromkeys(values))
        return different[0] if len(different) == 1 else different or None

    solvers = [block.eval_solver for block in flow.blocks]
    traces = [block.divergence for block in flow.blocks]
    adaptive = [s for s in solvers if isinstance(s, Adaptive)]
    grids = [s for s in solvers if isinstance(s, FixedGrid)]
    probes = [d for d in traces if isinstance(d, Hutchinson)]
    return {
        "solver": common([s.method if isinstance(s, Adaptive | FixedGrid) else repr(s) for s in solvers]),
        "rtol": common([s.rtol for s in adaptive]),
        "atol": common([s.atol for s in adaptive]),
        "quadrature_tolerance": common([s.quadrature_tolerance for s in adaptive]),
        "grid_steps": common([s.steps for s in grids]),
        "divergence": common(["exact" if isinstance(d, Exact) else "hutchinson" for d in traces]),
        "probe": common([d.noise for d in probes]),
        "probes": common([d.probes for d in probes]),
    }


def write_scores(path: Path, found: Evaluation, *, names: Sequence[str] | None = None) -> None:
    """The likelihood of every item, in the order of evaluation, whole or not at all.

    ``index`` is the item's number in its split, ``nll`` its negative log-likelihood in the figure's unit (bits/dim or nats),
    ``log_prob`` its log-likelihood in nats; ``name`` where names are given. A .npz holds these arrays and ``unit``; a .csv has
    a column each, ``nll`` called ``bits_per_dim`` or ``nats``.

    Args:
        path: ending in .npz or .csv.
        found: what was evaluated.
        names: of the items.

    Raises:
        ConfigError: for another ending, or names that do not fit the items.
        CheckpointError: where the file cannot be written.
    """
    if names is not None and len(names) != len(found.per_item):
        raise ConfigError(f"names are {len(names)}, but {len(found.per_item)} items were evaluated")
    arrays = {"index": found.index.numpy(), "nll": found.per_item.numpy(), "log_prob": found.log_prob.numpy()}
    if names is not None:
        arrays["name"] = np.array([str(name) for name in names])
    renamed = {"nll": "nats" if found.unit == "nats" else "bits_per_dim"}
    columns = {renamed.get(key, key): values for key, values in arrays.items()}
    write_items(path, {"unit": np.array(found.unit), **arrays}, columns)
