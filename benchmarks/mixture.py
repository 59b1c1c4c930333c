"""Trained runs against scikit-learn's full-covariance Gaussian mixture: the paired difference per item.

    python benchmarks/mixture.py RUN [RUN ...]     # runs on one data set, such as three seeds

The mixture sees the runs' own splits and is chosen on their validation split. Images: in logit space, fitted on 16 dequantised
copies, K in {5, 10, 20}, reg_covar in {0.03, 0.1, 0.3}, alpha in {0.005, 0.01, 0.02}; --marginals gaussianize fits it behind
the same marginal transform as the digits preset instead. Tables: standardised, K in {10, 50}.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import RESULTS, machine, markdown, record, versions
from sklearn.mixture import GaussianMixture

from cnf.cli.common import load_splits
from cnf.data import DataSplits
from cnf.random import Noise
from cnf.runs import read_config
from cnf.transforms import Dequantize, Gaussianize, Logit, Request, Sequential, Transform

COPIES, DRAWS = 16, 10


def prepared(x: torch.Tensor, chain: Transform, seed: int, copies: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """``copies`` times dequantised: points (N, D) where the mixture lives, and log|det| (N,) of the way there."""
    out = []
    for copy in range(copies):
        value, log_det, _, _ = chain.double()(x, Request(noise=Noise(seed, "mixture", copy)))
        out.append((value.flatten(1).numpy(), log_det.numpy()))
    return out


def mean_nll(mixture: GaussianMixture, copies: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """(N,) nats, averaged over copies."""
    return -np.mean([mixture.score_samples(z) + log_det for z, log_det in copies], axis=0)


def images(data: DataSplits, marginals: str) -> tuple[np.ndarray, str]:
    """The chosen mixture's bits/dim of every test image, and its settings."""
    assert data.levels is not None
    unit = math.prod(data.event_shape) * math.log(2)
    best: tuple[float, Any, Any, str] | None = None
    for alpha in (0.005, 0.01, 0.02) if marginals == "logit" else (1e-4,):
        chain: Transform = Logit(alpha)
        if marginals == "gaussianize":
            chain = own = Gaussianize(data.event_shape, data.levels, alpha)
            own.fit(Dequantize(data.levels)(data.train, Request(noise=Noise(0, "statistics"))).value)
        chain = Sequential([Dequantize(data.levels), chain])
        points = np.concatenate([z for z, _ in prepared(data.train, chain, 1, COPIES)])
        validation = prepared(data.validation, chain, 2, DRAWS)
        for k, reg in itertools.product((5, 10, 20), (0.03, 0.1, 0.3)):
            mixture = GaussianMixture(k, covariance_type="full", reg_covar=reg, random_state=0).fit(points)
            value = mean_nll(mixture, validation).mean() / unit
            print(f"  alpha {alpha:g}, K {k}, reg_covar {reg:g}: validation {value:.4f} bits/dim", flush=True)
            if best is None or value < best[0]:
                best = (value, mixture, chain, f"K {k}, reg_covar {reg:g}, alpha {alpha:g}")
    assert best is not None
    return mean_nll(best[1], prepared(data.test, best[2], 3, DRAWS)) / unit, best[3]


def tables(data: DataSplits) -> tuple[np.ndarray, str]:
    """The chosen mixture's nats of every test row, and its settings."""
    train, validation, test = (x.double().numpy() for x in (data.train, data.validation, data.test))
    mean, std = train.mean(0), train.std(0)
    shift = np.log(std).sum()
    best: tuple[float, Any, str] | None = None
    for k in (10, 50):
        mixture = GaussianMixture(k, covariance_type="full", random_state=0).fit((train - mean) / std)
        value = shift - mixture.score((validation - mean) / std)
        print(f"  K {k}: validation {value:.4f} nats", flush=True)
        if best is None or value < best[0]:
            best = (value, mixture, f"K {k}")
    assert best is not None
    return shift - best[1].score_samples((test - mean) / std), best[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--marginals", choices=("logit", "gaussianize"), default="logit", help="images: before the mixture")
    options = parser.parse_args()
    infos = [read_config(run) for run in options.runs]
    if any(info.config.data != infos[0].config.data for info in infos):
        raise SystemExit("the runs are on different data: compare those of one data set")
    data = load_splits(infos[0].config)
    started = time.perf_counter()
    image = data.levels is not None
    baseline, chosen = images(data, options.marginals) if image else tables(data)
    seconds = time.perf_counter() - started
    unit = "bits/dim" if image else "nats"
    ours = np.stack([np.load(run / "test_nll.npz")["nll"] for run in options.runs])
    count = len(baseline)
    rows: list[dict[str, Any]] = []
    for name, nll in [(run.name, nll) for run, nll in zip(options.runs, ours, strict=True)] + [("mean of runs", ours.mean(0))]:
        difference = nll - baseline
        rows.append(
            {
                "run": name,
                "ours": float(nll.mean()),
                "mixture": float(baseline.mean()),
                "difference": float(difference.mean()),
                "standard_error": float(difference.std(ddof=1) / math.sqrt(count)),
            }
        )
    print(f"{data.name}, {count} test items, {unit}; mixture {chosen} ({options.marginals if image else 'standardised'}), {seconds:.0f} s")
    columns = {"run": "{run}", "ours": "{ours:.4f}", "mixture": "{mixture:.4f}", "ours - mixture, paired": "{difference:+.4f} ± {standard_error:.4f}"}
    print(markdown(rows, columns))
    name = f"mixture {Path(data.name).stem}" + (f" {options.marginals}" if image else "")
    about = {"machine": machine(), "versions": versions("torch", "scikit-learn"), "unit": unit, "mixture": chosen}
    record(RESULTS, name, None, rows, about)


if __name__ == "__main__":
    main()
