"""The share of a training step that goes into getting its batch: order, indexing, dequantising, noise.

Data sets stay uint8 in memory, on the training device; a batch is indexed, spread by uniform noise and handed on. Three
cases: the digits preset; a set of MNIST's size with rnode-mnist; and, as the worst case, the same set with the digits'
fast MLP, a model whose step is about as cheap as any that one would train.

    python benchmarks/data_share.py --quick
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import alternate, machine, markdown, record, versions
from torch import Tensor

from cnf import data as datasets
from cnf.config import RunConfig, preset
from cnf.data import DataSplits
from cnf.losses import Likelihood
from cnf.models import build
from cnf.random import Noise
from cnf.training.batches import Batches
from cnf.transforms import Dequantize, Request

COLUMNS = {
    "case": "{case}",
    "batch": "{batch}",
    "index ms": "{index_ms:.3f}",
    "dequantise ms": "{dequantise_ms:.3f}",
    "probe ms": "{probe_ms:.3f}",
    "shuffle ms a step": "{shuffle_ms:.3f}",
    "whole step ms": "{step_ms:.1f}",
    "share": "{share:.2%}",
}


def mnist_sized(rows: int = 50_000) -> DataSplits:
    """Random pixels in MNIST's shape: getting a batch costs the same whatever they show."""
    x = torch.randint(0, 256, (rows, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return DataSplits("mnist-sized", "image", x, x[:1000], x[:1000], levels=256)


def share(name: str, config: RunConfig, data: DataSplits, batch: int, repeats: int) -> dict[str, Any]:
    """One row: median times of the parts and of a whole training step (batch, forward, backward, Adam)."""
    assert data.levels is not None
    torch.manual_seed(0)
    flow = build(config.model, config.solver, data.event_shape, levels=data.levels).train()
    flow.fit_statistics(data.train[:10_000])
    objective = Likelihood(flow, config.train.objective.kinetic, config.train.objective.jacobian)
    # a rate of zero: Adam does its work, but the field, and so the cost of a step, stays put
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.0)
    batches = Batches(data, batch, 0, torch.device("cpu"))
    spread = next(m for m in flow.modules() if isinstance(m, Dequantize))
    x, _, noise = batches(0)
    per_epoch = len(data.train) // batches.size
    number = itertools.count()
    probes = probe_draws(flow, spread(x, Request(noise=noise)).value)

    def step() -> None:
        pixels, _, fresh = batches(next(number) % per_epoch)
        optimizer.zero_grad()
        objective(pixels, noise=fresh)["loss"].mean().backward()
        optimizer.step()

    parts = alternate(
        {
            "index": lambda: batches(next(number) % per_epoch),  # ever other rows, as in training
            "dequantise": lambda: spread(x, Request(noise=noise)),
            "probe": lambda: [draw() for draw in probes],
            "shuffle": lambda: torch.randperm(len(data.train)),
        },
        10 * repeats,
    )
    whole = alternate({"step": step}, repeats)["step"]["wall"]
    # one shuffle serves a whole epoch
    seconds = {k: v["wall"] for k, v in parts.items()} | {"shuffle": parts["shuffle"]["wall"] / per_epoch}
    return {
        "case": name,
        "batch": batch,
        "rows": len(data.train),
        **{f"{k}_ms": 1e3 * v for k, v in seconds.items()},
        "step_ms": 1e3 * whole,
        "share": sum(seconds.values()) / whole,
        "repeats": repeats,
    }


def probe_draws(flow: Any, x: Tensor) -> list[Callable[[], object]]:
    """One draw for every block that draws a probe, of the data's size (later scales of a multiscale flow draw less)."""
    need = [frozenset({"div"}).union(*(q.need for q in block.quadratures)) for block in flow.blocks]
    return [
        lambda block=block, names=names: block.divergence.probe(x, Noise(0), names, block.field)
        for block, names in zip(flow.blocks, need, strict=True)
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and record if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="few repeats (the default)")
    extent.add_argument("--full", action="store_true", help="more repeats")
    parser.add_argument("--json", type=Path, help="file of measured rows to add to")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    repeats = 20 if args.full else 3
    digits, rnode, images = preset("digits").config, preset("rnode-mnist").config, mnist_sized()
    rows = [
        share("digits", digits, datasets.load("digits"), digits.train.batch_size, 10 * repeats),
        share("MNIST-sized, digits' MLP", digits, images, 256, 10 * repeats),
        share("MNIST-sized, rnode-mnist", rnode, images, 16, repeats),
    ]
    about = {**machine(), "threads": 1, **versions("torch")}
    print(", ".join(f"{k} {v}" for k, v in about.items()) + "\n")
    print(markdown(rows, COLUMNS))
    if args.json:
        record(args.json, "data_share", argv, rows, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
