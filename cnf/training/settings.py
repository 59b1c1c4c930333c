"""A training put together from the settings of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cnf._utils.errors import ConfigError
from cnf.bases import ConditionalMixture, GaussianMixture
from cnf.config import (
    AdaptiveConfig,
    BothConfig,
    ClassificationConfig,
    ElboConfig,
    GridConfig,
    LikelihoodConfig,
    MatchingConfig,
    RegressionConfig,
    SolverConfig,
    TrainConfig,
)
from cnf.data import DataSplits
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.flow import Flow
from cnf.losses import FlowMatching, Likelihood, Objective, Supervised
from cnf.losses.elbo import ELBO
from cnf.losses.penalties import parse_penalties
from cnf.models import Model
from cnf.neural_ode import Predictor
from cnf.random import Noise
from cnf.runs import RunInfo, write_config
from cnf.training.auto_steps import AutoSteps
from cnf.training.batches import Batches, Validation, fingerprint, shared_settings, validation_rows
from cnf.training.callbacks import Callback, EarlyStopping, TimeLimit, WeightAverage, replaced
from cnf.training.checkpointer import Checkpointer
from cnf.training.defaults import default_callbacks
from cnf.training.feature_history import FeatureHistory, chosen_points
from cnf.training.loggers import ProgressBar
from cnf.training.loop import VALIDATION_SEED, Trainer
from cnf.training.non_finite import NonFinitePolicy
from cnf.training.phases import Phase
from cnf.training.schedule import adamw, learning_rate
from cnf.training.solver_monitor import SolverMonitor
from cnf.training.time_sampler import TimeSampler
from cnf.vae import FlowVAE

__all__ = ["advice", "from_settings", "prepare"]

MIXTURE_ROWS = 20_000  # of the training data, by which a mixture base is fitted
MAX_ERROR = 10.0  # fine-tuning is rolled back above this solver error, as a multiple of the tolerance


def from_settings(
    info: RunInfo,
    data: DataSplits,
    folder: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    group: Group = SINGLE_PROCESS,
    callbacks: Iterable[Callback | type[Callback]] = (),
    log_every: int = 10,
    kind: type[Trainer] = Trainer,
    initial: Mapping[str, Tensor] | None = None,
) -> Trainer:
    """Return the training of a flow, predictor or autoencoder in a run folder; writes only when it resumes.

    Args:
        info: settings and shape of the data.
        data: the splits; the test split is never used here.
        folder: the run folder, with its config.json.
        resume: continue from the folder's checkpoint.
        quiet: show neither progress bar nor messages.
        group: processes that train this run together.
        callbacks: take the place of the default ones (see :func:`~cnf.training.callbacks.replaced`).
        log_every: steps between rows of metrics.jsonl.
        kind: class of the result, a subclass of :class:`~cnf.training.Trainer`.
        initial: weights and statistics to start from, a state dict of the model.

    Raises:
        CheckpointError: on resume, for a checkpoint that is damaged, of another model or of other data.
        ConfigError: for incompatible settings.
    """
    model, stages = prepare(info, data, group, initial)
    config, solver, device = info.config.train, info.config.solver, stages[0].batches.device
    defaults = default_callbacks(folder, partial(write_config, info=info), fingerprint(data), group)
    defaults = replaced(defaults, _configured(config, solver, stages[-1].objective))
    if group.main:
        defaults = replaced(defaults, [ProgressBar(entropy=data.entropy)])
    if isinstance(model, Predictor) and group.main:
        points = data.validation[chosen_points(len(data.validation), math.prod(model.state_shape))]
        defaults.append(FeatureHistory(points))
    trainer = kind(
        model,
        stages,
        steps=config.steps,
        validation=Validation(*validation_rows(data, config.validation_items, VALIDATION_SEED, device)),
        callbacks=replaced(defaults, callbacks),
        validate_every=config.validate_every,
        log_every=log_every,
        accumulate=config.accumulate,
        max_grad_norm=config.max_grad_norm,
        tf32=solver.precision == "tf32",
        group=group,
        quiet=quiet,
        dashes="--",
    )
    checkpointer = trainer.callback(Checkpointer)
    if resume and checkpointer is not None:
        checkpointer.resume()
    return trainer


def prepare(
    info: RunInfo, data: DataSplits, group: Group = SINGLE_PROCESS, initial: Mapping[str, Tensor] | None = None
) -> tuple[Model, list[Phase]]:
    """Return the model on its device, with initial weights and statistics (those of ``initial``, if given), and its training phases.

    Raises:
        ConfigError: for incompatible settings, or processes that differ.
    """
    config = info.config.train
    if config.threads:
        torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    torch.manual_seed(config.seed)  # the initial weights
    model = info.build().to(device)
    batches = Batches(data, config.batch_size, config.seed, device, group, model.like.dtype)
    stages = phases(model, config, batches, data.train_levels)
    if initial is None:
        stages[0].objective.prepare(batches.x)
        if isinstance(model, Flow) and isinstance(model.base, GaussianMixture | ConditionalMixture):
            _fit_mixture(model, model.base, batches)
    else:
        model.load_state_dict(initial)
    group.check_same(shared_settings(info.config, data))
    group.broadcast(model.state_dict().values())  # equal already, up to rounding that differs between machines
    return model, stages


def _fit_mixture(flow: Flow, base: GaussianMixture | ConditionalMixture, batches: Batches) -> None:
    """Fit the mixture of a flow to the latents of training data; a mixture that a user makes is fitted by the user."""
    index = torch.randperm(batches.length, generator=torch.Generator().manual_seed(0))[:MIXTURE_ROWS].to(batches.x.device)
    latents, contexts = [], []
    with torch.no_grad():
        for i, part in enumerate(index.split(4096)):
            x, context = batches.fetch(part)
            latents.append(flow.encode(x, context, noise=Noise(0, "mixture", i)))
            contexts.append(context)
    if isinstance(base, ConditionalMixture):
        base.fit_to(torch.cat(latents), torch.cat([c for c in contexts if c is not None]))
    else:
        base.fit_to(torch.cat(latents))


def _configured(config: TrainConfig, solver: SolverConfig, objective: Objective) -> list[Callback]:
    """Return the callbacks that have settings."""
    grid = solver.train_solver
    fixed = isinstance(grid, GridConfig) and grid.step_size is not None
    kind = AutoSteps if isinstance(grid, GridConfig) and grid.automatic_steps and objective.solves and not fixed else SolverMonitor
    most = grid.steps if isinstance(grid, GridConfig) and fixed else config.max_grid_steps
    return [
        WeightAverage(config.ema_decay),
        TimeSampler(config.solver_check_every),
        kind(config.solver_check_tolerance, most, config.solver_check_every),
        NonFinitePolicy(max_error=MAX_ERROR * config.solver_check_tolerance, advice=advice(config, solver, objective.solves)),
        EarlyStopping(config.patience),
        TimeLimit(config.max_time),
    ]


def phases(model: Model, config: TrainConfig, batches: Batches, redraw: int | None = None) -> list[Phase]:
    """Return the phases in order: two if the objective is ``"both"``, one otherwise; ``redraw`` as in :class:`~cnf.losses.elbo.ELBO`.

    Raises:
        ConfigError: for settings that the model does not support, or that exclude each other.
    """

    def phase(objective: Objective, batches: Batches, lr: float, warmup: int, steps: int | None = None, message: str = "") -> Phase:
        rate = partial(learning_rate, peak=1.0, warmup=warmup, schedule=config.schedule)
        optimizer = partial(adamw, lr=lr, weight_decay=config.weight_decay)
        return Phase(objective, batches, optimizer, lambda step, steps: rate(step, steps=steps), steps, message)

    settings = config.objective
    if isinstance(model, FlowVAE):
        assert isinstance(settings, ElboConfig)
        return [phase(ELBO(model, settings.kl_warmup, redraw), batches, config.lr, config.warmup)]
    if not isinstance(model, Flow):
        assert isinstance(settings, RegressionConfig | ClassificationConfig)
        weights = parse_penalties(settings.penalty, {"kinetic": settings.kinetic, "jacobian": settings.jacobian})
        return [phase(Supervised(model, settings.kind, weights, settings.measure), batches, config.lr, config.warmup)]
    stages: list[Phase] = []
    if isinstance(settings, MatchingConfig):
        if settings.coupling != "independent" and (config.accumulate > 1 or batches.group.size > 1):
            raise ConfigError(
                f"coupling={settings.coupling!r} assigns the noise of a whole batch, which no process or micro-batch has: leave "
                "--accumulate at 1 and train in one process, or take coupling='independent'"
            )
        matching = FlowMatching(model, settings.coupling, settings.fm_weighting, settings.fm_time_sampling, settings.drop_condition)
        stages.append(phase(matching, batches, config.lr, config.warmup))
    if isinstance(settings, LikelihoodConfig):
        likelihood = Likelihood(
            model, settings.kinetic, settings.jacobian, settings.regularisers, settings.step_error,
            parse_penalties(settings.penalty), settings.measure,
        )  # fmt: skip
        if not isinstance(settings, BothConfig):
            return [phase(likelihood, batches, config.lr, config.warmup)]
        own = batches.resized(settings.finetune_batch_size) if settings.finetune_batch_size else batches
        message = f"from here on the likelihood, on batches of {own.size}"
        warmup = min(config.warmup, settings.finetune_steps // 10)
        stages.append(phase(likelihood, own, settings.finetune_lr, warmup, settings.finetune_steps, message))
    return stages


def advice(config: TrainConfig, solver: SolverConfig, solves: bool = True) -> str:
    """Return the options that may help, with their current values.

    Example:
        >>> advice(TrainConfig(lr=0.1, warmup=0), SolverConfig.of(grid_steps=2))
        'a smaller --lr (now 0.1), a longer --warmup (now 0), --kinetic 0.01 or more (now 0), or more --grid-steps (now 2)'
    """
    objective, train = config.objective, solver.train_solver
    finer = f"a smaller --rtol (now {train.rtol:g})" if isinstance(train, AdaptiveConfig) else f"more --grid-steps (now {train.steps})"
    if objective.kind == "flow-matching" or not solves:
        return f"a smaller --lr (now {config.lr:g}), or a longer --warmup (now {config.warmup})"
    kinetic = f"--kinetic 0.01 or more (now {objective.kinetic:g}), " if isinstance(objective, LikelihoodConfig) else ""
    rate = f"--lr (now {config.lr:g})"
    if isinstance(objective, BothConfig):
        rate = f"--lr or --finetune-lr (now {config.lr:g}, {objective.finetune_lr:g})"
    return f"a smaller {rate}, a longer --warmup (now {config.warmup}), {kinetic}or {finer}"
