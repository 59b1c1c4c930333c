"""train_density.py: train, resume, dry run, list; evaluation is next door."""

from __future__ import annotations

import dataclasses
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from cnf.checkpoint import RunInfo, has_trainer, write_config
from cnf.cli.common import guard, load_splits, usable_device
from cnf.cli.evaluate import evaluate_run, score_items
from cnf.cli.options import FITTING, Command, check, parse, refuse_changes, refuse_idle, refuse_idle_noise
from cnf.datasets import DataSplits
from cnf.errors import ConfigError, DataError
from cnf.models import build
from cnf.presets import PRESETS, RunConfig
from cnf.published import PUBLISHED
from cnf.published import count as parameters
from cnf.training import Interrupted, Trainer, finish, summary
from cnf.training.measure import measure

__all__ = ["train_main"]


def train_main(arguments: Sequence[str] | None = None) -> int:
    """train_density.py: returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return guard(lambda: _main(given))


def _main(given: list[str]) -> int:
    command, default, old = parse(given)
    if command.list:
        return _list()
    config = command.config
    check(config)
    usable_device(config.train.device)
    if old is not None:
        refuse_changes(old.config, config, command)
    if command.score:
        assert old is not None
        refuse_idle_noise(default, config, old.levels, mid_bin=command.mid_bin)
        return score_items(command, dataclasses.replace(old, config=config))
    if old is None and command.out is not None:
        _refuse_occupied(command.out)
    data = load_splits(config)
    if old is None and command.preset is None and data.kind in FITTING:
        # digits' settings would be a poor start; presets differ in the data's name alone, so the data stay what they are
        command, default, _ = parse(given, FITTING[data.kind])
        config = command.config
        check(config)
        print(f"preset {default.name}, since {data.name} is a {data.kind} set (name one to choose another)")
    folder = command.evaluate or command.out or _free_folder(config)
    refuse_idle(default, config, data)
    refuse_idle_noise(default, config, data.levels, mid_bin=command.mid_bin)
    for line in data.notices:
        print(f"data: {line}")
    info = _describe(config, data)
    if command.evaluate:
        assert old is not None
        return evaluate_run(command, dataclasses.replace(old, config=config), data)
    if old is not None and dataclasses.replace(info, config=old.config) != old:
        raise DataError(f"the data are not those that {folder} was trained on ({old.event_shape}): put them back, or start a new run")
    if command.dry_run:
        return _dry_run(info, data, folder)
    return _train(command, info, data, folder)


def _describe(config: RunConfig, data: DataSplits) -> RunInfo:
    return RunInfo(config, data.event_shape, data.levels, data.context_dim, data.classes, data.columns)


def _train(command: Command, info: RunInfo, data: DataSplits, folder: Path) -> int:
    trainer = Trainer(info, data, folder, resume=command.resume)
    if command.resume:
        done = trainer.stop_reason()
        if done and (folder / "result.json").is_file():
            print(f"{folder} has finished already ({done}, step {trainer.step:,}): more --steps train on, --evaluate scores it again")
            return 0
        print(f"{folder}: from step {trainer.step:,} on" if has_trainer(folder) else f"{folder}: no checkpoint yet, from the beginning")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be made: {error}") from None
    write_config(folder, info)
    count = sum(p.numel() for p in trainer.flow.parameters())
    print(f"{folder}: {count:,} parameters, {len(data.train):,} items, {info.config.train.steps:,} steps", flush=True)
    trainer.run()
    try:
        result = finish(trainer)
    except KeyboardInterrupt:  # the training is saved, and --resume goes straight to the test
        raise Interrupted(signal.SIGINT, trainer.step) from None
    print(summary(result))
    print(f"pictures in {folder / 'samples'} and {folder / 'plots'}; python sample.py {folder} draws more")
    return 0


def _refuse_occupied(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file: expected a folder")
    if any(folder.iterdir()):
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


def _list() -> int:
    width = max(map(len, PRESETS))
    for name, entry in PRESETS.items():
        flow = build(entry.config.model, entry.config.solver, entry.shape, levels=entry.levels)
        count = sum(p.numel() for p in flow.parameters())
        print(f"{name:{width}}  {entry.summary}; data {entry.config.data.data}, {count:,} parameters, {entry.cost}")
    print("\nparameters of the published image models, as their papers give them or their released code makes them:")
    width = max(len(entry.name) for entry in PUBLISHED)
    for model in PUBLISHED:
        own = parameters(model.model, model.shape)
        differs = "" if own == model.parameters else f", here {own:,}: {model.reason}"
        print(f"{model.name:{width}}  {model.parameters:>9,}{differs}")
    return 0


def _dry_run(info: RunInfo, data: DataSplits, folder: Path) -> int:
    found = measure(Trainer(info, data, folder, quiet=True))
    train = info.config.train
    print(f"{found.parameters:,} parameters; batch {found.batch}")
    print(f"memory: {found.kept:,.0f} MiB kept for the backward pass, {found.peak:,.0f} MiB at the peak ({found.where})")
    print(f"time: {found.seconds:.3g} s a step; {train.steps:,} steps take about {_duration(found.seconds * train.steps)}, validations apart")
    if info.config.solver.adaptive or train.warmup:
        print("  (measured at the start: an adaptive solver, or a grid that the watch refines, takes longer later)")
    return 0


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
