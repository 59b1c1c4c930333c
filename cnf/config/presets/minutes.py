"""Presets of tables and points that are searched and trained within minutes, from a Gaussian mixture."""

from __future__ import annotations

from cnf.config.model import FlowConfig
from cnf.config.settings import DataConfig, Preset, RunConfig, TrainConfig
from cnf.config.solver import SolverConfig

__all__ = ["MINUTES"]

_MODEL = FlowConfig.of(hidden=(64, 64), time_conditioning="concat", preprocess="marginals", base="mixture", components=30)
_SOLVER = SolverConfig.of(grid_steps=2)
_TRAIN = TrainConfig(minutes=1.0, ema_decay=0.0, threads=1)

MINUTES = {
    "table": Preset(
        RunConfig("table", DataConfig("power"), _MODEL, _SOLVER, _TRAIN),
        "tables: marginals, Gaussian mixture, then a flow from there (--data table.csv --minutes 10)",
        "the time that --minutes gives",
        (6,),
    ),
    "demo": Preset(
        RunConfig("demo", DataConfig("2spirals"), _MODEL, _SOLVER, _TRAIN),
        "points in the plane within a minute, with an animation (--data checkerboard, points.csv, picture.png, ...)",
        "the time that --minutes gives",
        (2,),
    ),
}
