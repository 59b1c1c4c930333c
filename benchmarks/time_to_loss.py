"""Seconds of training until the digits' validation reaches a given bits/dim: closed-form trace, estimate, published form."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from stopwatch import Stopwatch

from cnf.cli.common import load_splits
from cnf.config import FlowConfig, RunConfig, SolverConfig, preset
from cnf.models import build
from cnf.runs import RunInfo
from cnf.training import from_settings

__all__ = ["LOSS_COLUMNS", "time_to_loss"]

LOSS_COLUMNS = {
    "case": "{case}",
    "hidden": "{hidden}",
    "parameters": "{parameters:,}",
    "target, bits/dim": "{target}",
    "reached": "{reached}",
    "training s": "{seconds:.1f}",
    "steps": "{steps}",
    "ms a step": "{step_ms:.1f}",
    "best validation": "{best:.4f}",
}
VALIDATE_EVERY = 50


def parameters(model: FlowConfig) -> int:
    """Of the digits' flow."""
    return sum(p.numel() for p in build(model, SolverConfig(), (1, 8, 8), levels=17).parameters())


def cases() -> dict[str, RunConfig]:
    """The preset; its net with Hutchinson's estimate; three hidden layers with as many parameters and the estimate."""
    exact = preset("digits").config
    estimate = exact.solver.change(divergence="hutchinson")
    count = parameters(exact.model)
    width = min(range(32, 300), key=lambda w: abs(parameters(exact.model.change(hidden=(w,) * 3)) - count))
    return {
        "digits preset, exact trace": exact,
        "the same, Hutchinson": replace(exact, solver=estimate),
        "three hidden layers, Hutchinson": replace(
            exact, solver=estimate, model=exact.model.change(hidden=(width,) * 3)
        ),
    }


def run(name: str, config: RunConfig, target: float, max_steps: int | None = None) -> dict[str, Any]:
    """One row; training stops at the target, or where the preset would."""
    # the rate's schedule stays the preset's, whenever the target is reached
    config = replace(config, train=config.train.change(validate_every=VALIDATE_EVERY))
    if max_steps is not None:
        config = replace(config, train=config.train.change(steps=max_steps, validate_every=max_steps))
    data = load_splits(config)
    info = RunInfo(config, data.event_shape, data.levels, data.context_dim, data.classes, data.columns)
    with tempfile.TemporaryDirectory() as folder:
        trainer = from_settings(info, data, Path(folder), quiet=True, kind=Stopwatch)
        trainer.target = target
        trainer.run()
    seconds = trainer.total
    return {
        "case": name,
        "hidden": "-".join(map(str, config.model.field.hidden)),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "target": target,
        "reached": trainer.state.best <= target,
        "seconds": seconds,
        "steps": trainer.state.step,
        "step_ms": 1e3 * seconds / max(1, trainer.state.step),
        "best": trainer.state.best,
    }


def time_to_loss(target: float) -> list[dict[str, Any]]:
    """A row for each of :func:`cases`, one after another."""
    return [run(name, config, target) for name, config in cases().items()]
