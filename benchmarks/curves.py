"""Validation against wall-clock for several runs, in one picture.

    python benchmarks/curves.py RUN [RUN ...] --out curves.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    unit = ""
    for run in options.runs:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        unit = "nats" if json.loads((run / "config.json").read_text(encoding="utf-8"))["levels"] is None else "bits/dim"
        validated = [row for row in rows if row.get("validation") is not None]
        left.plot([row["seconds"] / 60 for row in validated], [row["validation"] for row in validated], marker="o", ms=3, label=run.name)
        solved = [row for row in rows if "nfe" in row]
        right.plot([row["seconds"] / 60 for row in solved], [row["nfe"] + row["nfe_backward"] for row in solved], label=run.name)
    left.set(xlabel="minutes", ylabel=f"validation, {unit}", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    right.set(xlabel="minutes", ylabel="evaluations a step, forward and backward", ylim=(0, None))
    for axis in (left, right):
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(options.out, dpi=90)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
