"""Every default, listed once, and the presets that the command line knows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Literal

import tyro

from cnf.errors import ConfigError
from cnf.models import ModelConfig, SolverConfig
from cnf.published import FFJORD, RNODE

__all__ = ["PRESETS", "DataConfig", "Preset", "RunConfig", "TrainConfig", "preset"]


@dataclass(frozen=True)
class DataConfig:
    """Which data."""

    data: str = "digits"
    """A known data set (digits, 8gaussians, mnist, miniboone, ...) or a path: .npz, .npy, .csv, a folder, one picture."""
    data_root: str = "data"
    """Folder where named data sets are looked for and downloaded to."""
    download: bool = True
    """Whether named data sets that are not there may be downloaded."""
    split_seed: int = 0
    """Decides the split where none is fixed; apart from --seed, so that runs share their test set."""
    data_seed: int = 0
    """Draws toy points and the noise of --discrete dequantize; apart from --seed, so that runs share their data."""
    validation_fraction: float = 0.1
    """Share of your own data that is held out for validation."""
    test_fraction: float = 0.1
    """Share of your own data that is held out for the test."""
    condition: Literal["none", "label"] = "none"
    """label: one-hot classes as context (npz 'labels', sub-folder names)."""
    discrete: Literal["dequantize", "keep", "error"] = "dequantize"
    """Table columns on a lattice: add one step of uniform noise, keep, or refuse."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Exact duplicates in your own data: drop them before splitting, since they would leak into the test, or keep them."""
    limit: int | None = None
    """Keep only so many training items."""
    nbits: int = 8
    """Bits kept of 8-bit images (5 for CelebA-HQ): 2**nbits grey levels."""
    image_size: int | None = None
    """Crop and resize a folder's pictures, or celeba's, to this size."""
    flip: Literal["default", "yes", "no"] = "default"
    """Flip training images at random from left to right; by default where it is published so (cifar10, celeba, celebahq256)."""
    invert: bool = False
    """One picture as a density: light is dense instead of dark."""
    toy_sizes: tuple[int, int, int] = (50_000, 5_000, 10_000)
    """Points of a toy set for training, validation and test."""


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
    """Gradients are clipped to this norm, since rare batches explode; 0 leaves them as they are."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are what is validated and saved (shorter at first); 0 does not average."""
    kinetic: float = 0.0
    """Weight of the kinetic energy ∫‖f‖² (RNODE)."""
    jacobian: float = 0.0
    """Weight of the Jacobian's norm ∫‖J‖² (RNODE)."""
    regularisers: Literal["paper", "code"] = "paper"
    """paper: integrals of sums (images: over D); code: RNODE's released means over each block, half on kinetic."""
    validate_every: int = 250
    """Steps between validations."""
    patience: int = 0
    """Stop after so many validations without a better one; 0 never."""
    validation_items: int | None = None
    """Validate on so many items only, chosen once at random; all if not given."""
    test_items: int | None = None
    """Test on so many items only, chosen once at random; all if not given."""
    draws: int = 10
    """Noise draws an item in the final test, where noise enters (images, Hutchinson's trace)."""
    watch_every: int = 100
    """Steps between measurements of the training solver's error."""
    watch_tolerance: float = 0.01
    """Error, in bits/dim or nats/dim, above which the grid gets twice the steps (an adaptive solver a tenth of its tolerances)."""
    max_grid_steps: int = 64
    """Where the watch stops doubling."""
    max_time: float | None = None
    """Train for so many seconds at most in this call, then test; --resume goes on."""
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


# threads=1: matrices are small, and two threads are slower (digits: 2,000 images a second instead of 3,600)
PRESETS = {
    "digits": Preset(
        RunConfig(
            "digits",
            DataConfig("digits"),
            # two hidden layers: the trace has a closed form; a quarter of the pixels is nearly always black, which each
            # pixel's own distribution takes off the field's hands
            ModelConfig(hidden=(270, 270), marginals="gaussianize", alpha=1e-4),
            SolverConfig(grid_steps=4),
            # 1,077 images: overfitting stands in the way, hence weight decay and kinetic energy
            TrainConfig(
                steps=3000, batch_size=256, lr=2e-3, weight_decay=1.0, kinetic=0.1, validate_every=250, threads=1
            ),
        ),
        "real 8x8 digits, MLP with the closed-form exact trace",
        "about 4 minutes on one core",
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
            TrainConfig(steps=8000, batch_size=512, lr=3e-3, validate_every=500, watch_tolerance=0.005, threads=1),
        ),
        "two-dimensional densities (--data 2spirals, checkerboard, rings, picture.png, ...), FFJORD's network",
        "about 12 minutes on one core (checkerboard)",
        (2,),
    ),
    "tabular": Preset(
        RunConfig(
            "tabular",
            DataConfig("power"),
            ModelConfig(hidden=(128, 128), blocks=2, residual="linear"),
            SolverConfig(grid_steps=4),
            TrainConfig(
                steps=6000, batch_size=1024, lr=3e-3, validate_every=500, patience=6, watch_tolerance=0.005, threads=1
            ),
        ),
        "tables (--data file.npy, file.csv, power, gas, ...), two blocks with the closed-form exact trace",
        "about 22 minutes on one busy core for 35,000 rows of 10",
        (6,),
    ),
}

# The published image models. Sources: FFJORD is 1810.01367, its README's command and its script's defaults; RNODE is
# 2002.02798, its example scripts and their script's defaults. Where RNODE's paper and code differ the preset follows
# the paper; the code's own way is --regularisers code, and for CIFAR-10 also --jacobian 0.01 --adaptive --method dopri5
# --gradient adjoint.

# both codes: Adam (betas and eps torch's), lr 1e-3 reached linearly in 1000 steps and held, batch 200, no weight decay,
# no averaging, gradients as they are (clipped at 1e10 and at infinity), one pass over the test set. Both choose weights
# by the test set; here a validation split does (of the large sets on some items, which is ours). Their epoch is 300
# steps of MNIST, 250 of CIFAR-10
_TRAIN = TrainConfig(
    batch_size=200,
    lr=1e-3,
    warmup=1000,
    schedule="constant",
    weight_decay=0.0,
    max_grad_norm=0.0,
    ema_decay=0.0,
    draws=1,
)
# dopri5 at 1e-5 (both scripts, for RNODE's tests too). Both codes pull eᵀJ back (--mode reverse); J e gives the same
# trace and as unbiased a norm in less time (rnode-mnist, batch 4: 1.9 s a step instead of 2.2). Both let the log-det
# drive the step size too, here the point alone does (Adaptive's quadratures_in_norm); RNODE gives a first step of 1/6,
# which dopri5 chooses here
_SOLVER = SolverConfig(
    "dopri5",
    adaptive=True,
    rtol=1e-5,
    atol=1e-5,
    gradient="adjoint",
    eval_method="dopri5",
    eval_rtol=1e-5,
    eval_atol=1e-5,
    divergence="hutchinson",
    mode="forward",
    probes=1,
)
# FFJORD: one Rademacher probe (README: --rademacher True)
_FFJORD_SOLVER = replace(_SOLVER, probe="rademacher")
# RNODE: one Gaussian probe; the scripts for ImageNet64 and CelebA-HQ name no solver, and the default is dopri5
_RNODE_ADAPTIVE = replace(_SOLVER, probe="gaussian")
# rk4 (the 3/8 rule) at step 0.25 in training: MNIST's script, and the paper for CIFAR-10. The code's gradient is the
# adjoint on that grid; the grid's own, by checkpoints, costs as little memory
_RNODE_SOLVER = replace(_RNODE_ADAPTIVE, method="rk4", adaptive=False, grid_steps=4, gradient="checkpoint")
# λ_K = λ_J = 0.01 (all scripts); the published grid is kept: the watch only warns
_RNODE_TRAIN = replace(_TRAIN, kinetic=0.01, jacobian=0.01, max_grid_steps=4)


def _published(
    name: str,
    model: ModelConfig,
    solver: SolverConfig,
    train: TrainConfig,
    shape: tuple[int, ...],
    nbits: int = 8,
    cost: str = "not measured yet",
) -> dict[str, Preset]:
    paper, data = name.split("-")
    hint = " (--num-blocks 1 --lr 6e-4: AFFJORD's re-tuned baseline)" if paper == "ffjord" else ", regularised"
    config = RunConfig(name, DataConfig(data, nbits=nbits), model, solver, train)
    return {name: Preset(config, f"{paper.upper()}'s multiscale model{hint}", cost, shape, 2**nbits)}


PRESETS |= (
    # 1000 epochs (script's default)
    _published("ffjord-mnist", FFJORD, _FFJORD_SOLVER, replace(_TRAIN, steps=300_000, validate_every=300), (1, 28, 28),
               cost="about 12 s a step of 16 images on two cores")
    | _published(
        "ffjord-cifar10",
        FFJORD,
        _FFJORD_SOLVER,
        replace(_TRAIN, steps=250_000, validate_every=250),
        (3, 32, 32),
    )
    # alpha: scripts; 100 epochs (paper; script's default)
    | _published(
        "rnode-mnist",
        replace(RNODE, alpha=1e-5),
        _RNODE_SOLVER,
        replace(_RNODE_TRAIN, steps=30_000, validate_every=300),
        (1, 28, 28),
        cost="about 5 s a step of 16 images on two cores",
    )
    # λ_J = 0.03, rk4: paper (script: 0.01, dopri5)
    | _published(
        "rnode-cifar10",
        RNODE,
        _RNODE_SOLVER,
        replace(_RNODE_TRAIN, jacobian=0.03, steps=25_000, validate_every=250),
        (3, 32, 32),
    )
    # script: 4 epochs of 1,281,149 pictures on 4 GPUs of batch 50
    | _published(
        "rnode-imagenet64",
        RNODE,
        _RNODE_ADAPTIVE,
        replace(_RNODE_TRAIN, steps=25_600, validate_every=1600, validation_items=1000),
        (3, 64, 64),
    )
    # script: 5 bits, 16 epochs of 27,000 faces on 4 GPUs of batch 3
    | _published(
        "rnode-celebahq256",
        RNODE,
        _RNODE_ADAPTIVE,
        replace(_RNODE_TRAIN, batch_size=12, steps=36_000, validate_every=2250, validation_items=120),
        (3, 256, 256),
        nbits=5,
    )
)


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigError: for an unknown one; the nearest is suggested.
    """
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(PRESETS)}; --data NAME chooses data"
        raise ConfigError(f"preset {name!r} is unknown: {hint} (--list shows all)")
    return PRESETS[name]
