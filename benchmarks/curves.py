"""Validation, cost and straightness against wall-clock for several runs, in one picture.

    python benchmarks/curves.py RUN [RUN ...] --out curves.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lowest", type=float, help="of the validation axis")
    parser.add_argument("--highest", type=float, help="of the validation axis")
    options = parser.parse_args()
    figure, ((top, cost), (evaluations, paths)) = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    unit = ""
    for place, run in enumerate(options.runs):
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # a running training's last line may be half there
        unit = "nats" if json.loads((run / "config.json").read_text(encoding="utf-8"))["levels"] is None else "bits/dim"

        def draw(axis: Axes, name: str, rows: list[dict[str, float]] = rows, label: str = run.name, color: str = f"C{place}") -> None:
            known = [row for row in rows if row.get(name) is not None]
            if known:  # a run keeps its colour where another has nothing to show
                axis.plot([row["seconds"] / 60 for row in known], [row[name] for row in known], marker="o", ms=3, label=label, color=color)

        draw(top, "validation")
        for row in rows:
            if "nfe" in row:
                row["evaluations"] = row["nfe"] + row["nfe_backward"]
        draw(cost, "evaluations")
        draw(evaluations, "validation_nfe")
        draw(paths, "straightness")
    top.set(ylabel=f"validation, {unit}")
    if options.lowest is not None or options.highest is not None:
        top.set(ylim=(options.lowest, options.highest))
    cost.set(ylabel="evaluations a training step, both ways", yscale="log")
    evaluations.set(ylabel="evaluations of a solve in validation")
    paths.set(ylabel="straightness of the paths (1: straight)")
    for axis in (top, cost, evaluations, paths):
        axis.set(xlabel="minutes")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(options.out, dpi=90)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
