"""Evaluation of runs that are no densities: predictors and autoencoders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cnf._utils.errors import ConfigError
from cnf.cli.options import Command
from cnf.data import DataSplits
from cnf.distributed import Group
from cnf.models import divergence, eval_solver
from cnf.neural_ode import NeuralODE
from cnf.runs import RunInfo, load
from cnf.training.autoencoders import score_bounds, write_bounds
from cnf.training.predictions import score_predictions, write_predictions
from cnf.vae import FlowVAE

__all__ = ["OTHERS"]

Evaluated = tuple[dict[str, Any], Callable[[Path], None]]


def _predicted(command: Command, info: RunInfo, data: DataSplits, group: Group) -> Evaluated:
    """Evaluate a run that predicts; return the result and a function that writes the predictions."""
    folder, config = command.evaluate, info.config
    assert folder is not None
    if command.mid_bin or command.importance > 1:
        raise ConfigError(f"{'--mid-bin' if command.mid_bin else '--importance'} is for {'densities' if command.mid_bin else 'densities and autoencoders'}, and {folder} predicts")
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    model = load(folder, config.train.device)
    if isinstance(model, NeuralODE):
        model.eval_solver = eval_solver(config.solver)
    elif command.check:
        raise ConfigError(f"--check solves again, and {folder} is a residual net, which solves nothing: leave it out")
    result, found, index = score_predictions(
        model, data, config.train.objective.kind, command.split, items=config.train.test_items, check=command.check, group=group
    )
    return result, partial(write_predictions, found=found, index=index, classes=data.classes)


def _bounded(command: Command, info: RunInfo, data: DataSplits, group: Group) -> Evaluated:
    """Evaluate a run of an autoencoder; return the result and a function that writes the images' bounds."""
    folder, config = command.evaluate, info.config
    assert folder is not None
    if command.mid_bin:
        raise ConfigError(f"--mid-bin is for densities, and {folder} is an autoencoder, whose grey levels have a probability each: leave it out")
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    model: FlowVAE = load(folder, config.train.device)
    if command.check and not model.blocks:
        raise ConfigError(f"--check solves again, and the posterior of {folder} is normal, which solves nothing: leave it out")
    for block in model.blocks:
        block.eval_solver, block.divergence = eval_solver(config.solver), divergence(config.solver)
    result, found, index = score_bounds(
        model, data, config.data.binarize, command.split, config.train.noise_samples, items=config.train.test_items, check=command.check,
        importance=command.importance, importance_images=command.importance_images, group=group,
    )  # fmt: skip
    return result, partial(write_bounds, found=found, index=index)


OTHERS: dict[str, Callable[[Command, RunInfo, DataSplits, Group], Evaluated]] = {"predictor": _predicted, "autoencoder": _bounded}
"""Evaluation of a split by the kind of model."""
