"""What samples are worth when they are drawn in few steps.

    python benchmarks/few_steps.py RUN [RUN ...] --json benchmarks/results.json
    python benchmarks/few_steps.py pretrained:fm-mnist --quick

From the same latent noise, samples are drawn by an adaptive solver and by few steps of one method after another, and compared with the
adaptive solver's samples, one by one (RMS), and with the test items by the energy distance, 2 E|x - y| - E|x - x'| - E|y - y'| (zero
where both have one distribution), next to its value for as many training items. ``--quick`` draws 16 samples of each and needs no data.
For a denoiser there are also rk4 at equal steps of a power of the noise and the multistep solvers.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import machine, markdown, record, versions
from torch import Tensor

from cnf import Adaptive, FixedGrid, Noise, load
from cnf.cli.common import load_splits, read_run
from cnf.fields import Denoiser
from cnf.flow import Flow
from cnf.ode.dynamics import field_precision
from cnf.solvers import ExponentialMultistep, PowerSpacing, RatioSpacing, Solver

COLUMNS = {
    "run": "{run}", "method": "{method}", "steps": "{steps}", "evaluations": "{evaluations}", "energy distance": "{distance:.4f}",
    "to the adaptive solver's, RMS": "{apart:.4f}", "samples a CPU second": "{speed:,.1f}",
}  # fmt: skip
BUDGETS, QUICK_BUDGETS = (4, 8, 16, 32, 64), (5, 6, 8, 12, 16, 32)


class Method(NamedTuple):
    """A way of drawing samples in few steps."""

    name: str
    evaluations: int  # of a step
    solver: Callable[[int], Solver]  # of this many steps
    autocast: torch.dtype | None = None


def methods(flow: Flow) -> list[Method]:
    """The methods for a flow."""
    found = [Method(name, each, lambda n, name=name: FixedGrid(name, n)) for name, each in (("euler", 1), ("heun", 2), ("rk4", 4))]
    field = flow.blocks[0].field
    if isinstance(field, Denoiser):
        power, ratio = PowerSpacing(field.interpolant), RatioSpacing(field.interpolant)
        found.append(Method(f"rk4, b^(1/{power.rho:g})", 4, lambda n: FixedGrid("rk4", n, spacing=power)))
        found += [Method(name, 1, lambda n, name=name: ExponentialMultistep(name, n, ratio)) for name in ExponentialMultistep.METHODS]
        found.append(Method("unipc, bf16", 1, lambda n: ExponentialMultistep("unipc", n, ratio), torch.bfloat16))
    return found


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Between two samples (N, \\*event), without the pairs of a point with itself."""
    x, y = x.flatten(1).double(), y.flatten(1).double()
    own = sum(float(torch.cdist(v, v).sum()) / (len(v) * (len(v) - 1)) for v in (x, y))
    return 2 * float(torch.cdist(x, y).mean()) - own


def samples(flow: Flow, n: int, solver: Solver | None, autocast: torch.dtype | None = None) -> tuple[Tensor, float]:
    """Drawn from the same noise whatever the solver, and the CPU seconds it took."""
    began = time.process_time()
    with field_precision(autocast, flow.like):
        x = torch.cat([flow.sample(min(256, n - i), noise=Noise(0, "sample", i), solver=solver) for i in range(0, n, 256)])
    return x, time.process_time() - began


def main(argv: list[str] | None = None) -> int:
    """Draw, compare, print, and record if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("-n", type=int, help="samples of each (default: 1000; 16 with --quick)")
    parser.add_argument("--budgets", type=int, nargs="+", help="evaluations a block")
    parser.add_argument("--tolerance", type=float, help="of the adaptive solver, dopri5 (default: the run's solver; 1e-6 with --quick)")
    parser.add_argument("--quick", action="store_true", help="16 samples, without the data and the energy distance")
    parser.add_argument("--json", type=Path, help="file of measured rows to add to")
    args = parser.parse_args(argv)
    n, budgets = args.n or (16 if args.quick else 1000), args.budgets or (QUICK_BUDGETS if args.quick else BUDGETS)
    tolerance = args.tolerance or (1e-6 if args.quick else None)
    rows: list[dict[str, Any]] = []
    for run in args.runs:
        flow, test = load(run), None

        def row(method: str, steps: Any, evaluations: Any, x: Tensor, apart: float, seconds: float, name: str, test: Tensor | None) -> None:
            distance, speed = math.nan if test is None else energy_distance(x, test), len(x) / seconds
            told = {"method": method, "steps": steps, "evaluations": evaluations}
            rows.append({"run": name, **told, "distance": distance, "apart": apart, "speed": speed})

        if not args.quick:
            data = load_splits(read_run(run).config)
            scale = 1.0 if data.levels is None else 1 / data.levels
            test, train = ((x[:n].to(flow.like) + (0.5 if data.levels else 0)) * scale for x in (data.test, data.train))
            row("(training items)", "", "", train, math.nan, math.nan, run.name, test)
        reference, took = samples(flow, n, None if tolerance is None else Adaptive("dopri5", tolerance, tolerance, max_steps=10_000))
        row("adaptive", "", "", reference, 0.0, took, run.name, test)
        for method in methods(flow):
            for steps in (budget // method.evaluations for budget in budgets if budget % method.evaluations == 0):
                x, took = samples(flow, n, method.solver(steps), method.autocast)
                apart = float((x - reference).square().mean().sqrt())
                row(method.name, steps, steps * method.evaluations, x, apart, took, run.name, test)
    columns = {heading: form for heading, form in COLUMNS.items() if not (args.quick and heading == "energy distance")}
    print(markdown(rows, columns))
    if args.json:
        record(args.json, "few_steps", argv, rows, {**machine(), **versions("torch")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
