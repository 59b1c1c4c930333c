"""Training phases: one, or flow matching followed by fine-tuning of the likelihood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cnf.config import TrainConfig
from cnf.errors import ConfigError
from cnf.flow import Flow
from cnf.models import Predictor, SolverConfig
from cnf.objectives import FlowMatching, Likelihood, Objective, Supervised
from cnf.training.automatic import AutomaticSteps
from cnf.training.batches import Batches
from cnf.training.importance import TimesWatch
from cnf.training.recovery import MAX_ROLLBACKS, Recovery
from cnf.training.schedule import AdamW, Average, learning_rate, optimizer
from cnf.training.watch import Watch

if TYPE_CHECKING:
    from cnf.training.loop import Trainer

__all__ = ["Stage", "enter", "fresh", "rate", "stages", "undo_gaming"]

GAMED = 10.0  # fine-tuning is rolled back above this solver error, as a multiple of the tolerance
SETTLING = 3  # measurements of the solver's error before fine-tuning


@dataclass(frozen=True)
class Stage:
    """One training phase: objective, batches, monitor, peak learning rate and warm-up steps."""

    objective: Objective
    batches: Batches
    watch: Watch | TimesWatch
    lr: float
    warmup: int


def stages(
    model: Flow | Predictor, config: TrainConfig, solver: SolverConfig, batches: Batches, say: Callable[[str], None]
) -> list[Stage]:
    """Return the phases in order: two if the objective is ``"both"``, one otherwise.

    Raises:
        ConfigError: for settings that the model does not support, or that exclude each other.
    """
    if not isinstance(model, Flow):
        if config.kinetic or config.jacobian or config.step_error:
            weights = f"kinetic={config.kinetic:g}, jacobian={config.jacobian:g}, step_error={config.step_error:g}"
            raise ConfigError(f"{weights} are for densities: leave them at 0")
        return [_solved(Supervised(model, config.objective), config, solver, batches, config.lr, config.warmup, say)]
    found: list[Stage] = []
    if config.objective in ("flow-matching", "both"):
        if config.coupling != "independent" and (config.accumulate > 1 or batches.group.size > 1):
            raise ConfigError(
                f"coupling={config.coupling!r} assigns the noise of a whole batch, which no process or micro-batch has: leave "
                "--accumulate at 1 and train in one process, or take coupling='independent'"
            )
        matching = FlowMatching(model, config.coupling, config.match_weights, config.match_times)
        found.append(Stage(matching, batches, TimesWatch(matching, config.watch_every), config.lr, config.warmup))
    if config.objective in ("likelihood", "both"):
        tunes = config.objective == "both"
        own = batches.resized(config.tune_batch_size) if tunes and config.tune_batch_size else batches
        lr, warmup = (config.tune_lr, config.warmup_of_tuning) if tunes else (config.lr, config.warmup)
        likelihood = Likelihood(model, config.kinetic, config.jacobian, config.regularisers, config.step_error)
        found.append(_solved(likelihood, config, solver, own, lr, warmup, say))
    return found


def _solved(
    objective: Objective, config: TrainConfig, solver: SolverConfig, batches: Batches, lr: float, warmup: int, say: Callable[[str], None]
) -> Stage:
    """Return the phase of an objective, with a monitor of its training solver if it solves an ODE."""
    # a preset's automatic_steps concerns its grid, which --adaptive replaces
    kind = AutomaticSteps if solver.automatic_steps and not solver.adaptive and objective.solves else Watch
    limits = config.watch_tolerance, config.max_grid_steps, config.watch_every
    return Stage(objective, batches, kind(objective, solver, *limits, say), lr, warmup)


def fresh(trainer: Trainer) -> tuple[AdamW, Average, Recovery]:
    """Return a new optimiser, weight average and rollback state for the current phase."""
    config = trainer.config
    adam = optimizer(trainer.flow, trainer.stages[trainer.stage].lr, config.weight_decay)
    average = Average(trainer.flow, config.ema_decay)
    return adam, average, Recovery(trainer.flow, average, adam)


def enter(trainer: Trainer) -> None:
    """Start the next phase, from the averaged weights, if the current one has ended."""
    if trainer.last_stage or trainer.step < trainer.stage_end:
        return
    trainer.settle()
    trainer.flow.load_state_dict(trainer.ema.module.state_dict())
    trainer.stage, trainer.since, trainer.worse = trainer.stage + 1, trainer.step, 0
    trainer.optimizer, trainer.ema, trainer.recovery = fresh(trainer)
    trainer.recovery.keep(trainer.step)
    trainer.ledger.last = None  # the progress bar shows no metrics of flow matching from here on
    trainer.say(f"step {trainer.step}: from here on the likelihood, on batches of {trainer.batches.size}")
    for _ in range(SETTLING):
        trainer.watch.measure(trainer.step, *trainer.batches(trainer.step), trainer.group)


def rate(trainer: Trainer) -> float:
    """Return the learning rate of the current step: the phase's schedule times the rollback factor."""
    config, stage = trainer.config, trainer.stages[trainer.stage]
    found = learning_rate(trainer.step - trainer.since, stage.lr, stage.warmup, trainer.stage_end - trainer.since, config.schedule)
    return found * trainer.recovery.factor


def undo_gaming(trainer: Trainer, measured: dict[str, Any]) -> None:
    """Roll back fine-tuning if the solver's error is so large that the likelihood may be an artefact of the grid."""
    error = measured.get("solver_error", 0.0)
    if trainer.stage == 0 or error <= GAMED * trainer.config.watch_tolerance:
        return
    # rollbacks did not help: the monitor has reported it, and validations select the weights
    if trainer.recovery.rollbacks >= MAX_ROLLBACKS:
        return
    good = trainer.recovery.go_back()
    trainer.say(
        f"step {trainer.step}: with an error of {error:.3g} the likelihood may be the grid's alone: back to the weights of step {good}, "
        f"with {trainer.recovery.factor:g} times the learning rate"
    )
