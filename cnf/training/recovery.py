"""Back to the last good weights, with a smaller rate, when too many batches in a row cannot be used."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from cnf.errors import TrainingError
from cnf.models import SolverConfig
from cnf.presets import TrainConfig

if TYPE_CHECKING:
    from cnf.training.loop import Trainer

__all__ = ["MAX_ROLLBACKS", "MAX_SKIPS", "RATE_FACTOR", "Recovery", "advice", "skip"]

MAX_SKIPS = 10  # batches skipped in a row before going back
MAX_ROLLBACKS = 3  # times of going back before giving up
RATE_FACTOR = 0.5  # of the learning rate, each time
# a solve runs away that takes so many times the usual evaluations, and more than so many, once so many steps are known
COUNTS = ("nfe", "nfe_backward")
RUNAWAY, RUNAWAY_FLOOR, RUNAWAY_STEPS, WINDOW = 10, 1000, 20, 100


class Recovery:
    """The last good weights of a run, and what is usual in it. It is part of the resume state (:meth:`state`).

    Good are the weights that a validation could be made with, and the initial ones. Batches are functions of the step,
    which does not go back: after a return the run goes on with other batches.

    Args:
        model: what is trained.
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
        self.usual: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in COUNTS}  # of the latest steps
        self.good: dict[str, Any] = {}
        self.good_step = 0
        self.keep(0)

    @property
    def factor(self) -> float:
        """What the learning rate is multiplied with."""
        return RATE_FACTOR**self.rollbacks

    def limit(self, name: str = "nfe") -> float:
        """Evaluations (``"nfe"`` or ``"nfe_backward"``) above which a solve runs away; infinite until it is known what is usual."""
        usual = self.usual[name]
        return max(RUNAWAY_FLOOR, RUNAWAY * statistics.median(usual)) if len(usual) >= RUNAWAY_STEPS else math.inf

    def count(self, values: dict[str, float]) -> None:
        """Evaluations of a step that was taken."""
        for name, usual in self.usual.items():
            usual.append(values[name])

    @property
    def told(self) -> dict[str, int]:
        """For metrics.jsonl: how often the run went back, once it did."""
        return {"rollbacks": self.rollbacks} if self.rollbacks else {}

    def keep(self, step: int) -> None:
        """The present weights are good."""
        self.good = {name: _copy(part.state_dict()) for name, part in self.parts.items()}
        self.good_step = step

    def go_back(self) -> int:
        """To the good weights, the averaged ones and the optimiser's state with them; returns their step."""
        self.rollbacks += 1
        for name, part in self.parts.items():
            part.load_state_dict(_copy(self.good[name]))  # a copy: an optimiser keeps and changes what it loads
        return self.good_step

    def state(self, step: int) -> dict[str, Any]:
        """What resuming needs; the good weights only where they are not those of the present ``step``."""
        usual = {name: list(values) for name, values in self.usual.items()}
        good = {} if self.good_step == step else self.good
        return {"rollbacks": self.rollbacks, "usual": usual, "good_step": self.good_step, "good": good}

    def load(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state`, once model, average and optimiser have theirs."""
        self.rollbacks = int(state["rollbacks"])
        self.usual = {name: deque(map(float, state["usual"][name]), maxlen=WINDOW) for name in COUNTS}
        self.keep(int(state["good_step"]))
        if state["good"]:
            self.good = {name: state["good"][name] for name in self.parts}


def skip(trainer: Trainer, step: int, reason: Callable[[], str]) -> bool:
    """Count the batch of a step that cannot be used; after too many in a row go back to the good weights, and say so.

    ``reason`` is called where it is told, before anything is counted.

    Raises:
        TrainingError: when that has been of no use.
    """
    tell, back = trainer.skipped < MAX_SKIPS, trainer.skips_in_row + 1 >= MAX_SKIPS
    why = reason() if tell or back else ""
    trainer.skipped += 1
    trainer.skips_in_row += 1
    if tell:  # all are counted in metrics.jsonl and result.json
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
    """Options that may help, with their present values.

    Example:
        >>> advice(TrainConfig(lr=0.1, warmup=0), SolverConfig(grid_steps=2))
        'a smaller --lr (now 0.1), a longer --warmup (now 0), --kinetic 0.01 or more (now 0), or more --grid-steps (now 2)'
    """
    finer = f"a smaller --rtol (now {solver.rtol:g})" if solver.adaptive else f"more --grid-steps (now {solver.grid_steps})"
    if config.objective == "flow-matching":
        return f"a smaller --lr (now {config.lr:g}), or a longer --warmup (now {config.warmup})"
    kinetic = f"--kinetic 0.01 or more (now {config.kinetic:g}), " if config.objective in ("likelihood", "both") else ""
    rate = f"--lr (now {config.lr:g})" if config.objective != "both" else f"--lr or --tune-lr (now {config.lr:g}, {config.tune_lr:g})"
    return f"a smaller {rate}, a longer --warmup (now {config.warmup}), {kinetic}or {finer}"


def _copy(value: Any) -> Any:
    """A state_dict's copy on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list | tuple) else value
