"""What each of flow matching's choices is worth on the digits, by validation bits/dim.

    python benchmarks/ablation.py --json benchmarks/results.json

Every side is the first one but for one choice, trained once for each seed with the same batches, and scored with the same noise
on the validation images. The first is the preset fm-digits with the rate and the times of the other matching presets; what came out best here the preset
has taken. Quality alone: a loaded machine changes nothing.
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

import torch
from measure import machine, markdown, record, versions

from cnf.cli.common import load_splits
from cnf.config import RunConfig, preset
from cnf.evaluation import evaluate
from cnf.runs import RunInfo
from cnf.training import from_settings

BASE = "cosine, times by importance"
COMMON: dict[str, dict[str, Any]] = {
    "train": {"schedule": "cosine", "fm_time_sampling": "importance"},
    "solver": {"eval_rtol": 1e-5, "eval_atol": 1e-5, "eval_tolerance": 1e-4},
}
SIDES: dict[str, dict[str, dict[str, Any]]] = {
    BASE: {},
    "times drawn evenly": {"train": {"fm_time_sampling": "even"}},
    "weights even": {"train": {"fm_weighting": "even"}},
    "weights and times even": {"train": {"fm_weighting": "even", "fm_time_sampling": "even"}},
    "no average of the weights": {"train": {"ema_decay": 0.0}},
    "EMA 0.99": {"train": {"ema_decay": 0.99}},
    "EMA 0.9997": {"train": {"ema_decay": 0.9997}},
    "constant rate": {"train": {"schedule": "constant"}},
    "constant rate, EMA 0.9997": {"train": {"schedule": "constant", "ema_decay": 0.9997}},
    "constant rate, times drawn evenly": {"train": {"schedule": "constant", "fm_time_sampling": "even"}},
    # the plain U-Net in logit space, its path a straight line between data and noise
    "uniform noise, logit, standardised": {"model": {"dequantize": "uniform", "preprocess": "standardize"}},
    "the same, optimal transport": {
        "model": {"dequantize": "uniform", "preprocess": "standardize"}, "train": {"coupling": "optimal-transport"},
    },
    "the same, weights by likelihood": {
        "model": {"dequantize": "uniform", "preprocess": "standardize"}, "train": {"fm_weighting": "likelihood"},
    },
    "attention at 4x4": {"model": {"attention": True}},
}  # fmt: skip
COLUMNS = {
    "side": "{side}", "validation, bits/dim": "{validation:.4f} ± {spread:.4f}", "less the first's, by seed": "{difference:+.4f} ± {error:.4f}",
    "NFE": "{nfe:.0f}",
}  # fmt: skip


def settings(side: str, seed: int, steps: int) -> RunConfig:
    """The first side but for one choice."""
    config = preset("fm-digits").config
    for choices in (COMMON, SIDES[side]):
        config = replace(config, **{part: getattr(config, part).change(**changes) for part, changes in choices.items()})
    train = config.train.change(seed=seed, steps=steps, validate_every=min(config.train.validate_every, steps))
    return replace(config, train=train)


def trained(side: str, seed: int, steps: int, draws: int) -> tuple[float, float]:
    """Validation bits/dim of the best weights, and the evaluations of a solve."""
    config = settings(side, seed, steps)
    data = load_splits(config)
    info = RunInfo(config, data.event_shape, data.levels, data.context_dim, data.classes, data.columns)
    with tempfile.TemporaryDirectory() as folder:
        trainer = from_settings(info, data, Path(folder), quiet=True)
        trainer.run()
        found = evaluate(trainer.best_model(), data.validation, draws=draws)
    return found.mean, found.nfe


def main(argv: list[str] | None = None) -> int:
    """Train, score, print, and record if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES), default=tuple(SIDES), help="the first is always trained too")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=1500, help="of a training (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file of measured rows to add to")
    args = parser.parse_args(argv)
    base: list[float] = []
    rows: list[dict[str, Any]] = []
    for side in dict.fromkeys((BASE, *args.sides)):
        scores, evaluations = zip(*(trained(side, seed, args.steps, args.draws) for seed in args.seeds), strict=True)
        base = base or list(scores)
        apart = [a - b for a, b in zip(scores, base, strict=True)]
        several = len(scores) > 1
        spread, error = (statistics.stdev(v) / len(v) ** power if several else float("nan") for v, power in ((scores, 0), (apart, 0.5)))
        rows.append({
            "side": side, "validation": statistics.mean(scores), "spread": spread, "difference": statistics.mean(apart), "error": error,
            "nfe": statistics.mean(evaluations), "by_seed": list(scores),
        })  # fmt: skip
        print(f"{side}: {', '.join(f'{score:.4f}' for score in scores)}", flush=True)
    print(markdown(rows, COLUMNS))
    if args.json:
        record(args.json, "ablation", argv, rows, {"seeds": list(args.seeds), **machine(), **versions("torch")})
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
