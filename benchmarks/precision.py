"""Training in float32 and with bfloat16 inside the fields: do the curves agree within what the seed alone does to them?

    python benchmarks/precision.py --data-root DIR --threads 1 --picture docs/pictures/precision.png

Two cases: the preset exact-digits (closed-form trace), and a small multiscale convolutional flow with RNODE's layers, Hutchinson's
trace and regularisers on MNIST (enlarged digits without --data-root). A seed's two trainings start from the same weights and see the
same batches and noise, on one fixed grid. Every validation is in float32, whatever training used: that is checked, not assumed. No timing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib

matplotlib.use("Agg")
import torch
from automatic_steps import data as pictures
from exact import spread
from matplotlib import pyplot as plt
from measure import machine, markdown, record, versions

from cnf.cli.common import load_splits
from cnf.config import RunConfig, preset
from cnf.data import DataSplits
from cnf.evaluation import evaluate
from cnf.models import build
from cnf.runs import RunInfo
from cnf.training import Trainer, from_settings

CASES = {"digits": 400, "mnist": 200}  # steps
PRECISIONS = ("fp32", "bf16")
POINTS = 8  # validations of a training
BATCHES = 8  # from which the gradient's noise is told
COLUMNS = {
    "case": "{case}", "parameters": "{parameters:,}", "steps": "{steps}", "seeds": "{seeds}", "fp32, bits/dim": "{fp32:.4f} ± {fp32_spread:.4f}",
    "bf16": "{bf16:.4f} ± {bf16_spread:.4f}", "bf16 - fp32, by seed": "{difference:+.4f} ± {difference_spread:.4f}",
    "its standard error": "{difference_error:.4f}", "largest along the curves": "{largest:.4f}",
    "difference / spread": "{ratio:.2f}", "gradient's rounding / its norm": "{rounding:.1e}", "/ the minibatch's noise": "{to_noise:.1e}",
}  # fmt: skip


def settings(case: str, steps: int, seed: int, threads: int) -> RunConfig:
    """What both precisions train."""
    config = preset("exact-digits" if case == "digits" else "rnode-mnist").config
    every = max(1, steps // POINTS)
    # one grid for all: steps chosen by measurement would differ between trainings
    solver = config.solver.change(automatic_steps=False, grid_steps=2, gradient="direct")
    train = config.train.change(steps=steps, seed=seed, threads=threads, validate_every=every, warmup=min(50, steps // 5), schedule="cosine", solver_check_every=steps, max_grid_steps=2)  # fmt: skip
    if case == "mnist":
        train = train.change(batch_size=32, lr=2e-3, validation_items=128)
        config = replace(config, model=config.model.change(hidden=(16, 16, 16), blocks=1))
    return replace(config, solver=solver, train=train)


def gradient(trainer: Trainer, step: int = 0) -> torch.Tensor:
    """Of a training step's loss at the trainer's weights, on the batch and noise of that step."""
    x, _, noise = trainer.batches(step)
    trainer.model.train().zero_grad(set_to_none=True)
    trainer.objective(x, noise=noise)["loss"].mean().backward()  # type: ignore[operator]
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def check(trainer: Trainer, info: RunInfo, splits: DataSplits) -> tuple[float, float]:
    """A bf16 training's validation is float32's to the last bit, while its training is not: what rounding does to the gradient.

    Returns:
        The difference of the gradients at the last weights, over the gradient's norm and over its deviation from batch to batch.

    Raises:
        AssertionError: where it is otherwise.
    """
    plain = replace(info.config, solver=info.config.solver.change(precision="fp32"))
    flow = build(plain.model, plain.solver, info.event_shape, levels=info.levels)
    flow.load_state_dict(trainer.model.state_dict())
    x, index = trainer.validation.x, trainer.validation.index
    one, other = (evaluate(model.eval(), x[:16], seed=1, index=index[:16]) for model in (trainer.model, flow))
    assert torch.equal(one.log_prob, other.log_prob), "a bf16-trained model was not evaluated in float32"
    with tempfile.TemporaryDirectory() as folder:
        same = from_settings(replace(info, config=plain), splits, Path(folder), quiet=True)
    same.model.load_state_dict(trainer.model.state_dict())
    low, full = gradient(trainer), gradient(same)
    assert not torch.equal(low, full), "the training was not in bfloat16"
    assert low.dtype == torch.float32  # weights and their gradients stay in it
    noise, _ = spread(gradient(same, step) for step in range(BATCHES))
    return float((low - full).norm() / full.norm()), float((low - full).norm()) / noise**0.5


def curve(config: RunConfig, splits: DataSplits, precision: str) -> tuple[list[tuple[int, float]], Trainer, RunInfo]:
    """Step and validation at every point of one training."""
    used = replace(config, solver=config.solver.change(precision=precision))
    info = RunInfo(used, splits.event_shape, splits.levels, 0, (), ())
    with tempfile.TemporaryDirectory() as folder:
        trainer = from_settings(info, splits, Path(folder), quiet=True)
        trainer.run()
    assert trainer.state.skipped == 0
    return [(row["step"], row["validation"]) for row in trainer.history if "validation" in row], trainer, info


def compare(case: str, seeds: list[int], steps: int, splits: DataSplits, threads: int) -> dict[str, Any]:
    """All trainings of a case, as one row."""
    curves: dict[str, list[list[tuple[int, float]]]] = {precision: [] for precision in PRECISIONS}
    rounding = []
    for seed in seeds:
        config = settings(case, steps, seed, threads)
        for precision in PRECISIONS:
            points, trainer, info = curve(config, splits, precision)
            curves[precision].append(points)
            print(f"{case}, seed {seed}, {precision}: {points[-1][1]:.4f}", flush=True)
        rounding.append(check(trainer, info, splits))
    last = {precision: [points[-1][1] for points in found] for precision, found in curves.items()}
    paired = [low - full for full, low in zip(*last.values(), strict=True)]
    spread = {precision: _deviation(values) for precision, values in last.items()}
    pairs = [(a[1], b[1]) for full, low in zip(*curves.values(), strict=True) for a, b in zip(full, low, strict=True)]
    return {
        "case": case, "data": splits.name, "parameters": sum(p.numel() for p in trainer.model.parameters()), "steps": steps,
        "seeds": len(seeds), **{p: statistics.mean(values) for p, values in last.items()},
        **{f"{p}_spread": value for p, value in spread.items()}, "difference": statistics.mean(paired),
        "difference_spread": _deviation(paired), "difference_error": _deviation(paired) / len(paired) ** 0.5,
        "largest": max(abs(a - b) for a, b in pairs), "ratio": abs(statistics.mean(paired)) / spread["fp32"] if spread["fp32"] else 0.0,
        "rounding": max(r for r, _ in rounding), "to_noise": max(r for _, r in rounding), "evaluated_in": "fp32", "curves": curves,
    }  # fmt: skip


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel a case: every seed's curve, thin, and the mean of each precision."""
    figure, panels = plt.subplots(1, len(rows), figsize=(5.5 * len(rows), 4), layout="constrained", squeeze=False)
    for panel, row in zip(panels[0], rows, strict=True):
        for precision, colour, style in (("fp32", "tab:blue", "-"), ("bf16", "tab:orange", "--")):
            found = row["curves"][precision]
            steps = [step for step, _ in found[0]]
            for points in found:
                panel.plot(steps, [value for _, value in points], style, color=colour, lw=0.8, alpha=0.6)
            mean = [statistics.mean(values) for values in zip(*([v for _, v in points] for points in found), strict=True)]
            panel.plot(steps, mean, style, color=colour, lw=2, label=f"{precision}, mean of {len(found)} seeds")
        last = f"at the end bf16 - fp32 is {row['difference']:+.4f} ± {row['difference_spread']:.4f}, seeds spread by {row['fp32_spread']:.4f}"
        panel.set(title=f"{row['data']}, {row['parameters']:,} parameters\n{last}", xlabel="step", ylabel="validation in fp32, bits/dim", yscale="log")
        panel.title.set_fontsize("medium")
        for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            axis("{x:.3g}")
        panel.legend()
        panel.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Train, compare, print, and record if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of every training; the case's if not given")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads; all cores if not given")
    parser.add_argument("--data-root", help="folder that has MNIST; enlarged digits if not given")
    parser.add_argument("--picture", type=Path, help="where to draw the curves")
    parser.add_argument("--json", type=Path, help="file of measured rows to add to")
    args = parser.parse_args(argv)
    about = {**machine(), "threads": args.threads, **versions("torch")}
    rows: list[dict[str, Any]] = []
    for case in args.cases:
        steps = args.steps or CASES[case]
        splits = load_splits(preset("exact-digits").config) if case == "digits" else pictures(steps, 32, 128, args.data_root)
        rows.append(compare(case, args.seeds, steps, splits, args.threads))
        print(f"\n{markdown(rows[-1:], COLUMNS)}\n", flush=True)
        if args.picture:
            draw(rows, args.picture)
        if args.json:
            record(args.json, "precision", argv, rows, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
