"""train_density.py --evaluate: evaluation of a trained run on a split or on custom data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf._utils.errors import ConfigError, DataError
from cnf._utils.output import emit
from cnf._utils.progress import Progress
from cnf.cli.changes import warn_of_changed_data, warn_of_changed_field
from cnf.cli.common import read_run
from cnf.cli.evaluate_others import OTHERS
from cnf.cli.odd_rows import extrapolated, odd_rows
from cnf.cli.options import Command
from cnf.config import ExactConfig, HutchinsonConfig
from cnf.data import DataSplits, tabular
from cnf.data.arrays import read_numpy
from cnf.data.columns import own_names
from cnf.data.items import Items, read_items
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.evaluation import Ranking, rank
from cnf.flow import Flow
from cnf.models import divergence, eval_solver
from cnf.runs import RunInfo, load, located, outputs
from cnf.training import read_json, score, summary, write_json, write_scores
from cnf.training.autoencoders import BOUNDS
from cnf.training.predictions import PREDICTIONS
from cnf.training.report import TEST_SCORES, add_columns
from cnf.training.scoring import TEST_SEED

__all__ = ["evaluate_run", "score_items"]


def _flow(folder: Path, info: RunInfo) -> Flow:
    """Load the run's flow with the requested evaluation solver and divergence."""
    config = info.config
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    flow: Flow = load(folder, config.train.device)
    solver, trace = eval_solver(config.solver, flow), divergence(config.solver)
    for block in flow.blocks:
        block.eval_solver, block.divergence = solver, trace
    return flow


def _dequantisation(command: Command, info: RunInfo) -> str | None:
    """Return the ``dequantisation`` argument of ``score`` and ``rank``; None selects the flow's own.

    Raises:
        ConfigError: for image options if the run models vectors.
    """
    if info.levels is None and (command.mid_bin or command.importance > 1):
        option = "--mid-bin" if command.mid_bin else "--importance"
        raise ConfigError(f"{option} is for images, and {command.evaluate} models vectors")
    return "mid-bin" if command.mid_bin else None


def _require_writable(command: Command, folder: Path) -> None:
    """Check the output paths before hours of work.

    Raises:
        ConfigError: if --per-item, or (for a split) the run folder, cannot be written.
    """
    path = command.per_item
    if path is not None:
        if path.suffix not in (".npz", ".csv"):
            raise ConfigError(f"--per-item {path}: expected a file ending in .npz or .csv")
        if path.resolve() in [(folder / name).resolve() for name in (TEST_SCORES, PREDICTIONS, BOUNDS)]:
            raise ConfigError(f"--per-item {path} holds the scores of the run's own test: choose another file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--per-item {path}: its folder cannot be made: {error}") from None
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            why = "it is a folder" if path.is_dir() else "its folder cannot be written"
            raise ConfigError(f"--per-item {path}: {why}; expected a file that can be made")
    if command.score:
        return
    if folder != located(folder):  # a pretrained model, whose evaluations are stored in a separate folder
        with suppress(OSError):  # reported by the access check below
            outputs(folder).mkdir(parents=True, exist_ok=True)
    if not os.access(outputs(folder), os.W_OK):
        raise ConfigError(f"--evaluate {folder}: {outputs(folder)} cannot be written, and the evaluation is kept there")


def evaluate_run(command: Command, info: RunInfo, data: DataSplits, group: Group = SINGLE_PROCESS) -> int:
    """Evaluate a run on a split and write evaluation-N.json next to result.json; return the exit code.

    Raises:
        ConfigError: for options that do not apply to the run, or files that cannot be written.
        DataError: for data that do not match the run.
    """
    folder, config = command.evaluate, info.config
    assert folder is not None
    kind = _dequantisation(command, info) if config.train.model_kind == "density" else None
    _require_model(folder, info, data)
    _require_writable(command, folder)
    warn_of_changed_data(folder, data, config.data.data)
    warn_of_changed_field(folder)
    write: Callable[[Path], None]
    other = OTHERS.get(config.train.model_kind)
    if other is not None:
        result, write = other(command, info, data, group)
    else:
        flow = _flow(folder, info)
        result, found = score(
            flow, data, command.split, config.train.noise_samples, importance=command.importance, dequantisation=kind,
            items=config.train.test_items, check=command.check, group=group,
        )  # fmt: skip
        if group.main:
            add_columns(result, flow, data, command.split, partial(emit, "warning"))
        write = partial(write_scores, found=found)
    if not group.main:
        return 0
    result |= {"seed": config.train.seed, "notices": list(data.notices), "config": dataclasses.asdict(config)}
    kept = _keep(outputs(folder), result)  # before printing, which fails if the output pipe is closed
    if command.per_item is not None:
        write(command.per_item)
    emit("result", summary(result), file=kept, **result)
    emit("message", f"written to {kept}")
    if command.per_item is not None:
        what = {"density": "likelihood", "predictor": "prediction", "autoencoder": "bound"}[config.train.model_kind]
        emit("message", f"the {what} of each item is in {command.per_item}")
    return 0


def _keep(folder: Path, result: dict[str, Any]) -> Path:
    """Write the result to the first free evaluation-N.json, reserved atomically against concurrent evaluations."""
    number = 1
    while True:
        path = folder / f"evaluation-{number}.json"
        try:
            path.touch(exist_ok=False)
            break
        except FileExistsError:
            number += 1
        except OSError:  # reported by write_json
            break
    try:
        write_json(path, result)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    return path


def _require_model(folder: Path, info: RunInfo, data: DataSplits) -> None:
    """Check that the data have the shape, levels, classes and columns of the run."""

    def words(shape: tuple[int, ...], levels: int | None, classes: int) -> str:
        grey = "" if levels is None else f" of {levels} levels"
        return f"events {shape}{grey}" + (f" with {classes} classes" if classes else "")

    ours = words(info.event_shape, info.levels, info.context_dim)
    theirs = words(data.event_shape, data.levels, data.context_dim)
    if ours != theirs:
        raise DataError(f"{folder} models {ours}, but {data.name} has {theirs}")
    for what, known, given in (
        ("classes", info.classes if info.context_dim else (), data.classes),
        ("columns", info.columns if own_names(info.columns) and own_names(data.columns) else (), data.columns),
    ):
        if known and known != given:
            raise DataError(f"{folder} models the {what} {', '.join(known)}, but {data.name} has {', '.join(given)}")


def score_items(command: Command, info: RunInfo, group: Group = SINGLE_PROCESS) -> int:
    """Rank custom rows or images by likelihood, with the run's test scores as reference if comparable.

    Raises:
        ConfigError: for options that do not apply to the run, or files that cannot be written.
        DataError: for rows or images that do not match the run, or lack a known class.
    """
    folder, config = command.evaluate, info.config
    assert folder is not None and command.score is not None
    if config.train.model_kind != "density":
        what = {"predictor": "predicts", "autoencoder": "is an autoencoder, which has a bound"}[config.train.model_kind]
        raise ConfigError(f"--score ranks by likelihood, and {folder} {what}: --split, --data and --per-item are for it")
    kind = _dequantisation(command, info)
    items = read_items(
        command.score, info.event_shape, info.levels, columns=info.columns, image_size=config.data.image_size, table=info.table,
    )  # fmt: skip
    for line in (*items.notices, *_preparations(folder, info)):
        emit("data", f"data: {line}")
    context = _context(folder, info, items)
    reference = _reference(command, info)
    _require_writable(command, folder)
    flow = _flow(folder, info)
    with Progress("scoring", "solves", quiet=not group.main) as work:
        ranking = rank(
            flow, items.x, items.names, context, reference=reference, draws=config.train.noise_samples,
            importance=command.importance, dequantisation=kind, seed=TEST_SEED, group=group, steps=items.steps,
            progress=work.update, columns=info.columns, unseen=items.unseen, incomplete=items.incomplete,
        )  # fmt: skip
    if not group.main:
        return 0
    if command.per_item is not None:
        write_scores(command.per_item, ranking.evaluation, names=items.names)
    described = odd_rows(flow, items, info.table, ranking)
    lines, unit = [ranking.text(notes={i: row.lines() for i, row in described.items()}), *extrapolated(items, info.table)], ranking.evaluation.unit
    if ranking.evaluation.note is not None:
        lines.append(f"(not a bound: {ranking.evaluation.note})")
    if reference is not None:
        lines.append(f"(the reference is the run's own test: {len(reference):,} items)")
        lines += _shifted(ranking, [column.name for column in info.table if column.kind == "date" and column.role == "data"])
    cells = {i: dataclasses.asdict(row) for i, row in described.items()}
    emit("result", "\n".join(lines), unit=unit, items=[row | cells.get(row["index"], {}) for row in ranking.rows()])
    if command.per_item is not None:
        emit("message", f"the likelihood of each item is in {command.per_item}")
    return 0


def _context(folder: Path, info: RunInfo, items: Items) -> Tensor | None:
    """Return the context (N, C): encoded conditions of a table or one-hot classes; None for an unconditional run."""
    if not info.context_dim or items.context is not None:
        return items.context
    codes = {name: code for code, name in enumerate(info.classes)}
    for name, label in zip(items.names, items.labels, strict=True):
        if label not in codes:
            has = "no class: give an .npz with 'labels', or a folder whose sub-folders are the classes"
            raise DataError(
                f"--score: {folder} is conditional, and {name} has {has if label is None else f'the class {label!r}'}; "
                f"known are {', '.join(info.classes)}"
            )
    return torch.eye(info.context_dim)[[codes[label] for label in items.labels if label is not None]]


def _shifted(ranking: Ranking, dates: list[str]) -> list[str]:
    """Return a warning if half of at least 20 rows are among the least likely twentieth of the reference: the order then says little."""
    low = 0 if ranking.below is None else int((ranking.below < 0.05).sum())
    if 2 * low <= max(20, len(ranking.names)):
        return []
    line = f"{low:,} of {len(ranking.names):,} items are in the least likely 5 % of the reference: they differ from the training data as a whole"
    if dates:
        names = ",".join(dates)
        line += f"; dates outside those of training do this: train without {names} (--drop-columns {names}) to rank later rows"
    return [f"({line})"]


def _reference(command: Command, info: RunInfo) -> Tensor | None:
    """Return the run's test scores (nll) if the custom data are scored with the same noise settings, else None."""
    folder = command.evaluate
    assert folder is not None
    path, trained, now = folder / TEST_SCORES, read_run(folder).config, info.config
    noise = [(c.train.noise_samples, _estimate(c.solver.divergence)) for c in (trained, now)]
    if command.mid_bin or command.importance > 1 or noise[0] != noise[1] or not path.is_file():
        return None
    arrays = read_numpy(path)
    if "nll" not in arrays:
        raise DataError(f"{path} holds no scores (no array 'nll'): remove it, and the items are ranked without it")
    found = arrays["nll"]
    if found.ndim != 1 or found.dtype.kind != "f" or np.isinf(found).any():
        raise DataError(f"{path}: 'nll' is no list of finite numbers: remove the file, and the items are ranked without it")
    return torch.from_numpy(found[~np.isnan(found)])  # NaN: failed solves


def _estimate(divergence: ExactConfig | HutchinsonConfig) -> tuple[str, int] | None:
    """Return noise and number of Hutchinson's probes; None for the exact trace."""
    return (divergence.hutchinson_noise, divergence.probes) if isinstance(divergence, HutchinsonConfig) else None


def _preparations(folder: Path, info: RunInfo) -> Iterator[str]:
    """Yield notices of training-time preprocessing that the rows to score lack."""
    name = info.config.data.data
    if name.lower() in tabular.NAMES:
        yield f"{name} is prepared before training (data/README.md), and the items are not: prepare them alike"
    if info.table:  # read_items applies the same preprocessing
        return
    notices = read_json(folder / "result.json").get("notices")  # missing for an unfinished run
    for line in notices if isinstance(notices, list) else []:
        if isinstance(line, str) and ": dequantised by" in line:
            yield f"in training, {line}; the items are scored as they are: add such noise, or they stand at an edge"
