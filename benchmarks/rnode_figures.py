"""The figures of RNODE (2002.02798) at the size of toys, and regularised predictors, one command each.

    python benchmarks/rnode_figures.py transport   # 1: two flows of the same points on the line, with and without transport cost
    python benchmarks/rnode_figures.py nfe         # 3: evaluations of an unregularised flow against the norm of its Jacobian
    python benchmarks/rnode_figures.py penalties   # 4: none, kinetic, Jacobian, both: training on the published grid (h = 0.25)
    python benchmarks/rnode_figures.py predictors  # the same for neural ODEs that predict (section 9; the survey's eq. 4)

Each takes --seeds, --steps and --pictures FOLDER, prints a table of means and standard deviations over seeds, and adds its
rows to --out. Data: a mixture on the line; checkerboard (``nfe``, ``penalties``); spheres2 (``predictors``). The norms are
measured (--measure), not penalised, except where the row says so. One process, one thread; ``--quick`` takes seconds.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from anode import train
from anode_runs import Budget, configure
from measure import draw_figure, markdown, spread

import cnf
from cnf.config import RunConfig, preset
from cnf.evaluation import evaluate
from cnf.fields import MLP
from cnf.losses import Likelihood, assess
from cnf.ode.trajectory import straightness
from cnf.plotting import flow_1d
from cnf.plotting.canvas import new_figure, save_figure, subplots
from cnf.random import Noise
from cnf.solvers import Adaptive

Row = dict[str, Any]
DEFAULTS = {"transport": (1, 800), "nfe": (1, 250), "penalties": (1, 200), "predictors": (2, 300)}  # seeds, steps
MEASURED = ("jacobian", "kinetic", "total-derivative")
TERMS = ("jacobian", "kinetic", "total_derivative")
PENALTIES = {"none": {}, "K": {"kinetic": 0.05}, "J": {"jacobian": 0.05}, "K and J": {"kinetic": 0.05, "jacobian": 0.05}}
PREDICTOR_PENALTIES = {
    "none": {}, "kinetic": {"kinetic": 0.1}, "Jacobian": {"jacobian": 0.1}, "total derivative": {"penalty": ("total-derivative=0.1",)},
}  # fmt: skip
TRANSPORT = 0.3  # weight of the kinetic energy in figure 1


def mixture(n: int, seed: int) -> torch.Tensor:
    """Return points (n, 1) of two normal clusters."""
    generator = torch.Generator().manual_seed(seed)
    side = (torch.rand(n, 1, generator=generator) < 0.5).float()
    return 0.35 * torch.randn(n, 1, generator=generator) + 3 * side - 1.5


def transport(seeds: int, steps: int, folder: Path, quick: bool) -> list[Row]:
    """Figure 1."""
    rows, shown = [], {}
    for seed in range(seeds):
        for name, weight in (("without transport cost", 0.0), ("with transport cost", TRANSPORT)):
            begun = time.process_time()
            torch.manual_seed(seed)
            field = MLP(1, (32, 32), zero_init=False)
            with torch.no_grad():
                for p in field.parameters():  # away from the straight start, from which likelihood alone does not move it
                    p.mul_(3)
            flow = cnf.Flow(cnf.CNF(field, solver=cnf.FixedGrid("rk4", 8)), (1,))
            loss = Likelihood(flow, kinetic=weight)
            cnf.fit(flow, mixture(4000, seed), loss=loss, steps=steps, batch_size=256, lr=3e-3, seed=seed, quiet=True)
            x = mixture(2000, 1000 + seed)
            ratio, energy = straightness(flow.transform, x[:256], None, noise=Noise(0, "paths"))
            found = evaluate(flow, x)
            rows.append({"penalty": name, "seed": seed, "nll": found.mean, "nfe": found.nfe,
                         "straightness": ratio, "kinetic": energy, "cpu_seconds": time.process_time() - begun})  # fmt: skip
            shown.setdefault(f"{name}: {found.mean:.3f} nats, kinetic energy {energy:.2f}", flow)
            print(f"{name}, seed {seed}: {found.mean:.4f} nats, {rows[-1]['cpu_seconds']:.0f} CPU s", flush=True)
    flow_1d(dict(list(shown.items())[:2]), mixture(4000, 5000), folder / "rnode-transport.png")
    return rows


def _toy(steps: int, seed: int, quick: bool, **changes: Any) -> RunConfig:
    config = preset("ffjord-toy").config
    sizes, batch = ((400, 64, 128), 64) if quick else ((20_000, 1000, 2000), 256)
    return replace(config, data=config.data.change(data="checkerboard", toy_sizes=sizes)).change(
        steps=steps, batch_size=batch, validate_every=max(1, steps // 5), warmup=20, seed=seed, end_time=1.0, measure=MEASURED,
        hidden=(32, 32), lr=1e-2, **changes,
    )  # fmt: skip


def nfe(seeds: int, steps: int, folder: Path, quick: bool) -> list[Row]:
    """Figure 3."""
    rows = []
    for seed in range(seeds):
        begun = time.process_time()
        settings = {"train_solver": "adaptive", "method": "dopri5", "rtol": 1e-5, "atol": 1e-5, "zero_init": True}
        trainer, _ = train(_toy(steps, seed, quick, **settings))
        logged = [m for m in trainer.history if "nfe" in m and "jacobian" in m]
        rows.append({
            "penalty": "none", "seed": seed, "nfe": [m["nfe"] for m in logged], "steps": [m["step"] for m in logged],
            **{key: [m[key] for m in logged] for key in TERMS}, "nll": logged[-1]["nll"], "cpu_seconds": time.process_time() - begun,
            "rank_correlation": _rank_correlation([m["nfe"] for m in logged], [m["jacobian"] for m in logged]),
        })  # fmt: skip
        print(f"seed {seed}: rank correlation {rows[-1]['rank_correlation']:.2f}, {rows[-1]['cpu_seconds']:.0f} CPU s", flush=True)
    figure = new_figure(11, 3.8)
    for axis, key in zip(subplots(figure, 1, 3), TERMS, strict=True):
        for row in rows:
            dots = axis.scatter([v**0.5 for v in row[key]], row["nfe"], 14, c=row["steps"], cmap="viridis")
        axis.set(xlabel=f"square root of the integral: {key.replace('_', ' ')}", ylabel="NFE of a training solve")
        axis.grid(alpha=0.3)
    figure.colorbar(dots, label="step")
    save_figure(figure, folder / "rnode-nfe.png")
    return [{**row, "nfe_first": row["nfe"][0], "nfe_last": row["nfe"][-1]} for row in rows]


def _rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's correlation, ties at their mean rank."""
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    return float(spearmanr(first, second).statistic) if len(set(first)) > 1 else float("nan")


def penalties(seeds: int, steps: int, folder: Path, quick: bool) -> list[Row]:
    """Figure 4."""
    rows = []
    for name, weights in PENALTIES.items():
        for seed in range(seeds):
            begun = time.process_time()
            trainer, data = train(_toy(steps, seed, quick, step_size=0.25, zero_init=True, **weights))
            flow = trainer.best_model()
            flow.blocks[0].eval_solver = Adaptive("dopri5", 1e-5, 1e-5)  # the tolerance at which RNODE reports evaluations
            found = evaluate(flow, data.test)
            logged = [m for m in trainer.history if "jacobian" in m]
            ends = {key: statistics.mean(m[key] for m in logged[-5:]) for key in TERMS}
            curves = {f"{key}_curve": [m[key] for m in logged] for key in TERMS}
            rows.append({"penalty": name, "seed": seed, "nll": found.mean, "nfe": found.nfe, **ends, **curves,
                         "steps": [m["step"] for m in logged], "cpu_seconds": time.process_time() - begun})  # fmt: skip
            print(f"{name}, seed {seed}: {found.mean:.4f} nats, NFE {found.nfe:.0f}, {rows[-1]['cpu_seconds']:.0f} CPU s", flush=True)
    figure = new_figure(11, 3.8)
    for axis, key in zip(subplots(figure, 1, 3), TERMS, strict=True):
        for number, name in enumerate(PENALTIES):
            for row in (row for row in rows if row["penalty"] == name):
                axis.plot(row["steps"], row[f"{key}_curve"], color=f"C{number}", lw=1, label=name if row["seed"] == 0 else None)
        axis.set(xlabel="step", title=f"integral: {key.replace('_', ' ')}", yscale="log")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=9)
    save_figure(figure, folder / "rnode-penalties.png")
    return rows


def predictors(seeds: int, steps: int, folder: Path, quick: bool) -> list[Row]:
    """Regularised neural ODEs that predict."""
    rows = []
    for architecture in ("NODE", "ANODE"):
        for name, weights in PREDICTOR_PENALTIES.items():
            for seed in range(seeds):
                begun = time.process_time()
                budget = Budget(1, 1, (192, 64, 64)) if quick else Budget(1, 1)
                config = configure(architecture, "spheres2", seed, budget, steps=steps, validate_every=max(1, steps // 3), **weights)
                trainer, data = train(config)
                model = trainer.averaged().eval()
                found = assess(model, data.test, data.test_context, "regression")
                logged = [m["nfe"] for m in trainer.history if "nfe" in m]
                rows.append({"penalty": f"{architecture}, {name}", "seed": seed, "test": found.mean, "nfe": found.nfe,
                             "nfe_training": statistics.mean(logged), "cpu_seconds": time.process_time() - begun})  # fmt: skip
                print(f"{architecture}, {name}, seed {seed}: test {found.mean:.3g}, NFE {found.nfe:.0f}, "
                      f"{rows[-1]['cpu_seconds']:.0f} CPU s", flush=True)  # fmt: skip
    figure = new_figure(6.4, 4.4)
    axis = subplots(figure)
    for number, name in enumerate(PREDICTOR_PENALTIES):
        for architecture, marker in (("NODE", "o"), ("ANODE", "s")):
            some = [row for row in rows if row["penalty"] == f"{architecture}, {name}"]
            axis.plot([r["nfe"] for r in some], [r["test"] for r in some], marker, color=f"C{number}", label=f"{architecture}, {name}")
    axis.set(xlabel="NFE of a test solve (dopri5, 1e-5)", ylabel="test loss (MSE)", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save_figure(figure, folder / "rnode-predictors.png")
    return rows


FIGURES = {function.__name__: function for function in (transport, nfe, penalties, predictors)}
COLUMNS = {  # key -> heading and form
    "nll": ("nll, nats", ".3f"), "test": ("test loss (MSE)", ".2g"), "nfe": ("NFE, test", ".0f"), "nfe_first": ("NFE, first", ".0f"),
    "nfe_last": ("NFE, last", ".0f"), "nfe_training": ("NFE, training", ".0f"), "rank_correlation": ("rank correlation of NFE and ∫‖J‖²", ".2f"),
    "jacobian": ("∫‖J‖²", ".3g"), "kinetic": ("∫‖f‖²", ".3g"), "total_derivative": ("∫‖df/dt‖²", ".3g"),
    "straightness": ("distance / path length", ".3f"), "cpu_seconds": ("CPU s", ".0f"),
}  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Return means and standard deviations over seeds, one line for each penalty."""
    keys = [key for key in COLUMNS if key in rows[0] and not isinstance(rows[0][key], list)]
    lines = []
    for name in dict.fromkeys(row["penalty"] for row in rows):
        some = [row for row in rows if row["penalty"] == name]
        lines.append({"penalty": name, "seeds": len(some)} | {key: spread([row[key] for row in some], COLUMNS[key][1]) for key in keys})
    return markdown(lines, {"penalty": "{penalty}", "seeds": "{seeds}"} | {COLUMNS[key][0]: f"{{{key}}}" for key in keys})


def main(arguments: Sequence[str] | None = None) -> None:
    commands = {name: (function, *DEFAULTS[name]) for name, function in FIGURES.items()}
    draw_figure(__doc__ or "", arguments, "rnode_figures", "steps", commands, list, table)


if __name__ == "__main__":
    main()
