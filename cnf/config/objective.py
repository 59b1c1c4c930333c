"""Settings of training objectives, one class for each family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cnf.config.model import ODE
from cnf.config.rules import NONNEGATIVE, POSITIVE, Bounds, Family, setting, tag
from cnf.config.solver import GRID
from cnf.config.tagged import Settings

__all__ = ["BothConfig", "ClassificationConfig", "ElboConfig", "LikelihoodConfig", "MatchingConfig", "ObjectiveConfig", "RegressionConfig"]

REGULARISED = Family("regularised", (True,), "kinetic, jacobian and penalty, and none is given")


@dataclass(frozen=True)
class _Penalised(Settings):
    """Weighted and measured integrals along the path."""

    kinetic: float = setting(0.0, NONNEGATIVE, given=(ODE,))
    """Weight of the kinetic energy ∫‖f‖² (RNODE)."""
    jacobian: float = setting(0.0, NONNEGATIVE, given=(ODE,))
    """Weight of the Jacobian's squared Frobenius norm ∫‖J‖² (RNODE)."""
    penalty: tuple[str, ...] = setting((), given=(ODE,), later=True)
    """Weights of further integrals, NAME=WEIGHT: directional (∫‖J f‖²), total-derivative (∫‖J f + ∂f/∂t‖²), and as in the
    released codes l1int, l2int, dl2int, JFrobint, JdiagFrobint, JoffdiagFrobint, directional_penalty, total_deriv."""
    measure: tuple[str, ...] = setting((), given=(ODE,), later=True)
    """Integrals to report in metrics.jsonl without penalising them: kinetic, jacobian, directional, total-derivative, l1int, ..."""


@dataclass(frozen=True)
class LikelihoodConfig(_Penalised):
    """Maximum likelihood, possibly with RNODE's regularisers (2002.02798)."""

    kind: Literal["likelihood"] = tag("likelihood")
    step_error: float = setting(0.0, NONNEGATIVE, given=(GRID,))
    """Weight of the local error of the grid (ERNODE), for flows that few solver steps solve."""
    regularisers: Literal["paper", "code"] = setting("paper", given=(REGULARISED,))
    """paper: RNODE's eq. 17, integrals of sums (images: divided by D ln 2, like -log p in bits/dim); code: means over
    each block as in its released code, half of the kinetic energy, added to bits/dim."""


@dataclass(frozen=True)
class MatchingConfig(Settings):
    """Flow matching (2210.02747), which solves no ODE in training."""

    kind: Literal["flow-matching"] = tag("flow-matching")
    coupling: Literal["independent", "optimal-transport"] = "independent"
    """Flow matching: pair noise with data at random, or by optimal transport within the batch (one
    process, --accumulate 1; within each class with --condition label)."""
    fm_weighting: Literal["default", "likelihood", "even"] = "default"
    """Flow matching: loss weighting over time. likelihood: by the cost in likelihood (default for data with normal
    noise); even: uniform (there, relative to the size of the field)."""
    fm_time_sampling: Literal["importance", "even"] = "importance"
    """Flow matching: sample times by importance (where the loss is large) or uniformly; the expected loss is the
    same."""
    drop_condition: float = setting(0.0, Bounds("zero or more, less than 1", least=0, below=1), later=True)
    """Flow matching with --condition: share of the rows trained without it, such as 0.1, for `cnf sample --guidance`."""


@dataclass(frozen=True)
class BothConfig(MatchingConfig, LikelihoodConfig):
    """Flow matching, then likelihood in the last steps."""

    kind: Literal["both"] = tag("both")  # type: ignore[assignment]
    finetune_steps: int = setting(100, POSITIVE)
    """--objective both: likelihood steps at the end of --steps, with --kinetic, --jacobian and the solver's grid; steps
    added to a finished run are likelihood steps as well."""
    finetune_batch_size: int | None = setting(None, POSITIVE)
    """--objective both: batch size of the likelihood steps; default: --batch-size."""
    finetune_lr: float = setting(2e-4, POSITIVE)
    """--objective both: peak learning rate of the likelihood steps."""


@dataclass(frozen=True)
class RegressionConfig(_Penalised):
    """Least squares of a predictor."""

    kind: Literal["regression"] = tag("regression")


@dataclass(frozen=True)
class ClassificationConfig(_Penalised):
    """Cross entropy of a predictor."""

    kind: Literal["classification"] = tag("classification")


@dataclass(frozen=True)
class ElboConfig(Settings):
    """Negative evidence lower bound of an autoencoder."""

    kind: Literal["elbo"] = tag("elbo")
    kl_warmup: int = setting(0, NONNEGATIVE)
    """vae: steps in which the weight of the KL term rises linearly from 0 to 1; validation and test always have 1."""


ObjectiveConfig = LikelihoodConfig | MatchingConfig | BothConfig | RegressionConfig | ClassificationConfig | ElboConfig
