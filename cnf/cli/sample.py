"""sample.py: samples, likelihoods and trajectories of a trained run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf._utils.errors import ConfigError, DataError
from cnf._utils.output import emit
from cnf.cli.changes import warn_of_changed_field
from cnf.cli.common import load_splits, read_run, usable_device
from cnf.cli.sample_images import sample_images
from cnf.cli.sample_options import FRAMES, IMAGES, VECTORS
from cnf.cli.sample_solver import SamplePlan, sample_plan
from cnf.data.schema import conditions, data_columns, encode, parse_given, plain_table, wanted
from cnf.data.write import (
    ENDINGS,
    as_numbers_of,
    category_value,
    given_values,
    require_writer,
    sampled_frame,
    write_frame,
)
from cnf.distributed import Group, join
from cnf.flow import Flow
from cnf.guidance import guided
from cnf.ode.dynamics import field_precision
from cnf.random import Noise
from cnf.runs import RunInfo, load, outputs, write_atomic

__all__ = ["sample"]

BATCH_NUMBERS = 2**20  # numbers per solve, at most 8192 samples


@torch.no_grad()
def sample(options: Any) -> int:
    """Draw samples by these options of the program (see :mod:`cnf.cli.sample_options`) and return the exit code."""
    info = read_run(options.run)
    kind = info.config.train.model_kind
    if kind == "predictor":
        raise ConfigError(
            f"{options.run} was trained for {info.config.train.objective.kind}: it predicts, and has no density to draw from; train_classifier.py "
            f"--evaluate {options.run} --per-item FILE writes its predictions"
        )
    with join(options.device) as group:
        if kind == "autoencoder":  # drawn in no time
            return sample_images(options) if group.main else 0
        return _joined(options, info, group)


def _joined(options: Any, info: RunInfo, group: Group) -> int:
    flow = load(options.run, usable_device(options.device))
    warn_of_changed_field(options.run)
    if options.guidance is not None:
        if not info.context_dim:
            raise ConfigError(f"--guidance {options.guidance:g} is for runs with --condition, and {options.run} has none")
        if not getattr(info.config.train.objective, "drop_condition", 0):
            raise ConfigError(f"--guidance {options.guidance:g}: {options.run} never saw rows without their condition: train with --drop-condition 0.1")
        flow = guided(flow, options.guidance)
    images = len(info.event_shape) == 3
    n: int = options.n or (IMAGES if images else VECTORS)
    context, given = _context(info, options, n, flow.like)
    out: Path = options.out or outputs(options.run) / "samples" / f"sample-{options.seed}.png"
    plan = sample_plan(options, flow, animated=out.suffix == ".gif")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: its folder cannot be made: {error}") from None
    if out.suffix in ENDINGS:
        if images:
            raise ConfigError(f"--out {out}: images are no table; expected .png or .npz")
        require_writer(out)
    if out.suffix == ".gif":
        if not images and info.event_shape != (2,):
            raise ConfigError(f"--out {out}: a .gif shows images or points in the plane, and these samples have {info.event_shape[0]} columns")
        if group.main:
            from cnf import plotting

            with field_precision(plan.autocast, flow.like):
                plotting.flow_gif(
                    flow, out, n=n, seed=options.seed, temperature=options.temperature, context=context, solver=plan.solver
                )
    else:
        x, arrays = _draw(flow, n, context, options, plan, full=out.suffix == ".npz", group=group)
        if not group.main:
            return 0
        table = info.table or plain_table(info.columns or [f"column {j}" for j in range(info.event_shape[0])])
        if out.suffix in ENDINGS:
            classes = None if context is None or given else np.array(info.classes)[context.argmax(1).cpu().numpy()]
            frame = sampled_frame(x.cpu().numpy(), table, given)
            if classes is not None:
                frame = frame.assign(**{"label": classes})
            write_atomic(out, lambda path: write_frame(frame, path, out.suffix))
        elif out.suffix == ".npz":
            if context is not None and info.classes:
                arrays["classes"] = np.array(info.classes)[context.argmax(1).cpu().numpy()]
            if info.table:
                arrays["samples"] = as_numbers_of(arrays["samples"], table)
                arrays["columns"] = np.array(info.columns)

            def save(path: Path) -> None:
                with path.open("wb") as file:
                    np.savez(file, **arrays)

            write_atomic(out, save)
        else:
            _picture(x.cpu(), info, options, out)
        if out.suffix in (".npz", *ENDINGS):
            _explain(info, out)
    drawn = f", drawn by {plan.description}" if plan.description else ""
    if drawn and plan.solver is not None and out.suffix == ".npz":
        drawn += f"; log_prob{' and trajectory' if options.trajectory else ''} by {plan.own}"
    emit("result", f"{n:,} samples of {os.path.normpath(options.run)} in {out}{drawn}", samples=n, file=out)
    return 0


def _explain(info: RunInfo, out: Path) -> None:
    """Print how the samples of a table were rounded."""
    lattice = [c.name for c in data_columns(info.table) if c.step]
    rounded = [c.name for c in data_columns(info.table) if not c.step and c.type == "int"]
    extra = "; log_prob is the density of the value before" if out.suffix == ".npz" else ""
    if lattice:
        emit("message", f"{', '.join(lattice)}: discrete in the data, and written in their steps (the floor of the dequantised value, within the values of the data){extra}")
    if rounded:
        emit("message", f"{', '.join(rounded)}: whole numbers in the data, and rounded to them{extra}")
    if out.suffix == ".npz" and (dates := [c.name for c in data_columns(info.table) if c.kind == "date"]):
        emit("message", f"{', '.join(dates)}: days since 1970-01-01 (.csv and .parquet have dates)")


def _context(info: RunInfo, options: Any, n: int, like: Tensor) -> tuple[Tensor | None, dict[str, Any]]:
    """Return context rows (n, C) with dtype and device of ``like``, or None; and the conditions' values by column."""
    label, columns = options.label, conditions(info.table)
    if not columns and options.given is not None:
        raise ConfigError(f"--given {options.given}: this run was trained without --condition COLUMNS")
    if columns and label is None and (options.given is not None or not info.classes):
        if options.given is None:
            raise ConfigError(f"this run is p(others | {', '.join(c.name for c in columns)}): give {'them' if len(columns) > 1 else 'it'} by --given {wanted(info.table)}")
        numbers, values, said = given_values(parse_given(options.given, info.table), info.table)
        for line in said:
            emit("message", line)
        row = torch.from_numpy(encode(info.table, numbers)).to(like)
        return row.expand(n, -1), values
    if columns and not info.classes:
        raise ConfigError(f"--class {label}: this run has no classes; --given {wanted(info.table)} is for it")
    context = _class_context(info, label, n, like)
    if columns and context is not None:
        return context, {columns[0].name: [category_value(columns[0], info.classes[i]) for i in context.argmax(1).tolist()]}
    return context, {}


def _class_context(info: RunInfo, label: str | None, n: int, like: Tensor) -> Tensor | None:
    """Return one-hot rows (n, C), or None for a run without classes; without a label, cycle through the classes."""
    if not info.context_dim:
        if label is not None:
            raise ConfigError(f"--class {label}: this run was trained without classes (--condition label)")
        return None
    eye = torch.eye(info.context_dim).to(like)
    if label is None:  # cycle through the classes
        return eye[torch.arange(n, device=like.device) % info.context_dim]
    if label not in info.classes:
        raise ConfigError(f"--class {label} is unknown: this run has {', '.join(info.classes)}")
    return eye[info.classes.index(label)].expand(n, -1)


def _draw(
    flow: Flow, n: int, context: Tensor | None, options: Any, plan: SamplePlan, *, full: bool, group: Group
) -> tuple[Tensor, dict[str, Any]]:
    """Draw samples (n, \\*event) in batches; with ``full``, also return the arrays of the .npz file.

    Several processes divide the batches, each drawing its rows of the joint noise; rank 0 returns all samples, the
    others none.
    """
    size = max(1, min(8192, BATCH_NUMBERS // flow.dim))
    times = torch.linspace(0, 1, FRAMES)
    parts: dict[int, dict[str, Tensor]] = {}
    with group.together():
        for number, start in enumerate(range(0, n, size)):
            if not group.owns(number):
                continue
            count = min(size, n - start)
            noise = Noise(options.seed, "sample", start=start, total=n)
            rows = None if context is None else context[start : start + count]
            wanted: dict[str, Any] = {"noise": noise, "temperature": options.temperature, "solver": plan.solver}
            with field_precision(plan.autocast, flow.like):
                x = flow.sample(count, **wanted) if rows is None else flow.sample(1, rows, **wanted)[0]
            part = {"samples": x}
            if full:
                part["log_prob"] = flow.log_prob(x, rows, noise=noise)
            if full and options.trajectory:
                part["trajectory"] = flow.trajectory(x, times, rows).flip(0)
            parts[number] = {name: value.cpu() for name, value in part.items()}
    gathered = {number: part for some in group.gather(parts) for number, part in some.items()}
    if not gathered:
        return torch.empty(0), {}
    joined = {
        name: torch.cat([gathered[i][name] for i in range(len(gathered))], dim=1 if name == "trajectory" else 0)
        for name in gathered[0]
    }
    arrays = {name: value.numpy() for name, value in joined.items()}
    if "trajectory" in arrays:
        arrays["times"] = times.flip(0).numpy()
    return joined["samples"], arrays


def _picture(x: Tensor, info: RunInfo, options: Any, out: Path) -> None:
    from cnf import plotting

    if x.ndim == 4:
        plotting.image_grid(x, out)
        return
    data, label = None, options.label
    try:
        found = load_splits(info.config, run=info, download=False)
        data = found.test
        if options.given is not None:
            emit("message", "samples only: the context differs between rows of the data")
            data = None
        elif label is not None and found.test_context is not None:
            data = data[found.test_context.argmax(1) == info.classes.index(label)]
    except (DataError, ConfigError) as error:
        emit("message", f"samples only, since the data are not available: {error}")
    plotting.samples_beside_data(x, data, out, columns=info.columns)
