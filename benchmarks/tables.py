"""cnf.estimators.fit_density against other densities of tables, at a budget of CPU seconds on one thread.

    python benchmarks/tables.py --seconds 60 --seeds 0 1 2 --json benchmarks/results.json
    python benchmarks/tables.py --data checkerboard power.npy --quick

The rivals are scikit-learn's mixture and kernel density, zuko's neural spline flow (1906.04032) and masked autoregressive
flow (1705.07057), and FFJORD (1810.01367) with the settings of its scripts, weight decay left out. All sides of a data set
see the same splits. The mixture's number of components, from 1 to 100, the kernel's bandwidth and the learning rate of
zuko's flows are chosen on the validation rows; all are fitted to standardised columns. Mixture and kernel take what they
take; our search and the flows have the budget.
Every side is compared on the test rows, row by row: the difference to the mixture has its own standard error.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from measure import machine, markdown, record, versions
from rivals import autoregressive, ffjord
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, make_moons, make_swiss_roll
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from torch import Tensor

from cnf.data import load
from cnf.estimators import fit_density
from cnf.evaluation import evaluate

SIDES = ("flow", "mixture", "kernel", "NSF", "MAF", "FFJORD")
COMPONENTS = (1, 2, 4, 8, 16, 30, 60, 100)
BANDWIDTHS = tuple(np.geomspace(0.03, 1.0, 8))
KERNEL_ROWS = 10_000  # training rows of the kernel density, whose evaluation costs a distance to each
COLUMNS = {
    "data": "{data}", "side": "{side}", "seed": "{seed}", "start": "{start}", "CPU s": "{seconds:.0f}",
    "test, nats": "{test:.4f} ± {error:.4f}", "over the mixture": "{difference:+.4f} ± {difference_error:.4f}",
}  # fmt: skip
Splits = tuple[Tensor, Tensor, Tensor, list[tuple[float, float] | None] | None]


def _swiss_roll() -> np.ndarray:
    return make_swiss_roll(6000, noise=0.5, random_state=0)[0]


def _moon_pairs() -> np.ndarray:
    orders = [np.random.default_rng(i).permutation(8000) for i in (0, 1)]
    return np.concatenate([make_moons(8000, noise=0.05, random_state=i)[0][order] for i, order in enumerate(orders)], 1)


def _helix() -> np.ndarray:
    rng = np.random.default_rng(1)
    t = rng.uniform(0, 6 * np.pi, 8000)
    return np.stack([np.cos(t), np.sin(t), t / 6, np.cos(t / 2)], 1) + 0.05 * rng.standard_normal((8000, 4))


def _mixed() -> np.ndarray:
    """A count, a normal column that depends on it, a lognormal column that depends on both, and a share."""
    rng = np.random.default_rng(2)
    count = rng.poisson(3.0, 10_000)
    level = rng.normal(count, 0.5)
    return np.stack([count + rng.random(10_000), level, np.exp(rng.normal(0.3 * level, 0.5)), rng.beta(2.0, 5.0, 10_000)], 1)


def _mixed_nll(x: Tensor) -> Tensor:
    """Its exact negative log-likelihood (N,)."""
    count, level, log, share = x[:, 0].double().floor(), x[:, 1].double(), x[:, 2].double().log(), x[:, 3].double()
    parts = [
        torch.distributions.Poisson(3.0).log_prob(count), torch.distributions.Normal(count, 0.5).log_prob(level),
        torch.distributions.Normal(0.3 * level, 0.5).log_prob(log) - log, torch.distributions.Beta(2.0, 5.0).log_prob(share),
    ]  # fmt: skip
    return -torch.stack(parts).sum(0)


def _digits() -> np.ndarray:
    return load_digits().data + np.random.default_rng(0).random((1797, 64))


MADE: dict[str, Callable[[], np.ndarray]] = {
    "swiss-roll": _swiss_roll,
    "moon-pairs": _moon_pairs,
    "helix": _helix,
    "heavy-tails": lambda: np.random.default_rng(1).standard_t(3, (6000, 6)),
    "mixed": _mixed,
    "digits-64": _digits,
    "diabetes": lambda: load_diabetes(scaled=False).data[:, [0, *range(2, 10)]],
    "breast-cancer": lambda: load_breast_cancer().data[:, :10],
}


CELLS: dict[str, list[tuple[float, float] | None]] = {"mixed": [(0.0, 1.0), None, None, None], "digits-64": [(0.0, 1.0)] * 64}
TRUTH: dict[str, Callable[[Tensor], Tensor]] = {
    "mixed": _mixed_nll,
    "heavy-tails": lambda x: -torch.distributions.StudentT(3.0).log_prob(x.double()).sum(1),
}


def splits(name: str, limit: int | None = None) -> Splits:
    """Training, validation and test rows, and the cells of dequantised columns."""
    if name in MADE:
        x = torch.from_numpy(MADE[name]().astype(np.float32))
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
        tenth = len(x) // 10
        train, validation, test, cells = x[2 * tenth :], x[tenth : 2 * tenth], x[:tenth], CELLS.get(name)
    else:
        data = load(name)
        train, validation, test = data.train, data.validation, data.test
        columns = [c for c in data.table if c.role == "data"]
        cells = [(c.origin, c.step) if c.dequantised else None for c in columns] or None
    return train[:limit], validation[:limit], test[:limit], cells


def flow(data: Splits, seconds: float, seed: int, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    """Negative log-likelihood of the test rows by our search, and what it found."""
    train, validation, test, cells = data
    made = fit_density(train, validation, minutes=seconds / 60, seed=seed, cells=cells, **options)
    found = {"start": made.start, "steps": made.steps, "seconds": made.seconds, "validation": made.validation, "parts": made.parts}
    return evaluate(made.flow, test).per_item, found


def standardised(data: Splits) -> tuple[list[np.ndarray], float]:
    """The three parts, standardised by the training rows, and the log of the volume."""
    train = data[0].double()
    mean, std = train.mean(0), train.std(0)
    return [((x.double() - mean) / std).numpy() for x in data[:3]], float(std.log().sum())


def mixture(data: Splits, seed: int, components: tuple[int, ...] = COMPONENTS) -> tuple[Tensor, dict[str, Any]]:
    """Of scikit-learn's full-covariance mixture, its number of components chosen on the validation rows."""
    (train, validation, test), volume = standardised(data)
    began, fits = time.process_time(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged in 100 iterations
        fits = [GaussianMixture(k, random_state=seed).fit(train) for k in components if k <= len(train) // 2]
    best = max(fits, key=lambda fit: float(fit.score(validation)))
    found = {"start": f"{best.n_components} Gaussians", "seconds": time.process_time() - began, "validation": volume - best.score(validation)}
    return volume - torch.from_numpy(best.score_samples(test)), found


def kernel(data: Splits, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """Of scikit-learn's Gaussian kernel density, its bandwidth chosen on the validation rows."""
    (train, validation, test), volume = standardised(data)
    train = np.random.default_rng(seed).permutation(train)[:KERNEL_ROWS]
    began = time.process_time()
    fits = [KernelDensity(bandwidth=float(b), rtol=1e-4).fit(train) for b in BANDWIDTHS]
    some = validation[:1000]
    best = max(fits, key=lambda fit: float(fit.score(some)))
    found = {"start": f"bandwidth {best.bandwidth:.3g}", "seconds": time.process_time() - began, "validation": volume - best.score(some) / len(some)}
    return volume - torch.from_numpy(best.score_samples(test)), found


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of rows, and its standard error."""
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def compare(name: str, data: Splits, seconds: float, seed: int, sides: tuple[str, ...] = SIDES, **options: Any) -> list[dict[str, Any]]:
    """One row for each side; differences are to the mixture, row by row."""
    calls: dict[str, Callable[[], tuple[Tensor, dict[str, Any]]]] = {
        "flow": lambda: flow(data, seconds, seed, **options), "mixture": lambda: mixture(data, seed), "kernel": lambda: kernel(data, seed),
        "FFJORD": lambda: ffjord(data[:3], seconds, seed),
        **{kind: lambda kind=kind: autoregressive(data[:3], seconds, seed, kind) for kind in ("NSF", "MAF")},  # type: ignore[misc]
    }  # fmt: skip
    found = {side: calls[side]() for side in sides}
    if name in TRUTH:
        found["truth"] = TRUTH[name](data[2]), {"start": "", "seconds": 0.0}
    rows = []
    for side, (nll, about) in found.items():
        test, error = mean_and_error(nll)
        difference = mean_and_error(nll - found["mixture"][0]) if "mixture" in found else (math.nan, math.nan)
        row = {"test": test, "error": error, "difference": difference[0], "difference_error": difference[1]}
        rows.append({"data": Path(name).stem, "side": side, "seed": seed, "rows": len(data[0]), "columns": data[0].shape[1], **about, **row})
    return rows


def main(argv: list[str] | None = None) -> int:
    """Fit, test, print, and record if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["checkerboard", "2spirals", "hash-gaussian", *MADE], help=f"toy sets, {', '.join(MADE)}, or tables (.npy, .csv)")
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of our search")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--quick", action="store_true", help="500 rows of each part, and five steps: a check of the script")
    parser.add_argument("--json", type=Path, help="file of measured rows to add to")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    about = {**machine(), "threads": 1, **versions("torch", "scikit-learn", "zuko")}
    options: dict[str, Any] = {"steps": 5, "components": (1, 2, 4)} if args.quick else {}
    seconds = 1.0 if args.quick else args.seconds
    rows: list[dict[str, Any]] = []
    for name in args.data:
        data = splits(name, 500 if args.quick else None)
        for seed in args.seeds:
            found = compare(name, data, seconds, seed, tuple(args.sides), **options)
            rows += found
            for row in found:
                print(f"{row['data']}, {row['side']}, seed {seed}: {row['test']:.4f} ± {row['error']:.4f} nats, {row['seconds']:.0f} s", flush=True)
    print(f"\n{markdown(rows, COLUMNS)}")
    if args.json:
        record(args.json, "tables", argv, rows, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
