"""The command line: train_density.py and sample.py."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from cnf.checkpoint import RunInfo, load, read_config, write_atomic, write_config
from cnf.datasets import DataSplits
from cnf.datasets import load as load_data
from cnf.errors import CNFError, ConfigError, DataError
from cnf.flow import Flow
from cnf.models import build, divergence, eval_solver
from cnf.noise import Noise
from cnf.presets import PRESETS, RunConfig, preset
from cnf.training import Interrupted, Trainer, finish, score, summary, write_json

__all__ = ["sample_main", "train_main"]

RESUMABLE = ("steps", "max_time", "device", "threads", "data_root")  # what --resume may change


@dataclasses.dataclass(frozen=True)
class Command:
    """Train a continuous normalizing flow and report its test likelihood: train_density.py [PRESET] [options]."""

    config: tyro.conf.OmitArgPrefixes[RunConfig]
    out: Path | None = None
    """Run folder; runs/PRESET-SEED if not given. A finished run is never overwritten."""
    resume: bool = False
    """Continue the run in --out where it stopped; only the run's length, device and data folder may change."""
    evaluate: Path | None = None
    """Score this run folder again (other solver, tolerances, divergence, --draws, --split) without training."""
    split: Literal["test", "validation", "train"] = "test"
    """What --evaluate scores."""
    dry_run: bool = False
    """Print parameters, memory and time per step, and stop."""
    list: bool = False
    """List the presets and stop."""


def _guard(run: Callable[[], int]) -> int:
    """The program's exit codes: 0 done, 1 failed, 2 wrong usage, 130 (143) interrupted but saved."""
    try:
        return run()
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CNFError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        print("interrupted; everything is saved, --resume continues", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def train_main(arguments: Sequence[str] | None = None) -> int:
    """train_density.py: returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return _guard(lambda: _train(given))


def _train(given: list[str]) -> int:
    name = given.pop(0) if given and not given[0].startswith("-") else None
    default = preset(name or "digits").config
    stored = _option(given, "--evaluate") or (_option(given, "--out") if "--resume" in given else None)
    info = read_config(Path(stored)) if stored else None
    command: Command = tyro.cli(
        Command,
        default=Command(info.config if info else default),
        args=given,
        prog="train_density.py [PRESET]",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    config = command.config
    if command.list:
        return _list()
    if command.resume and command.out is None:
        raise ConfigError("--resume needs --out DIR: the run folder to continue")
    if info and command.resume:
        _refuse_changes(info.config, config)
    data = _data(config)
    for line in data.notices:
        print(f"data: {line}")
    found = RunInfo(
        config,
        data.event_shape,
        data.levels,
        0 if data.train_context is None else data.train_context.shape[1],
        data.classes,
        data.columns,
    )
    if command.evaluate is not None:
        return _evaluate(command.evaluate, found, data, command.split)
    if command.dry_run:
        return _dry_run(found, data)
    folder = command.out or _free_folder(config)
    if not command.resume:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"--out {folder} is not empty: choose another folder, or --resume the run there")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {folder} cannot be made: {error}") from None
        write_config(folder, found)
    trainer = Trainer(found, data, folder, resume=command.resume)
    count = sum(p.numel() for p in trainer.flow.parameters())
    print(f"{folder}: {count:,} parameters, {len(data.train):,} items, {config.train.steps:,} steps", flush=True)
    trainer.run()
    result = finish(trainer)
    print(summary(result))
    print(f"pictures in {folder / 'samples'} and {folder / 'plots'}; python sample.py {folder} draws more")
    return 0


def _option(given: list[str], name: str) -> str | None:
    for i, word in enumerate(given):
        if word == name and i + 1 < len(given):
            return given[i + 1]
        if word.startswith(name + "="):
            return word.split("=", 1)[1]
    return None


def _refuse_changes(old: RunConfig, new: RunConfig) -> None:
    changed = []
    for part in ("data", "model", "solver", "train"):
        before, after = dataclasses.asdict(getattr(old, part)), dataclasses.asdict(getattr(new, part))
        changed += [f"--{k.replace('_', '-')}" for k in before if before[k] != after[k] and k not in RESUMABLE]
    if changed:
        raise ConfigError(f"--resume cannot change {', '.join(changed)}: leave them out, or start a new run")


def _data(config: RunConfig) -> DataSplits:
    d = config.data
    return load_data(
        d.data,
        root=d.data_root,
        split_seed=d.split_seed,
        condition=None if d.condition == "none" else d.condition,
        discrete=d.discrete,
        limit=d.limit,
        nbits=d.nbits,
        image_size=d.image_size,
    )


def _free_folder(config: RunConfig) -> Path:
    stem = f"{config.name}-{config.train.seed}"
    for number in range(1, 10_000):
        folder = Path("runs") / (stem if number == 1 else f"{stem}-{number}")
        if not folder.exists():
            return folder
    raise ConfigError("runs/ is full of folders of this name: give --out")


def _list() -> int:
    for name, entry in PRESETS.items():
        flow = build(entry.config.model, entry.config.solver, entry.shape, levels=entry.levels)
        count = sum(p.numel() for p in flow.parameters())
        print(f"{name:12} {entry.summary}; data {entry.config.data.data}, {count:,} parameters, {entry.cost}")
    return 0


def _evaluate(folder: Path, info: RunInfo, data: DataSplits, split: str) -> int:
    flow = load(folder, info.config.train.device)
    if flow.event_shape != data.event_shape or flow.levels != data.levels:
        raise DataError(f"{folder} models events {flow.event_shape}, levels {flow.levels}; the data has {data.event_shape}, {data.levels}")
    for block in flow.blocks:
        block.eval_solver, block.divergence = eval_solver(info.config.solver), divergence(info.config.solver)
    result, _ = score(flow, info, data, split, info.config.train.draws)
    number = 1
    while (path := folder / f"evaluation-{number}.json").exists():
        number += 1
    write_json(path, result)
    print(summary(result))
    print(f"written to {path}")
    return 0


def _dry_run(info: RunInfo, data: DataSplits) -> int:
    import resource
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(info, data, Path(scratch), quiet=True)
        trainer._update()
        started = time.perf_counter()
        for _ in range(3):
            trainer.step += 1
            trainer._update()
        seconds = (time.perf_counter() - started) / 3
    count = sum(p.numel() for p in trainer.flow.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    where = "process peak"
    if trainer.device.type == "cuda":
        peak, where = torch.cuda.max_memory_allocated(trainer.device) / 2**20, "GPU peak"
    total = seconds * info.config.train.steps
    print(f"{count:,} parameters; {where} {peak:,.0f} MiB; {seconds:.3f} s a step at batch {info.config.train.batch_size}")
    print(f"{info.config.train.steps:,} steps would take about {total / 60:.1f} minutes, validations apart")
    return 0


def sample_main(arguments: Sequence[str] | None = None) -> int:
    """sample.py: returns the exit code."""
    parser = argparse.ArgumentParser(prog="sample.py", description="Draw samples from a trained run.")
    parser.add_argument("run", type=Path, help="run folder that train_density.py made")
    parser.add_argument("-n", type=int, default=64, help="number of samples (default 64)")
    parser.add_argument("--out", type=Path, help="x.png, x.npz or x.gif (default RUN/samples/sample-SEED.png)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default 0)")
    parser.add_argument("--temperature", type=float, default=1.0, help="scale of the latent noise (default 1)")
    parser.add_argument("--trajectory", action="store_true", help="npz: also where each sample was on its way from the noise")
    parser.add_argument("--class", dest="label", help="draw from one class of a run trained with --condition label")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    options = parser.parse_args(arguments)
    return _guard(lambda: _sample(options))


def _context(info: RunInfo, label: str | None, n: int) -> torch.Tensor | None:
    if not info.context_dim:
        if label is not None:
            raise ConfigError(f"--class {label}: this run was trained without classes (--condition label)")
        return None
    if label is None:  # every class in turn
        return torch.eye(info.context_dim)[torch.arange(n) % info.context_dim]
    if label not in info.classes:
        raise ConfigError(f"--class {label} is unknown: this run has {', '.join(info.classes)}")
    return torch.eye(info.context_dim)[info.classes.index(label)].expand(n, -1)


@torch.no_grad()
def _sample(options: Any) -> int:
    from cnf import plotting

    info = read_config(options.run)
    flow: Flow = load(options.run, options.device)
    out: Path = options.out or options.run / "samples" / f"sample-{options.seed}.png"
    if out.suffix not in (".png", ".npz", ".gif"):
        raise ConfigError(f"--out {out}: expected a file ending in .png, .npz or .gif")
    out.parent.mkdir(parents=True, exist_ok=True)
    noise = Noise(options.seed, "sample")
    context = _context(info, options.label, options.n)
    if out.suffix == ".gif":
        if context is not None:
            raise ConfigError("--out x.gif is for runs without classes: choose .png or .npz")
        plotting.flow_gif(flow, out, seed=options.seed)
    else:
        if context is None:
            x = flow.sample(options.n, noise=noise, temperature=options.temperature)
        else:
            x = flow.sample(1, context.to(options.device), noise=noise, temperature=options.temperature)[0]
        if out.suffix == ".png":
            if x.ndim == 4:
                plotting.image_grid(x, out)
            else:
                plotting.samples_beside_data(x.cpu(), _data(info.config).test, out, columns=info.columns)
        else:
            rows = None if context is None else context.to(options.device)
            arrays = {"samples": x.cpu().numpy(), "log_prob": flow.log_prob(x, rows, noise=noise).cpu().numpy()}
            if options.trajectory:
                arrays["trajectory"] = flow.trajectory(x, torch.linspace(0, 1, 21), rows).flip(0).cpu().numpy()

            def save(path: Path) -> None:
                with path.open("wb") as file:
                    np.savez(file, **arrays)  # type: ignore[arg-type]

            write_atomic(out, save)
    print(f"{options.n} samples of {os.path.normpath(options.run)} in {out}")
    return 0


