"""cnf.fit: train any flow, predictor or module with a loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from cnf._utils.compilation import require_compile
from cnf._utils.errors import ConfigError, DataError, require_at_least
from cnf.bases import Base
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.flow import Flow
from cnf.losses import CustomLoss, FlowMatching, Likelihood, Objective, Supervised
from cnf.losses.custom import LossFunction
from cnf.neural_ode import Predictor
from cnf.runs import ModelInfo, describe, has_trainer, leftovers, write_model_info
from cnf.runs.lock import LOCK
from cnf.training.batches import Batches
from cnf.training.callbacks import Callback, replaced
from cnf.training.checkpointer import Checkpointer
from cnf.training.defaults import default_callbacks
from cnf.training.fit_data import training_data
from cnf.training.fit_optimizer import MakeOptimizer, Schedule, optimizer_and_rates
from cnf.training.fit_result import finish_fit, require_scorable
from cnf.training.loop import Trainer
from cnf.training.phases import Phase
from cnf.training.solver_monitor import SolverMonitor
from cnf.transforms import Standardize

__all__ = ["FitResult", "fit"]

PRECISIONS = ("float32", "tf32", "bfloat16", "float64")


@dataclass(frozen=True)
class FitResult:
    """Result of :func:`fit`.

    Attributes:
        flow: the trained model, the same object that was given, with the best weights, in evaluation mode.
        history: logged rows, as in metrics.jsonl.
        best: best validation, in ``unit``; infinite without validation data.
        best_step: its step.
        reason: why training ended: ``"steps"``, ``"patience"``, ``"max_time"`` or that of a callback.
        unit: of the validation: bits/dim, nats, squared error, or "" for a custom loss.
        seconds: of training, over all calls.
        folder: the run folder.
        figure: entries of result.json: the score of the test rows, or in a run folder without them of the validation
            rows; None if neither was scored.
    """

    flow: Any = field(repr=False)
    history: list[dict[str, Any]] = field(repr=False)
    best: float
    best_step: int
    reason: str
    unit: str
    seconds: float
    folder: Path | None
    figure: dict[str, Any] | None = field(default=None, repr=False)


def fit(
    flow: nn.Module,
    train: Any,
    *,
    validation: Any = None,
    test: Any = None,
    context: Any = None,
    loss: Objective | LossFunction | None = None,
    steps: int = 1000,
    batch_size: int = 256,
    optimizer: Optimizer | MakeOptimizer | None = None,
    schedule: Schedule | None = None,
    callbacks: Iterable[Callback | type[Callback]] | Callback | None = (),
    folder: str | Path | None = None,
    resume: bool = False,
    device: str | torch.device | None = None,
    compile: bool | Literal["solve"] = False,
    precision: str = "float32",
    seed: int = 0,
    lr: float = 1e-3,
    warmup: int | None = None,
    accumulate: int = 1,
    max_grad_norm: float = 10.0,
    validate_every: int = 250,
    log_every: int = 10,
    quiet: bool = False,
    group: Group = SINGLE_PROCESS,
) -> FitResult:
    """Train a model in place and give it the weights of the best validation.

    Args:
        flow: a :class:`~cnf.Flow` with any field, a predictor, or any module (then with ``loss``).
        train: x, or (x, context): a tensor, array or DataFrame, a torch Dataset, or a DataLoader, whose batch size
            counts. Items are fetched by index, so that the batch of step k is a function of (seed, k); of an
            IterableDataset, or a DataLoader with its own sampler, the order is its own, and a resumed run takes other
            batches than one that was never stopped. A data set of :func:`cnf.data.load` has its own validation and test
            rows.
        validation: data of the same kind, or the share of ``train`` to hold out at random. Without it the last weights
            are the best.
        test: data of the same kind, scored once, at the end, with the best weights: the figure of ``result.json`` in
            ``folder``, which ``cnf compare`` tabulates. Without it, a run with a folder has that of the validation rows.
        context: condition of a flow, or target of a predictor, for each row of ``train``: an array, or column names of
            the DataFrame.
        loss: an object of :mod:`cnf.losses`, or a function ``loss(model, x, context, noise)`` that returns (N,), a
            scalar, or a dictionary with ``"loss"``. None: the negative log-likelihood of a flow (in bits/dim for
            images), the squared error of a predictor, or its cross entropy if the targets are integers.
        steps: optimiser steps.
        batch_size: rows of a step.
        optimizer: of the model's parameters, or a function ``parameters -> Optimizer``. None: AdamW without decay, at
            ``lr``. Steps that are not finite change nothing (see :func:`~cnf.training.schedule.masked_step`).
        schedule: ``"cosine"`` or ``"constant"``, after ``warmup`` steps, a function ``step -> factor``, or a scheduler of
            ``optimizer``. None: cosine for the default optimiser, the optimiser's own rates otherwise.
        callbacks: take the place of the default ones of their class; a class leaves that default out; others are added.
            None leaves out all of them. The defaults are WeightAverage, TimeSampler, SolverMonitor, NonFinitePolicy and
            ProgressBar; with a ``folder`` also Checkpointer, RunLogger, TensorBoardLogger and Signals.
        folder: run folder for checkpoints, logs and the best weights, from which ``cnf.load(folder)`` (of a custom model
            ``cnf.load(folder, flow=...)``) reads them.
        resume: continue the run in ``folder``, to the same bits as if it had never stopped; with the same arguments.
        device: where to train; None leaves the model where it is.
        compile: compile a flow's solver steps, its whole solves (``"solve"``, see :class:`~cnf.ode.CNF`), or the whole of
            another module.
        precision: ``"float32"``, ``"tf32"``, ``"bfloat16"`` (inside the fields, in training), or ``"float64"``.
        seed: of order and noise. The initial weights are the model's.
        lr: peak learning rate of the default optimiser.
        warmup: steps of linear warm-up; a tenth of the steps, at most 100, if None.
        accumulate: micro-batches of a step.
        max_grad_norm: gradients are clipped to this norm; 0 leaves them as they are.
        validate_every: steps between validations.
        log_every: steps between rows of the history.
        quiet: show neither messages nor progress.
        group: processes that train together (:func:`cnf.distributed.join`).

    Raises:
        ConfigError: for arguments that do not fit the model or each other.
        DataError: for data that are no numbers, or do not fit the model.
        CheckpointError: for a folder that cannot be written or resumed.
        TrainingError: if too many batches in a row are not finite, or one does not fit into memory.
        Interrupted: after SIGINT or SIGTERM, with everything saved.

    Example:
        >>> import cnf
        >>> flow = cnf.build(cnf.FlowConfig.of(hidden=(16,)), cnf.SolverConfig(), (2,))
        >>> result = fit(flow, torch.randn(200, 2), validation=0.2, steps=5, quiet=True)
        >>> result.reason, result.unit, result.flow is flow, result.flow.sample(3).shape
        ('steps', 'nats', True, torch.Size([3, 2]))
    """
    require_at_least(
        1, steps=steps, batch_size=batch_size, accumulate=accumulate, validate_every=validate_every, log_every=log_every
    )
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    where = None if folder is None else Path(folder)
    if resume and where is None:
        raise ConfigError("resume=True needs the folder of the run: give folder=")
    if where is not None and not resume:
        group.on_rank0(lambda: _require_free(where))
    if precision == "float64":
        flow.double()
    if device is not None:
        _move(flow, device)
    data = training_data(flow, train, validation, test, context, batch_size, seed, group)
    batches, mark = data.batches, data.fingerprint
    objective = _objective(flow, loss, batches)
    if test is not None:
        require_scorable(flow, objective)
    if where is None or not (resume and group.on_rank0(lambda: has_trainer(where))):
        if not _fitted(flow):
            objective.prepare(batches.x)
        if isinstance(flow, Flow) and flow.embedding is not None and not flow.embedding.fitted and batches.context is not None:
            flow.embedding.fit(batches.context)
    group.broadcast(flow.state_dict().values())
    make, rates = optimizer_and_rates(flow, optimizer, schedule, lr, warmup, steps, batches.device)
    phase = Phase(objective, batches, make, rates)
    info = describe(
        flow, steps=steps, batch_size=batches.size, rows=getattr(batches, "length", 0), loss=_name(objective), seed=seed,
        optimizer=_name(optimizer) if optimizer is not None else "AdamW",
    )  # fmt: skip
    chosen = [] if callbacks is None else replaced(default_callbacks(where, partial(write_model_info, info=info), mark, group), callbacks)
    _set_precision(flow, precision, compile)
    trainer = Trainer(
        flow, [phase], steps=steps, validation=data.validation, callbacks=chosen, validate_every=validate_every, log_every=log_every,
        accumulate=accumulate, max_grad_norm=max_grad_norm, tf32=precision == "tf32", group=group, quiet=quiet,
    )  # fmt: skip
    with torch.random.fork_rng([batches.device] if batches.device.type == "cuda" else []):  # a loss may seed it
        reason = _run(trainer, where, info, resume)
    state = trainer.state
    flow.load_state_dict(state.best_weights)
    flow.eval()
    figure = finish_fit(trainer, flow, data.scored, info, where)
    return FitResult(flow, trainer.history, state.best, state.best_step, reason, objective.unit, state.seconds, where, figure)


def _run(trainer: Trainer, folder: Path | None, info: ModelInfo, resume: bool) -> str:
    checkpointer, monitor = trainer.callback(Checkpointer), trainer.callback(SolverMonitor)
    if resume and checkpointer is None:
        raise ConfigError("resume=True needs a Checkpointer: leave it in callbacks")
    try:
        if resume and checkpointer is not None:
            checkpointer.resume()
        if folder is not None and trainer.group.main:
            folder.mkdir(parents=True, exist_ok=True)
            write_model_info(folder, info)
        return trainer.run()
    finally:  # solvers and learning rates of before, from which another call starts
        trainer.rates.reset()
        if monitor is not None:
            monitor.reset()


def _move(model: nn.Module, device: str | torch.device) -> None:
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None


def _fitted(model: nn.Module) -> bool:
    """Return whether a flow has statistics of data already, which another training keeps, or a base fitted to latents."""
    return any(
        m.fitted if isinstance(m, Base) else isinstance(m, Standardize) and bool((m.mean != 0).any() or (m.std != 1).any())
        for m in model.modules()
    )


def _require_free(folder: Path) -> None:
    """Refuse a folder that is not empty."""
    if folder.exists() and (not folder.is_dir() or set(folder.iterdir()) - {folder / LOCK, *leftovers(folder)}):
        hint = "resume=True continues the run in it" if (folder / "config.json").is_file() else "choose another"
        raise ConfigError(f"folder={str(folder)!r} is not empty; expected a new or an empty folder: {hint}")


def _objective(model: nn.Module, loss: Objective | LossFunction | None, batches: Batches) -> Any:
    if isinstance(loss, Likelihood | FlowMatching | Supervised | CustomLoss):
        own = loss.flow if isinstance(loss, Likelihood | FlowMatching) else loss.model
        if own is not model:
            raise ConfigError(f"loss is a {type(loss).__name__} of another model than the one to train: make it of this one")
        return loss
    if loss is None and isinstance(model, Flow):
        return Likelihood(model)
    if loss is None and isinstance(model, Predictor):
        context = batches.fetch(torch.arange(1))[1]
        first = None if context is None else getattr(batches, "context", context)
        if first is None:
            raise DataError("a predictor needs targets: give context=, or (x, targets)")
        one_hot = model.outputs > 1 and bool(((first == 0) | (first == 1)).all()) and bool((first.sum(1) == 1).all())
        return Supervised(model, "classification" if one_hot else "regression")
    if loss is None:
        raise ConfigError(f"loss=None is for a cnf.Flow or a predictor, got {type(model).__name__}: give loss=function(model, x, context, noise)")
    if isinstance(loss, nn.Module) and hasattr(loss, "validate"):
        return loss
    if not callable(loss):
        raise ConfigError(f"loss={loss!r}; expected an object of cnf.losses, or a function of (model, x, context, noise)")
    return CustomLoss(model, loss)


def _set_precision(model: nn.Module, precision: str, compile: bool | Literal["solve"]) -> None:
    require_compile(compile)
    blocks = model.blocks if isinstance(model, Flow) else []
    for block in blocks:
        block.autocast = torch.bfloat16 if precision == "bfloat16" else block.autocast
        block.compiles = compile or block.compiles
    if precision == "bfloat16" and not blocks:
        raise ConfigError("precision='bfloat16' is for flows, whose fields compute in it: use torch.autocast in the loss")
    if compile and not blocks:
        model.compile()


def _name(thing: Any) -> str:
    named = getattr(thing, "function", thing)
    return str(getattr(named, "__name__", type(named).__name__))
