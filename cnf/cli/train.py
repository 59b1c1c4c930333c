"""Training: new runs, resumption and dry runs."""

from __future__ import annotations

import dataclasses
import re
import shlex
import signal
from contextlib import nullcontext
from pathlib import Path

from cnf._utils.errors import ConfigError, DataError, Interrupted
from cnf._utils.output import emit
from cnf._utils.progress import duration_text
from cnf.cli.changes import check, refuse_changes, warn_of_changed_field
from cnf.cli.common import load_splits, usable_device
from cnf.cli.evaluate import evaluate_run, score_items
from cnf.cli.minutes import CHOSEN, refuse_chosen, search
from cnf.cli.options import (
    CLASSIFIER,
    DEFAULT,
    Command,
    fitting,
    parse,
    refuse_meaningless,
    suited,
)
from cnf.config import PRESETS, AdaptiveConfig, BothConfig, RunConfig
from cnf.data import DataSplits, binary, tabular
from cnf.distributed import Group, join
from cnf.models import slow_bf16
from cnf.models.custom import registered
from cnf.runs import LOCK, RunInfo, has_trainer, leftovers, write_config
from cnf.training import REPORT, Trainer, finish, from_settings, read_json, summary
from cnf.training.checkpointer import run_lock
from cnf.training.cost import measure
from cnf.training.predictions import PREDICTIONS

__all__ = ["train"]


Parsed = tuple[Command, frozenset[str], RunInfo | None]


def train(words: list[str], fallback: str, program: str, parsed: Parsed) -> int:
    """Train, resume, evaluate or rank by a parsed command line, and return the exit code.

    Args:
        words: the command line.
        fallback: default preset.
        program: name of the program.
        parsed: :func:`~cnf.cli.options.parse` of these.
    """
    command, given, old = parsed
    if old is None and command.preset is None and (name := suited(fallback, command.config.data.data)):
        command, given, _ = parse(words, name, program)
        emit("message", f"preset {name}, which is for {command.config.data.data} (name one to choose another)")
        fallback = name
    config = command.config
    check(config, trains=command.evaluate is None)
    with join(config.train.device) as group:
        return _joined(words, fallback, program, command, given, old, group)


def _joined(
    words: list[str], fallback: str, program: str, command: Command, given: frozenset[str], old: RunInfo | None, group: Group
) -> int:
    config = command.config
    usable_device(config.train.device)
    line = shlex.join([*(["python", program] if program.endswith(".py") else program.split()), *words])
    if old is not None:
        refuse_changes(old.config, config, command)
    if command.score:
        assert old is not None
        spreads = any(column.dequantised for column in old.table)
        refuse_meaningless(config, given, noisy=_noisy(command, old.levels, spreads=spreads))
        return score_items(command, dataclasses.replace(old, config=config), group)
    out = command.out
    if old is None and out is not None:
        group.on_rank0(lambda: _refuse_occupied(out))
    # --resume classifies the columns again, so that changed data are detected
    data = load_splits(config, run=old if command.evaluate or (old and not old.table) else None, group=group)
    if old is None and command.preset is None:
        name = fitting(fallback, data.kind, data.event_shape) if fallback in (DEFAULT, CLASSIFIER) else None
        if not set(CHOSEN) & given and not registered() and group.size == 1:  # nothing is asked for that the search chooses
            name = {"tabular": "table", "ffjord-toy": "demo"}.get(name or "", name)
        # of the data settings presets change the name alone, so the loaded data stay valid
        command, given, _ = parse(words, name or fallback, program)
        config = command.config
        check(config)
        if name:
            emit("message", f"preset {name}, since {data.name} is {_described(data)} (name one to choose another)")
    folder = command.evaluate or out or group.on_rank0(lambda: _free_folder(config))
    refuse_meaningless(
        config, given, events="vectors" if data.levels is None else "images", kind=data.kind, split=_split(config, data),
        noisy=_noisy(command, data.levels),
    )  # fmt: skip
    if data.report and not command.evaluate:
        emit("message", "\n".join([f"columns of {data.name}:", *(f"  {line}" for line in data.report.splitlines())]))
    for notice in data.notices:
        emit("data", f"data: {notice}")
    if config.train.model_kind == "predictor" and data.kind == "table":
        emit("data", "data: columns are not standardised: do so beforehand if their units differ")
    info = _describe(config, data)
    if old is not None and info.custom_field and not old.custom_field:
        raise ConfigError(f"{folder} was trained with a built-in field: leave --field out")
    if command.evaluate:
        assert old is not None
        return evaluate_run(command, dataclasses.replace(old, config=config), data, group)
    if old is not None:
        warn_of_changed_field(folder)
        info = dataclasses.replace(info, custom_field=old.custom_field)
    if old is not None and dataclasses.replace(info, config=old.config, table=info.table if old.table else ()) != old:
        raise DataError(f"the data are not those that {folder} was trained on ({old.event_shape}): put them back, or start a new run")
    searched = old is None and config.train.minutes
    if searched:
        refuse_chosen(config, given | {"field"} if registered() else given)
    if command.dry_run:
        if searched:
            emit("result", f"the search and the training take {config.train.minutes:g} minutes (--minutes); steps and start are chosen by it")
            return 0
        return _dry_run(info, data, group)
    if searched:
        if group.size > 1:
            raise ConfigError("--minutes searches in one process: start it without torchrun")
        return search(info, data, folder, group, line)
    return _train(command, info, data, folder, group, line)


def _noisy(command: Command, levels: int | None, *, spreads: bool = False) -> bool:
    """Return whether noise enters the likelihood; ``spreads``: discrete columns are dequantised in each draw."""
    config = command.config
    exact = config.solver.divergence.kind == "exact" and config.train.model_kind == "density"
    return not (exact and ((levels is None and not spreads) or command.mid_bin))


def _split(config: RunConfig, data: DataSplits) -> str:
    """Return "fixed" if the set's split is, and no random rows are left out, else "random"."""
    fixed = data.kind == "toy" or data.name == "digits" or data.name in (*tabular.NAMES, *binary.FIXED)
    return "fixed" if fixed and config.data.max_train_rows is None else "random"


def _described(data: DataSplits) -> str:
    """Return a description of the data for the message about the default preset."""
    return f"a set of {data.event_shape[1]}x{data.event_shape[2]} images" if data.kind == "image" else f"a {data.kind} set"


def _describe(config: RunConfig, data: DataSplits) -> RunInfo:
    return RunInfo(config, data.event_shape, data.levels, data.context_dim, data.classes, data.columns, data.table, registered())


def _train(command: Command, info: RunInfo, data: DataSplits, folder: Path, group: Group, line: str) -> int:
    if info.config.solver.precision == "bf16" and slow_bf16(info.config.train.device):
        emit("warning", "precision: this CPU has neither AMX nor avx512_bf16, so that bf16 is no faster here than fp32")
    with run_lock(folder, group) if command.resume else nullcontext():
        trainer = from_settings(info, data, folder, resume=command.resume, group=group)
        step = trainer.state.step
        if command.resume:
            done = trainer.stop_reason()
            # a result of fewer steps belongs to a shorter run that was continued since
            if done and group.on_rank0(lambda: read_json(folder / "result.json").get("steps") == step):
                emit("result", f"{folder} has finished already ({done}, step {step:,}): more --steps train on, --evaluate scores it again")
                return 0
            emit("message", f"{folder}: from step {step:,} on" if has_trainer(folder) else f"{folder}: no checkpoint yet, from the beginning")
        group.on_rank0(lambda: _make(folder))
        with run_lock(folder, group):
            group.on_rank0(lambda: _begin(folder, info, command.resume))
            return _run(trainer, info, data, folder, line)


def _run(trainer: Trainer, info: RunInfo, data: DataSplits, folder: Path, line: str) -> int:
    count = sum(p.numel() for p in trainer.model.parameters())
    items, steps = len(data.train), info.config.train.steps
    text = f"{folder}: {count:,} parameters, {items:,} items, {steps:,} steps"
    emit("start", text, folder=folder, parameters=count, items=items, steps=steps, first_step=trainer.state.step)
    trainer.run()
    try:
        result = finish(trainer, info, data, folder, {"command": line})
    except KeyboardInterrupt:  # training is saved, so --resume only repeats the test
        raise Interrupted(signal.SIGINT, trainer.state.step) from None
    if not trainer.group.main:
        return 0
    emit("result", summary(result), folder=folder, **result)
    if info.config.train.model_kind == "predictor":
        emit("message", f"report in {folder / REPORT}, pictures in {folder / 'plots'}, the test items' predictions in {folder / PREDICTIONS}")
    else:
        emit("message", f"report in {folder / REPORT}, pictures in {folder / 'samples'} and {folder / 'plots'}; cnf sample {folder} draws more")
    return 0


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be made: {error}") from None


def _begin(folder: Path, info: RunInfo, resume: bool) -> None:
    if not resume:  # another run may have started there while the data were loaded
        _refuse_occupied(folder)
    write_config(folder, info)


def _refuse_occupied(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file: expected a folder")
    killed = {folder / LOCK, *leftovers(folder)}  # left by a run that was killed before it started
    if set(folder.iterdir()) - killed:
        hint = f"--resume --out {folder} continues the run there" if (folder / "config.json").is_file() else "choose another"
        raise ConfigError(f"--out {folder} is not empty: expected a new or an empty folder; {hint}")


def _free_folder(config: RunConfig) -> Path:
    usual = PRESETS[config.name].config.data.data if config.name in PRESETS else config.data.data
    parts = [config.name, str(config.train.seed)]
    if config.data.data != usual:
        parts.insert(1, re.sub(r"[^\w.-]+", "-", Path(config.data.data).stem) or "data")
    stem = "-".join(parts)
    for number in range(1, 10_000):
        folder = Path("runs") / (stem if number == 1 else f"{stem}-{number}")
        if not folder.exists():
            return folder
    raise ConfigError(f"runs/ is full of folders called {stem}: give --out")


def _dry_run(info: RunInfo, data: DataSplits, group: Group) -> int:
    train, costs = info.config.train, measure(info, data, group)
    tunes = len(costs) > 1
    stages = [("", train.steps)]
    if isinstance(train.objective, BothConfig):
        last = train.objective.finetune_steps
        stages = [("matching: ", train.steps - last), ("fine-tuning: ", last)]
    parts = f" in {train.accumulate} micro-batches, whose memory this is" if train.accumulate > 1 else ""
    lines = []
    for (name, steps), cost in zip(stages, costs, strict=True):
        lines.append(f"{name}batch {cost.batch}{parts}")
        lines.append(f"memory: {cost.kept:,.0f} MiB kept for the backward pass, {cost.peak:,.0f} MiB at the peak ({cost.where})")
        lines.append(f"time: {cost.seconds:.3g} s a step; {steps:,} steps take about {duration_text(cost.seconds * steps)} without validations")
    if isinstance(info.config.solver.train_solver, AdaptiveConfig) or train.warmup or tunes:
        lines.append("  (measured at the start: an adaptive solver, or a grid that solver checks refine, takes longer later)")
    phases = [{"steps": steps, **dataclasses.asdict(cost)} for (_, steps), cost in zip(stages, costs, strict=True)]
    emit("result", f"{costs[0].parameters:,} parameters; " + "\n".join(lines), phases=phases)
    return 0
