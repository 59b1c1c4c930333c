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
    """Which data."""

    data: str = "digits"
    """A known data set (digits, 8gaussians, mnist, miniboone, ...) or a path: .npz, .npy, a table (.csv, .tsv, .csv.gz, .parquet, .xlsx), a
    folder, one picture."""
    data_root: str = "data"
    """Folder where named data sets are looked for and downloaded to."""
    download: bool = True
    """Whether named data sets that are not there may be downloaded."""
    split_seed: int = setting(0, SEED, given=(RANDOM,))
    """Decides the split where none is fixed; apart from --seed, so that runs share their test set."""
    data_seed: int = setting(0, SEED, given=(DRAWN,))
    """Draws toy points and the noise of --discrete dequantize; apart from --seed, so that runs share their data."""
    validation_fraction: float = 0.1
    """Share of your own data that is held out for validation."""
    test_fraction: float = 0.1
    """Share of your own data that is held out for the test."""
    condition: str = setting("none", given=(DENSITY,))
    """label: one-hot classes as context (npz 'labels', sub-folder names). COLUMNS, separated by commas: those of a table, for p(others | COLUMNS);
    numbers are standardised, text is one-hot."""
    discrete: Literal["dequantize", "keep", "error"] = setting("dequantize", given=(TABLES,))
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
    columns: str | None = setting(None, given=(TABLES,), later=True)
    """Columns of your own table to keep, separated by commas; all if not given."""
    drop_columns: str | None = setting(None, given=(TABLES,), later=True)
    """Columns of your own table to leave out, separated by commas."""
    missing: Literal["error", "drop"] = setting("error", given=(TABLES,), later=True)
    """Rows of your own table with missing values: refuse, or drop them."""
    dependent: Literal["error", "keep"] = setting("error", given=(TABLES,), later=True)
    """Columns of your own table that follow from others (a copy, a sum, shares of 100 %): refuse, or keep them."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained."""

    objective: Literal["likelihood", "flow-matching", "both", "regression", "classification"] = "likelihood"
    """Densities: the likelihood; flow matching, whose training solves no ODE; or both: matching, then the likelihood in the last
    --finetune-steps. With --architecture node or resnet: the data's targets or classes."""
    steps: int = setting(3000, POSITIVE)
    """Training steps."""
    coupling: Literal["independent", "optimal-transport"] = setting("independent", given=(MATCHING,))
    """Matching: noise is paired with items at random, or by optimal transport within the batch (in one process, --accumulate 1; within
    each class with --condition label)."""
    match_weights: Literal["default", "likelihood", "even"] = setting("default", given=(MATCHING,))
    """Matching: an error counts at each time what it costs in likelihood (default where the data have normal noise), or the same (there, as
    a share of the field's size)."""
    match_times: Literal["importance", "even"] = setting("importance", given=(MATCHING,))
    """Matching: times are drawn where the loss was found to be large, or evenly; the loss is the same in expectation."""
    tune_steps: int = setting(100, POSITIVE, given=(BOTH,))
    """--objective both: so many of --steps, the last, are the likelihood's, with --kinetic, --jacobian and the solver's grid; so are all that
    a finished run is given later."""
    tune_batch_size: int | None = setting(None, POSITIVE, given=(BOTH,))
    """--objective both: items a step of those; --batch-size if not given."""
    tune_lr: float = setting(2e-4, POSITIVE, given=(BOTH,))
    """--objective both: peak learning rate of those."""
    batch_size: int = setting(256, POSITIVE)
    """Items a step."""
    accumulate: int = setting(1, POSITIVE)
    """Micro-batches a step, one after another: the same gradient as the whole batch's, in the memory of one of them."""
    lr: float = setting(1e-3, POSITIVE)
    """Peak learning rate."""
    warmup: int = setting(100, NONNEGATIVE)
    """Steps of linear warm-up; without it the first steps of a flow can throw it far off."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: down to zero along a cosine, or constant."""
    weight_decay: float = setting(0.0, NONNEGATIVE)
    """Decoupled weight decay (AdamW); zero is Adam."""
    max_grad_norm: float = setting(10.0, NONNEGATIVE)
    """Gradients are clipped to this norm, since rare batches explode; 0 leaves them as they are."""
    ema_decay: float = setting(0.999, DECAY)
    """Decay of the averaged weights, which are what is validated and saved (shorter at first); 0 does not average."""
    kinetic: float = setting(0.0, NONNEGATIVE, given=(DENSITY, BY_LIKELIHOOD,))
    """Weight of the kinetic energy ∫‖f‖² (RNODE)."""
    jacobian: float = setting(0.0, NONNEGATIVE, given=(DENSITY, BY_LIKELIHOOD,))
    """Weight of the Jacobian's norm ∫‖J‖² (RNODE)."""
    step_error: float = setting(0.0, NONNEGATIVE, given=(DENSITY, BY_LIKELIHOOD, GRID,))
    """Weight of the grid's own error, step by step (ERNODE): flows that few steps solve."""
    regularisers: Literal["paper", "code"] = setting("paper", given=(DENSITY, BY_LIKELIHOOD, REGULARISED,))
    """paper: RNODE's eq. 17, integrals of sums (images: divided by D ln 2, as -log p is for bits/dim); code: its released code's means
    over each block, half on kinetic, added to bits/dim."""
    validate_every: int = setting(250, POSITIVE)
    """Steps between validations."""
    patience: int = setting(0, NONNEGATIVE)
    """Stop after so many validations without a better one (--objective both: in its fine-tuning); 0 never."""
    validation_items: int | None = setting(None, POSITIVE)
    """Validate on so many items only, chosen once at random; all if not given."""
    test_items: int | None = setting(None, POSITIVE)
    """Test on so many items only, chosen once at random; all if not given."""
    draws: int = setting(10, POSITIVE, given=(DENSITY, NOISY,))
    """Noise draws an item in the final test, where noise enters (images, Hutchinson's trace)."""
    watch_every: int = setting(100, POSITIVE, given=(ODE, WATCHED,))
    """Steps between measurements of the training solver's error, and of matching's loss over time."""
    watch_tolerance: float = setting(0.01, POSITIVE, given=(ODE, BY_LIKELIHOOD,))
    """Error, in bits/dim or nats/dim, above which the grid gets twice the steps (an adaptive solver a tenth of its tolerances)."""
    max_grid_steps: int = setting(64, COUNT, given=(ODE, BY_LIKELIHOOD, GRID,))
    """Where the watch stops doubling."""
    max_time: float | None = setting(None, POSITIVE)
    """Train for so many seconds at most in this call, then test; --resume goes on. The rate's cosine stays that of --steps: for a short
    training give fewer of those."""
    seed: int = setting(0, SEED)
    """Seed of weights, order and noise."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, ..."""
    threads: int | None = setting(None, THREADS)
    """CPU threads; torch's choice if not given."""

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
