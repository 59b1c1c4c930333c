"""The training loop: every step is a pure function of (seed, step), so that a resumed run repeats it bit for bit."""

from __future__ import annotations

import math
from contextlib import ExitStack, suppress
from typing import Any

from cnf._utils.errors import Interrupted, SolverError
from cnf.flow import Flow
from cnf.training.non_finite import NonFinitePolicy
from cnf.training.signals import Abandoned, Signals
from cnf.training.state import Pending
from cnf.training.step import tensor_cores
from cnf.training.stepper import Stepper

__all__ = ["VALIDATION_SEED", "Trainer"]

VALIDATION_SEED = 20_000  # fixed validation noise, so that validations compare within and between runs


class Trainer(Stepper):
    """Training of a model: optimiser steps, validations, and the callbacks that act next to them.

    Arguments are those of :class:`~cnf.training.stepper.Stepper`.
    """

    # -- validation ----------------------------------------------------------------------------------------------

    def validate(self) -> dict[str, Any]:
        """Validate the averaged weights with the evaluation solver and keep the best ones."""
        state, model, figures = self.state, self.averaged().eval(), {}
        if self.validation is not None:
            x, context, index = self.validation.x, self.validation.context, self.validation.index
            try:
                with self.abandoning(), tensor_cores(False):
                    figures = self.objective.validate(model, x, context, index=index, seed=VALIDATION_SEED, group=self.group)
            except SolverError as error:
                policy = self.callback(NonFinitePolicy)
                self.say(f"step {state.step}: validation failed: {error}{policy.growth if policy else ''}")
        value = figures.get("validation", math.inf)
        if math.isnan(value):  # compares as neither better nor worse
            value = math.inf
        state.validated, state.worse = state.step, state.worse + 1
        better = value < state.best or not state.best_weights or self.validation is None
        if better:
            state.best, state.best_step, state.worse = value, state.step, 0
            state.best_weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.rates.validated(value)
        self.figures = {**self.figures, **figures, "validation": value, "best": state.best, "best_step": state.best_step}
        for callback in self.callbacks:
            callback.on_validation(self, better)
        return self.figures

    # -- the loop ------------------------------------------------------------------------------------------------

    @property
    def _fitted(self) -> bool:
        """Whether the model is a density already: its base was fitted to the data, so that training must not make it worse."""
        return isinstance(self.model, Flow) and self.model.base.fitted

    def stop_reason(self) -> str | None:
        """Return why training ends, such as ``"steps"``, ``"patience"`` or ``"max_time"``; None while it continues."""
        if self.state.step >= self.steps:
            return "steps"
        return next((reason for callback in self.callbacks if (reason := callback.stop_reason(self))), None)

    def _stop(self) -> str | None:
        """Return the stop reason, the same on all processes: by rank 0's clock, and a signal to any rank stops all."""
        signals = self.callback(Signals)
        elapsed = self.clock() - self._started if self.group.main else 0.0
        number, self.elapsed = self.group.all_max([0 if signals is None else signals.number, elapsed])
        self.signal = int(number)
        return self.stop_reason()

    def run(self) -> str:
        """Train from the current step to the end and return the stop reason (see :meth:`stop_reason`).

        Raises:
            Interrupted: after SIGINT or SIGTERM, with everything saved.
            TrainingError: if too many consecutive batches are unusable after all rollbacks.
            CheckpointError: if the final state cannot be saved in the run folder; names the one that holds it.
        """
        self._started, state = self.clock(), self.state
        before = state.seconds
        with ExitStack() as stack:
            for callback in self.callbacks:
                stack.callback(callback.on_end, self)
                callback.on_start(self)
            if state.step == 0 and state.pending is None and self._fitted:
                with suppress(Abandoned):
                    self._log(dict(self.validate()))
            while ((reason := self._stop()) is None or state.pending) and not self.signal:
                with suppress(Abandoned):  # a signal: the interrupted work is repeated on resume
                    if state.pending is None:
                        self.update()
                        state.step += 1
                        self.rates.advance()
                        state.pending = Pending()
                    state.seconds = before + self.clock() - self._started
                    self._after_step(state.pending)
            last = reason is not None and not self.signal and state.validated != state.step
            for callback in self.callbacks:
                callback.on_finish(self)
            # after a stop by time, validate the last weights for the test and the export only, not for the saved state:
            # a resumed run then selects the same weights as an uninterrupted one
            if last:
                with suppress(Abandoned):
                    self.read_metrics()
                    self.figures = {}
                    self._log({**self.validate()})
            self._stop()  # catch a signal during the last validation; all ranks wait until everything is saved
        if self.signal:
            raise Interrupted(self.signal, state.step)
        assert reason is not None
        if reason != "steps":
            text = {"max_time": "time is up", "patience": f"no better validation in {state.worse}"}
            self.report("progress", f"step {state.step}: {text.get(reason, reason)}", step=state.step, steps=self.steps)
        return reason

    def _after_step(self, pending: Pending) -> None:
        """Measure, validate and log where due; ``pending`` holds the results of an interrupted earlier call."""
        state, due = self.state, self.due
        self.figures = pending.figures
        if state.metrics.failed or (due and len(state.metrics)):
            pending.values = self.read_metrics()
        if not pending.measured:
            for callback in self.callbacks:
                self.figures.update(callback.on_step(self) or {})
            pending.measured = True
        if self.validates:
            self.validate()
        if due or self.figures:
            self._log({**(pending.values or {}), "skipped": state.skipped, **self.figures})
        state.pending = None
        for callback in self.callbacks:
            callback.on_step_end(self)

    def _log(self, figures: dict[str, Any]) -> None:
        row = {"step": self.state.step, **figures, "seconds": round(self.state.seconds, 3)}
        self.history.append(row)
        for callback in self.callbacks:
            callback.on_row(self, row)
