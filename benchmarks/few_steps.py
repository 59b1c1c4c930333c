"""What samples are worth when they are drawn in few steps.

    python benchmarks/few_steps.py RUN [RUN ...] --json benchmarks/results.json

From the same latent noise, samples are drawn by the run's adaptive solver and by fixed grids of one method after another, and held
against the test items by the energy distance, 2 E|x - y| - E|x - x'| - E|y - y'| (zero where both have one distribution), whose value
for as many training items stands beside it; and against the adaptive solver's samples, one by one.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measure import machine, markdown, record, versions
from torch import Tensor

from cnf import FixedGrid, Noise, load
from cnf.cli.common import load_splits, read_run
from cnf.flow import Flow

METHODS = {"euler": 1, "heun": 2, "rk4": 4}  # evaluations a step
COLUMNS = {
    "run": "{run}", "method": "{method}", "steps": "{steps}", "evaluations": "{evaluations}", "energy distance": "{distance:.4f}",
    "to the adaptive solver's, RMS": "{apart:.2e}", "samples a second": "{speed:,.0f}",
}  # fmt: skip


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Between two samples (N, \\*event), without the pairs of a point with itself."""
    x, y = x.flatten(1).double(), y.flatten(1).double()
    own = sum(float(torch.cdist(v, v).sum()) / (len(v) * (len(v) - 1)) for v in (x, y))
    return 2 * float(torch.cdist(x, y).mean()) - own


def samples(flow: Flow, n: int, method: str, steps: int | None) -> tuple[Tensor, float]:
    """Drawn from the same noise whatever the solver, and the seconds it took."""
    began = time.perf_counter()
    solver = None if steps is None else FixedGrid(method, steps)
    x = torch.cat([flow.sample(min(256, n - i), noise=Noise(0, "sample", i), solver=solver) for i in range(0, n, 256)])
    return x, time.perf_counter() - began


def main(argv: list[str] | None = None) -> int:
    """Draw, compare, print, and record if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("-n", type=int, default=1000, help="samples of each")
    parser.add_argument("--budgets", type=int, nargs="+", default=(4, 8, 16, 32, 64), help="evaluations a block")
    parser.add_argument("--json", type=Path, help="file of measured rows to add to")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for run in args.runs:
        flow, data = load(run), load_splits(read_run(run).config)
        scale = 1.0 if data.levels is None else 1 / data.levels
        test, train = ((x[: args.n].to(flow.like) + (0.5 if data.levels else 0)) * scale for x in (data.test, data.train))
        reference, took = samples(flow, args.n, "rk4", None)

        def row(method: str, steps: Any, evaluations: Any, x: Tensor, apart: float, seconds: float, name: str, test: Tensor) -> None:
            distance, speed = energy_distance(x, test), len(x) / seconds
            told = {"method": method, "steps": steps, "evaluations": evaluations}
            rows.append({"run": name, **told, "distance": distance, "apart": apart, "speed": speed})

        row("(training items)", "", "", train, math.nan, math.nan, run.name, test)
        row("adaptive", "", "", reference, 0.0, took, run.name, test)
        for method, each in METHODS.items():
            for steps in (budget // each for budget in args.budgets if budget >= each):
                x, took = samples(flow, args.n, method, steps)
                apart = float((x - reference).square().mean().sqrt())
                row(method, steps, steps * each, x, apart, took, run.name, test)
    print(markdown(rows, COLUMNS))
    if args.json:
        record(args.json, "few_steps", argv, rows, {**machine(), **versions("torch")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
