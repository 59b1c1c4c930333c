"""The stages of a training: one, or matching and then fine-tuning by the likelihood; each with its objective, batches and watch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cnf.errors import ConfigError
from cnf.flow import Flow
from cnf.models import Predictor, SolverConfig
from cnf.objectives import FlowMatching, Likelihood, Objective, Supervised
from cnf.presets import TrainConfig
from cnf.training.automatic import AutomaticSteps
from cnf.training.batches import Batches
from cnf.training.importance import TimesWatch
from cnf.training.recovery import MAX_ROLLBACKS, Recovery
from cnf.training.schedule import AdamW, Average, learning_rate, optimizer
from cnf.training.watch import Watch

if TYPE_CHECKING:
    from cnf.training.loop import Trainer

__all__ = ["Stage", "enter", "fresh", "rate", "stages", "undo_gaming"]

GAMED = 10.0  # times the tolerance: an error of the solver after which a fine-tuning goes back to its last good weights
SETTLING = 3  # measurements of the solver's error before the likelihood is fine-tuned


@dataclass(frozen=True)
class Stage:
    """What is minimised, on which batches, how its solver is watched, and how fast the weights move."""

    objective: Objective
    batches: Batches
    watch: Watch | TimesWatch
    lr: float
    warmup: int


def stages(
    model: Flow | Predictor, config: TrainConfig, solver: SolverConfig, batches: Batches, say: Callable[[str], None]
) -> list[Stage]:
    """The stages in order: two where the objective is ``"both"``, one otherwise.

    Raises:
        ConfigError: for settings that do not fit the model or each other.
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
    """A stage that solves an ODE, if there is one, whose solver is watched."""
    # a preset's automatic steps are those of its grid, which --adaptive puts aside
    kind = AutomaticSteps if solver.automatic_steps and not solver.adaptive and objective.solves else Watch
    limits = config.watch_tolerance, config.max_grid_steps, config.watch_every
    return Stage(objective, batches, kind(objective, solver, *limits, say), lr, warmup)


def fresh(trainer: Trainer) -> tuple[AdamW, Average, Recovery]:
    """An optimiser without a past, the weights' average, which they are themselves, and the last good ones."""
    config = trainer.config
    adam = optimizer(trainer.flow, trainer.stages[trainer.stage].lr, config.weight_decay)
    average = Average(trainer.flow, config.ema_decay)
    return adam, average, Recovery(trainer.flow, average, adam)


def enter(trainer: Trainer) -> None:
    """The next stage, from the averaged weights on, where its time has come."""
    if trainer.last_stage or trainer.step < trainer.stage_end:
        return
    trainer.settle()
    trainer.flow.load_state_dict(trainer.ema.module.state_dict())
    trainer.stage, trainer.since, trainer.worse = trainer.stage + 1, trainer.step, 0
    trainer.optimizer, trainer.ema, trainer.recovery = fresh(trainer)
    trainer.recovery.keep(trainer.step)
    trainer.ledger.last = None  # what is told from here on, matching has not given
    trainer.say(f"step {trainer.step}: from here on the likelihood, on batches of {trainer.batches.size}")
    for _ in range(SETTLING):
        trainer.watch.measure(trainer.step, *trainer.batches(trainer.step), trainer.group)


def rate(trainer: Trainer) -> float:
    """The learning rate of the present step, by the present stage's own schedule."""
    config, stage = trainer.config, trainer.stages[trainer.stage]
    found = learning_rate(trainer.step - trainer.since, stage.lr, stage.warmup, trainer.stage_end - trainer.since, config.schedule)
    return found * trainer.recovery.factor


def undo_gaming(trainer: Trainer, measured: dict[str, Any]) -> None:
    """Back to the last good weights of a fine-tuning whose grid was found to be far off: its likelihood may be the grid's alone."""
    error = measured.get("solver_error", 0.0)
    if trainer.stage == 0 or error <= GAMED * trainer.config.watch_tolerance:
        return
    if trainer.recovery.rollbacks >= MAX_ROLLBACKS:  # it has been of no use: the watch has told, and validations select
        return
    good = trainer.recovery.go_back()
    trainer.say(
        f"step {trainer.step}: with an error of {error:.3g} the likelihood may be the grid's alone: back to the weights of step {good}, "
        f"with {trainer.recovery.factor:g} times the learning rate"
    )
