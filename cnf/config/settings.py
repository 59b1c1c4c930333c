"""Settings of a run with their defaults: data, model, solver, training."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cnf.config.model import ODE, VECTORS, FlowConfig, ModelConfig
from cnf.config.objective import LikelihoodConfig, MatchingConfig, ObjectiveConfig
from cnf.config.rules import (
    COUNT,
    DENSITY,
    GENERATIVE,
    KINDS,
    NONNEGATIVE,
    POSITIVE,
    SEED,
    Bounds,
    Family,
    outside,
    setting,
)
from cnf.config.solver import BY_LIKELIHOOD, FREE, GRID, SolverConfig
from cnf.config.tagged import Settings, schema, values

__all__ = ["DataConfig", "Preset", "RunConfig", "TrainConfig"]


DECAY = Bounds("0 (no averaging) or more, below 1", least=0, below=1)
THREADS = Bounds("a positive number, at most 4096", least=1, most=4096)
ANGLE = Bounds("degrees above 0 and below 360", above=0, below=360)
TABLES = Family("kind", ("table",), "tables")
TOYS = Family("kind", ("toy",), "toy points")
RANDOM = Family("split", ("random",), "random splits, and that of these data is fixed")
DRAWN = Family("drawn", (True,), "toy points, the noise on a table's columns, and images with --binarize")
AUTOENCODED = Family("objective", KINDS["autoencoder"].objectives, "autoencoders")
NOISY = Family("noisy", (True,), "likelihoods with noise, and the exact trace of vectors (or of the middle of each grey level) has none")
WATCHED = Family("watched", (True,), "solver checks and fm_time_sampling='importance'")


@dataclass(frozen=True)
class DataConfig(Settings):
    """Data set, splits and preprocessing of a run."""

    data: str = "digits"
    """Named data set (digits, 8gaussians, mnist, miniboone, ...) or a path: .npz, .npy, a
    table (.csv, .tsv, .csv.gz, .parquet, .xlsx), a folder, an image."""
    data_root: str = "data"
    """Folder of named data sets, also the download target."""
    download: bool = True
    """Allow downloads of missing named data sets."""
    split_seed: int = setting(0, SEED, given=(RANDOM,))
    """Seed of random splits; separate from --seed, so that runs share their test set."""
    data_seed: int = setting(0, SEED, given=(DRAWN,))
    """Seed of toy points, of --discrete dequantize and --binarize; separate from --seed, so that runs share their data."""
    validation_fraction: float = 0.1
    """Validation fraction of custom data."""
    test_fraction: float = 0.1
    """Test fraction of custom data."""
    condition: str = setting("none", given=(DENSITY,))
    """Context of the density. label: one-hot classes (npz 'labels', names of sub-folders). COLUMNS, separated by
    commas: columns of a table, for p(others | COLUMNS); numbers are standardised, text is one-hot."""
    discrete: Literal["dequantize", "keep", "error"] = setting("dequantize", given=(TABLES,))
    """Discrete table columns: add one step of uniform noise, keep, or reject."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Duplicate rows of custom data: drop before splitting, since they would leak into the test set, or keep."""
    max_train_rows: int | None = None
    """Maximum number of training rows."""
    nbits: int = 8
    """Bits kept of 8-bit images (5 for CelebA-HQ): 2**nbits grey levels."""
    image_size: int | None = None
    """Crop and resize images of a folder, or of celeba, to this size."""
    binarize: Literal["no", "once", "redraw"] = setting("no", given=(AUTOENCODED,), later=True)
    """Autoencoders: binary images. once: each pixel is 1 with its grey level as probability; redraw: the same, and
    training images are drawn again at each step; no: the grey levels themselves (--nbits 1: black and white)."""
    flip: Literal["default", "yes", "no"] = "default"
    """Flip training images horizontally at random; default: as published (cifar10, celeba, celebahq256)."""
    invert: bool = False
    """Density of an image in the plane: light is dense instead of dark."""
    toy_sizes: tuple[int, int, int] = (50_000, 5_000, 10_000)
    """Training, validation and test samples of a toy set."""
    hold_out_angle: float | None = setting(None, ANGLE, given=(TOYS,), later=True)
    """Supervised toy sets in the plane: train outside of a slice of these degrees, validate inside of it (ANODE, figure 9)."""
    columns: str | None = setting(None, given=(TABLES,), later=True)
    """Columns of a custom table to keep, separated by commas; default: all."""
    drop_columns: str | None = setting(None, given=(TABLES,), later=True)
    """Columns of a custom table to leave out, separated by commas."""
    missing: Literal["error", "drop"] = setting("error", given=(TABLES,), later=True)
    """Rows of a custom table with missing values: reject, or drop."""
    dependent: Literal["error", "keep"] = setting("error", given=(TABLES,), later=True)
    """Linearly dependent columns of a custom table (copies, sums, shares of 100 %): reject, or keep."""


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Objective, optimiser and schedule of a run."""

    objective: ObjectiveConfig = LikelihoodConfig()
    """Densities: maximum likelihood; flow matching, which solves no ODE in training; or both: flow matching, then
    likelihood in the last --finetune-steps. With --architecture node or resnet: regression or classification; with vae: elbo."""
    steps: int = setting(3000, POSITIVE)
    """Optimiser steps."""
    batch_size: int = setting(256, POSITIVE)
    """Rows of a step."""
    accumulate: int = setting(1, POSITIVE)
    """Micro-batches of a step, computed in turn: the same gradient in the memory of one of them."""
    lr: float = setting(1e-3, POSITIVE)
    """Peak learning rate."""
    warmup: int = setting(100, NONNEGATIVE)
    """Steps of linear warm-up, which keeps the first steps from diverging."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: cosine decay to zero, or constant."""
    weight_decay: float = setting(0.0, NONNEGATIVE)
    """Decoupled weight decay (AdamW); zero is Adam."""
    max_grad_norm: float = setting(10.0, NONNEGATIVE)
    """Clip gradients to this norm, against rare batches with large ones; 0 disables clipping."""
    ema_decay: float = setting(0.999, DECAY)
    """Decay of the averaged weights that are validated and saved (lower in early steps); 0 disables averaging."""
    validate_every: int = setting(250, POSITIVE)
    """Steps between validations."""
    patience: int = setting(0, NONNEGATIVE)
    """Stop after this many validations without improvement (--objective both: in the likelihood steps); 0 disables."""
    validation_items: int | None = setting(None, POSITIVE)
    """Validate on a random subset of this size; default: all."""
    test_items: int | None = setting(None, POSITIVE)
    """Test on a random subset of this size; default: all."""
    noise_samples: int = setting(10, POSITIVE, given=(GENERATIVE, NOISY,))
    """Noise samples for each row of the final test, where noise enters (images, Hutchinson's estimate; vae: draws of z)."""
    solver_check_every: int = setting(100, POSITIVE, given=(ODE, WATCHED,))
    """Steps between measurements of the training solver's error, and of the flow-matching loss over time."""
    solver_check_tolerance: float = setting(0.01, POSITIVE, given=(ODE, BY_LIKELIHOOD,))
    """Solver error, in bits/dim or nats/dim (vae: nats), above which the solver steps of a grid are doubled (the tolerances of an
    adaptive solver divided by ten)."""
    max_grid_steps: int = setting(64, COUNT, given=(ODE, BY_LIKELIHOOD, GRID, FREE))
    """Maximum number of solver steps that are set by the solver checks."""
    minutes: float | None = setting(None, POSITIVE, given=(DENSITY, VECTORS), later=True)
    """Tables and points: find the start (marginals and Gaussian mixture) and train, all within this time (CPU minutes). The
    steps, rates, solver and start are then chosen; the result is not worse than the best mixture on validation."""
    max_time: float | None = setting(None, POSITIVE)
    """Maximum training time of this call in seconds, followed by the test; --resume continues. The cosine schedule is
    that of --steps: for a short training reduce those."""
    seed: int = setting(0, SEED)
    """Seed of weights, order of the data and noise."""
    device: str = "cpu"
    """Training device: cpu, cuda, cuda:1, ..."""
    threads: int | None = setting(None, THREADS)
    """CPU threads; default: torch's choice."""

    @property
    def model_kind(self) -> str:
        """Kind of model that is trained, one of :data:`~cnf.config.rules.KINDS`, ``"density"``, ``"predictor"`` or ``"autoencoder"``."""
        return next(name for name, kind in KINDS.items() if self.objective.kind in kind.objectives)


@dataclass(frozen=True)
class RunConfig(Settings):
    """A whole run.

    Example:
        >>> RunConfig().change(lr=0.01, field="conv", hidden=(8,)).model.field.hidden
        (8,)
    """

    name: str = "digits"
    data: DataConfig = DataConfig()
    model: ModelConfig = FlowConfig()
    solver: SolverConfig = SolverConfig()
    train: TrainConfig = TrainConfig()

    @property
    def parts(self) -> dict[str, Settings]:
        """The four parts of the settings; all settings in them differ in name."""
        return {"data": self.data, "model": self.model, "solver": self.solver, "train": self.train}

    def tags(self, **facts: Any) -> dict[str, Any]:
        """Return what decides which settings apply: all settings by name, facts about training, and those given."""
        tags = {each.name: each.value for each in values(self)}
        objective = self.train.objective
        matching = isinstance(objective, MatchingConfig) and not isinstance(objective, LikelihoodConfig)
        ode = tags["architecture"] != "resnet" and tags.get("posterior") != "normal"
        tags |= {
            "ode": ode,
            "traced": ode and self.train.model_kind != "predictor",
            "solves": ode and (not matching or tags.get("augmented_time", "none") != "none"),
            "denoiser": tags.get("field") == "unet" and tags.get("dequantize") == "truncated-normal",
            "regularised": bool(tags.get("kinetic") or tags.get("jacobian") or tags.get("penalty")),
            "watched": not matching or tags["fm_time_sampling"] == "importance",
        }
        if "kind" in facts:
            tags["drawn"] = facts["kind"] in ("toy", "table") or tags["binarize"] != "no"
        return tags | facts

    def meaningless(self, names: Collection[str], **facts: Any) -> tuple[str, Any, str] | None:
        """Return the first of the settings ``names`` that does nothing in this run: its name, default and why.

        ``facts`` are known once the data are: ``events``, ``kind``, ``split``, ``noisy``. A value that is the
        setting's default is never meaningless.
        """
        tags, places = self.tags(**facts), schema((RunConfig,))
        for each in values(self):
            family, default = outside(each.given, tags), places[each.name][0].field.default
            if each.name in names and family is not None and each.value != default:
                return each.name, default, family.words
        return None


@dataclass(frozen=True)
class Preset:
    """Settings of a run, with a summary and the measured cost."""

    config: RunConfig
    summary: str
    cost: str
    shape: tuple[int, ...]  # event_shape of its data, for the parameter count
    levels: int | None = None
    outputs: int = 0  # number of outputs of a predictor; 0 for a density
    otherwise: Mapping[str, Any] = field(default_factory=dict)  # settings of families that it does not choose, if a user does
