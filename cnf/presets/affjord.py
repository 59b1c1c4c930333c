"""Presets of AFFJORD (2306.02731): a learned, augmented time drives the field; its toy densities and its image models."""

from __future__ import annotations

from dataclasses import replace

from cnf.models import ModelConfig, SolverConfig
from cnf.presets.images import FFJORD_SOLVER, PUBLISHED_TRAIN
from cnf.presets.settings import DataConfig, Preset, RunConfig, TrainConfig
from cnf.published import AFFJORD as MODEL

__all__ = ["AFFJORD"]

OTHER = "--drive concat: a beside x"
COST = "2,000 steps took 2 to 4 minutes on a shared core"


def _toy(name: str, data: str) -> dict[str, Preset]:
    # the field of benchmarks/affjord_toy.py, where FFJORD's of the same size stands beside it
    config = RunConfig(
        name,
        DataConfig(data),
        ModelConfig(hidden=(64, 64), zero_init=False, drive="hyper"),
        SolverConfig(method="rk4", grid_steps=8),
        TrainConfig(steps=4000, batch_size=512, lr=3e-3, validate_every=500, watch_tolerance=0.005, threads=1),
    )
    return {name: Preset(config, f"AFFJORD, weights driven by a learned time ({OTHER})", COST, (2,))}


def _image(
    name: str, data: DataConfig, shape: tuple[int, ...], epoch: int, cost: str = "not measured yet"
) -> dict[str, Preset]:
    # its script: FFJORD's training with a rate of 6e-4 and one block a group, 500 epochs of batch 200
    train = replace(PUBLISHED_TRAIN, lr=6e-4, steps=500 * epoch, validate_every=epoch)
    if data.data == "celeba":
        train = replace(train, validation_items=10_000)
    config = RunConfig(name, data, MODEL, FFJORD_SOLVER, train)
    return {name: Preset(config, f"AFFJORD's multiscale model, hyper ({OTHER})", cost, shape, 256)}


AFFJORD = (
    _toy("affjord-toy-checkerboard", "checkerboard")
    | _toy("affjord-toy-hash", "hash-gaussian")
    | _image("affjord-mnist", DataConfig("mnist"), (1, 28, 28), 300, "13 s a step of 16 images on one core, at the start")
    | _image("affjord-cifar10", DataConfig("cifar10"), (3, 32, 32), 250)
    | _image("affjord-celeba32", DataConfig("celeba", image_size=32), (3, 32, 32), 814)
)
