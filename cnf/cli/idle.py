"""Rejection of changed options that have no effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from cnf.cli.options import option
from cnf.config import RunConfig
from cnf.datasets import DataSplits, tabular
from cnf.errors import ConfigError

__all__ = ["refuse_idle", "refuse_idle_noise"]

Idle = Iterator[tuple[str, tuple[str, ...], str]]  # (part of the configuration, options without effect, reason)


def _idle_noise(config: RunConfig, levels: int | None, mid_bin: bool, spreads: bool) -> Idle:
    if config.solver.divergence == "exact" and config.train.density:
        yield "solver", ("probe", "mode", "probes"), "is for --divergence hutchinson"
        if (levels is None and not spreads) or mid_bin:
            of = "vectors" if levels is None else "the middle of each grey level"
            yield "train", ("draws",), f"repeats noise, and the exact trace of {of} has none"


def _idle_predicting(config: RunConfig) -> Idle:
    if config.train.density:
        return
    yield "data", ("condition",), "conditions densities; what is to be predicted is taken from the data by --objective"
    yield "solver", ("divergence", "probe", "mode", "probes", "steer", "eval_tolerance", "compile", "precision"), "is for densities"
    yield "train", ("draws", "kinetic", "jacobian", "step_error", "regularisers"), "is for densities"
    if config.model.architecture == "resnet":
        names = tuple(f.name for f in dataclasses.fields(config.solver))
        yield "solver", names, "is for ODEs, and --architecture resnet solves none"
        yield "train", ("watch_every", "watch_tolerance", "max_grid_steps"), "is for ODEs, and --architecture resnet solves none"


def _idle_objective(config: RunConfig) -> Idle:
    objective = config.train.objective
    if objective not in ("flow-matching", "both"):
        yield "train", ("coupling", "match_weights", "match_times"), "is for --objective flow-matching, or both"
    if objective != "both":
        yield "train", ("tune_steps", "tune_batch_size", "tune_lr"), "is for --objective both"
    if objective == "flow-matching":
        why = "says how training solves an ODE, and --objective flow-matching solves none"
        if config.model.drive == "none":  # an augmented time is solved by these settings even so
            yield "solver", ("method", "grid_steps", "adaptive", "gradient", "rtol", "atol"), why
        yield "solver", ("automatic_steps",), why
        # a preset's weights may be set to zero, so only positive ones are rejected
        weights = tuple(name for name in ("kinetic", "jacobian", "step_error") if getattr(config.train, name))
        yield "train", (*weights, "regularisers", "watch_tolerance", "max_grid_steps"), why
        if config.train.match_times == "even":
            yield "train", ("watch_every",), "is for --match-times importance"


def _idle(config: RunConfig, data: DataSplits) -> Idle:
    yield from _idle_predicting(config)
    yield from _idle_objective(config)
    if config.model.drive != "none":
        yield "model", ("layer",), "says how t enters the layers, and with --drive a learned time stands in its place"
    if data.levels is None:
        yield "model", ("alpha", "marginals"), "is for images, and these data are vectors"
    if config.model.marginals == "center":
        yield "model", ("alpha",), "is the logit's margin, and --marginals center has no logit"
    if config.train.density and not (config.train.kinetic or config.train.jacobian):
        yield "train", ("regularisers",), "says how --kinetic and --jacobian are measured, and both are zero"
    if config.data.limit is None and (data.kind == "toy" or data.name == "digits" or data.name in tabular.NAMES):
        yield "data", ("split_seed",), f"decides random splits, and that of {data.name} is fixed"
    if data.kind == "image":
        yield "data", ("data_seed",), "draws toy points and the noise on a table's columns"
    if data.kind != "table":
        yield "data", ("discrete", "columns", "drop_columns", "missing", "dependent"), "is for tables"
    if config.solver.adaptive:
        yield "solver", ("grid_steps",), "is for fixed grids, not for --adaptive"
        if config.solver.automatic_steps:  # --adaptive turns off a preset's automatic steps itself
            yield "solver", ("automatic_steps",), "is for fixed grids, not for --adaptive"
        yield "train", ("max_grid_steps", "step_error"), "is for fixed grids, not for --adaptive"
    else:
        yield "solver", ("rtol", "atol"), "is for --adaptive; evaluation has --eval-rtol and --eval-atol"


def refuse_idle(default: RunConfig, config: RunConfig, data: DataSplits) -> None:
    """Reject changed options without effect on these data, except noise options (:func:`refuse_idle_noise`).

    Raises:
        ConfigError: for the first such option.
    """
    _refuse(default, config, _idle(config, data))


def refuse_idle_noise(default: RunConfig, config: RunConfig, levels: int | None, *, mid_bin: bool, spreads: bool = False) -> None:
    """Reject changed noise options (draws, probes) without effect because the likelihood involves no noise.

    ``spreads``: discrete columns are dequantised in each draw, as when custom rows are scored.

    Raises:
        ConfigError: for the first such option.
    """
    _refuse(default, config, _idle_noise(config, levels, mid_bin, spreads))


def _refuse(default: RunConfig, config: RunConfig, idle: Idle) -> None:
    for part, names, reason in idle:
        for name in names:
            before: Any = getattr(getattr(default, part), name)
            if getattr(getattr(config, part), name) != before:
                raise ConfigError(f"{option(name)} {reason}: leave it at {before}")
