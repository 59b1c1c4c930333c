"""The figures of ANODE (1904.01681) on toy sets, one command each.

    python benchmarks/anode_figures.py fields          # 3: field and paths of identity and flip; Euler steps that cross
    python benchmarks/anode_figures.py losses          # 5, 20: losses of ResNet, NODE and ANODE
    python benchmarks/anode_figures.py training        # 6, 8, 17: features of fixed points over the training
    python benchmarks/anode_figures.py flows           # 7, 25: losses, NFE and the learned flows
    python benchmarks/anode_figures.py generalisation  # 9: a slice held out of the training
    python benchmarks/anode_figures.py stability       # 13: failed runs over initialisations
    python benchmarks/anode_figures.py decay           # 19: weight decay and augmentation

Each takes --seeds, --epochs and --pictures FOLDER, prints a table of means and standard deviations over seeds, and adds
its rows to --out. Settings are those of the presets node-... and anode-... (the paper's), with fewer epochs than its 50
by default. One process, one thread. ``--quick`` runs one seed for one or two epochs of 192 points, in seconds.

A run counts as failed if training breaks off, a batch is skipped since its solve takes more than 1,000 evaluations, or
its test loss ends above half of the variance of the targets. The default of ``stability`` trains at ten times the usual
rate. The paper's random search (F.2.1) is ``cnf sweep``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from anode_pictures import (
    draw_decay,
    draw_flows,
    draw_held_out,
    draw_losses,
    draw_stability,
    draw_training,
    draw_vector_fields,
)
from anode_runs import Budget, Curves, run, runs, select
from measure import draw_figure, markdown, spread

DEFAULTS = {  # seeds, epochs: about two CPU minutes each
    "fields": (1, 25), "losses": (2, 6), "training": (1, 10), "flows": (1, 15),
    "generalisation": (2, 12), "stability": (10, 5), "decay": (1, 6),
}  # fmt: skip
QUICK = (192, 64, 64)  # points
EULER = 3  # steps: an odd number of equal maps can be the flip
ANGLE = 40.0
DECAYS, AUGMENTS = (0.0, 1.0, 5.0), (0, 1, 5)  # decoupled decay: times the rate, per step
STABILITY_RATE = 1e-2
Row = dict[str, Any]


def fields(budget: Budget, folder: Path) -> list[Curves]:
    """Figure 3."""
    found = runs([("NODE", "identity"), ("NODE", "flip")], budget)
    changes = {"train_solver": "grid", "method": "euler", "grid_steps": EULER, "max_grid_steps": EULER, "solver_check_every": 10**6}
    euler = run("NODE", "flip", 0, budget, **changes)
    euler.row["model"] = f"NODE, {EULER} Euler steps"
    first = [one for one in found if one.row["seed"] == 0]
    draw_vector_fields(first, euler, EULER, folder / "anode-fields.png")
    return [*found, euler]


def losses(budget: Budget, folder: Path) -> list[Curves]:
    """Figures 5 and 20."""
    cases = [(name, data) for data in ("spheres1", "spheres2", "separable2") for name in ("ResNet", "NODE", "ANODE")]
    found = runs(cases, budget)
    draw_losses(found, folder / "anode-losses.png")
    return found


def training(budget: Budget, folder: Path) -> list[Curves]:
    """Figures 6, 8 and 17."""
    found = runs([("NODE", "separable2"), ("NODE", "spheres2"), ("ANODE", "spheres2"), ("ANODE", "spheres3")], budget)
    draw_training([one for one in found if one.row["seed"] == 0], folder / "anode-training.png")
    return found


def flows(budget: Budget, folder: Path) -> list[Curves]:
    """Figures 7 and 25."""
    found = runs([(name, data) for data in ("spheres1", "spheres2") for name in ("NODE", "ANODE")], budget)
    draw_losses(found, folder / "anode-flows-losses.png", (("loss", "validation loss (MSE)"), ("nfe", "NFE of a training solve")))
    draw_flows([one for one in found if one.row["seed"] == 0], folder / "anode-flows.png")
    return found


def generalisation(budget: Budget, folder: Path) -> list[Curves]:
    """Figure 9."""
    found = runs([("NODE", "spheres2"), ("ANODE", "spheres2")], budget, data_settings={"hold_out_angle": ANGLE})
    draw_held_out(found, ANGLE, folder / "anode-generalisation.png")
    return found


def stability(budget: Budget, folder: Path) -> list[Curves]:
    """Figure 13."""
    found = runs([("NODE", "spheres2"), ("ANODE", "spheres2")], budget, lr=STABILITY_RATE)
    draw_stability(found, folder / "anode-stability.png")
    return found


def decay(budget: Budget, folder: Path) -> list[Curves]:
    """Figure 19."""
    found = []
    for weight in DECAYS:
        for p in AUGMENTS:
            for seed in range(budget.seeds):
                one = run("ANODE", "spheres2", seed, budget, weight_decay=weight, augment=p)
                one.row |= {"model": f"p = {p}, decay {weight:g}", "weight_decay": weight, "augment": p}
                found.append(one)
                print(f"{one.row['model']}, seed {seed}: " + (one.row["failure"] or f"test {one.row['test']:.3g}"), flush=True)
    rows = [{**one.row, "last_nfe": one.row["nfe"][-1]} for one in found if one.model is not None]
    draw_decay(rows, folder / "anode-decay.png")
    return found


FIGURES = {function.__name__: function for function in (fields, losses, training, flows, generalisation, stability, decay)}


def table(found: Sequence[Curves]) -> str:
    """Return the table of runs: one line for each data set and model."""
    lines = []
    for data, model in dict.fromkeys((one.row["data"], one.row["model"]) for one in found):
        every = [one.row for one in found if (one.row["data"], one.row["model"]) == (data, model)]
        some = [one.row for one in select(found, data=data, model=model)]
        line = {"data": data, "model": model, "seeds": len(every), "failed": sum(row["failed"] for row in every)}
        line |= {"cpu": spread([row["cpu_seconds"] for row in every], ".0f")}
        ends = {key: [row[key][-1] for row in some] for key in ("train_loss", "loss", "nfe")} | {"test": [row["test"] for row in some]}
        forms = {"train_loss": ".2g", "loss": ".2g", "nfe": ".0f", "test": ".2g"}
        lines.append(line | {key: spread(values, forms[key]) if values else "" for key, values in ends.items()})
    return markdown(lines, {
        "data": "{data}", "model": "{model}", "seeds": "{seeds}", "training loss, last epoch": "{train_loss}", "validation": "{loss}",
        "test": "{test}", "NFE, last epoch": "{nfe}", "failed": "{failed}", "CPU s": "{cpu}",
    })  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    def command(figure: Callable[[Budget, Path], list[Curves]]) -> Callable[..., list[Curves]]:
        return lambda seeds, epochs, folder, quick: figure(Budget(seeds, epochs, *([QUICK] if quick else [])), folder)

    commands = {name: (command(function), *DEFAULTS[name]) for name, function in FIGURES.items()}
    draw_figure(__doc__ or "", arguments, "anode_figures", "epochs", commands, lambda found: [one.row for one in found], table)


if __name__ == "__main__":
    main()
