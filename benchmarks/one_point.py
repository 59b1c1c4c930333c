"""log_prob and sample of one point: ours against a plain PyTorch program of the same arithmetic, and against zuko.

The plain program evaluates concatsquash layers of width 64-64 and their closed-form trace in rk4 steps, with no package around
it; both have the same weights and give the same log p. zuko's CNF has the same function and weights as ours, trained for a
while, and both are called at their defaults (adaptive solvers; zuko's exact trace).

    python benchmarks/one_point.py --quick
    python benchmarks/one_point.py --full --json benchmarks/results.json
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import alternate, machine, markdown, record, versions
from torch import Tensor
from zuko_pair import data, our_flow, train, zuko, zuko_flow

from cnf import CNF, FixedGrid, Flow
from cnf.fields import MLP

STEPS = {2: 7, 43: 3}
COLUMNS = {
    "D": "{dim}", "batch": "{batch}", "steps": "{steps}", "plain ms": "{plain:.2f}", "ours ms": "{ours:.2f}", "ours / plain": "{ratio:.2f}",
    "difference of log p": "{difference:.0e}", "log_prob at defaults, zuko ms": "{zuko_log_prob:.1f}", "ours ": "{our_log_prob:.1f}",
    "sample at defaults, zuko ms": "{zuko_sample:.1f}", "ours  ": "{our_sample:.1f}",
}  # fmt: skip


def plain_log_prob(field: Any, steps: int) -> Callable[[Tensor], Tensor]:
    """Log p by rk4 (the 3/8 rule) and the closed-form trace, written out."""
    one, two, three = field.layers
    w1, w2, w3 = (layer.core.weight for layer in field.layers)

    def affine(layer: Any, t: float) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(layer.gate.weight[:, 0] * t + layer.gate.bias)
        return gate, layer.core.bias * gate + layer.drift.weight[:, 0] * t

    def slopes(t: float, x: Tensor) -> tuple[Tensor, Tensor]:
        (g1, c1), (g2, c2), (g3, c3) = affine(one, t), affine(two, t), affine(three, t)
        h1 = torch.tanh((x @ w1.T) * g1 + c1)
        h2 = torch.tanh((h1 @ w2.T) * g2 + c2)
        kernel = w2 * (w1 @ (g3[:, None] * w3)).T
        trace = ((((1 - h2 * h2) * g2) @ kernel) * ((1 - h1 * h1) * g1)).sum(1)
        return (h2 @ w3.T) * g3 + c3, trace

    def log_prob(x: Tensor) -> Tensor:
        h, total = 1 / steps, torch.zeros(len(x))
        dim = x.shape[1]
        for i in range(steps):
            t = i * h
            k1, d1 = slopes(t, x)
            k2, d2 = slopes(t + h / 3, x + (h / 3) * k1)
            k3, d3 = slopes(t + 2 * h / 3, x + h * (k2 - k1 / 3))
            k4, d4 = slopes(t + h, x + h * (k1 - k2 + k3))
            x = x + (h / 8) * (k1 + 3 * (k2 + k3) + k4)
            total = total + (h / 8) * (d1 + 3 * (d2 + d3) + d4)
        return total - 0.5 * (x * x).sum(1) - 0.5 * dim * math.log(2 * math.pi)

    return log_prob


def compare(dim: int, batch: int, updates: int, turns: int) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(0)
    steps = STEPS[dim]
    flow = Flow(CNF(MLP(dim, (64, 64)), eval_solver=FixedGrid("rk4", steps)), (dim,)).eval()
    x = data(dim)[:batch]
    plain = plain_log_prob(flow.blocks[0].field, steps)
    trained = our_flow(dim, "tanh")
    train(trained, data(dim), updates, 256)
    trained.eval()
    other = zuko_flow(trained, "tanh")
    sides = {
        "plain": lambda: plain(x), "ours": lambda: flow.log_prob(x),
        "zuko log_prob": lambda: other().log_prob(x), "our log_prob": lambda: trained.log_prob(x),
        "zuko sample": lambda: other().sample((batch,)), "our sample": lambda: trained.sample(batch),
    }  # fmt: skip
    with torch.no_grad():
        difference = float((plain(x) - flow.log_prob(x)).abs().max())
        found = alternate(sides, turns, warmup=3)
    cpu = {name.replace(" ", "_"): 1000 * each["cpu"] for name, each in found.items()}
    return {"dim": dim, "batch": batch, "steps": steps, **cpu, "ratio": cpu["ours"] / cpu["plain"], "difference": difference, "repeats": turns}


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and record if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="short training, few repeats (the default)")
    extent.add_argument("--full", action="store_true", help="longer training, more repeats")
    parser.add_argument("--dims", type=int, nargs="+", choices=STEPS, default=list(STEPS), help="numbers of data dimensions")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 256], help="points of a call")
    parser.add_argument("--json", type=Path, help="file of measured rows to add to")
    args = parser.parse_args(argv)
    if zuko is None:
        print("zuko is not installed: pip install -e '.[dev]' brings it, or pip install 'zuko>=1.2'", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    updates, turns = (1500, 41) if args.full else (200, 9)
    rows = [compare(dim, batch, updates, turns) for dim in args.dims for batch in args.batch]
    about = {**machine(), "threads": 1, **versions("torch", "zuko")}
    print(", ".join(f"{k} {v}" for k, v in about.items()) + "\n")
    print(markdown(rows, COLUMNS))
    if args.json:
        record(args.json, "one_point", argv, rows, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
