"""Likelihoods of denoisers: error against evaluations, and the cost of a product.

    python benchmarks/denoiser_likelihood.py RUN [RUN ...] -n 64 --json benchmarks/results.json
    python benchmarks/denoiser_likelihood.py pretrained:fm-mnist --quick

The same test images with the same noise and probe are solved by one solver after another. The error is the difference in bits/dim to a fixed
grid of 48 fifth-order steps at equal steps of b^(1/7), 288 products, within 2e-5 of 64 such steps on three models. ``--quick`` has 4
images, the default solver and dopri5. The last table is the CPU time of a Jacobian product, beside a forward pass of twice the batch, in turns.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measure import machine, markdown, record, versions
from torch import Tensor

from cnf import Adaptive, FixedGrid, Noise, load
from cnf.cli.common import load_splits, read_run
from cnf.flow import Flow
from cnf.solvers import ExponentialAdams, PowerSpacing, Solver, Stats
from cnf.solvers.interpolant import Interpolant
from cnf.transforms import Request

COLUMNS = {
    "run": "{run}", "solver": "{solver}", "products": "{products}", "mean error": "{mean:+.4f}", "mean absolute": "{absolute:.4f}",
    "largest": "{largest:.4f}", "estimate": "{estimate:.4f}",
}  # fmt: skip
COST = {"run": "{run}", "batch": "{batch}", "product, ms an image": "{product:.2f}", "forward passes": "{ratio:.2f}"}
REFERENCE, POWER = 48, 7.0
POWERS = (3.0, 7.0, 16.0)


class Watched(ExponentialAdams):
    """Keeps the estimate of its last attempt."""

    error = math.nan

    def attempt(self, *arguments: Any) -> Any:
        state, error = super().attempt(*arguments)
        self.error = float(error.mean())
        return state, error


def solvers(path: Interpolant, quick: bool) -> dict[str, Solver]:
    """The solvers by name."""
    found: dict[str, Solver] = {"Adams 4, 32 steps": Watched(32), "dopri5 at 1e-5": Adaptive("dopri5", 1e-5, 1e-5, max_steps=10_000)}
    if quick:
        return found
    for order in (3, 4):
        found |= {f"Adams {order}, {steps} steps": Watched(steps, order) for steps in (20, 24, 32, 39, 48)}
        found |= {f"Adams {order}, 32 steps of b^(1/{p:g})": Watched(32, order, spacing=PowerSpacing(path, p)) for p in POWERS}
    return found


@torch.no_grad()
def bits(flow: Flow, x: Tensor, solver: Solver) -> tuple[Tensor, Stats]:
    """Bits/dim (N,) of images with one noise, and the cost."""
    out = flow.evaluate(x, Request(None, Noise(0, "benchmark"), integrals=False, solver=solver))
    return -flow.density(out.value.double(), out.log_det.double(), None) / (flow.dim * math.log(2)), out.stats


@torch.no_grad()
def cost(flow: Flow, name: str, batch: int = 32, turns: int = 15) -> dict[str, Any]:
    """CPU time of a Jacobian product of a batch and of a forward pass of twice the batch, in turns."""
    block = flow.blocks[0]
    shape = flow.latent_shape
    x, v, t = torch.randn(batch, *shape), torch.randn(1, batch, *shape), torch.tensor(0.4)
    both, times = torch.cat([x, v[0]]), []
    for _ in range(turns):
        stamps = [time.process_time()]
        for run in (lambda: block.field.jvp(t, x, v), lambda: block.field(t, both)):
            run()
            stamps.append(time.process_time())
        times.append((stamps[1] - stamps[0], stamps[2] - stamps[1]))
    product, forward = (statistics.median(part) for part in zip(*times, strict=True))
    return {"run": name, "batch": batch, "product": 1e3 * product / batch, "ratio": product / forward}


def main(argv: list[str] | None = None) -> int:
    """Solve, compare, print, and record if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("-n", type=int, help="images (default: 32; 4 with --quick)")
    parser.add_argument("--quick", action="store_true", help="4 images, two solvers")
    parser.add_argument("--data-root", help="folder of the data sets (default: the run's)")
    parser.add_argument("--json", type=Path, help="file of measured rows to add to")
    args = parser.parse_args(argv)
    rows, costs = list[dict[str, Any]](), list[dict[str, Any]]()
    for run in args.runs:
        flow = load(run).eval()
        config = read_run(run).config
        config = config.change(data_root=args.data_root) if args.data_root else config
        x = load_splits(config).test[: args.n or (4 if args.quick else 32)]
        path = flow.blocks[0].field.interpolant
        truth, _ = bits(flow, x, FixedGrid("dopri5", REFERENCE, spacing=PowerSpacing(path, POWER)))
        for name, solver in solvers(path, args.quick).items():
            found, stats = bits(flow, x, solver)
            error = found - truth
            told = {"mean": float(error.mean()), "absolute": float(error.abs().mean()), "largest": float(error.abs().max())}
            estimate = getattr(solver, "error", math.nan) / (flow.dim * math.log(2))
            rows.append({"run": run.name, "solver": name, "products": stats.products, **told, "estimate": estimate})
            print(rows[-1], flush=True)
        costs.append(cost(flow, run.name))
    print(markdown(rows, COLUMNS), markdown(costs, COST), sep="\n\n")
    if args.json:
        record(args.json, "denoiser_likelihood", argv, rows, {**machine(), **versions("torch")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
