"""Rollback to the last good weights, with a smaller learning rate, after too many consecutive unusable batches."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from cnf.config import TrainConfig
from cnf.errors import TrainingError
from cnf.models import SolverConfig

if TYPE_CHECKING:
    from cnf.training.loop import Trainer

__all__ = ["MAX_ROLLBACKS", "MAX_SKIPS", "RATE_FACTOR", "Recovery", "advice", "skip"]

MAX_SKIPS = 10  # consecutive skipped batches before a rollback
MAX_ROLLBACKS = 3  # rollbacks before training is aborted
RATE_FACTOR = 0.5  # factor on the learning rate at each rollback
# abort a solve when its evaluations exceed max(RUNAWAY_FLOOR, RUNAWAY times the median of the last WINDOW steps); no
# limit before RUNAWAY_STEPS steps are known
COUNTS = ("nfe", "nfe_backward")
RUNAWAY, RUNAWAY_FLOOR, RUNAWAY_STEPS, WINDOW = 10, 1000, 20, 100


class Recovery:
    """The last good weights of a run and its recent evaluation counts. Part of the resume state (:meth:`state`).

    Good weights are the initial ones and those with a finite validation (in fine-tuning: a new best). The step is not
    rolled back, and batches are functions of the step, so that a run continues with other batches after a rollback.

    Args:
        model: the trained model.
        average: its averaged weights.
        optimizer: its optimiser.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> recovery = Recovery(model, nn.Linear(2, 1), torch.optim.AdamW(model.parameters()))
        >>> good = model.weight.detach().clone()
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(float("nan"))
        >>> recovery.go_back()
        0
        >>> bool((model.weight == good).all()), recovery.factor
        (True, 0.5)
    """

    def __init__(self, model: nn.Module, average: nn.Module, optimizer: Optimizer):
        self.parts: dict[str, nn.Module | Optimizer] = {"flow": model, "ema": average, "optimizer": optimizer}
        self.rollbacks = 0
        # evaluation counts of the latest steps
        self.usual: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in COUNTS}
        self.good: dict[str, Any] = {}
        self.good_step = 0
        self.keep(0)

    @property
    def factor(self) -> float:
        """The factor on the learning rate."""
        return RATE_FACTOR**self.rollbacks

    def limit(self, name: str = "nfe") -> float:
        """Return the limit on ``"nfe"`` or ``"nfe_backward"`` of a solve; infinite in the first RUNAWAY_STEPS steps."""
        usual = self.usual[name]
        return max(RUNAWAY_FLOOR, RUNAWAY * statistics.median(usual)) if len(usual) >= RUNAWAY_STEPS else math.inf

    def count(self, values: dict[str, float]) -> None:
        """Record the evaluations of a completed step."""
        for name, usual in self.usual.items():
            usual.append(values[name])

    @property
    def told(self) -> dict[str, int]:
        """Entry of metrics.jsonl with the number of rollbacks; {} if there were none."""
        return {"rollbacks": self.rollbacks} if self.rollbacks else {}

    def keep(self, step: int) -> None:
        """Store the current weights as good."""
        self.good = {name: _copy(part.state_dict()) for name, part in self.parts.items()}
        self.good_step = step

    def go_back(self) -> int:
        """Restore the good weights, their average and the optimiser's state; return the step they are from."""
        self.rollbacks += 1
        for name, part in self.parts.items():
            # a copy: an optimiser keeps the loaded tensors and modifies them
            part.load_state_dict(_copy(self.good[name]))
        return self.good_step

    def state(self, step: int) -> dict[str, Any]:
        """Return the state for a checkpoint, without the good weights if they are those of the current ``step``."""
        usual = {name: list(values) for name, values in self.usual.items()}
        good = {} if self.good_step == step else self.good
        return {"rollbacks": self.rollbacks, "usual": usual, "good_step": self.good_step, "good": good}

    def load(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`, after model, average and optimiser have been restored."""
        self.rollbacks = int(state["rollbacks"])
        self.usual = {name: deque(map(float, state["usual"][name]), maxlen=WINDOW) for name in COUNTS}
        self.keep(int(state["good_step"]))
        if state["good"]:
            self.good = {name: state["good"][name] for name in self.parts}


def skip(trainer: Trainer, step: int, reason: Callable[[], str]) -> bool:
    """Count the unusable batch of a step, roll back after too many in a row, and return whether that happened.

    ``reason`` is called before anything is counted, and only if its text is printed.

    Raises:
        TrainingError: if all rollbacks have been used.
    """
    tell, back = trainer.skipped < MAX_SKIPS, trainer.skips_in_row + 1 >= MAX_SKIPS
    why = reason() if tell or back else ""
    trainer.skipped += 1
    trainer.skips_in_row += 1
    if tell:  # metrics.jsonl and result.json count all of them
        trainer.say(f"step {step}: batch skipped: {why}")
    if not back:
        return False
    row, recovery = f"{MAX_SKIPS} batches in a row could not be used, the last at step {step} ({why})", trainer.recovery
    if recovery.rollbacks >= MAX_ROLLBACKS:
        raise TrainingError(
            f"{row}, though the weights went back {MAX_ROLLBACKS} times and the rate is down to {recovery.factor:g} of its "
            f"schedule: try {advice(trainer.config, trainer.info.config.solver)}, in a new run"
        )
    trainer.skips_in_row, good = 0, recovery.go_back()
    trainer.say(f"{row}: back to the weights of step {good}, with {RATE_FACTOR:g} times the learning rate")
    return True


def advice(config: TrainConfig, solver: SolverConfig) -> str:
    """Return the options that may help, with their current values.

    Example:
        >>> advice(TrainConfig(lr=0.1, warmup=0), SolverConfig(grid_steps=2))
        'a smaller --lr (now 0.1), a longer --warmup (now 0), --kinetic 0.01 or more (now 0), or more --grid-steps (now 2)'
    """
    finer = f"a smaller --rtol (now {solver.rtol:g})" if solver.adaptive else f"more --grid-steps (now {solver.grid_steps})"
    if config.objective == "flow-matching":
        return f"a smaller --lr (now {config.lr:g}), or a longer --warmup (now {config.warmup})"
    kinetic = f"--kinetic 0.01 or more (now {config.kinetic:g}), " if config.objective in ("likelihood", "both") else ""
    rate = f"--lr (now {config.lr:g})" if config.objective != "both" else f"--lr or --finetune-lr (now {config.lr:g}, {config.tune_lr:g})"
    return f"a smaller {rate}, a longer --warmup (now {config.warmup}), {kinetic}or {finer}"


def _copy(value: Any) -> Any:
    """Copy a state_dict to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list | tuple) else value
