"""Exact fields of two hidden layers against the published fields of three with Hutchinson's trace, at equal parameters.

    python benchmarks/exact.py --cases digits tabular --seconds 150 --seeds 0 1
    python benchmarks/exact.py --cases mnist --data-root DIR --seconds 240 --batch 16

Both sides have the preset's training and automatic grid. They train in turns in one process, so many seconds of their own time each,
the rate falling along a cosine of that time, and are validated on the same items and noise. Then, at the weights of the end, the
gradient is drawn again and again to see what the probe adds to its variance, and whole training steps on one grid are timed in turn.
The third side, the exact field with Hutchinson's trace, tells the trace's part from the width's.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from automatic_steps import data as pictures
from measure import alternate, machine, markdown, record, training_step, versions
from torch import Tensor

from cnf import data as datasets
from cnf._utils.async_checks import defer_checks
from cnf.cli.common import load_splits
from cnf.config import RunConfig, SolverConfig, preset
from cnf.data import DataSplits
from cnf.evaluation import Evaluation, evaluate
from cnf.models import build
from cnf.ode.divergence import Exact
from cnf.random import Kind, Noise
from cnf.runs import RunInfo
from cnf.solvers import FixedGrid
from cnf.training import Trainer, from_settings
from cnf.training.solver_monitor import SolverMonitor

# FFJORD's probe, and RNODE's for images
PROBES = {"digits": "rademacher", "mnist": "gaussian", "tabular": "rademacher"}
SIDES = ("two hidden layers, exact", "three hidden layers, Hutchinson", "two hidden layers, Hutchinson")
SLICES = 40  # turns of each side
WARMUP = 0.05  # of the time: the rate's way up
TANGENTS = 64  # dimensions up to which the published side is validated without a probe
STEPS = 4  # of the grid of timed steps
TRAINED = {
    "case": "{case}", "side": "{side}", "hidden": "{hidden}", "parameters": "{parameters:,}", "seed": "{seed}", "batch": "{batch}",
    "seconds": "{seconds:.0f}", "steps": "{steps:,}", "grid at the end": "{grid:.1f}", "validation": "{validation:.4f} {unit}",
    "± of items": "{error:.4f}", "best": "{best:.4f}", "less the exact one's, paired": "{difference:+.4f} ± {difference_error:.4f}",
}  # fmt: skip
VARIANCES = {
    "case": "{case}", "side": "{side}", "of": "{term}", "batch": "{batch}", "draws": "{draws}", "‖g‖": "{norm:.3g}",
    "probe / ‖g‖²": "{probe:.3g}", "dequantisation / ‖g‖²": "{dequantisation:.3g}", "all and the minibatch / ‖g‖²": "{total:.3g}",
    "the probe's part": "{share:.1%}",
}  # fmt: skip
TIMED = {
    "case": "{case}", "side": "{mode}", "batch": "{batch}", "s a step": "{ours_s:.4f}",
    "CPU s": "{ours_cpu_s:.4f}", "three layers' / it": "{ratio:.2f}", "by CPU time": "{cpu_ratio:.2f}", "turns": "{repeats}",
}  # fmt: skip


def _data(case: str, config: RunConfig, batch: int, args: argparse.Namespace) -> DataSplits:
    if case == "mnist":
        return pictures(100, batch, args.items, args.data_root)
    if case == "tabular" and not args.table:
        return planes()
    return load_splits(config.change(data=args.table) if case == "tabular" else config)


def planes() -> DataSplits:
    """Six columns in which three sets of points in the plane are mixed by a rotation, so that the entropy is known."""
    sets = [datasets.load(name, seed=i) for i, name in enumerate(("checkerboard", "2spirals", "8gaussians"))]
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    parts = [torch.cat([getattr(s, part) for s in sets], 1) @ turn for part in ("train", "validation", "test")]
    return DataSplits("three planes", "table", *parts, entropy=sum(s.entropy or math.nan for s in sets))


def sides(case: str, info: RunInfo) -> dict[str, RunConfig]:
    """The exact preset; three hidden layers with as many parameters and Hutchinson's trace; the preset's field with that trace."""

    def count(hidden: tuple[int, ...]) -> int:
        with torch.device("meta"):
            model = build(exact.model.change(hidden=hidden), SolverConfig(), info.event_shape, levels=info.levels)
        return sum(p.numel() for p in model.parameters())

    exact = info.config
    estimate = replace(exact, solver=exact.solver.change(divergence="hutchinson", hutchinson_noise=PROBES[case]))
    wanted, width = count(exact.model.field.hidden), exact.model.field.hidden[0]
    three = min(range(1, width + 1), key=lambda w: abs(count((w,) * 3) - wanted))
    return dict(zip(SIDES, (exact, replace(estimate, model=exact.model.change(hidden=(three,) * 3)), estimate), strict=True))


class Timed(Trainer):
    """Trains in turns, ``seconds`` in all: the rate follows the time that is spent, and validations are not a part of it."""

    seconds_in_all = 1.0
    spent = 0.0

    def turn(self, seconds: float) -> None:
        """Train for so long, or to the end of all seconds; one step at least."""
        until = min(seconds, self.seconds_in_all - self.spent)
        began, before = time.perf_counter(), self.spent
        while self.spent == before or self.spent - before < until:
            part = min(1.0, self.spent / self.seconds_in_all)
            rate = min(1.0, part / WARMUP + 0.01) * 0.5 * (1 + math.cos(math.pi * part))
            self.phases = [replace(self.phase, schedule=lambda step, steps, rate=rate: rate)]
            self.update()
            self.state.step += 1
            self.callback(SolverMonitor).on_step(self)  # type: ignore[union-attr]
            if self.due or self.state.metrics.failed:
                self.read_metrics()
            if self.batches.device.type == "cuda":
                torch.cuda.synchronize()
            self.spent = before + time.perf_counter() - began

    def score(self, draws: int) -> Evaluation:
        """Of the averaged weights on the validation items, the trace exact where that is to be had."""
        flow = copy.deepcopy(self.averaged()).eval()
        for block in flow.blocks if flow.dim <= TANGENTS else ():
            block.divergence = Exact()
        x, index = self.validation.x, self.validation.index
        return evaluate(flow, x, draws=draws, seed=1, index=index)


def train(
    case: str, infos: dict[str, RunInfo], splits: DataSplits, seconds: float, points: int, draws: int
) -> tuple[list[dict[str, Any]], dict[str, Timed]]:
    """A row for each side, in alternation trained for so many seconds, and the trainers at the end."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {side: from_settings(info, splits, Path(folder), quiet=True, kind=Timed) for side, info in infos.items()}
    found: dict[str, list[tuple[float, int, Evaluation]]] = {side: [] for side in trainers}
    for trainer in trainers.values():
        trainer.seconds_in_all = seconds
    while any(trainer.spent < seconds for trainer in trainers.values()):
        for side, trainer in trainers.items():
            if trainer.spent >= seconds:
                continue
            trainer.turn(seconds / SLICES)
            if trainer.spent >= seconds * (len(found[side]) + 1) / points - 1e-9:
                found[side].append((trainer.spent, trainer.state.step, trainer.score(draws)))
                print(f"{case}, {side}: {trainer.spent:.0f} s, {trainer.state.step} steps, {found[side][-1][2].mean:.4f}", flush=True)
    rows: list[dict[str, Any]] = []
    first = found[SIDES[0]][-1][2]
    for side, trainer in trainers.items():
        last = found[side][-1][2]
        paired = last.per_item - first.per_item
        grids = [solver.steps for solver in trainer.objective.solvers if isinstance(solver, FixedGrid)]
        rows.append({
            "case": case, "data": splits.name, "side": side, "hidden": "-".join(map(str, infos[side].config.model.field.hidden)),
            "parameters": sum(p.numel() for p in trainer.model.parameters()), "seed": infos[side].config.train.seed,
            "batch": trainer.batches.size, "seconds": trainer.spent, "steps": trainer.state.step, "skipped": trainer.state.skipped,
            "grid": sum(grids) / max(1, len(grids)), "validation": last.mean, "unit": last.unit, "error": last.standard_error,
            "best": min(e.mean for _, _, e in found[side]), "difference": float(paired.mean()),
            "difference_error": float(paired.std()) / math.sqrt(len(paired)),
            "curve": [[spent, step, e.mean] for spent, step, e in found[side]],
        })  # fmt: skip
    return rows, trainers


class Redrawn(Noise):
    """Noise of which only what is named in ``moving`` is another one at every number."""

    def __init__(self, number: int, moving: frozenset[str]):
        super().__init__(0, "variance", number)
        self.moving = moving

    def draw(self, name: str, kind: Kind, shape: Any, **options: Any) -> Tensor:
        """Draw by name."""
        noise = Noise(self.seed, self.purpose, self.step if name in self.moving else 0)
        noise.path = self.path
        return noise.draw(name, kind, shape, **options)


PROBE, PIXELS = frozenset({"probe", "stage"}), frozenset({"dequantize"})  # the stage is that of the Jacobian's penalty


def spread(gradients: Iterator[Tensor]) -> tuple[float, float]:
    """Variance of a gradient, summed over its entries, and the squared norm of its mean without the variance's part in that."""
    drawn = torch.stack(list(gradients))
    variance = float(drawn.var(0).double().sum())
    return variance, float(drawn.mean(0).double().square().sum()) - variance / len(drawn)


def variance(case: str, side: str, trainer: Timed, term: str, draws: int) -> dict[str, Any]:
    """What probe, dequantisation and minibatch each do to the gradient of ``term`` at the trainer's weights.

    Relative to the squared norm of the first batch's own gradient, which is free of the probe.
    """
    objective = trainer.objective.train()

    def gradient(x: Tensor, noise: Noise) -> Tensor:
        trainer.model.zero_grad(set_to_none=True)
        objective(x, noise=noise)[term].mean().backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])

    batch = trainer.batches(0)[0]
    probe, square = spread(gradient(batch, Redrawn(i, PROBE)) for i in range(draws))
    pixels = 0.0 if trainer.model.levels is None else spread(gradient(batch, Redrawn(i, PIXELS)) for i in range(draws))[0]
    total = spread(gradient(trainer.batches(i)[0], Redrawn(i, PROBE | PIXELS)) for i in range(draws))[0]
    return {
        "case": case, "side": side, "term": term, "batch": len(batch), "draws": draws, "norm": math.sqrt(max(0.0, square)),
        "probe": probe / square, "dequantisation": pixels / square, "total": total / square, "share": probe / total,
    }  # fmt: skip


def timed(case: str, trainers: dict[str, Timed], turns: int) -> list[dict[str, Any]]:
    """A row for each side: whole training steps on the same grid, in turn."""

    def loss(trainer: Timed) -> Tensor:
        x, _, noise = trainer.batches(trainer.state.step)
        with defer_checks():
            return trainer.objective(x, noise=noise)["loss"].mean()

    steps = {}
    for side, trainer in trainers.items():
        trainer.objective.train()
        trainer.objective.put_solvers([FixedGrid("rk4", STEPS, "direct")] * len(trainer.model.blocks))
        steps[side] = training_step(trainer.model, lambda trainer=trainer: loss(trainer))  # type: ignore[misc]
    found = alternate(steps, turns)
    base = found[SIDES[1]]
    return [
        {
            "case": case, "mode": side, "batch": trainer.batches.size,
            "baseline_s": base["wall"], "ours_s": found[side]["wall"], "ratio": base["wall"] / found[side]["wall"],
            "ours_cpu_s": found[side]["cpu"], "cpu_ratio": base["cpu"] / found[side]["cpu"], "repeats": found[side]["repeats"],
        }
        for side, trainer in trainers.items()
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and record if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=PROBES, default=["digits", "tabular"])
    parser.add_argument("--seconds", type=float, default=120.0, help="of training, for each side and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--points", type=int, default=4, help="validations of each side, the last at the end")
    parser.add_argument("--items", type=int, default=256, help="images or, times 16, rows of a validation")
    parser.add_argument("--noise", type=int, default=4, help="noise draws of a validation")
    parser.add_argument("--batch", type=int, help="items a step; the preset's if not given, 16 of mnist's")
    parser.add_argument("--draws", type=int, default=24, help="gradients of each variance")
    parser.add_argument("--turns", type=int, default=9, help="timings of each side")
    parser.add_argument("--data-root", help="folder that has MNIST; enlarged digits if not given")
    parser.add_argument("--table", help="file of a table with few columns; three toy sets side by side if not given")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads; all cores if not given")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="file of measured rows to add to")
    args = parser.parse_args(argv)
    about = {**machine(), "threads": args.threads, **versions("torch")}
    tables: dict[str, tuple[list[dict[str, Any]], dict[str, str]]] = {
        "exact": ([], TRAINED), "exact variance": ([], VARIANCES), "exact steps": ([], TIMED),
    }  # fmt: skip
    for case in args.cases:
        config = preset(f"exact-{case}").config
        batch = args.batch or (16 if case == "mnist" else config.train.batch_size)
        config = replace(config, solver=config.solver.change(gradient="direct"))  # small batches need no checkpoints
        splits = _data(case, config, batch, args)
        items = args.items * (1 if splits.levels else 16)
        for seed in args.seeds:
            used = config.train.change(seed=seed, batch_size=batch, validation_items=items, device=args.device, threads=args.threads)
            info = RunInfo(replace(config, train=used), splits.event_shape, splits.levels, 0, (), ())
            infos = {side: replace(info, config=one) for side, one in sides(case, info).items()}
            rows, trainers = train(case, dict(list(infos.items())[:2]), splits, args.seconds, args.points, args.noise)
            tables["exact"][0].extend(rows)
            if seed != args.seeds[0]:
                continue
            with tempfile.TemporaryDirectory() as folder:
                same = from_settings(infos[SIDES[2]], splits, Path(folder), quiet=True, kind=Timed)
            same.model.load_state_dict(trainers[SIDES[0]].model.state_dict())
            same.objective.put_solvers(trainers[SIDES[0]].objective.solvers)
            trainers[SIDES[2]] = same
            for side, trainer in trainers.items():
                for term in ("nll", "loss") if infos[side].config.train.objective.jacobian else ("nll",):
                    tables["exact variance"][0].append(variance(case, side, trainer, term, args.draws))
            tables["exact steps"][0].extend(timed(case, trainers, args.turns))
        for name, (rows, columns) in tables.items():
            print(f"\n{markdown([row for row in rows if row['case'] == case], columns)}", flush=True)
            if args.json:  # at once: what comes later may be killed
                record(args.json, name, argv, rows, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
