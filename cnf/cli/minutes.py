"""cnf train --minutes: a density of a table or of points, found within a time, as a run folder like any other."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cnf._utils.errors import ConfigError
from cnf._utils.output import emit
from cnf.bases import ConditionalMixture, GaussianMixture
from cnf.cli.spelling import option
from cnf.config import FlowConfig, RunConfig
from cnf.data import DataSplits
from cnf.distributed import Group
from cnf.fields import MLP
from cnf.flow import Flow
from cnf.runs import RunInfo, write_config
from cnf.solvers import FixedGrid
from cnf.training import REPORT, finish, from_settings, summary
from cnf.training.checkpointer import Checkpointer, run_lock
from cnf.transforms import MarginalTransform, iter_leaves

if TYPE_CHECKING:
    from cnf.estimators.conditional_fit import ConditionalFit
    from cnf.estimators.search import DensityFit

__all__ = ["CHOSEN", "refuse_chosen", "search"]

# settings that the search chooses
CHOSEN = (
    "architecture", "field", "time_conditioning", "nonlinearity", "residual", "blocks", "end_time", "learn_end_time", "preprocess", "knots", "base",
    "components", "covariance", "train_base", "base_std", "objective", "train_solver", "method", "grid_steps", "step_size",
    "automatic_steps", "gradient", "divergence", "penalty", "measure",
    "steps", "batch_size", "accumulate", "lr", "warmup", "schedule", "weight_decay", "max_grad_norm", "ema_decay", "kinetic", "jacobian", "patience",
    "max_time", "validate_every",
)  # fmt: skip


def refuse_chosen(config: RunConfig, given: Collection[str]) -> None:
    """Reject settings that the user gave and that the search chooses.

    Raises:
        ConfigError: for the first such setting.
    """
    if idle := [name for name in CHOSEN if name in given]:
        raise ConfigError(f"{option(idle[0])} is chosen by --minutes {config.train.minutes:g}: leave one of them out")


def search(info: RunInfo, data: DataSplits, folder: Path, group: Group, line: str = "") -> int:
    """Find a density within the minutes of the settings, and leave a finished run that --resume trains on; ``line`` is the command."""
    train = info.config.train
    if train.threads:
        torch.set_num_threads(train.threads)
    assert train.minutes is not None and isinstance(info.config.model, FlowConfig)  # --minutes is for densities
    found = _find(info, data, train.minutes, info.config.model.field.hidden)
    info = dataclasses.replace(info, config=info.config.change(**_settings(found.flow), steps=max(1, found.steps)))
    folder.mkdir(parents=True, exist_ok=True)
    with run_lock(folder, group):
        write_config(folder, info)
        trainer = from_settings(info, data, folder, group=group, quiet=True, initial=found.flow.state_dict())
        trainer.state.step = info.config.train.steps
        trainer.validate()
        checkpointer = trainer.callback(Checkpointer)
        assert checkpointer is not None
        checkpointer.save()
        about = {"start": found.start, "parts": found.parts, "gains": found.gains, "search_seconds": found.seconds, "command": line}
        result = finish(trainer, info, data, folder, about)
    lines = [f"validation, nats per row, and the gain over the part before ({found.start}):"]
    for name, value in found.parts.items():
        gain = "{:+z.4f} ± {:.4f}".format(*found.gains[name]) if name in found.gains else ""
        lines.append(f"  {name:16}{value:12.4f}  {gain}".rstrip())
    emit("message", "\n".join(lines))
    emit("result", summary(result), folder=folder, **result)
    emit("message", f"report in {folder / REPORT}, pictures in {folder / 'samples'} and {folder / 'plots'}; cnf sample {folder} draws more, cnf rank {folder} FILE ranks rows")
    return 0


def _find(info: RunInfo, data: DataSplits, minutes: float, hidden: Sequence[int]) -> DensityFit | ConditionalFit:
    """Return the density of the rows, given their condition if they have one."""
    from cnf.estimators.conditional_fit import fit_conditional  # needs scikit-learn
    from cnf.estimators.search import fit_density

    train = info.config.train
    options: dict[str, Any] = {
        "minutes": minutes, "seed": train.seed, "cells": info.cells, "names": data.columns or None, "hidden": hidden, "device": train.device,
        "on_progress": partial(emit, "message"),
    }  # fmt: skip
    if data.train_context is not None:
        return fit_conditional([data], **options)
    return fit_density(data.train, data.validation, **options)


def _settings(flow: Flow) -> dict[str, Any]:
    """Return the settings by which :func:`cnf.build` makes a flow of this form."""
    (first, _), *_ = iter_leaves(flow.transform)
    (block,) = flow.blocks
    named: dict[str, Any] = {"architecture": "stack", "field": "mlp", "blocks": 1, "base": "mixture", "objective": "likelihood", "ema_decay": 0.0}
    assert isinstance(block.field, MLP)
    named["hidden"] = tuple(layer.map.outputs for layer in list(block.field.time_layers)[:-1])
    named["time_conditioning"] = "concatsquash" if isinstance(flow.base, ConditionalMixture) else "concat"
    if isinstance(first, MarginalTransform):
        named |= {"preprocess": "marginals", "knots": first.knots}
    else:
        named["preprocess"] = "standardize"
    assert isinstance(flow.base, GaussianMixture | ConditionalMixture) and isinstance(block.solver, FixedGrid)
    named["components"] = flow.base.components
    if isinstance(flow.base, ConditionalMixture):
        named |= {"base": "conditional-mixture", "base_hidden": tuple(each.out_features for each in flow.base.trunk if isinstance(each, nn.Linear))}
    else:
        named |= {"covariance": flow.base.covariance, "train_base": True}
    return named | {"train_solver": "grid", "method": block.solver.method, "grid_steps": block.solver.steps}
