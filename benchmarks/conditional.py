"""Conditional densities p(y | x): ConditionalDensityEstimator against Gaussian heads and quantile forests of scikit-learn.

    PYTHONPATH=. python benchmarks/conditional.py                            # all tables, 60 CPU seconds for our fit
    PYTHONPATH=. python benchmarks/conditional.py --data diabetes --seconds 20

Tables: diabetes (442 rows, cross-validated), make_friedman1 with noise that grows with a column, and a bimodal one of two
curves; of the last two the true density is known. Sides: gradient boosting or an MLP for the mean and, on out-of-fold
residuals, for the log variance; a random forest whose leaves weight the training rows in a kernel density. Their settings are
chosen on validation rows. Coverage is the share of test rows whose distribution function is between 0.05 and 0.95.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from measure import RESULTS, machine, markdown, record, versions
from scipy import stats
from scipy.special import logsumexp
from sklearn.base import clone
from sklearn.datasets import load_diabetes, make_friedman1
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
from sklearn.model_selection import KFold, cross_val_predict, train_test_split
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cnf import ConditionalDensityEstimator

Array = np.ndarray
Scores = tuple[Array, Array]  # log-density and distribution function of the test rows
Side = Callable[[Array, Array, Array, Array, int, float], Scores]


def tables() -> dict[str, tuple[Array, Array, Array | None]]:
    """Features, target and true log-density of each table."""
    generator = np.random.default_rng(0)
    x, y = load_diabetes(return_X_y=True)
    u, mean = make_friedman1(6000, noise=0.0, random_state=0)
    scale = 0.5 + 2 * u[:, 5]
    v = generator.uniform(-1, 1, (6000, 3))
    centre, width = np.sin(3 * v[:, 0]) + 1, 0.1 + 0.2 * (v[:, 1] > 0)
    share = 1 / (1 + np.exp(-3 * v[:, 2]))
    two = np.where(generator.uniform(size=6000) < share, centre, -centre) + width * generator.normal(size=6000)
    noisy = mean + scale * generator.normal(size=6000)
    heights = [share * stats.norm.pdf(two, centre, width), (1 - share) * stats.norm.pdf(two, -centre, width)]
    return {
        "diabetes": (x, y, None),
        "friedman": (u, noisy, stats.norm.logpdf(noisy, mean, scale)),
        "bimodal": (v, two, np.log(np.sum(heights, 0))),
    }


def ours(x: Array, y: Array, x_test: Array, y_test: Array, seed: int, seconds: float) -> Scores:
    """ConditionalDensityEstimator with its defaults."""
    model = ConditionalDensityEstimator(max_minutes=seconds / 60, random_state=seed).fit(x, y)
    print("   ", {k: round(v, 4) for k, v in model.parts_.items()}, model.n_steps_, "steps", flush=True)
    return model.score_samples(x_test, y_test), model.cdf(x_test, y_test)


def gaussian(kind: str) -> Side:
    """A model of the mean, and one of the log variance by out-of-fold residuals; their scale by validation rows."""

    def fit(x: Array, y: Array, x_test: Array, y_test: Array, seed: int, seconds: float) -> Scores:
        a, b, c, d = train_test_split(x, y, test_size=0.15, random_state=seed)
        best: tuple[float, float, Any, Any] | None = None
        for model in _boosting() if kind == "boosting" else _networks(seed):
            residual = c - cross_val_predict(model, a, c, cv=5)
            log_square = np.log(residual**2 + 1e-6 * c.var())
            mean, spread = clone(model).fit(a, c), clone(model).fit(a, log_square)
            z = (d - mean.predict(b)) * np.exp(-0.5 * spread.predict(b))
            log_scale = 0.5 * math.log((z**2).mean())
            score = stats.norm.logpdf(z, 0, math.exp(log_scale)).mean() - 0.5 * spread.predict(b).mean()
            if best is None or score > best[0]:
                best = score, log_scale, mean, spread
        assert best is not None
        scale = np.exp(best[1] + 0.5 * best[3].predict(x_test))
        normal = stats.norm(best[2].predict(x_test), scale)
        return normal.logpdf(y_test), normal.cdf(y_test)

    return fit


def _boosting() -> list[Any]:
    return [HistGradientBoostingRegressor(max_iter=n, learning_rate=0.05, min_samples_leaf=20) for n in (30, 60, 120, 240)]


def _networks(seed: int) -> list[Any]:
    return [
        make_pipeline(StandardScaler(), MLPRegressor(hidden_layer_sizes=(64, 64), alpha=alpha, early_stopping=True, max_iter=300, random_state=seed))
        for alpha in (1e-4, 1e-1)
    ]


def forest(x: Array, y: Array, x_test: Array, y_test: Array, seed: int, seconds: float) -> Scores:
    """Kernel density of the training rows, weighted by the leaves that they share with a row."""
    a, b, c, d = train_test_split(x, y, test_size=0.15, random_state=seed)
    best: tuple[float, Any, float] | None = None
    for leaf in (5, 10, 20, 40):
        model = RandomForestRegressor(200, min_samples_leaf=leaf, max_features=1 / 3, random_state=seed).fit(a, c)
        weights = _weights(model, a, b)
        for bandwidth in c.std() * np.geomspace(0.03, 0.8, 10):
            score = _kernel(weights, c, d, bandwidth)[0].mean()
            if best is None or score > best[0]:
                best = score, model, bandwidth
    assert best is not None
    return _kernel(_weights(best[1], a, x_test), c, y_test, best[2])


def _weights(model: Any, x: Array, queries: Array) -> Array:
    """Weights (queries, rows): the mean over the trees of the uniform weights in a leaf."""
    own, asked = model.apply(x), model.apply(queries)
    out = np.zeros((len(queries), len(x)), dtype=np.float32)
    for tree in range(own.shape[1]):
        same = asked[:, tree, None] == own[None, :, tree]
        out += same / same.sum(1, keepdims=True)
    return out / own.shape[1]


def _kernel(weights: Array, rows: Array, y: Array, bandwidth: float) -> Scores:
    z = (y[:, None] - rows) / bandwidth
    with np.errstate(divide="ignore"):
        log_density = logsumexp(-0.5 * z**2 + np.log(weights), axis=1) - math.log(bandwidth * math.sqrt(2 * math.pi))
    return log_density, (weights * stats.norm.cdf(z)).sum(1)


SIDES: dict[str, Side] = {"ours": ours, "Gaussian, boosting": gaussian("boosting"), "Gaussian, MLP": gaussian("mlp"), "forest": forest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(tables()), choices=list(tables()))
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of our fit")
    parser.add_argument("--folds", type=int, default=5, help="of diabetes; the other tables are halved once")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.data:
        x, y, truth = tables()[name]
        folds = KFold(options.folds if name == "diabetes" else 2, shuffle=True, random_state=0).split(x)
        splits = list(folds) if name == "diabetes" else list(folds)[:1]
        found: dict[str, list[Scores]] = {side: [] for side in SIDES}
        spent = dict.fromkeys(SIDES, 0.0)
        for seed, (train, test) in enumerate(splits):
            for side, fit in SIDES.items():
                began = time.process_time()
                found[side].append(fit(x[train], y[train], x[test], y[test], seed, options.seconds))
                spent[side] += (time.process_time() - began) / len(splits)
        tested = np.concatenate([test for _, test in splits])
        values = {side: np.concatenate([v for v, _ in scores]) for side, scores in found.items()}
        for side, scores in found.items():
            level = np.concatenate([u for _, u in scores])
            apart = values[side] - values["ours"]
            rows.append(
                {
                    "data": name,
                    "side": side,
                    "nll": -float(values[side].mean()),
                    "worse": -float(apart.mean()),
                    "error": float(apart.std(ddof=1) / math.sqrt(len(apart))) if side != "ours" else 0.0,
                    "coverage": 100 * float(((level >= 0.05) & (level <= 0.95)).mean()),
                    "rows": len(apart),
                    "seconds": spent[side],
                }
            )
            print(rows[-1], flush=True)
        if truth is not None:
            rows.append({"data": name, "side": "truth", "nll": -float(truth[tested].mean()), "worse": float((values["ours"] - truth[tested]).mean()),
                         "error": float((values["ours"] - truth[tested]).std() / math.sqrt(len(tested))), "coverage": 90.0, "rows": len(tested), "seconds": 0.0})  # fmt: skip
    columns = {
        "table": "{data}", "side": "{side}", "nats": "{nll:.4f}", "minus ours, paired": "{worse:+.4f} ± {error:.4f}",
        "inside 90 %": "{coverage:.1f} %", "test rows": "{rows}", "CPU s": "{seconds:.0f}",
    }  # fmt: skip
    print(markdown(rows, columns))
    record(RESULTS, "conditional", None, rows, {"machine": machine(), "versions": versions("torch", "scikit-learn"), "unit": "nats"})


if __name__ == "__main__":
    main()
