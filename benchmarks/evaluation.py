"""Likelihoods at a stated error: the log-det carried along by dopri5 in its error norm, against few nodes of the path.

Both sides have the same trained flow, points and way of taking the exact trace. Each takes the loosest tolerances that reach
the error, which is the mean |log p - its true value|, in bits/dim, against dopri5 at 1e-10 in float64 with all states in its
norm. *Products* are evaluations that take a derivative: of a field without a closed form each is D tangents. In the rows
"defaults" both solve at 1e-5, ours with the default tolerance of the log-det. "sorted" is the same evaluation of all test
images in batches, cut as they come and in the order of local_error.

    python benchmarks/evaluation.py --quick           # short trainings; about a minute on one core
    python benchmarks/evaluation.py --full --json benchmarks/results.json  # or --controlled: the default's error, row by row
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import controlled
import torch
from measure import alternate, machine, markdown, record, seconds, versions
from torch import Tensor

from cnf import data as datasets
from cnf.config import FlowConfig, SolverConfig, preset
from cnf.evaluation import evaluate
from cnf.evaluation import likelihood as evaluation
from cnf.flow import Flow
from cnf.losses import Likelihood
from cnf.models import build, eval_solver
from cnf.ode.divergence import Exact
from cnf.random import Noise
from cnf.solvers import Adaptive
from cnf.transforms import Dequantize, Request

ERRORS = (1e-3, 1e-4)  # bits/dim
TOLERANCES = [10 ** (-k / 2) for k in range(-2, 15)]
LOG_DET = (10.0, 0.1, 1e-2, 1e-3, 3e-4, 1e-4, 5e-5, 2e-5)  # tolerances of the log-det, nats/dim
COLUMNS = {
    "case": "{case}",
    "D": "{dim}",
    "mode": "{mode}",
    "batch": "{batch}",
    "tolerances along": "{baseline_rtol:.0e}",
    "of x, of the log-det": "{ours_rtol:.0e}, {ours_tolerance:.0e}",
    "error along": "{baseline_error:.1e}",
    "at nodes": "{ours_error:.1e}",
    "products along": "{baseline_products:.0f}",
    "at nodes ": "{ours_products:.0f}",
    "times fewer": "{products_ratio:.1f}",
    "NFE along": "{baseline_nfe:.0f}",
    "at nodes  ": "{ours_nfe:.0f}",
    "s per 1,000 along": "{baseline_s:.3f}",
    "at nodes   ": "{ours_s:.3f}",
    "ratio": "{ratio:.2f}",
}
SORTED = {
    "case": "{case}",
    "items": "{items}",
    "batch": "{batch}",
    "NFE a batch, as they come": "{baseline_nfe:.1f}",
    "sorted": "{ours_nfe:.1f}",
    "s per 1,000, as they come": "{baseline_s:.3f}",
    "sorted ": "{ours_s:.3f}",
    "ratio": "{ratio:.2f}",
    "largest difference, bits/dim": "{difference:.1e}",
}
SAMPLES = {
    "case": "{case}",
    "images": "{batch}",
    "NFE": "{nfe}",
    "products": "{products}",
    "images a second": "{rate:,.0f}",
}


@dataclass
class Case:
    """What is trained, and on how many points it is held against the truth."""

    model: FlowConfig
    solver: SolverConfig
    data: str
    batch: int
    lr: float
    updates: tuple[int, int]
    """Quick, and full."""
    rows: tuple[int, int]


CASES = {
    "digits": Case(preset("digits").config.model, SolverConfig(), "digits", 256, 2e-3, (120, 600), (128, 512)),
    # three hidden layers, as published: no closed form; trained by an estimate of the trace
    "digits multiscale": Case(
        FlowConfig.of(architecture="multiscale", field="conv", hidden=(16, 16, 16), time_conditioning="concat", nonlinearity="softplus"),
        SolverConfig.of(divergence="hutchinson"), "digits", 64, 3e-3, (40, 200), (8, 32),
    ),
    "checkerboard": Case(
        preset("ffjord-toy").config.model, SolverConfig.of(grid_steps=6), "checkerboard", 512, 3e-3, (100, 800), (256, 2048)
    ),
}  # fmt: skip


def trained(case: Case, updates: int) -> tuple[Flow, datasets.DataSplits]:
    """A flow that bends, with the exact trace, and its data."""
    torch.manual_seed(0)
    data = datasets.load(case.data, **({} if case.data == "digits" else {"sizes": (20_000, 10, 4096)}))
    flow = build(case.model, case.solver, data.event_shape, levels=data.levels)
    flow.fit_statistics(data.train)
    objective = Likelihood(flow.train())
    optimizer = torch.optim.Adam(flow.parameters(), lr=case.lr)
    generator = torch.Generator().manual_seed(0)
    for step in range(updates):
        rows = torch.randint(len(data.train), (case.batch,), generator=generator)
        optimizer.zero_grad()
        objective(data.train[rows], noise=Noise(0, step=step))["loss"].mean().backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
    for block in flow.blocks:
        block.divergence = Exact()
    return flow.eval(), data


def points(flow: Flow, x: Tensor) -> Tensor:
    """Images dequantised once, so that all sides have the same points."""
    return x if flow.levels is None else Dequantize(flow.levels)(x, Request(noise=Noise(1, "benchmark"))).value


@dataclass
class Side:
    """One side at some tolerances: its figures, its error in bits/dim, and what it cost."""

    rtol: float
    tolerance: float | None
    error: float
    nfe: int
    products: int


class Comparison:
    """A flow, points, and the truth of their log p."""

    def __init__(self, flow: Flow, x: Tensor):
        self.flow, self.x = flow, x
        exact = copy.deepcopy(flow).double()
        for block in exact.blocks:
            block.eval_solver = Adaptive("dopri5", 1e-10, 1e-10, max_steps=10_000, quadratures_in_norm=True)
        with torch.no_grad():
            self.truth = exact.log_prob(x.double())

    def place(self, rtol: float, tolerance: float | None) -> None:
        """The solver of all blocks: along with x and in the norm where there is no tolerance of the log-det (nats/dim)."""
        share = None if tolerance is None else tolerance / len(self.flow.blocks)
        for block in self.flow.blocks:
            block.eval_solver = Adaptive(
                "dopri5", rtol, rtol, max_steps=10_000, quadratures_in_norm=share is None, quadrature_tolerance=share
            )

    def side(self, rtol: float, tolerance: float | None) -> Side:
        """What these tolerances give."""
        self.place(rtol, tolerance)
        with torch.no_grad():
            out = self.flow.evaluate(self.x, Request(integrals=False))
            found = self.flow.base_log_prob(out.value) + out.log_det
        error = float((found.double() - self.truth).abs().mean()) / (self.flow.dim * math.log(2))
        return Side(rtol, tolerance, error, out.stats.nfe, out.stats.products)

    def loosest(self, error: float) -> tuple[Side, Side]:
        """Both sides as cheap as the error allows."""
        along = next(s for rtol in TOLERANCES if (s := self.side(rtol, None)).error <= error)
        every = (self.side(rtol, tolerance) for tolerance in LOG_DET for rtol in TOLERANCES[:-3])
        return along, min((s for s in every if s.error <= error), key=lambda s: (s.products, s.nfe))

    def row(self, mode: str, along: Side, nodes: Side, repeats: int) -> dict[str, Any]:
        """Both sides timed in turn."""

        @torch.no_grad()
        def run(side: Side) -> None:
            self.place(side.rtol, side.tolerance)
            self.flow.log_prob(self.x)

        took = alternate({"along": lambda: run(along), "nodes": lambda: run(nodes)}, repeats)
        scale = 1000 / len(self.x)
        row: dict[str, Any] = {"dim": self.flow.dim, "mode": mode, "batch": len(self.x)}
        for name, side, one in (("baseline", along, took["along"]), ("ours", nodes, took["nodes"])):
            row |= {
                f"{name}_s": one["wall"] * scale, f"{name}_error": side.error, f"{name}_rtol": side.rtol,
                f"{name}_nfe": side.nfe, f"{name}_products": side.products,
            }  # fmt: skip
        return row | {
            "ours_tolerance": nodes.tolerance,
            "ratio": row["baseline_s"] / row["ours_s"],
            "cpu_ratio": took["along"]["cpu"] / took["nodes"]["cpu"],
            "products_ratio": along.products / nodes.products,
            "repeats": repeats,
        }


def compare(flow: Flow, x: Tensor, repeats: int) -> list[dict[str, Any]]:
    """A row for each error, and one at the defaults."""
    both = Comparison(flow, points(flow, x))
    rows = [both.row(f"error {error:g}", *both.loosest(error), repeats) for error in ERRORS]
    unit = 1.0 if flow.levels is None else math.log(2)
    plain = SolverConfig()
    sides = both.side(plain.eval_rtol, None), both.side(plain.eval_rtol, plain.eval_tolerance * unit)
    return [*rows, both.row("defaults", *sides, repeats)]


def in_order(flow: Flow, x: Tensor, batch: int, repeats: int) -> dict[str, Any]:
    """Whole evaluations in batches, as the items come and sorted."""
    for block in flow.blocks:
        block.eval_solver = eval_solver(SolverConfig(), flow)
    own, found = evaluation.sorted_rows, {}

    def run(name: str, order: Callable[..., Tensor]) -> None:
        evaluation.sorted_rows = order
        found[name] = evaluate(flow, x, draws=10, batch_size=batch)

    try:
        as_is = {"as": lambda: run("as", lambda flow, x, context, **_: torch.arange(len(x)))}
        took = alternate({**as_is, "sorted": lambda: run("sorted", own)}, repeats, warmup=0)
    finally:
        evaluation.sorted_rows = own
    solved = len(x) * found["as"].draws / 1000
    baseline, ours = (took[name]["wall"] / solved for name in ("as", "sorted"))
    moved = (found["as"].log_prob - found["sorted"].log_prob).abs().max() / (flow.dim * math.log(2))
    return {
        "mode": "sorted", "items": len(x), "batch": batch, "baseline_s": baseline, "ours_s": ours, "ratio": baseline / ours,
        "baseline_nfe": found["as"].nfe, "ours_nfe": found["sorted"].nfe, "products": found["sorted"].products,
        "difference": float(moved), "repeats": repeats,
    }  # fmt: skip


def sampling(flow: Flow, count: int, repeats: int) -> dict[str, Any]:
    """Images a second at the default tolerances, and what a batch of them costs."""
    for block in flow.blocks:
        block.eval_solver = eval_solver(SolverConfig(), flow)
    z = torch.randn(count, *flow.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stats = flow.transform.inverse(z, Request(log_det=False)).stats
        took = seconds(lambda: flow.sample(count), repeats)
    return {
        "mode": "sampling", "batch": count, "ours_s": took, "rate": count / took, "nfe": stats.nfe, "products": stats.products,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and record if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="short trainings, few points and turns (the default)")
    extent.add_argument("--full", action="store_true", help="longer trainings, more points and turns")
    parser.add_argument("--controlled", action="store_true", help="the default's error and cost, row by row, and no more")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, help="file of measured rows to add to")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    full = int(args.full)
    repeats = 7 if full else 3
    rows: list[dict[str, Any]] = []
    for name in args.cases:
        case = CASES[name]
        began = time.perf_counter()
        flow, data = trained(case, case.updates[full])
        if args.controlled:
            rows.append(controlled.trained(name, flow, points(flow, data.test[: case.rows[0]]), repeats))
            continue
        print(f"{name}: {case.updates[full]} updates in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        found = compare(flow, data.test[: case.rows[full]], repeats)
        if case.model.architecture == "stack":
            found.append(
                in_order(flow, data.test if full else data.test[:512], 64 if flow.levels else 128, 3 if full else 1)
            )
        if flow.levels is not None:
            found.append(sampling(flow, 4 * case.rows[full], repeats))
        rows += [{"case": name, **row} for row in found]
    if args.controlled:
        rows = [{**row, "mode": "controlled"} for row in (*rows, *controlled.fields((1.0, 2.0), repeats))]
    about = {**machine(), "threads": args.threads, **versions("torch", "torchdiffeq")}
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    for columns, modes in ((COLUMNS, None), (SORTED, "sorted"), (SAMPLES, "sampling"), (controlled.COLUMNS, "controlled")):
        part = [row for row in rows if (row["mode"] == modes if modes else row["mode"] not in ("sorted", "sampling", "controlled"))]
        if part:
            print(f"\n{markdown(part, columns)}")
    if args.json:
        record(args.json, "evaluation", argv, rows, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
