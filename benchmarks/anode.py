"""Neural ODEs with and without augmentation on the flip and the spheres, over 50 epochs.

    python benchmarks/anode.py [--seeds 5] [--epochs 50] [--picture docs/pictures/anode-fits.png]

Trains the presets node-... and anode-... (p = 5) on flip, spheres1 and spheres2 and follows validation loss and evaluations
(NFE) over the epochs. One process, one thread; about 20 minutes of a core with five seeds. The figures of the paper (ANODE,
1904.01681) are in anode_figures.py, the survey's eight nets on three spheres in survey.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from measure import RESULTS, machine, markdown, record, spread, versions

from cnf.cli.common import load_splits
from cnf.config import RunConfig, preset
from cnf.losses import assess
from cnf.plotting.canvas import new_figure, subplots, write
from cnf.runs import RunInfo
from cnf.training import Trainer, from_settings

FITS = ("flip", "spheres1", "spheres2")
Row = dict[str, Any]


def train(config: RunConfig) -> tuple[Trainer, Any]:
    """A finished run in a folder that is gone by then, and its data."""
    data = load_splits(config)
    info = RunInfo(config, data.event_shape, data.levels, data.context_dim, data.classes, data.columns)
    with tempfile.TemporaryDirectory() as folder:
        trainer = from_settings(info, data, Path(folder), quiet=True)
        trainer.run()
    return trainer, data


def train_row(name: str, data: str, seed: int, epochs: int, **changes: Any) -> tuple[Row, Trainer, Any]:
    """Train a preset on a data set for epochs as long as its validations are apart; return the row's entries of any benchmark."""
    config = preset(name).config
    config = replace(config, data=config.data.change(data=data)).change(**{"steps": epochs * config.train.validate_every, "seed": seed} | changes)
    begun = time.process_time()  # of one thread: the wall time on a core of its own
    trainer, splits = train(config)
    row = {
        "data": data,
        "model": name,
        "seed": seed,
        "epochs": epochs,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "skipped": trainer.state.skipped,
        "cpu_seconds": time.process_time() - begun,
    }
    return row, trainer, splits


def by_epoch(trainer: Trainer, key: str, every: int) -> list[float]:
    """Return the mean of a logged figure over each epoch of ``every`` steps."""
    epochs, logged = trainer.steps // every, [m for m in trainer.history if key in m]
    parts = [[m[key] for m in logged if e * every < m["step"] <= (e + 1) * every] for e in range(epochs)]
    return [statistics.mean(part) if part else float("nan") for part in parts]


def fit(name: str, data: str, seed: int, epochs: int) -> Row:
    """One run of ``fits``: loss and evaluations epoch by epoch."""
    row, trainer, splits = train_row(name, data, seed, epochs)
    return row | {
        "model": name.split("-")[0].upper(),
        "test": assess(trainer.best_model(), splits.test, splits.test_context, "regression").mean,
        "loss": [m["validation"] for m in trainer.history if "validation" in m],
        "nfe": by_epoch(trainer, "nfe", preset(name).config.train.validate_every),
    }


def fits(seeds: int, epochs: int) -> list[Row]:
    """Every run of ``fits``, told as it ends."""
    rows = []
    for data in FITS:
        kind = "flip" if data == "flip" else "spheres"
        for name in (f"node-{kind}", f"anode-{kind}"):
            for seed in range(seeds):
                rows.append(fit(name, data, seed, epochs))
                print(f"{data:9} {name:14} seed {seed}: test {rows[-1]['test']:.3g}, NFE {rows[-1]['nfe'][-1]:.0f}, "
                      f"{rows[-1]['cpu_seconds']:.0f} CPU s", flush=True)  # fmt: skip
    return rows


def table(rows: Sequence[Row]) -> str:
    """The markdown table of the rows."""
    lines = []
    for data, model in dict.fromkeys((row["data"], row["model"]) for row in rows):
        some = [row for row in rows if (row["data"], row["model"]) == (data, model)]
        lines.append({
            "data": data, "model": model, "parameters": some[0]["parameters"], "seeds": len(some),
            "median": f"{statistics.median(r['test'] for r in some):.2g}",
            "range": f"{min(r['test'] for r in some):.2g} to {max(r['test'] for r in some):.2g}",
            "first": spread([r["nfe"][0] for r in some], ".0f"),
            "last": spread([r["nfe"][-1] for r in some], ".0f"),
            "time": spread([r["cpu_seconds"] for r in some], ".0f"),
        })  # fmt: skip
    return markdown(lines, {
        "data": "{data}", "model": "{model}", "parameters": "{parameters:,}", "seeds": "{seeds}", "test loss (MSE), median": "{median}",
        "its range": "{range}", "NFE, first epoch": "{first}", "NFE, last epoch": "{last}", "CPU s": "{time}",
    })  # fmt: skip


def draw_fits(rows: Sequence[Row], path: Path) -> None:
    """Loss above, NFE below, over epochs: medians, with the range over seeds shaded."""
    figure = new_figure(11, 5.6)
    axes = subplots(figure, 2, len(FITS), sharex=True)
    for column, data in zip(axes.T, FITS, strict=True):
        for model, colour in (("NODE", "tab:red"), ("ANODE", "tab:blue")):
            some = [r for r in rows if r["data"] == data and r["model"] == model]
            for axis, key in zip(column, ("loss", "nfe"), strict=True):
                values = np.array([r[key] for r in some])
                epochs = np.arange(1, values.shape[1] + 1)
                axis.plot(epochs, np.median(values, 0), color=colour, label=model)
                axis.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
                axis.grid(alpha=0.3)
        column[0].set(title=data, yscale="log")
        column[1].set(xlabel="epoch", ylim=(0, None))
    axes[0, 0].set_ylabel("validation loss (MSE)")
    axes[1, 0].set_ylabel("NFE of a training solve")
    axes[0, 0].legend(loc="best", fontsize=9)
    write(path, lambda p: figure.savefig(p, format="png"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="one epoch, one seed")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file of rows (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds = options.epochs = 1
    torch.set_num_threads(1)
    rows = fits(options.seeds, options.epochs)
    if options.picture:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        draw_fits(rows, options.picture)
    record(options.out, "anode", arguments, rows, {**machine(), "versions": versions("torch", "torchdiffeq")})
    print(table(rows))


if __name__ == "__main__":
    main()
