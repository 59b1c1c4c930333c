"""Runs of ResNet, NODE and ANODE on the toy sets of ANODE (1904.01681), for benchmarks/anode_figures.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from anode import by_epoch, train
from torch import Tensor

from cnf.config import ResNetConfig, RunConfig, preset
from cnf.data import DataSplits
from cnf.errors import SolverError, TrainingError
from cnf.losses import assess
from cnf.neural_ode import Predictor
from cnf.training import FeatureHistory, Trainer

__all__ = ["FAILS", "MODELS", "Budget", "Curves", "configure", "run", "runs"]

MODELS = ("ResNet", "NODE", "ANODE")
BLOCKS = 3  # of the residual net, each with the field of the neural ODE
FAILS = 0.5  # a run that ends above this share of the targets' variance has not learned
Row = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """Number of seeds, epochs and points of every run of a figure."""

    seeds: int
    epochs: int
    sizes: tuple[int, int, int] = (3000, 900, 3000)


@dataclass(eq=False)
class Curves:
    """One run: its figures and what pictures need of it."""

    row: Row
    """Figures for the table and for results.json: model, data, seed, loss and NFE by epoch, ..."""
    model: Predictor | None
    """The trained model, or None if training failed."""
    data: DataSplits | None
    frames: dict[int, Tensor]
    """Features of fixed validation points by step."""


def configure(name: str, data: str, seed: int, budget: Budget, *, data_settings: Row | None = None, **changes: Any) -> RunConfig:
    """Return the settings of a run: the preset of the paper's toys, with 50 epochs cut to the budget's."""
    kind = "flip" if data in ("identity", "flip") else "spheres"
    config = preset(f"{'anode' if name == 'ANODE' else 'node'}-{kind}").config
    every = max(1, budget.sizes[0] // config.train.batch_size)
    train = config.train.change(steps=budget.epochs * every, validate_every=every, seed=seed)
    model = config.model
    if name == "ResNet":
        head = getattr(config.model, "head", "linear")
        model = ResNetConfig.of(hidden=(32, 32), blocks=BLOCKS, nonlinearity="relu", zero_init=False, head=head)
    config = replace(config, data=config.data.change(data=data, toy_sizes=budget.sizes, **data_settings or {}), train=train, model=model)
    return config.change(**changes)


def run(name: str, data: str, seed: int, budget: Budget, **changes: Any) -> Curves:
    """Train one model; a failure of training becomes a row as well."""
    config = configure(name, data, seed, budget, **changes)
    begun, trainer, splits, failure = time.process_time(), None, None, ""
    try:
        trainer, splits = train(config)
    except (TrainingError, SolverError) as error:
        failure = str(error)
    row: Row = {"model": name, "data": data, "seed": seed, "epochs": budget.epochs, "failure": failure}
    if trainer is None or splits is None:
        return Curves({**row, "cpu_seconds": time.process_time() - begun, "failed": True}, None, None, {})
    model, history = trainer.averaged().eval(), trainer.callback(FeatureHistory)
    row |= _figures(trainer, splits, config)
    row["cpu_seconds"] = time.process_time() - begun
    assert isinstance(model, Predictor)
    return Curves(row, model, splits, {} if history is None else history.frames)


def _figures(trainer: Trainer, splits: DataSplits, config: RunConfig) -> Row:
    every, targets = config.train.validate_every, splits.test_context
    assert targets is not None
    spread = float(targets.var(unbiased=False))
    try:  # the weights at the end, as the paper's curves
        test = assess(trainer.averaged().eval(), splits.test, targets, "regression").mean
    except SolverError:
        test = float("inf")
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "loss": [m["validation"] for m in trainer.history if "validation" in m],
        "train_loss": by_epoch(trainer, "loss", every),
        "nfe": by_epoch(trainer, "nfe", every),
        "test": test,
        "skipped": trainer.state.skipped,
        "failed": bool(trainer.state.skipped) or not test < FAILS * spread,
    }


def runs(
    cases: Iterable[tuple[str, str]], budget: Budget, tell: Callable[[str], object] = print, **changes: Any
) -> list[Curves]:
    """Every seed of every (model, data), reported as it ends."""
    found = []
    for name, data in cases:
        for seed in range(budget.seeds):
            found.append(run(name, data, seed, budget, **changes))
            row = found[-1].row
            tell(f"{data:14} {name:7} seed {seed}: " + (row["failure"] or f"test {row['test']:.3g}, {row['cpu_seconds']:.0f} CPU s"))
    return found


def select(found: Sequence[Curves], **wanted: Any) -> list[Curves]:
    """Return the runs whose rows have these entries and that did not break off."""
    return [one for one in found if one.model is not None and all(one.row[key] == value for key, value in wanted.items())]


def band(found: Sequence[Curves], key: str) -> tuple[Any, Any]:
    """Return mean and standard deviation over seeds of a curve by epoch."""
    curves = np.array([one.row[key] for one in found], dtype=float)
    return curves.mean(0), curves.std(0, ddof=1) if len(curves) > 1 else np.zeros(curves.shape[1])


def vector_field(model: Predictor, height: Tensor) -> Tensor:
    """Return dh/dt (N,) of a neural ODE on the line at heights (N,), at t = 0."""
    with torch.no_grad():
        field: Any = model.fields[0]  # type: ignore[index]
        values: Tensor = field(torch.zeros(()), height[:, None])[:, 0]
    return values
