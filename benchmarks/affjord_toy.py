"""FFJORD against AFFJORD (2306.02731) on points in the plane and on images: equal field, equal steps or CPU minutes, several seeds.

    python benchmarks/affjord_toy.py --steps 2000                      # three toy sets, three seeds
    python benchmarks/affjord_toy.py --sets digits --seeds 0 1         # the digits preset with each drive
    python benchmarks/affjord_toy.py --sets mnist --drives none hyper both --seeds 0 --minutes 5    # equal CPU minutes
    python benchmarks/affjord_toy.py --quick                           # half a minute
    python benchmarks/affjord_toy.py --report                          # tables and pictures from what was measured

FFJORD's field is a concatsquash MLP; AFFJORD's has the same hidden sizes, with the learned time next to x (concat),
generating all weights (hyper), or both, as in the paper; "wide" is FFJORD with as many parameters as the hypernetwork has (not for digits). Everything
else is the same: solver, steps, batch, rate, data, and the seeds of noise and order. NFE are those of a dopri5 solve at
1e-5 of the validation points, at every validation. Rows go to a JSON file as they come, so an interrupted benchmark
goes on where it stopped.

mnist, cifar10 and celeba (32 x 32) have the published multiscale chains with one block per group, but 16 filters in place of 64, two steps of
rk4 and batches of 32, and stop after --minutes of CPU time: minutes on a core, not the paper's days on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from measure import machine, markdown, versions
from torch import Tensor

from cnf.config import DataConfig, RunConfig, preset
from cnf.data import DataSplits, load
from cnf.evaluation import evaluate
from cnf.flow import Flow
from cnf.runs import RunInfo
from cnf.training import Callback, Trainer, from_settings
from cnf.training.solver_monitor import SolverMonitor
from cnf.transforms import Request

TOYS = ("checkerboard", "hash-gaussian", "letters-gaussian")
AUGMENTED_TIME_LAYERS = {"none": "FFJORD", "concat": "AFFJORD concat", "hyper": "AFFJORD hyper", "both": "AFFJORD", "wide": "FFJORD, wide"}
IMAGES = {"mnist": "affjord-mnist", "cifar10": "affjord-cifar10", "celeba": "affjord-celeba32"}  # presets
SMALL: dict[str, Any] = {
    "hidden": (16, 16, 16), "preprocess": "standardize", "train_solver": "grid", "method": "rk4", "grid_steps": 2, "max_grid_steps": 8,
    "gradient": "direct", "batch_size": 32, "lr": 1e-3, "warmup": 20, "max_grad_norm": 10.0, "validate_every": 50, "validation_items": 100, "threads": 1,
    "steps": 100_000,
}  # fmt: skip
WIDE = (220, 220)  # as many parameters as the hypernetwork of a field of (64, 64)
WIDE_FILTERS = {"mnist": 70, "cifar10": 78, "celeba": 78}  # as many parameters as "both" has with 16 filters
HERE = Path(__file__).resolve().parent
NFE_ITEMS = 500


class Measured(Trainer):
    """Training that also counts, at each validation, what a solve of validation points takes."""

    def validate(self) -> dict[str, Any]:
        """Validation, with the averaged weights' NFE."""
        found = super().validate()
        x, context = self.validation.x, self.validation.context
        flow = self.averaged().eval()
        with torch.no_grad():
            found["solve_nfe"] = flow.evaluate(x[:NFE_ITEMS], Request(context, integrals=False)).stats.nfe
        return found


class CpuLimit(Callback):
    """Stops after so many CPU seconds of this process."""

    def __init__(self, seconds: float):
        self.end = time.process_time() + seconds

    def stop_reason(self, run: Any) -> str | None:
        """Return a reason when the time is up."""
        return "cpu_time" if time.process_time() >= self.end else None


def settings(data: str, drive: str, seed: int, steps: int | None) -> RunConfig:
    """The preset of the data, with one drive."""
    if data in IMAGES:
        drives: dict[str, Any] = {"augmented_time": "none", "hidden": (WIDE_FILTERS[data],) * 3} if drive == "wide" else {"augmented_time": drive}
        found = preset(IMAGES[data]).config.change(**(SMALL | drives), seed=seed)
        return found if steps is None else found.change(steps=steps)
    base = preset("digits" if data == "digits" else "affjord-toy-checkerboard").config
    model = base.model.change(**({"augmented_time": "none", "hidden": WIDE} if drive == "wide" else {"augmented_time": drive}))
    train = base.train.change(seed=seed, steps=steps or base.train.steps)
    return dataclasses.replace(base, data=DataConfig(data), model=model, train=train)


def images(data: DataConfig, path: Path | None, root: str) -> DataSplits:
    """The images of a preset, or of a path; pictures of a folder are cropped to the preset's size."""
    size = data.image_size if path is None or path.is_dir() else None
    return load(path or data.data, root=root, **({} if size is None else {"image_size": size}))


def run(data: str, drive: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One training, and its test."""
    config = settings(data, drive, seed, options.steps)
    splits = images(config.data, options.path, options.data_root) if data in IMAGES else load(data)
    info = RunInfo(config, splits.event_shape, splits.levels, 0, splits.classes, splits.columns)
    started, cpu = time.perf_counter(), time.process_time()
    limit = [CpuLimit(60 * options.minutes)] if options.minutes else []
    with tempfile.TemporaryDirectory() as folder:
        trainer = from_settings(info, splits, Path(folder), quiet=True, kind=Measured, callbacks=limit)
        trainer.run()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        flow = trainer.best_model()
        test, draws = (splits.test[: options.test_items], 2) if data in IMAGES else (splits.test, 10 if splits.levels else 1)
        found = evaluate(flow, test, None, draws=draws, seed=30_000)
        curve = [(r["step"], r["validation"], r["solve_nfe"]) for r in trainer.history if "solve_nfe" in r]
    if splits.event_shape == (2,) and seed == 0:
        torch.save(density(flow, splits.test), options.densities / f"{data}-{drive}.pt")
    return {
        "data": data,
        "drive": drive,
        "seed": seed,
        "steps": trainer.state.step if limit else config.train.steps,
        "cpu_minutes": options.minutes,
        "parameters": sum(p.numel() for p in flow.parameters()),
        "validation": min(v for _, v, _ in curve),
        "test": found.mean,
        "standard_error": found.standard_error,
        "nfe": curve[-1][2],
        "refinements": trainer.callback(SolverMonitor).refinements,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "curve": curve,
    }


@torch.no_grad()
def density(flow: Flow, data: Tensor, resolution: int = 200) -> Tensor:
    """p(x) on a grid over the data's square."""
    half = extent(data)
    ticks = (torch.arange(resolution) + 0.5) / resolution * 2 * half - half
    grid = torch.cartesian_prod(ticks, ticks)
    return torch.cat([flow.log_prob(part).exp() for part in grid.split(10_000)]).reshape(resolution, resolution)


def extent(data: Tensor) -> float:
    """Half the side of the square that is drawn."""
    return 1.15 * float(data.abs().max())


def report(rows: list[dict[str, Any]], densities: Path, pictures: Path) -> str:
    """Tables, and a picture a set: curves of all seeds, densities side by side."""
    tables = []
    for data in dict.fromkeys(row["data"] for row in rows):
        of = [row for row in rows if row["data"] == data]
        minutes = of[0].get("cpu_minutes")
        length = f"{minutes:g} CPU minutes" if minutes else f"{of[0]['steps']:,} steps"
        tables.append(f"\n{data}, {length}:\n\n" + markdown(list(summaries(of)), COLUMNS))
        curves(data, of, pictures / f"affjord-{data}-curves.png")
        if data in TOYS and any((densities / f"{data}-{drive}.pt").exists() for drive in AUGMENTED_TIME_LAYERS):
            side_by_side(data, densities, pictures / f"affjord-{data}.png")
    return "\n".join(tables)


COLUMNS = {
    "model": "{model}",
    "parameters": "{parameters:,}",
    "seeds": "{seeds}",
    "steps": "{steps:,.0f}",
    "validation": "{validation:.4f}",
    "spread over seeds": "{spread:.4f}",
    "test": "{test:.4f}",
    "standard error over rows": "{standard_error:.4f}",
    "NFE at the end": "{nfe:.0f}",
    "seconds a run": "{seconds:.0f}",
}


def summaries(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Means over seeds, for each drive."""
    for drive, name in AUGMENTED_TIME_LAYERS.items():
        of = [row for row in rows if row["drive"] == drive]
        if of:
            means = {key: statistics.mean(row[key] for row in of) for key in ("validation", "test", "nfe", "steps", "standard_error")}
            means["seconds"] = statistics.median(row["seconds"] for row in of)
            spread = statistics.stdev(row["validation"] for row in of) if len(of) > 1 else float("nan")
            yield {"model": name, "parameters": of[0]["parameters"], "seeds": len(of), "spread": spread, **means}


def curves(data: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Validation and NFE against steps: the mean of the seeds, and their range."""
    unit = "bits/dim" if data == "digits" or data in IMAGES else "nats"
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
    for drive, name in AUGMENTED_TIME_LAYERS.items():
        runs = [row["curve"] for row in rows if row["drive"] == drive]
        for axis, entry in zip(axes, (1, 2), strict=True):
            if runs:
                columns = list(zip(*runs, strict=False))
                steps = [points[0][0] for points in columns]  # of the shortest run
                values = [[point[entry] for point in points] for points in columns]
                (line,) = axis.plot(steps, [statistics.mean(v) for v in values], label=name)
                axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], alpha=0.2, color=line.get_color())
    axes[0].set(xlabel="step", ylabel=f"validation, {unit}", title=data)
    axes[1].set(xlabel="step", ylabel="NFE of a solve (dopri5, 1e-5)")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def side_by_side(data: str, densities: Path, path: Path) -> None:
    """The data's histogram and the densities of seed 0, on one scale."""
    points = load(data).test
    half = extent(points)
    share = torch.histogramdd(points.double(), [80, 80], range=[-half, half] * 2, density=True)
    panels = {"data": share.hist}
    for drive, name in AUGMENTED_TIME_LAYERS.items():
        if (densities / f"{data}-{drive}.pt").exists():
            panels[name] = torch.load(densities / f"{data}-{drive}.pt", weights_only=True)
    top = float(panels["data"][panels["data"] > 0].quantile(0.97))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 3.3), layout="constrained")
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        axis.imshow(values.T, origin="lower", extent=(-half, half, -half, half), cmap="magma", vmin=0, vmax=top)
        axis.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=TOYS, choices=(*TOYS, "digits", *IMAGES))
    parser.add_argument("--drives", nargs="+", default=tuple(AUGMENTED_TIME_LAYERS), choices=tuple(AUGMENTED_TIME_LAYERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=None, help="the preset's if not given")
    parser.add_argument("--quick", action="store_true", help="20 steps of one set and one seed without and with a learned time")
    parser.add_argument("--minutes", type=float, help="stop each training after so many CPU minutes")
    parser.add_argument("--test-items", type=int, default=200, help="test images of mnist, cifar10 and celeba (default: %(default)s)")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--path", type=Path, help="images of the same size in place of the named set, such as a part of it")
    parser.add_argument("--results", type=Path, help="JSON file of rows (default: affjord_toy.json next to the script; --quick: a temporary one)")
    parser.add_argument("--densities", type=Path, default=Path(tempfile.gettempdir()) / "affjord-toy-densities")
    parser.add_argument("--pictures", type=Path, default=HERE.parent / "docs" / "pictures")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    if options.quick:
        options.sets, options.drives, options.seeds, options.steps, options.minutes = ["checkerboard"], ["none", "both"], [0], 20, None
    options.results = options.results or (Path(tempfile.gettempdir()) / "affjord-toy-quick.json" if options.quick else HERE / "affjord_toy.json")
    if set(options.sets) & set(IMAGES) and not (options.minutes or options.steps or options.report):
        parser.error("mnist, cifar10 and celeba stop after a time, not by themselves: give --minutes, or --steps")
    options.densities.mkdir(parents=True, exist_ok=True)
    kept = json.loads(options.results.read_text(encoding="utf-8")) if options.results.exists() else {"rows": []}
    rows = kept["rows"]
    for data in () if options.report else options.sets:  # rows of other lengths would be taken for these, or averaged with them
        steps = settings(data, "none", 0, options.steps).train.steps
        found = [row for row in rows if row["data"] == data]
        if others := {row.get("cpu_minutes") for row in found} - {options.minutes}:
            parser.error(f"{options.results} holds {data} with --minutes {min(others, key=str)}, not {options.minutes}: give another --results")
        if not options.minutes and (others := {row["steps"] for row in found} - {steps}):
            parser.error(f"{options.results} holds {data} after {min(others)} steps, not {steps}: give another --results")
    done = {(row["data"], row["drive"], row["seed"]) for row in rows}
    for seed in options.seeds:
        for data in options.sets:
            for drive in options.drives:
                if options.report or (data, drive, seed) in done or (drive == "wide" and data == "digits"):
                    continue
                about = {**machine(), "versions": versions("torch", "torchdiffeq")}
                row = run(data, drive, seed, options) | ({"about": about} if rows else {})  # the first row's stands at the top
                kept = kept if rows else about
                rows.append(row)
                options.results.write_text(json.dumps({**kept, "rows": rows}, indent=1) + "\n", encoding="utf-8")
                shown = {k: v for k, v in row.items() if k != "curve"}
                print(json.dumps(shown), flush=True)
    print(report(rows, options.densities, options.pictures))


if __name__ == "__main__":
    main()
