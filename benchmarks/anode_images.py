"""Images by ANODE with p added channels (1904.01681, figures 10, 11, 14, 18, 21 to 24).

    python benchmarks/anode_images.py                                    # real 8x8 digits
    python benchmarks/anode_images.py --data mnist --steps 1950          # the published nets; also cifar10, svhn, tiny-imagenet
    python benchmarks/anode_images.py --data cifar10 --path cifar_part   # other images of the same size, such as a part of the set
    python benchmarks/anode_images.py --data cifar10 --device cuda --batch-size 256 --steps 3500

Trains the presets node-DATA (p = 0) and anode-DATA (p = 1, 2, 5, 10) and draws training loss and evaluations (NFE) over the
steps, and loss and validation accuracy over NFE. The nets are the published ones, with as many parameters for p = 0 as
for the paper's p. Prints test accuracy and cross entropy, with their standard errors over images, and NFE. The batch is 64 by
default and gradients go through the solver; the paper has 256 and the adjoint. One process. ``--quick``: 8 steps of p = 0 and 5.
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

from cnf.losses import assess
from cnf.plotting.canvas import new_figure, save_figure, subplots

SETS = ("digits", "mnist", "cifar10", "svhn", "tiny-imagenet")
Row = dict[str, Any]


def run(p: int, seed: int, options: argparse.Namespace) -> Row:
    """Return the figures and curves of one training."""
    changes: Row = {
        "steps": options.steps, "batch_size": options.batch_size, "gradient": "direct", "validate_every": max(1, options.steps // 8), "warmup": 0,
        "validation_items": options.validation_items, "data_root": options.data_root, "device": options.device, "threads": 1,
        "solver_check_every": 10**6,
    }  # fmt: skip
    name = f"node-{options.data}" if p == 0 else f"anode-{options.data}"
    row, trainer, splits = train_row(name, str(options.path or options.data), seed, 1, **changes, **({"augment": p} if p else {}))
    items = slice(options.test_items)
    found = assess(trainer.averaged().eval(), splits.test[items], splits.test_context[items], "classification")
    logged = [m for m in trainer.history if "loss" in m and "nfe" in m]
    validated = [m for m in trainer.history if "validation_accuracy" in m]
    return row | {
        "p": p, "steps": options.steps, "accuracy": found.accuracy, "accuracy_error": found.accuracy_standard_error, "test": found.mean,
        "logged": [m["step"] for m in logged], "loss": [m["loss"] for m in logged], "nfe": [m["nfe"] for m in logged], "last_nfe": logged[-1]["nfe"],
        "validated": [m["step"] for m in validated], "validation_accuracy": [m["validation_accuracy"] for m in validated],
        "validation_nfe": [m["validation_nfe"] for m in validated],
    }  # fmt: skip


def pictures(rows: Sequence[Row], path: Path) -> None:
    """Draw loss and NFE over the steps, and loss and accuracy over NFE, a colour for each p."""
    figure = new_figure(11, 7)
    (loss, nfe), (loss_nfe, accuracy_nfe) = axes = subplots(figure, 2, 2)
    for row in rows:
        colour = f"C{sorted({r['p'] for r in rows}).index(row['p'])}"
        loss.plot(row["logged"], row["loss"], color=colour, lw=1, label=f"p = {row['p']}" if row["seed"] == 0 else None)
        nfe.plot(row["logged"], row["nfe"], color=colour, lw=1)
        loss_nfe.plot(row["nfe"], row["loss"], ".", color=colour, alpha=0.6)
        accuracy_nfe.plot(row["validation_nfe"], [100 * a for a in row["validation_accuracy"]], "o-", ms=4, lw=0.6, color=colour)
    loss.set(xlabel="step", ylabel="training loss, nats", yscale="log")
    nfe.set(xlabel="step", ylabel="NFE of a training solve")
    loss_nfe.set(xlabel="NFE of a training solve", ylabel="training loss, nats", yscale="log")
    accuracy_nfe.set(xlabel="NFE of a validation solve", ylabel="validation accuracy, %")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    loss.legend(fontsize=9)
    save_figure(figure, path)


def table(rows: Sequence[Row]) -> str:
    """Return one line for each p: means, and standard deviations over seeds."""
    lines = []
    for p in dict.fromkeys(row["p"] for row in rows):
        some = [row for row in rows if row["p"] == p]
        line = {"p": p, "parameters": some[0]["parameters"], "seeds": len(some), "steps": some[0]["steps"]}
        line["accuracy"] = spread([100 * row["accuracy"] for row in some], ".1f") + f" ({100 * max(row['accuracy_error'] for row in some):.1f})"
        forms = {"test": ".3f", "last_nfe": ".0f", "cpu_seconds": ".0f"}
        lines.append(line | {key: spread([row[key] for row in some], form) for key, form in forms.items()})
    return markdown(lines, {
        "p": "{p}", "parameters": "{parameters:,}", "seeds": "{seeds}", "steps": "{steps:,}", "test accuracy, % (standard error over images)": "{accuracy}",
        "test cross entropy, nats": "{test}", "NFE, last": "{last_nfe}", "CPU s": "{cpu_seconds}",
    })  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=SETS, default="digits", help="whose nets are trained (default: %(default)s)")
    parser.add_argument("--path", type=Path, help="labelled images of that size in place of the named set")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--p", type=int, nargs="+", default=[0, 1, 2, 5, 10], help="added channels (default: 0 1 2 5 10)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--validation-items", type=int, default=500, help="images of a validation (default: %(default)s)")
    parser.add_argument("--test-items", type=int, help="the first so many test images (default: all)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="p = 0 and 5, 8 steps, one seed")
    parser.add_argument("--pictures", type=Path, default=Path("docs/pictures"), help="folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file of rows (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.p, options.steps, options.seeds = [0, 5], 8, 1
    torch.set_num_threads(1)
    options.pictures.mkdir(parents=True, exist_ok=True)
    rows = []
    for p in options.p:
        for seed in range(options.seeds):
            rows.append(run(p, seed, options))
            print(f"p = {p}, seed {seed}: test {100 * rows[-1]['accuracy']:.1f} %, {rows[-1]['cpu_seconds']:.0f} CPU s", flush=True)
    pictures(rows, options.pictures / f"anode-images-{options.data}.png")
    record(options.out, f"anode_images {options.path or options.data}", arguments, rows, {**machine(), "versions": versions("torch", "torchdiffeq")})
    print(table(rows))


if __name__ == "__main__":
    main()
