"""Flow matching beside maximum likelihood at equal wall-clock, with a Gaussian mixture and a neural spline flow beside them.

    python benchmarks/matching.py --seconds 120 --json benchmarks/results.json
    python benchmarks/matching.py --data checkerboard power.npy --seconds 300

Every side of a data set sees the same splits and trains so many seconds on one thread: our flow by the likelihood, by matching
(independent and transport coupling) and by both, one architecture for all four, the number of steps set beforehand by timing a few of
each kind, so that every schedule runs to its end; zuko's neural spline flow (1906.04032) by the likelihood; scikit-learn's
full-covariance mixture takes what it takes. The best validation is tested, once.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from measure import machine, markdown, record, versions
from rivals import autoregressive
from sklearn.mixture import GaussianMixture
from torch import Tensor

from cnf.cli.common import load_splits
from cnf.config import DataConfig, FlowConfig, RunConfig, SolverConfig, TrainConfig
from cnf.data import DataSplits
from cnf.evaluation import evaluate
from cnf.ode.trajectory import straightness
from cnf.runs import RunInfo
from cnf.training import Trainer, from_settings

SIDES = ("likelihood", "matching", "matching, transport", "both")
TUNED = 0.3  # of the time of "both" is the likelihood's
TIMED = {False: 30, True: 10}  # steps that are timed beforehand: of matching, of the likelihood
VALIDATIONS = 12
MIXTURES = (10, 30, 100)
COLUMNS = {
    "data": "{data}", "side": "{side}", "parameters": "{parameters:,}", "seconds": "{seconds:.0f}", "steps": "{steps:,}",
    "test, nats": "{test:.4f} ± {error:.4f}", "above the truth": "{above}", "NFE": "{nfe:.0f}", "straightness": "{straight}",
}  # fmt: skip


def config(data: str, side: str, seconds: float, steps: int = 10, tune: int = 0) -> RunConfig:
    """The run of one side."""
    objective = {"likelihood": "likelihood", "both": "both"}.get(side, "flow-matching")
    own: dict[str, Any] = {} if objective == "flow-matching" else {"kinetic": 0.01}
    if objective != "likelihood":
        own["coupling"] = "optimal-transport" if "transport" in side else "independent"
    if objective == "both":
        own |= {"finetune_steps": tune or 100, "finetune_lr": 5e-4}
    train = TrainConfig.of(
        objective=objective, steps=steps, batch_size=1024, lr=2e-3, warmup=min(100, steps // 10), noise_samples=1, threads=1,
        validate_every=max(1, steps // VALIDATIONS), solver_check_every=100, solver_check_tolerance=0.005, **own,
    )  # fmt: skip
    # two hidden layers, whose exact trace the likelihood has in closed form: its best case
    model = FlowConfig.of(hidden=(192, 192), residual="linear", nonlinearity="swish")
    return RunConfig(f"{data} {side}", DataConfig(data), model, SolverConfig.of(grid_steps=1, automatic_steps=True), train)


class Timed(Trainer):
    """Counts the seconds of its training, without validations."""

    aside = 0.0

    def validate(self) -> dict[str, Any]:
        began = time.perf_counter()
        found = super().validate()
        self.aside += time.perf_counter() - began
        return found


def run(settings: RunConfig, data: DataSplits, folder: Path) -> Timed:
    """A trainer of these settings."""
    info = RunInfo(settings, data.event_shape, data.levels, data.context_dim, data.classes, data.columns)
    return from_settings(info, data, folder, quiet=True, kind=Timed)


def step_seconds(data: DataSplits, name: str, side: str, folder: Path) -> float:
    """Of one step, from a few at the start."""
    trainer = run(config(name, side, 0.0), data, folder)
    count = TIMED[side == "likelihood"]
    for i in range(count + 3):
        if i == 3:
            began = time.perf_counter()
        trainer.update()
        trainer.state.step += 1
    trainer.read_metrics()
    return (time.perf_counter() - began) / count


def ours(data: DataSplits, name: str, side: str, seconds: float, folder: Path) -> dict[str, Any]:
    """Train one side for so many seconds, and test it."""
    kinds = {"both": ("matching", "likelihood")}.get(side, (side,))
    each = [step_seconds(data, name, kind, folder) for kind in kinds]
    # a grid that grows makes the likelihood's steps dearer than the first ones: twice, as the runs have shown
    each = [s * 2 if kind == "likelihood" else s for s, kind in zip(each, kinds, strict=True)]
    shares = (1 - TUNED, TUNED) if side == "both" else (1.0,)
    counts = [max(20, int(seconds * share / s)) for share, s in zip(shares, each, strict=True)]
    settings = config(name, side, seconds, sum(counts), counts[1] if side == "both" else 0)
    trainer = run(replace(settings, train=replace(settings.train, max_time=2 * seconds)), data, folder)
    began = time.perf_counter()
    trainer.run()
    took = time.perf_counter() - began - trainer.aside
    flow = trainer.best_model()
    found = evaluate(flow, data.test)
    paths = straightness(flow.transform, data.test[:256])
    return {
        "parameters": sum(p.numel() for p in flow.parameters()), "seconds": took, "steps": trainer.state.step, "validation": trainer.state.best,
        "test": found.mean, "error": found.standard_error, "nfe": found.nfe, "straight": f"{paths.ratio:.3f}", "kinetic": paths.kinetic,
        "curve": [[r["seconds"], r["validation"]] for r in trainer.history if "validation" in r],
    }  # fmt: skip


def spline(data: DataSplits, seconds: float) -> dict[str, Any]:
    """zuko's neural spline flow on the standardised data, at one rate."""
    found, about = autoregressive((data.train, data.validation, data.test), seconds, 0, rates=(1e-3,), batch_size=1024)
    return {**about, **_tested(found)}


def mixture(data: DataSplits) -> dict[str, Any]:
    """A full-covariance mixture on the standardised data, its number of components chosen on the validation split."""
    mean, std = data.train.mean(0), data.train.std(0)
    train, validation, test = (((x - mean) / std).double().numpy() for x in (data.train, data.validation, data.test))
    shift = float(std.double().log().sum())
    began = time.perf_counter()
    fits = [GaussianMixture(k, random_state=0).fit(train) for k in MIXTURES]
    best = max(fits, key=lambda fit: float(fit.score(validation)))
    took = time.perf_counter() - began
    k, d = best.means_.shape
    found = shift - torch.from_numpy(best.score_samples(test))
    return {"parameters": k * (1 + d + d * (d + 1) // 2) - 1, "seconds": took, "steps": int(best.n_iter_), "components": k, **_tested(found)}


def _tested(nll: Tensor) -> dict[str, Any]:
    return {"test": float(nll.mean()), "error": float(nll.std()) / math.sqrt(len(nll)), "nfe": math.nan, "straight": ""}


def main(argv: list[str] | None = None) -> int:
    """Train, test, print, and record if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["checkerboard", "8gaussians", "2spirals"], help="toy sets or tables (.npy, .csv)")
    parser.add_argument("--seconds", type=float, default=120.0, help="of training, for each side")
    parser.add_argument("--sides", nargs="+", default=[*SIDES, "spline", "mixture"], choices=[*SIDES, "spline", "mixture"])
    parser.add_argument("--json", type=Path, help="file of measured rows to add to")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    about = {**machine(), "threads": 1, **versions("torch", "zuko", "scikit-learn")}
    rows: list[dict[str, Any]] = []
    for name in args.data:
        data = load_splits(RunConfig(name, DataConfig(name)))
        for side in args.sides:
            with tempfile.TemporaryDirectory() as folder:
                others: dict[str, Callable[[], dict[str, Any]]] = {
                    "spline": lambda data=data: spline(data, args.seconds), "mixture": lambda data=data: mixture(data)
                }  # fmt: skip
                found = others[side]() if side in others else ours(data, name, side, args.seconds, Path(folder))
            above = "" if data.entropy is None else f"{found['test'] - data.entropy:+.4f}"
            rows.append({"data": Path(name).stem, "side": side, "above": above, **found})
            print(f"{name}, {side}: {found['test']:.4f} ± {found['error']:.4f} nats, {found['seconds']:.0f} s", flush=True)
    print(f"\n{markdown(rows, COLUMNS)}")
    if args.json:
        record(args.json, "matching", argv, rows, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
