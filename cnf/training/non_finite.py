"""Policy for steps that are not finite: skip, roll back, abort."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cnf._utils.errors import TrainingError
from cnf.training.callbacks import Callback, Run
from cnf.training.metrics import StepResult

__all__ = ["NonFinitePolicy"]

COUNTS = ("nfe", "nfe_backward")
GROWN = 0.5  # of the lowest loss: a growth that noise does not explain
ADVICE = "a smaller learning rate, a longer warmup, or more solver steps"


class NonFinitePolicy(Callback):
    """Count the steps that were left out, roll back after too many in a row, and stop where that does not help.

    A rollback restores the last good weights, their average and the optimiser's state, with a smaller learning rate.
    Good weights are the initial ones and those with a finite validation (in a later phase: a new best). The step is not
    rolled back, and batches are functions of the step, so that a run continues with other batches. Without this policy
    a step that is not finite still changes nothing, but nothing is reported and training never stops for it.

    Args:
        max_skips: skipped steps in a row before a rollback.
        max_rollbacks: rollbacks before training is aborted.
        rate_factor: factor on the learning rate at each rollback.
        max_error: error of the training solver, in the monitor's unit, above which a later phase is rolled back: its
            likelihood may be an artefact of a coarse grid.
        runaway: a batch is skipped whose solve takes more evaluations than ``runaway`` times the median of the recent
            steps, and more than ``runaway_floor``; from ``runaway_steps`` known steps on.
        advice: what may help, for the error message.
    """

    def __init__(
        self,
        max_skips: int = 10,
        max_rollbacks: int = 3,
        rate_factor: float = 0.5,
        max_error: float = math.inf,
        runaway: float = 10.0,
        runaway_floor: int = 1000,
        runaway_steps: int = 20,
        advice: str = ADVICE,
    ):
        self.max_skips, self.max_rollbacks, self.rate_factor, self.max_error = max_skips, max_rollbacks, rate_factor, max_error
        self.runaway, self.runaway_floor, self.runaway_steps, self.advice = runaway, runaway_floor, runaway_steps, advice
        self.skips_in_row = self.rollbacks = self.good_step = 0
        self.recent_nfe: dict[str, deque[float]] = {name: deque(maxlen=100) for name in COUNTS}
        self.good: dict[str, Any] = {}
        self.lowest_loss = self.last_loss = math.inf

    def setup(self, run: Run) -> None:
        """Take the initial weights as good."""
        self._run = run
        self._keep()

    def on_start(self, run: Run) -> None:
        """Set the limits of a solve."""
        self._apply()
        for row in run.history:
            self._note(row)

    def on_phase(self, run: Run) -> None:
        """Start again with the weights that the phase starts from."""
        self.rollbacks = 0
        self.recent_nfe = {name: deque(maxlen=100) for name in COUNTS}
        self.lowest_loss = self.last_loss = math.inf
        self._keep()
        self._apply()

    def on_metrics(self, run: Run, result: StepResult) -> bool:
        """Count a skipped step, and roll back after too many in a row.

        Raises:
            TrainingError: if all rollbacks have been used.
        """
        self._note(result.values)
        if result.taken:
            self.skips_in_row = 0
            for name, recent in self.recent_nfe.items():
                recent.append(result.values[name])
            self._apply()
            return False
        report, back = run.state.skipped < self.max_skips, self.skips_in_row + 1 >= self.max_skips
        why = run.explain(result) if report or back else ""  # before anything is counted: a signal may interrupt it
        self.skips_in_row += 1
        if report:  # metrics.jsonl and result.json count all of them
            run.say(f"step {result.step}: batch skipped: {why}{self.growth}")
        if not back:
            return False
        text = f"{self.max_skips} batches in a row could not be used, the last at step {result.step} ({why}){self.growth}"
        if self.rollbacks >= self.max_rollbacks:
            raise TrainingError(
                f"{text}, though the weights went back {self.max_rollbacks} times and the rate is down to {self.factor:g} of its "
                f"schedule: try {self.advice}, in a new run"
            )
        self.skips_in_row = 0
        self._go_back()
        run.say(f"{text}: back to the weights of step {self.good_step}, with {self.rate_factor:g} times the learning rate")
        return True

    def on_step(self, run: Run) -> Mapping[str, Any] | None:
        """Roll back a later phase whose solver is too inaccurate; return the count of rollbacks for the row."""
        error = run.figures.get("solver_error", 0.0)
        # after the last rollback the monitor has reported it, and validations select the weights
        if run.state.phase and error > self.max_error and self.rollbacks < self.max_rollbacks:
            self._go_back()
            run.say(
                f"step {run.state.step}: with an error of {error:.3g} the likelihood may be the grid's alone: back to the weights "
                f"of step {self.good_step}, with {self.factor:g} times the learning rate"
            )
        return {"rollbacks": self.rollbacks} if self.rollbacks and run.due else None

    def on_validation(self, run: Run, better: bool) -> None:
        """Take the weights as good after a finite validation; in a later phase after a new best.

        Worse validations there may mean that training exploits the grid's error since the last measurement.
        """
        if math.isfinite(run.figures["validation"]) and (better or not run.state.phase):
            self._keep()

    @property
    def growth(self) -> str:
        """Likely cause of a failure after a growing loss, as text; "" where the loss did not grow."""
        if not self.last_loss - self.lowest_loss > GROWN * max(1.0, abs(self.lowest_loss)):
            return ""
        return f"; the loss had grown from {self.lowest_loss:.3g} to {self.last_loss:.3g}: the learning rate is the likely cause, try a smaller one"

    def _note(self, values: Mapping[str, Any]) -> None:
        loss = values.get("loss", values.get("nll"))
        if isinstance(loss, int | float) and math.isfinite(loss):
            self.lowest_loss, self.last_loss = min(self.lowest_loss, loss), loss

    @property
    def factor(self) -> float:
        """The factor on the learning rate."""
        return self.rate_factor**self.rollbacks

    def _keep(self) -> None:
        self.good, self.good_step = _copy(self._run.snapshot()), self._run.state.step

    def _go_back(self) -> None:
        self.rollbacks += 1
        # a copy: an optimiser keeps the loaded tensors and modifies them
        self._run.restore(_copy(self.good))
        self._apply()

    def _apply(self) -> None:
        """Set the factor on the learning rate and the limits of a solve."""
        forward, backward = map(self._limit, self.recent_nfe.values())
        self._run.limits, self._run.rate_factor = (forward, backward), self.factor

    def _limit(self, recent: deque[float]) -> float:
        if len(recent) < self.runaway_steps:
            return math.inf
        return max(self.runaway_floor, self.runaway * statistics.median(recent))

    def state_dict(self) -> dict[str, Any]:
        """Return counts and good weights, without the weights if they are the current ones."""
        return {
            "skips_in_row": self.skips_in_row,
            "rollbacks": self.rollbacks,
            "recent_nfe": {name: list(values) for name, values in self.recent_nfe.items()},
            "good_step": self.good_step,
            "good": {} if self.good_step == self._run.state.step else self.good,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`, after model, average and optimiser have been restored."""
        self.skips_in_row, self.rollbacks = int(state["skips_in_row"]), int(state["rollbacks"])
        self.recent_nfe = {name: deque(map(float, state["recent_nfe"][name]), maxlen=100) for name in COUNTS}
        self._keep()
        self.good_step = int(state["good_step"])
        if state["good"]:
            self.good = {name: state["good"][name] for name in self.good}
        self._apply()


def _copy(value: Any) -> Any:
    """Copy a state_dict to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list | tuple) else value
