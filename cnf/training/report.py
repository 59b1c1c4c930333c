"""End of a run: the evaluation of the test split, result.json as text, plots."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnf._utils.errors import DataError, SolverError
from cnf._utils.output import emit
from cnf.data import DataSplits
from cnf.evaluation import column_report
from cnf.flow import Flow
from cnf.losses import FlowMatching
from cnf.random import Noise
from cnf.runs import RunInfo
from cnf.training.autoencoders import bounds_text, encoded, finish_bounds
from cnf.training.files import write_json
from cnf.training.interpretation import interpret, warnings
from cnf.training.loop import Trainer
from cnf.training.memory import is_oom
from cnf.training.predictions import finish_predictions, predicted, predictions_text
from cnf.training.report_page import write_report
from cnf.training.scoring import score, trained, write_scores
from cnf.training.tensorboard import conclude

__all__ = ["TEST_SCORES", "add_columns", "columns_text", "comparability", "finish", "summary"]

DRAWN = 10_000  # rows and samples in a picture of a table
RANKED, RIVALS = 1000, 100  # test rows in the plot of calibration, and samples of each
TEST_SCORES = "test_nll.npz"  # likelihoods on the test split, in the run folder


def _number(value: Any) -> str:
    """Format a number, or the differing numbers of several blocks."""
    return "/".join(map(_number, value)) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)


def comparability(result: dict[str, Any]) -> str:
    """Return one line with every setting that changes the figure: figures compare only where these agree."""
    parts = []
    if "bits_per_dim" in result:
        kind = result["dequantisation"]
        noise = "" if kind == "mid-bin" else f", K = {result['importance_samples']}, {result['noise_draws']} draws"
        parts += [f"{result['levels']} levels", f"{kind} dequantisation{noise}"]
        parts.append("no logit" if result["alpha"] is None else f"alpha {result['alpha']:g}")
    trace = f"{_number(result['divergence'])} trace"
    if result["probes"] is not None:
        trace += f" ({_number(result['probes'])} {_number(result['probe'])} probes)"
        if result["dequantisation"] in ("none", "mid-bin"):  # otherwise the draws follow the dequantisation
            trace += f", {result['noise_draws']} draws"
    solver = _number(result["solver"])
    if result["rtol"] is not None:
        solver += f" rtol {_number(result['rtol'])} atol {_number(result['atol'])}"
    if result["grid_steps"] is not None:
        solver += f" in {_number(result['grid_steps'])} steps"
    unit = "bits/dim" if "bits_per_dim" in result else "nats"
    error = f"solver error {result['solver_error']:+.1e} {unit} on {result['checked_items']:,} items"
    parts += [trace, solver, error, f"{result['items']:,} of {result['items_of']:,} {result['split']} items of {result['data']}"]
    return "; ".join(parts)


def headline(result: dict[str, Any]) -> str:
    """Format the figure of a density: value, standard error, unit and number of items."""
    error = "" if result["standard_error"] is None else f" ± {result['standard_error']:.4f}"
    noise = result["noise_standard_error"]
    aside = " (noise: one draw cannot tell)" if noise is None else f" (noise ± {noise:.4f})" if noise else ""
    return f"{result['split']}: {result['value']:.4f}{error} {result['unit']}{aside} over {result['items']:,} items"


def summary(result: dict[str, Any]) -> str:
    """Format a result as text: the figure and every setting that it depends on."""
    if predicted(result):
        return predictions_text(result)
    if encoded(result):
        return bounds_text(result)
    lines = [headline(result)]
    lines += [f"  {line}" for line in interpret(result)]
    if result["note"] is not None:
        lines.append(f"  not a bound: {result['note']}")
    if result.get("unsolved_note"):
        lines.append(f"  {result['unsolved_note']}")
    lines.append(f"  {comparability(result)}")
    lines.append(
        f"  NFE {result['nfe']:.0f}, {result['products']:.0f} with a derivative; round trip {result['round_trip_error']:.1e} on {result['checked_items']:,} items, "
        f"largest solver error of one {result['solver_error_largest']:.1e}; {result['parameters']:,} parameters"
    )
    if "integral" in result:
        lines.append(f"  the density integrates to {result['integral']:.4f} on a grid")
    if "columns" in result:
        lines.append(columns_text(result["columns"]))
    return "\n".join(lines)


def columns_text(columns: list[dict[str, Any]]) -> str:
    """Format the report on a table's columns, costliest first, in units of each column's standard deviation."""
    width = max(len("column"), *(len(column["name"]) for column in columns))
    lines = [
        "  what each column costs in nats, standardised: given all others (what the model pays), alone (its own entropy), and "
        "what the model saves by the others; negative: it loses there",
        f"    {'column':{width}}  given others        alone    saved",
    ]
    for column in sorted(columns, key=lambda c: c["log_scale"] - c["given_others"]):
        given = column["given_others"] - column["log_scale"]
        alone = "   (none)   (none)"
        if math.isfinite(column["alone"]):
            alone = f"{column['alone'] - column['log_scale']:9.3f}{column['saved']:9.3f}"
        lines.append(f"    {column['name']:{width}}  {given:7.3f} ± {column['standard_error']:.3f} {alone}")
    worst = max(column["quadrature_error"] for column in columns)
    lines.append(f"    (half the points of the quadrature move a cost by {worst:.1e} at most)")
    return "\n".join(lines)


def add_columns(result: dict[str, Any], flow: Flow, data: DataSplits, split: str, say: Callable[[str], None]) -> None:
    """Add the report on a table's columns to the result; print a message if it cannot be computed."""
    if data.kind != "table":
        return
    try:
        report = column_report(flow, getattr(data, split), getattr(data, f"{split}_context"), names=data.columns)
        result["columns"] = [dataclasses.asdict(column) for column in report]
    except (DataError, SolverError) as error:
        say(f"no report on the columns: {error}")
    except (MemoryError, RuntimeError) as error:
        if not is_oom(error):
            raise
        say("no report on the columns: there is not enough memory for it")


def finish(trainer: Trainer, info: RunInfo, data: DataSplits, folder: Path, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Score the test split with the best validation's weights; write result.json, test_nll.npz and plots.

    For tables the result includes the cost of each column. A run of a predictor reports loss and accuracy and writes
    test_predictions.npz, one of an autoencoder its bound and test_elbo.npz. All write report.html. Several processes share the scoring; rank 0 does the rest.

    Args:
        trainer: after its last step.
        info, data: of the run.
        folder: of the run.
        about: further entries of result.json.
    """
    others = {"predictor": finish_predictions, "autoencoder": finish_bounds}
    if (finish_other := others.get(info.config.train.model_kind)) is not None:
        return finish_other(trainer, info, data, folder, about)
    flow = trainer.best_model()
    train, group = info.config.train, trainer.group
    result, found = score(flow, data, draws=train.noise_samples, items=train.test_items, group=group, quiet=trainer.quiet)
    result |= {**trained(trainer, train.seed, data, dataclasses.asdict(info.config)), **(about or {})}
    if not group.main:
        return result
    write_scores(folder / TEST_SCORES, found)
    # after the scores: --resume takes this file as proof that the test is complete
    write_json(folder / "result.json", result)
    warn = partial(emit, "warning")  # also of a quiet trainer, such as that of a search
    add_columns(result, flow, data, "test", warn)
    write_json(folder / "result.json", result)
    try:
        pictures(flow, data, folder, _curves(trainer), trainer.objective.unit)
    except SolverError as error:
        warn(f"some pictures could not be drawn: {error}")
    conclude(trainer, result["value"])
    write_report(
        folder, headline(result), meaning=interpret(result), settings=comparability(result).split("; "), warnings=warnings(result),
        details=columns_text(result["columns"]) if "columns" in result else "",
    )  # fmt: skip
    return result


def _curves(trainer: Trainer) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl for the learning curves.

    A step of flow matching evaluates the field and solves no ODE, so its rows have no ``nfe`` here; where its loss
    bounds the negative log-likelihood, it serves as their ``nll``.
    """
    first = trainer.phases[0].objective
    if not isinstance(first, FlowMatching):
        return trainer.history
    rows = []
    for row in trainer.history:
        if "loss" in row and "nll" not in row:
            row = {key: value for key, value in row.items() if key not in ("nfe", "nfe_backward")}
            row |= {"nll": row["loss"]} if first.bounds else {}
        rows.append(row)
    return rows


def pictures(flow: Flow, data: DataSplits, folder: Path, metrics: list[dict[str, Any]], unit: str) -> None:
    """Plot samples next to data and learning curves; in 1-D also density and paths, in 2-D density, field, trajectories and an animation."""
    from cnf import plotting

    plots, samples = folder / "plots", folder / "samples"
    plots.mkdir(exist_ok=True)
    samples.mkdir(exist_ok=True)
    rows, context = data.test, data.test_context
    if data.kind == "table":  # as many points as a picture holds: the test split may be small
        rows = torch.cat([rows, data.train[:DRAWN]])
        context = None if context is None or data.train_context is None else torch.cat([context, data.train_context[:DRAWN]])
    count = 64 if data.kind == "image" else min(DRAWN, len(rows))
    rows, context = rows[:count], None if context is None else context[:count].to(flow.like)
    noise = Noise(0, "sample")
    if context is None:
        x = flow.sample(count, noise=noise)
    else:
        x = flow.sample(1, context, noise=noise)[0]
    x = x.cpu()
    plotting.samples_beside_data(x, rows, samples / "samples.png", levels=data.levels, columns=data.columns)
    if data.kind == "table" and x.shape[1] > 1:
        plotting.corner_plot(x, rows, plots / "corner.png", columns=data.columns)
    if data.kind == "table" and data.test_context is not None and len(data.test):
        ranks = _ranks(flow, data.test[:RANKED], data.test_context[:RANKED].to(flow.like))
        plotting.calibration_plot(ranks, plots / "calibration.png", title="test rows", columns=data.columns)
    if any(key in row for row in metrics for key in ("nll", "loss", "validation")):  # a search within --minutes logs no steps
        plotting.learning_curves(metrics, plots / "learning_curves.png", unit=unit)
    if data.event_shape == (1,) and context is None:
        plotting.flow_1d({"density and paths": flow}, data.test, plots / "flow.png")
    if data.event_shape == (2,) and context is None:
        plotting.density_2d(flow, data.test, plots / "density.png")
        plotting.vector_field_2d(flow, plots / "vector_field.png")
        plotting.trajectories_2d(flow, data.test, plots / "trajectories.png")
        plotting.flow_gif(flow, plots / "flow.gif")


def _ranks(flow: Flow, x: Tensor, context: Tensor) -> Tensor:
    """Return F(x_j | context) (N, D) of rows (N, D), estimated by samples."""
    draws = flow.sample(RIVALS, context, noise=Noise(0, "ranks")).cpu()
    return ((draws < x.cpu()).double().sum(0) + 0.5) / (RIVALS + 1)
