"""Optimiser steps of a training, with its phases, learning rates and metrics."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from cnf._utils.async_checks import defer_checks
from cnf._utils.errors import DataError, SolverError
from cnf._utils.output import emit
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.losses import Objective
from cnf.training.batches import Batches, Validation
from cnf.training.callbacks import Callback, WeightAverage
from cnf.training.memory import micro_batch_advice, oom_advice
from cnf.training.metrics import MetricBuffer, StepResult
from cnf.training.phases import LearningRate, Phase
from cnf.training.schedule import masked_step
from cnf.training.signals import Signals
from cnf.training.state import TrainState
from cnf.training.step import culprit, gradient, micro_batches, tensor_cores

__all__ = ["Stepper"]

C = TypeVar("C", bound=Callback)


class Stepper:
    """State of a training and its optimiser steps, without the loop around them: see :class:`~cnf.training.Trainer`.

    Args:
        model: trained in place.
        phases: at least one.
        steps: total number of steps.
        validation: validation rows; the best weights are those of the last step without them.
        callbacks: in the order in which they act, one of each class.
        validate_every: steps between validations.
        log_every: steps between rows of metrics.jsonl; the steps since the last one are read from the device then.
        accumulate: micro-batches of a step.
        max_grad_norm: gradients are clipped to this norm; 0 leaves them as they are.
        tf32: compute float32 products with TF32 in training, on a GPU.
        group: processes that train together, all with the same arguments: one optimiser step for each joint batch, the
            same weights on all ranks, files written by rank 0. A run resumes on any number of processes.
        quiet: show neither messages nor progress.
        dashes: prefix of settings in advice: ``"--"`` in a program.
    """

    log_every = 10

    def __init__(
        self,
        model: nn.Module,
        phases: Sequence[Phase],
        *,
        steps: int,
        validation: Validation | None = None,
        callbacks: Iterable[Callback] = (),
        validate_every: int = 250,
        log_every: int | None = None,
        accumulate: int = 1,
        max_grad_norm: float = 0.0,
        tf32: bool = False,
        group: Group = SINGLE_PROCESS,
        quiet: bool = False,
        dashes: str = "",
    ):
        self.model, self.phases, self.steps, self.validation, self.group = model, list(phases), steps, validation, group
        self.validate_every, self.accumulate, self.max_grad_norm, self.tf32 = validate_every, accumulate, max_grad_norm, tf32
        self.log_every = self.log_every if log_every is None else log_every
        self.quiet, self.dashes = quiet or not group.main, dashes
        self.weights = list(model.parameters())  # cached: walking all modules is slow
        self.callbacks = list(callbacks)
        self.history: list[dict[str, Any]] = []
        self.figures: dict[str, Any] = {}
        self.limits, self.rate_factor, self.elapsed = (math.inf, math.inf), 1.0, 0.0
        self.signal = 0
        self.clock = time.monotonic
        self.state = TrainState(model, phases[0].optimizer(model), MetricBuffer(model))
        self._schedule()
        for callback in self.callbacks:
            callback.setup(self)
            name = type(callback).__name__
            same = sum(known.partition(" ")[0] == name for known in self.state.callbacks)
            self.state.callbacks[f"{name} {same + 1}" if same else name] = callback

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self.phases[self.state.phase]

    @property
    def objective(self) -> Objective:
        """The objective of the current phase."""
        return self.phase.objective

    @property
    def batches(self) -> Batches:
        """The batches of the current phase."""
        return self.phase.batches

    @property
    def last_phase(self) -> bool:
        """Whether the current phase is the last one."""
        return self.state.phase + 1 == len(self.phases)

    @property
    def phase_end(self) -> int:
        """The step at which the current phase ends."""
        return self.steps - sum(phase.steps or 0 for phase in self.phases[self.state.phase + 1 :])

    def say(self, line: str) -> None:
        """Print a warning."""
        self.report("warning", line)

    def report(self, event: str, text: str, /, **values: Any) -> None:
        """Print an event (see :func:`cnf._utils.output.emit`)."""
        if not self.quiet:
            emit(event, text, **values)

    def callback(self, kind: type[C]) -> C | None:
        """Return the callback of a class; None if there is none."""
        return next((callback for callback in self.callbacks if isinstance(callback, kind)), None)

    # -- state ---------------------------------------------------------------------------------------------------

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of :class:`TrainState`."""
        self.state.load_numbers(state)
        self._init_optimizer()
        self.state.load_state_dict(state)

    def snapshot(self) -> dict[str, Any]:
        """Return the state_dicts that :meth:`restore` puts back: weights, their average, the optimiser."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Put weights, their average and the optimiser back; the learning rates stay."""
        rates = [group["lr"] for group in self.state.optimizer.param_groups]
        for name, part in self._parts().items():
            part.load_state_dict(snapshot[name])
        for group, rate in zip(self.state.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _parts(self) -> dict[str, Any]:
        average = self.callback(WeightAverage)
        averages = {} if average is None else {"average": average.average}
        return {"model": self.model, **averages, "optimizer": self.state.optimizer}

    def averaged(self) -> nn.Module:
        """Return the model that is validated: with averaged weights, or the model itself."""
        average = self.callback(WeightAverage)
        return self.model if average is None else average.average.module

    def best_model(self) -> Any:
        """Return a copy of the model with the weights of the best validation, in evaluation mode."""
        model = copy.deepcopy(self.averaged())
        model.load_state_dict(self.state.best_weights)
        return model.eval()

    # -- one step ------------------------------------------------------------------------------------------------

    def update(self) -> None:
        """Take one optimiser step, masked on the device where loss or gradient is not finite.

        Runs without host synchronisation (the metrics are read later), except with adaptive solvers, whose steps depend
        on values, and with several processes, which synchronise.

        Raises:
            TrainingError: for a batch that does not fit into memory.
        """
        if not self.last_phase and self.state.step >= self.phase_end:
            self.start_phase()
        state, objective = self.state, self.objective
        rate = self.rates.set(state.step - state.since, self.phase_end - state.since, self.rate_factor)
        x, context, noise = self.batches(state.step)
        self.model.train()
        state.optimizer.zero_grad(set_to_none=True)
        solvers = objective.solvers if objective.solves else []
        guard = oom_advice(
            state.step,
            lambda: micro_batch_advice(objective, x, context, noise, self.accumulate, solvers, self.dashes),
            lambda: state.optimizer.zero_grad(set_to_none=True),
        )
        adjoint = any(getattr(solver, "gradient", "") == "adjoint" for solver in solvers)
        with self.abandoning(), guard, defer_checks(), tensor_cores(self.tf32):
            result = gradient(
                objective, x, context, noise, count=self.accumulate, limit=self.limits[0], limit_backward=self.limits[1], adjoint=adjoint
            )
        # from here on, gradient and metrics are the joint batch's, so that all processes do the same
        share = len(x) / self.batches.size
        figures, failure = self.group.all_reduce_gradients(self.weights, share, result.figures, result.failure)
        if failure:
            state.metrics.fail(state.step, failure)
        else:
            self._optimizer_step(rate, result.names, figures)

    def _optimizer_step(self, rate: float, names: tuple[str, ...], figures: Tensor) -> None:
        """Clip the gradients and update the weights, masked where not finite, without synchronisation.

        Where loss or gradient is not finite, weights, moments, average and counters stay unchanged. The buffer receives
        the norm before clipping, the number (from 1) of the first parameter whose gradient is not finite (0 for none),
        and the figures (k,).
        """
        state = self.state
        norms = torch.stack(torch._foreach_norm([p.grad for p in self.weights if p.grad is not None]))
        norm = torch.linalg.vector_norm(norms)
        clip_grads_with_norm_(self.weights, self.max_grad_norm or math.inf, norm)
        wrong = ~norms.isfinite()
        place = (wrong.long().argmax() + 1) * wrong.any()
        row = torch.cat([torch.stack([norm.double(), place.double()]), figures])
        taken = row.isfinite().all()
        masked_step(state.optimizer, taken)
        for callback in self.callbacks:
            callback.on_update(self, taken)
        state.metrics.add(state.step, rate, names, row)

    def start_phase(self) -> None:
        """Start the next phase, from the averaged weights."""
        state = self.state
        self.read_metrics()
        self.model.load_state_dict(self.averaged().state_dict())
        state.phase, state.since, state.worse = state.phase + 1, state.step, 0
        self._init_optimizer()
        state.metrics.last = None  # no metrics of the earlier phase are shown from here on
        if self.phase.message:
            self.report("progress", f"step {state.step}: {self.phase.message}", step=state.step, steps=self.steps)
        for callback in self.callbacks:
            callback.on_phase(self)

    def _init_optimizer(self) -> None:
        self.state.optimizer = self.phase.optimizer(self.model)
        self._schedule()

    def _schedule(self) -> None:
        self.rates = LearningRate(self.state.optimizer, self.phase.schedule)
        self.state.scheduler = self.rates.scheduler

    def read_metrics(self) -> dict[str, float] | None:
        """Process all buffered metrics and return the latest step's; None if it was skipped or void.

        Raises:
            TrainingError: by the non-finite policy, if all rollbacks have been used.
            Abandoned: on a signal; unprocessed results are processed later.
        """
        values, results = None, self.state.metrics.read()
        while results:
            result, values, discard = results[0], None, False
            if not result.void:
                discard = any([callback.on_metrics(self, result) for callback in self.callbacks])
                values = result.values if result.taken else None
            self.state.skipped += not result.taken
            del results[0]
            for later in results if discard else ():
                later.void = True
        self.state.metrics.failed = False
        return values

    def explain(self, result: StepResult) -> str:
        """Return why a step was skipped, if need be by evaluating its batch again with all value checks."""
        if result.failure:
            return result.failure
        figures = {name: value for name, value in result.values.items() if name not in ("grad_norm", "lr")}
        if not all(map(math.isfinite, figures.values())) and (failure := self._evaluate_again(result.step)):
            return failure
        return culprit(self.model, figures, result.values["grad_norm"], result.place)

    def _evaluate_again(self, step: int) -> str:
        """Evaluate a step's batch with all value checks and return its failure, "" if there is none."""
        failure = ""
        self.objective.train()
        try:
            with torch.no_grad(), self.abandoning():
                for part in micro_batches(*self.batches(step), self.accumulate):
                    self.objective.evaluate(*part)
        except (SolverError, DataError) as error:
            failure = str(error)
        return failure if self.group.size == 1 else self.group.reasons(failure)

    def abandoning(self) -> AbstractContextManager[None]:
        """Return a context manager in which a signal aborts the computation, which is repeated on resume."""
        signals = self.callback(Signals)
        return nullcontext() if signals is None else signals.abandoning()

    @property
    def validates(self) -> bool:
        """Whether to validate now: on schedule, at the end, and at the end of a phase, as the baseline of the next."""
        return self.state.step % self.validate_every == 0 or self.state.step in (self.phase_end, self.steps)

    @property
    def due(self) -> bool:
        """Whether this step gets a row in metrics.jsonl, which requires reading the metrics of all steps before it."""
        return self.validates or self.state.step % self.log_every == 0 or any(c.due(self) for c in self.callbacks)
