"""Every default, listed once, and the presets that the command line knows."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

import tyro

from cnf.errors import ConfigError
from cnf.models import ModelConfig, SolverConfig

__all__ = ["PRESETS", "DataConfig", "Preset", "RunConfig", "TrainConfig", "preset"]


@dataclass(frozen=True)
class DataConfig:
    """Which data."""

    data: str = "digits"
    """A known data set (digits, 8gaussians, mnist, miniboone, ...) or a path: .npz, .npy, .csv, a folder of pictures, one picture."""
    data_root: str = "data"
    """Folder where named data sets are looked for and downloaded to."""
    split_seed: int = 0
    """Decides the split where none is fixed; apart from --seed, so that runs share their test set."""
    condition: Literal["none", "label"] = "none"
    """label: one-hot classes as context (npz 'labels', sub-folder names)."""
    discrete: Literal["dequantize", "keep", "error"] = "dequantize"
    """Table columns on a lattice: add one step of uniform noise, keep, or refuse."""
    limit: int | None = None
    """Keep only so many training items."""
    nbits: int = 8
    """Grey levels kept of 8-bit images: 2**nbits."""
    image_size: int | None = None
    """Crop and resize a folder's pictures to this size."""


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained."""

    steps: int = 3000
    """Training steps."""
    batch_size: int = 256
    """Items a step."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup: int = 100
    """Steps of linear warm-up; without it the first steps of a flow can throw it far off."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: down to zero along a cosine, or constant."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW); zero is Adam."""
    max_grad_norm: float = 10.0
    """Gradients are clipped to this norm; rare batches explode without it."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are what is validated and saved."""
    kinetic: float = 0.0
    """Weight of the kinetic energy ∫‖f‖² (RNODE)."""
    jacobian: float = 0.0
    """Weight of the Jacobian's norm ∫‖J‖² (RNODE)."""
    validate_every: int = 250
    """Steps between validations."""
    patience: int = 0
    """Stop after so many validations without a better one; 0 never."""
    draws: int = 10
    """Noise draws an image in the final test."""
    watch_every: int = 100
    """Steps between measurements of the training grid's error."""
    watch_tolerance: float = 0.01
    """Error, in bits/dim or nats/dim, above which the grid gets twice the steps."""
    max_grid_steps: int = 64
    """Where the watch stops doubling."""
    max_time: float | None = None
    """Stop cleanly after so many seconds."""
    seed: int = 0
    """Seed of weights, order and noise."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, ..."""
    threads: int | None = None
    """CPU threads; torch's choice if not given."""


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    name: tyro.conf.Suppress[str] = "digits"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Preset:
    """A run's settings with a line about them and what they were measured to cost."""

    config: RunConfig
    summary: str
    cost: str
    shape: tuple[int, ...]  # of the events of its data, for the parameter count
    levels: int | None = None


PRESETS = {
    "digits": Preset(
        RunConfig(
            "digits",
            DataConfig("digits"),
            # two hidden layers: the trace has a closed form
            ModelConfig(hidden=(270, 270), alpha=0.01),
            SolverConfig(grid_steps=4),
            # 1,077 images: overfitting stands in the way, hence weight decay and kinetic energy
            TrainConfig(steps=6000, batch_size=256, lr=2e-3, weight_decay=2.0, kinetic=0.1, validate_every=250),
        ),
        "real 8x8 digits, MLP with the closed-form exact trace",
        "about 4 minutes on two cores",
        (1, 8, 8),
        17,
    ),
    "ffjord-toy": Preset(
        RunConfig(
            "ffjord-toy",
            DataConfig("8gaussians"),
            # FFJORD's toy network (three hidden layers, T = 0.5), with D = 2 exact tangents
            ModelConfig(hidden=(64, 64, 64), end_time=0.5, zero_init=False),
            SolverConfig(method="rk4", grid_steps=6),
            TrainConfig(steps=4000, batch_size=512, lr=3e-3, validate_every=500, watch_tolerance=0.005),
        ),
        "two-dimensional densities (--data 2spirals, checkerboard, rings, picture.png, ...), FFJORD's network",
        "a few minutes on two cores",
        (2,),
    ),
    "tabular": Preset(
        RunConfig(
            "tabular",
            DataConfig("power"),
            ModelConfig(hidden=(128, 128), blocks=2, residual="linear"),
            SolverConfig(grid_steps=4),
            TrainConfig(steps=6000, batch_size=1024, lr=3e-3, validate_every=500, patience=6, watch_tolerance=0.005),
        ),
        "tables (--data file.npy, file.csv, power, gas, ...), two blocks with the closed-form exact trace",
        "some minutes on two cores",
        (6,),
    ),
}


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigError: for an unknown one; the nearest is suggested.
    """
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PRESETS)}"
        raise ConfigError(f"preset {name!r} is unknown: {hint} (--list shows all)")
    return PRESETS[name]
