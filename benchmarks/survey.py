"""The survey's table and its picture of decision boundaries: eight nets of about 1,300 parameters on three spheres.

    python benchmarks/survey.py [--seeds 4] [--epochs 5 50] [--data three-spheres disjoint-spheres] [--pictures docs/pictures]

Trains the presets survey-... (variants of 2002.08071) on 1,024 points (batch 96, Adam at 1e-3, tanh): concentric spheres
(``three-spheres``), or two discs inside a ring (``disjoint-spheres``, which the survey's words describe). Prints train and test
accuracy, evaluations (NFE) and CPU time of an epoch, means and standard deviations over seeds, and draws for each set the
decision boundaries of the first seed and the accuracies of all. One process, one thread: with four seeds about 8 minutes
of a core for each set. ``--quick``: one seed, one epoch.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from anode import train_row
from measure import RESULTS, machine, markdown, record, spread, versions

from cnf.config import PRESETS
from cnf.data import load
from cnf.data.supervised import CLASSES
from cnf.losses import assess
from cnf.neural_ode import NeuralODE, Predictor
from cnf.plotting import decision_boundaries
from cnf.plotting.canvas import new_figure, save_figure, subplots

NETS = tuple(name for name in PRESETS if name.startswith("survey-"))
Row = dict[str, Any]


def three(name: str, seed: int, epochs: int, data: str = "three-spheres") -> tuple[Row, Predictor]:
    """Return the figures of one run on one of :data:`cnf.data.supervised.CLASSES`, and the model."""
    row, trainer, splits = train_row(name, data, seed, epochs, solver_check_every=10**6)
    model = trainer.averaged().eval()  # the weights at the end, as the survey has them
    parts = {s: assess(model, getattr(splits, s), getattr(splits, f"{s}_context"), "classification") for s in ("train", "test")}
    row |= {
        "train_accuracy": parts["train"].accuracy,
        "test_accuracy": parts["test"].accuracy,
        "nfe": trainer.history[-1].get("nfe", 0) if isinstance(trainer.model, NeuralODE) else 0,
        "seconds_per_epoch": row["cpu_seconds"] / epochs,
    }
    return row, model


def table(rows: Sequence[Row]) -> str:
    """Return the markdown table of the rows."""
    lines = []
    for key in dict.fromkeys((row["data"], row["epochs"], row["model"]) for row in rows):
        some = [row for row in rows if (row["data"], row["epochs"], row["model"]) == key]
        lines.append({
            "data": key[0], "epochs": key[1], "model": key[2], "parameters": some[0]["parameters"], "seeds": len(some),
            "train": spread([100 * r["train_accuracy"] for r in some], ".1f"), "test": spread([100 * r["test_accuracy"] for r in some], ".1f"),
            "nfe": spread([r["nfe"] for r in some], ".0f"), "time": spread([r["seconds_per_epoch"] for r in some], ".2f"),
        })  # fmt: skip
    return markdown(lines, {
        "model": "{model}", "data": "{data}", "epochs": "{epochs}", "parameters": "{parameters:,}", "seeds": "{seeds}",
        "train accuracy, %": "{train}", "test accuracy, %": "{test}", "NFE": "{nfe}", "CPU s an epoch": "{time}",
    })  # fmt: skip


def draw_accuracies(rows: Sequence[Row], path: Path) -> None:
    """Draw test accuracy of every seed, and NFE, model by model."""
    lengths = list(dict.fromkeys(r["epochs"] for r in rows))
    figure = new_figure(10, 4.2)
    left, right = subplots(figure, 1, 2, sharey=True)
    for k, length in enumerate(lengths):
        for i, name in enumerate(NETS):
            some = [r for r in rows if r["epochs"] == length and r["model"] == name]
            place = [i + 0.25 * (k - (len(lengths) - 1) / 2)] * len(some)
            label = f"{length} epochs" if i == 0 else None
            left.plot([100 * r["test_accuracy"] for r in some], place, "o", ms=4, alpha=0.7, color=f"C{k}", label=label)
            right.plot([r["nfe"] for r in some], place, "o", ms=4, alpha=0.7, color=f"C{k}")
    left.set_yticks(range(len(NETS)), list(NETS))
    left.invert_yaxis()
    left.set(xlabel="test accuracy, %", xlim=(None, 102))
    right.set(xlabel="NFE of a training solve", xlim=(0, None))
    figure.legend(fontsize=9, loc="outside lower center", ncols=len(lengths), frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epochs", type=int, nargs="+", default=[5, 50])
    parser.add_argument("--data", choices=list(CLASSES), nargs="+", default=["three-spheres"])
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch")
    parser.add_argument("--pictures", type=Path, default=Path("docs/pictures"), help="folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file of rows (default: %(default)s)")
    options = parser.parse_args(arguments)
    seeds, lengths = (1, [1]) if options.quick else (options.seeds, options.epochs)
    torch.set_num_threads(1)
    options.pictures.mkdir(parents=True, exist_ok=True)
    about = {**machine(), "versions": versions("torch", "torchdiffeq")}
    every: list[Row] = []
    for data in options.data:
        rows: list[Row] = []
        models: dict[str, Predictor] = {}
        for length in lengths:
            for name in NETS:
                for seed in range(seeds):
                    row, model = three(name, seed, length, data)
                    rows.append(row)
                    if seed == 0:  # of the longest training, which comes last
                        models[name] = model
                        titles = {n: f"{n.removeprefix('survey-')}: {100 * r['test_accuracy']:.1f} %" for r in rows if r["seed"] == 0 for n in [r["model"]]}
                    print(f"{length:3} epochs {name:20} seed {seed}: test {100 * row['test_accuracy']:.1f} %, NFE {row['nfe']}, "
                          f"{row['seconds_per_epoch']:.2f} CPU s an epoch", flush=True)  # fmt: skip
        x, y = (lambda d: (d.test[::4], d.test_context[::4].argmax(1)))(load(data, condition="label", sizes=(1024, 300, 3000)))
        named = {titles[name]: model for name, model in models.items()}
        decision_boundaries(named, x, y, options.pictures / f"survey-boundaries-{data}.png", classes=CLASSES[data])
        draw_accuracies(rows, options.pictures / f"survey-accuracies-{data}.png")
        record(options.out, f"survey {data}", arguments, rows, about)
        every += rows
    print(table(every))


if __name__ == "__main__":
    main()
