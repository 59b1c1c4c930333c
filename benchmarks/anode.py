"""Neural ODEs with and without augmentation: the flip and the spheres, and three spheres at equal parameter budgets.

    python benchmarks/anode.py fits  [--seeds 5] [--epochs 50] [--picture docs/pictures/anode-fits.png]
    python benchmarks/anode.py three [--seeds 5] [--epochs 5 50] [--data three-spheres] [--picture docs/pictures/anode-three.png]

``fits`` trains the presets node-... and anode-... (p = 5) on flip, spheres1 and spheres2 and follows validation loss and
evaluations (NFE) over the epochs, as in figures 5 to 8 of ANODE (1904.01681). ``three`` trains eight models of about 1,300
parameters each on 1,024 points of three spheres (batch 96, Adam at 1e-3, tanh), the comparison of a survey of neural ODEs:
concentric (``three-spheres``) or two discs inside a ring (``disjoint-spheres``, which the survey's words describe). One
process, one thread; with five seeds ``fits`` takes about 20 minutes of a core and ``three`` about 8 for each set.
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
from measure import RESULTS, machine, markdown, record, versions

from cnf.cli.common import load_splits
from cnf.config import NeuralODEConfig, ResNetConfig, RunConfig, preset
from cnf.data.supervised import CLASSES
from cnf.losses import assess
from cnf.neural_ode import NeuralODE
from cnf.plotting.canvas import new_figure, subplots, write
from cnf.runs import RunInfo
from cnf.training import Trainer, from_settings

FITS = ("flip", "spheres1", "spheres2")
# 15, 11 and 14 are the survey's hidden widths. It does not give the numbers of terms and pieces: they are inferred from its
# parameter counts of 1.3k, 1.4k and 1.4k with two hidden layers. For Fourier none rounds to 1.4k (7 terms 1,332, 8 terms 1,521)
BASE = NeuralODEConfig.of(hidden=(33, 33), time_conditioning="ignore", nonlinearity="tanh", zero_init=False)
THREE = {
    "residual net, 8 blocks": ResNetConfig.of(hidden=(32,), blocks=8, nonlinearity="tanh", zero_init=False),
    "vanilla NODE": BASE,
    "ANODE, p = 5": BASE.change(hidden=(28, 28), augment=5),
    "IL-NODE, p = 5": BASE.change(hidden=(28, 28), augment=5, input_layer=True),
    "data-controlled": BASE.change(hidden=(32, 32), data_control=True),
    "Chebyshev, width 15, 4 terms": BASE.change(hidden=(15, 15), depth="chebyshev", depth_terms=4),
    "Fourier, width 11, 7 terms": BASE.change(hidden=(11, 11), depth="fourier", depth_terms=7),
    "stacked, width 14, 5 pieces": BASE.change(hidden=(14, 14), depth="stacked", depth_terms=5),
}
Row = dict[str, Any]


def train(config: RunConfig) -> tuple[Trainer, Any]:
    """A finished run in a folder that is gone by then, and its data."""
    data = load_splits(config)
    info = RunInfo(config, data.event_shape, data.levels, data.context_dim, data.classes, data.columns)
    with tempfile.TemporaryDirectory() as folder:
        trainer = from_settings(info, data, Path(folder), quiet=True)
        trainer.run()
    return trainer, data


def fit(name: str, data: str, seed: int, epochs: int) -> Row:
    """One run of ``fits``: loss and evaluations epoch by epoch."""
    config = preset(name).config
    train_config = config.train.change(steps=epochs * config.train.validate_every, seed=seed)
    trainer, splits = train(replace(config, data=config.data.change(data=data), train=train_config))
    every = train_config.validate_every
    validated = [m for m in trainer.history if "validation" in m]
    solved = [m for m in trainer.history if "nfe" in m]
    nfe = [statistics.mean(m["nfe"] for m in solved if e * every < m["step"] <= (e + 1) * every) for e in range(epochs)]
    test = assess(trainer.best_model(), splits.test, splits.test_context, "regression").mean
    return {
        "data": data,
        "model": name.split("-")[0].upper(),
        "seed": seed,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "test": test,
        "loss": [m["validation"] for m in validated],
        "nfe": nfe,
        "skipped": trainer.state.skipped,
        "seconds": trainer.state.seconds,
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
                      f"{rows[-1]['seconds']:.0f} s", flush=True)  # fmt: skip
    return rows


def three(name: str, seed: int, epochs: int, data: str = "three-spheres") -> Row:
    """One run of ``three`` on one of :data:`cnf.data.supervised.CLASSES`."""
    config = preset("anode-three-spheres").config
    every = 1024 // config.train.batch_size
    changed = config.train.change(batch_size=96, steps=epochs * every, validate_every=every, seed=seed, solver_check_every=10**6)
    begun = time.process_time()  # of one thread: the wall time on a core of its own
    trainer, splits = train(replace(config, data=config.data.change(data=data), model=THREE[name], train=changed))
    spent = time.process_time() - begun
    model = trainer.averaged().eval()  # the weights at the end, as the survey has them
    parts = {s: assess(model, getattr(splits, s), getattr(splits, f"{s}_context"), "classification") for s in ("train", "test")}
    return {
        "model": name,
        "seed": seed,
        "epochs": epochs,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "train_accuracy": parts["train"].accuracy,
        "test_accuracy": parts["test"].accuracy,
        "nfe": trainer.history[-1].get("nfe", 0) if isinstance(trainer.model, NeuralODE) else 0,
        "seconds_per_epoch": spent / epochs,
        "skipped": trainer.state.skipped,
    }


def threes(seeds: int, epochs: Sequence[int], data: str) -> list[Row]:
    """Every run of ``three``, told as it ends."""
    rows = []
    for length in epochs:
        for name in THREE:
            for seed in range(seeds):
                rows.append(three(name, seed, length, data))
                print(f"{length:3} epochs {name:28} seed {seed}: test {100 * rows[-1]['test_accuracy']:.1f} %, NFE {rows[-1]['nfe']}, "
                      f"{rows[-1]['seconds_per_epoch']:.2f} CPU s an epoch", flush=True)  # fmt: skip
    return rows


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ± {deviation:{form}}"


def table(rows: Sequence[Row]) -> str:
    """The markdown table of either part's rows."""
    lines = []
    keys = ("data", "model") if "data" in rows[0] else ("epochs", "model")
    for key in dict.fromkeys(tuple(row[k] for k in keys) for row in rows):
        some = [row for row in rows if tuple(row[k] for k in keys) == key]
        line: Row = {keys[0]: key[0], "model": key[1], "parameters": some[0]["parameters"], "seeds": len(some)}
        if "data" in some[0]:
            line["median"] = f"{statistics.median(r['test'] for r in some):.2g}"
            line["range"] = f"{min(r['test'] for r in some):.2g} to {max(r['test'] for r in some):.2g}"
            line["first"] = spread([r["nfe"][0] for r in some], ".0f")
            line["last"] = spread([r["nfe"][-1] for r in some], ".0f")
            line["time"] = spread([r["seconds"] for r in some], ".0f")
        else:
            line["train"] = spread([100 * r["train_accuracy"] for r in some], ".1f")
            line["test"] = spread([100 * r["test_accuracy"] for r in some], ".1f")
            line["nfe"] = spread([r["nfe"] for r in some], ".0f")
            line["time"] = spread([r["seconds_per_epoch"] for r in some], ".2f")
        lines.append(line)
    head = {keys[0]: f"{{{keys[0]}}}", "model": "{model}", "parameters": "{parameters:,}", "seeds": "{seeds}"}
    if "data" in rows[0]:
        head |= {"test loss (MSE), median": "{median}", "its range": "{range}", "NFE, first epoch": "{first}",
                 "NFE, last epoch": "{last}", "seconds": "{time}"}  # fmt: skip
    else:
        head |= {"train accuracy, %": "{train}", "test accuracy, %": "{test}", "NFE": "{nfe}", "CPU s an epoch": "{time}"}
    return markdown(lines, head)


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


def draw_three(rows: Sequence[Row], path: Path) -> None:
    """Test accuracy of every seed, and NFE, model by model."""
    lengths = list(dict.fromkeys(r["epochs"] for r in rows))
    figure = new_figure(10, 4.2)
    left, right = subplots(figure, 1, 2, sharey=True)
    for k, length in enumerate(lengths):
        for i, name in enumerate(THREE):
            some = [r for r in rows if r["epochs"] == length and r["model"] == name]
            place = [i + 0.25 * (k - (len(lengths) - 1) / 2)] * len(some)
            label = f"{length} epochs" if i == 0 else None
            left.plot([100 * r["test_accuracy"] for r in some], place, "o", ms=4, alpha=0.7, color=f"C{k}", label=label)
            right.plot([r["nfe"] for r in some], place, "o", ms=4, alpha=0.7, color=f"C{k}")
    left.set_yticks(range(len(THREE)), list(THREE))
    left.invert_yaxis()
    left.set(xlabel="test accuracy, %", xlim=(None, 102))
    right.set(xlabel="NFE of a training solve", xlim=(0, None))
    figure.legend(fontsize=9, loc="outside lower center", ncols=len(lengths), frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    write(path, lambda p: figure.savefig(p, format="png"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["fits", "three"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, nargs="+", help="fits: one number, 50; three: one or several, 5 and 50")
    parser.add_argument("--data", choices=list(CLASSES), default="three-spheres", help="three: the set (default: %(default)s)")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file of rows (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    about = {**machine(), "versions": versions("torch", "torchdiffeq")}
    if options.part == "fits":
        rows = fits(options.seeds, (options.epochs or [50])[0])
    else:
        rows = threes(options.seeds, options.epochs or [5, 50], options.data)
    if options.picture:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        (draw_fits if options.part == "fits" else draw_three)(rows, options.picture)
    other = options.part == "three" and options.data != parser.get_default("data")
    record(options.out, f"anode {options.part}" + (f" {options.data}" if other else ""), arguments, rows, about)
    print(table(rows))


if __name__ == "__main__":
    main()
