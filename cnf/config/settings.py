"""Settings of a run with their defaults: data, model, solver, training."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from cnf.config.model import ODE, ModelConfig
from cnf.config.rules import (
    COUNT,
    DENSITY,
    NONNEGATIVE,
    POSITIVE,
    SEED,
    Bounds,
    Family,
    check_settings,
    outside,
    setting,
)
from cnf.config.solver import BY_LIKELIHOOD, GRID, SolverConfig

__all__ = ["DataConfig", "Preset", "RunConfig", "TrainConfig"]


DECAY = Bounds("0 (no averaging) or more, below 1", least=0, below=1)
THREADS = Bounds("a positive number, at most 4096", least=1, most=4096)
MATCHING = Family("objective", ("flow-matching", "both"), "objective='flow-matching' or 'both'")
BOTH = Family("objective", ("both",), "objective='both'")
REGULARISED = Family("regularised", (True,), "kinetic and jacobian, and both are zero")
TABLES = Family("kind", ("table",), "tables")
RANDOM = Family("split", ("random",), "random splits, and that of these data is fixed")
DRAWN = Family("kind", ("toy", "table"), "toy points and the noise on a table's columns")
NOISY = Family("noisy", (True,), "likelihoods with noise, and the exact trace of vectors (or of the middle of each grey level) has none")
WATCHED = Family("watched", (True,), "solver checks and match_times='importance'")


@dataclass(frozen=True)
class DataConfig:
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
    """Seed of toy points and of --discrete dequantize; separate from --seed, so that runs share their data."""
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
    limit: int | None = None
    """Maximum number of training rows."""
    nbits: int = 8
    """Bits kept of 8-bit images (5 for CelebA-HQ): 2**nbits grey levels."""
    image_size: int | None = None
    """Crop and resize images of a folder, or of celeba, to this size."""
    flip: Literal["default", "yes", "no"] = "default"
    """Flip training images horizontally at random; default: as published (cifar10, celeba, celebahq256)."""
    invert: bool = False
    """Density of an image in the plane: light is dense instead of dark."""
    toy_sizes: tuple[int, int, int] = (50_000, 5_000, 10_000)
    """Training, validation and test samples of a toy set."""
    columns: str | None = setting(None, given=(TABLES,), later=True)
    """Columns of a custom table to keep, separated by commas; default: all."""
    drop_columns: str | None = setting(None, given=(TABLES,), later=True)
    """Columns of a custom table to leave out, separated by commas."""
    missing: Literal["error", "drop"] = setting("error", given=(TABLES,), later=True)
    """Rows of a custom table with missing values: reject, or drop."""
    dependent: Literal["error", "keep"] = setting("error", given=(TABLES,), later=True)
    """Linearly dependent columns of a custom table (copies, sums, shares of 100 %): reject, or keep."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class TrainConfig:
    """Objective, optimiser and schedule of a run."""

    objective: Literal["likelihood", "flow-matching", "both", "regression", "classification"] = "likelihood"
    """Densities: maximum likelihood; flow matching, which solves no ODE in training; or both: flow matching, then
    likelihood in the last --finetune-steps. With --architecture node or resnet: regression or classification."""
    steps: int = setting(3000, POSITIVE)
    """Optimiser steps."""
    coupling: Literal["independent", "optimal-transport"] = setting("independent", given=(MATCHING,))
    """Flow matching: pair noise with data at random, or by optimal transport within the batch (one
    process, --accumulate 1; within each class with --condition label)."""
    match_weights: Literal["default", "likelihood", "even"] = setting("default", given=(MATCHING,))
    """Flow matching: loss weighting over time. likelihood: by the cost in likelihood (default for data with normal
    noise); even: uniform (there, relative to the size of the field)."""
    match_times: Literal["importance", "even"] = setting("importance", given=(MATCHING,))
    """Flow matching: sample times by importance (where the loss is large) or uniformly; the expected loss is the
    same."""
    tune_steps: int = setting(100, POSITIVE, given=(BOTH,))
    """--objective both: likelihood steps at the end of --steps, with --kinetic, --jacobian and the solver's grid; steps
    added to a finished run are likelihood steps as well."""
    tune_batch_size: int | None = setting(None, POSITIVE, given=(BOTH,))
    """--objective both: batch size of the likelihood steps; default: --batch-size."""
    tune_lr: float = setting(2e-4, POSITIVE, given=(BOTH,))
    """--objective both: peak learning rate of the likelihood steps."""
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
    kinetic: float = setting(0.0, NONNEGATIVE, given=(DENSITY, BY_LIKELIHOOD,))
    """Weight of the kinetic energy ∫‖f‖² (RNODE)."""
    jacobian: float = setting(0.0, NONNEGATIVE, given=(DENSITY, BY_LIKELIHOOD,))
    """Weight of the Jacobian's squared Frobenius norm ∫‖J‖² (RNODE)."""
    step_error: float = setting(0.0, NONNEGATIVE, given=(DENSITY, BY_LIKELIHOOD, GRID,))
    """Weight of the local error of the grid (ERNODE), for flows that few solver steps solve."""
    regularisers: Literal["paper", "code"] = setting("paper", given=(DENSITY, BY_LIKELIHOOD, REGULARISED,))
    """paper: RNODE's eq. 17, integrals of sums (images: divided by D ln 2, like -log p in bits/dim); code: means over
    each block as in its released code, half of the kinetic energy, added to bits/dim."""
    validate_every: int = setting(250, POSITIVE)
    """Steps between validations."""
    patience: int = setting(0, NONNEGATIVE)
    """Stop after this many validations without improvement (--objective both: in the likelihood steps); 0 disables."""
    validation_items: int | None = setting(None, POSITIVE)
    """Validate on a random subset of this size; default: all."""
    test_items: int | None = setting(None, POSITIVE)
    """Test on a random subset of this size; default: all."""
    draws: int = setting(10, POSITIVE, given=(DENSITY, NOISY,))
    """Noise samples for each row of the final test, where noise enters (images, Hutchinson's estimate)."""
    watch_every: int = setting(100, POSITIVE, given=(ODE, WATCHED,))
    """Steps between measurements of the training solver's error, and of the flow-matching loss over time."""
    watch_tolerance: float = setting(0.01, POSITIVE, given=(ODE, BY_LIKELIHOOD,))
    """Solver error, in bits/dim or nats/dim, above which the solver steps of a grid are doubled (the tolerances of an
    adaptive solver divided by ten)."""
    max_grid_steps: int = setting(64, COUNT, given=(ODE, BY_LIKELIHOOD, GRID,))
    """Maximum number of solver steps that are set by the solver checks."""
    max_time: float | None = setting(None, POSITIVE)
    """Maximum training time of this call in seconds, followed by the test; --resume continues. The cosine schedule is
    that of --steps: for a short training reduce those."""
    seed: int = setting(0, SEED)
    """Seed of weights, order of the data and noise."""
    device: str = "cpu"
    """Training device: cpu, cuda, cuda:1, ..."""
    threads: int | None = setting(None, THREADS)
    """CPU threads; default: torch's choice."""

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def density(self) -> bool:
        """True if a density is trained, not a predictor."""
        return self.objective not in ("regression", "classification")

    @property
    def warmup_of_tuning(self) -> int:
        """Warm-up steps of the fine-tuning: ``warmup``, but at most a tenth of ``tune_steps``."""
        return min(self.warmup, self.tune_steps // 10)


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    name: str = "digits"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def parts(self) -> tuple[DataConfig, ModelConfig, SolverConfig, TrainConfig]:
        """The four parts of the settings; their fields all differ in name."""
        return self.data, self.model, self.solver, self.train

    def map(self, change: Callable[[Any], Any]) -> RunConfig:
        """Return the run with ``change`` applied to each of its parts."""
        return RunConfig(self.name, *map(change, self.parts))

    def tags(self, **facts: Any) -> dict[str, Any]:
        """Return what decides which settings apply: all settings by name, facts about training, and those given."""
        values = {name: value for part in self.parts for name, value in vars(part).items()}
        matching = self.train.objective == "flow-matching"
        values |= {
            "solves": self.model.architecture != "resnet" and (not matching or self.model.drive != "none"),
            "regularised": bool(self.train.kinetic or self.train.jacobian),
            "watched": not matching or self.train.match_times == "importance",
        }
        return values | facts

    def meaningless(self, names: Collection[str], **facts: Any) -> tuple[str, Any, str] | None:
        """Return the first of the settings ``names`` that does nothing in this run: its name, default and why.

        ``facts`` are known once the data are: ``events``, ``kind``, ``split``, ``noisy``. A value that is the
        setting's default is never meaningless.
        """
        tags = self.tags(**facts)
        for part in self.parts:
            for each in fields(part):
                family = outside((*each.metadata.get("when", ()), *each.metadata.get("given", ())), tags)
                if each.name in names and family is not None and getattr(part, each.name) != each.default:
                    return each.name, each.default, family.words
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
