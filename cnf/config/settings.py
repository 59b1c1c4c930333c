"""Settings of a run with their defaults: data, model, solver, training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cnf.config.model import ModelConfig
from cnf.config.solver import LATER, SolverConfig

__all__ = ["DataConfig", "Preset", "RunConfig", "TrainConfig"]


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
    split_seed: int = 0
    """Decides the split where none is fixed; apart from --seed, so that runs share their test set."""
    data_seed: int = 0
    """Draws toy points and the noise of --discrete dequantize; apart from --seed, so that runs share their data."""
    validation_fraction: float = 0.1
    """Share of your own data that is held out for validation."""
    test_fraction: float = 0.1
    """Share of your own data that is held out for the test."""
    condition: str = "none"
    """label: one-hot classes as context (npz 'labels', sub-folder names). COLUMNS, separated by commas: those of a table, for p(others | COLUMNS);
    numbers are standardised, text is one-hot."""
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
    columns: str | None = field(default=None, metadata=LATER)
    """Columns of your own table to keep, separated by commas; all if not given."""
    drop_columns: str | None = field(default=None, metadata=LATER)
    """Columns of your own table to leave out, separated by commas."""
    missing: Literal["error", "drop"] = field(default="error", metadata=LATER)
    """Rows of your own table with missing values: refuse, or drop them."""
    dependent: Literal["error", "keep"] = field(default="error", metadata=LATER)
    """Columns of your own table that follow from others (a copy, a sum, shares of 100 %): refuse, or keep them."""


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained."""

    objective: Literal["likelihood", "flow-matching", "both", "regression", "classification"] = "likelihood"
    """Densities: the likelihood; flow matching, whose training solves no ODE; or both: matching, then the likelihood in the last
    --tune-steps. With --architecture node or resnet: the data's targets or classes."""
    steps: int = 3000
    """Training steps."""
    coupling: Literal["independent", "optimal-transport"] = "independent"
    """Matching: noise is paired with items at random, or by optimal transport within the batch (in one process, --accumulate 1; within
    each class with --condition label)."""
    match_weights: Literal["default", "likelihood", "even"] = "default"
    """Matching: an error counts at each time what it costs in likelihood (default where the data have normal noise), or the same (there, as
    a share of the field's size)."""
    match_times: Literal["importance", "even"] = "importance"
    """Matching: times are drawn where the loss was found to be large, or evenly; the loss is the same in expectation."""
    tune_steps: int = 100
    """--objective both: so many of --steps, the last, are the likelihood's, with --kinetic, --jacobian and the solver's grid; so are all that
    a finished run is given later."""
    tune_batch_size: int | None = None
    """--objective both: items a step of those; --batch-size if not given."""
    tune_lr: float = 2e-4
    """--objective both: peak learning rate of those."""
    batch_size: int = 256
    """Items a step."""
    accumulate: int = 1
    """Micro-batches a step, one after another: the same gradient as the whole batch's, in the memory of one of them."""
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
    step_error: float = 0.0
    """Weight of the grid's own error, step by step (ERNODE): flows that few steps solve."""
    regularisers: Literal["paper", "code"] = "paper"
    """paper: RNODE's eq. 17, integrals of sums (images: divided by D ln 2, as -log p is for bits/dim); code: its released code's means
    over each block, half on kinetic, added to bits/dim."""
    validate_every: int = 250
    """Steps between validations."""
    patience: int = 0
    """Stop after so many validations without a better one (--objective both: in its fine-tuning); 0 never."""
    validation_items: int | None = None
    """Validate on so many items only, chosen once at random; all if not given."""
    test_items: int | None = None
    """Test on so many items only, chosen once at random; all if not given."""
    draws: int = 10
    """Noise draws an item in the final test, where noise enters (images, Hutchinson's trace)."""
    watch_every: int = 100
    """Steps between measurements of the training solver's error, and of matching's loss over time."""
    watch_tolerance: float = 0.01
    """Error, in bits/dim or nats/dim, above which the grid gets twice the steps (an adaptive solver a tenth of its tolerances)."""
    max_grid_steps: int = 64
    """Where the watch stops doubling."""
    max_time: float | None = None
    """Train for so many seconds at most in this call, then test; --resume goes on. The rate's cosine stays that of --steps: for a short
    training give fewer of those."""
    seed: int = 0
    """Seed of weights, order and noise."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, ..."""
    threads: int | None = None
    """CPU threads; torch's choice if not given."""

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


@dataclass(frozen=True)
class Preset:
    """Settings of a run, with a summary and the measured cost."""

    config: RunConfig
    summary: str
    cost: str
    shape: tuple[int, ...]  # event_shape of its data, for the parameter count
    levels: int | None = None
    outputs: int = 0  # number of outputs of a predictor; 0 for a density
