"""Race of starts: short trainings of flows on mixtures of which the better half goes on, and the training of the winner."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cnf._utils.errors import SolverError
from cnf.data import DataSplits
from cnf.estimators.budget import Budget
from cnf.estimators.mixtures import Candidate
from cnf.evaluation import evaluate
from cnf.fields import MLP
from cnf.flow import Flow
from cnf.losses import Likelihood
from cnf.ode.continuous import CNF
from cnf.solvers import FixedGrid
from cnf.training import NonFinitePolicy, Run, SolverMonitor, Trainer, WeightAverage
from cnf.training.batches import Batches, Validation
from cnf.training.callbacks import Callback
from cnf.training.phases import Phase
from cnf.transforms import Sequential

__all__ = ["FINE", "SMOOTH", "Recipe", "Start", "start"]


@dataclass(frozen=True)
class Recipe:
    """Settings of the training."""

    batch_size: int = 256
    field_rate: float = 1e-2
    base_rate: float = 1e-3
    average: float = 0.99
    """Decay of the averaged weights."""
    grid_steps: int = 2
    layer: str = "concat"
    spread: tuple[float, float] = (2.0, 12.0)
    """Least and largest factor of the initial weights of the first hidden layer, spread over its units. With those of
    torch a field is nearly linear in the data, and does not leave a mixture: 300 steps from 8 components on the
    checkerboard gained 0.000 nats, with a factor 10 (and 3 in the next layer) 0.13."""
    gain: float = 3.0
    """Factor of the initial weights of the second hidden layer."""
    tolerance: float = 0.02
    """Error of the training solver in nats, above which its steps are doubled."""
    every: int = 50
    """Steps between two measurements of that error."""


FINE = Recipe()
"""For few columns and components: structure finer than the base's."""
SMOOTH = Recipe(field_rate=4e-3, spread=(1.0, 4.0), gain=2.0)
"""For many columns."""
SHARP = Recipe(field_rate=2e-4, base_rate=1e-3, spread=(1.0, 4.0), gain=2.0)
"""For many components, which the first steps of the others would undo: 44.19 to 50.5 nats on a table of 10 columns."""
FEW_COLUMNS, FEW_COMPONENTS = 4, 8
RISE = 30  # steps of linear warm-up
DAMPING = 0.7  # of the predicted gain


class Pace(Callback):
    """End of a training by steps, or by time: the learning rate follows the share that is done.

    Args:
        steps: planned number; without a limit of time it is kept.
        budget: the clock of the search.
        until: time by that clock at which the training ends.
        validations: planned during the training.
        every: steps between two corrections of the plan.
    """

    def __init__(self, steps: int, budget: Budget, until: float, validations: int, every: int = 20):
        self.planned, self.budget, self.until, self.every, self.validations = steps, budget, until, every, validations + 1
        self._last, self._steps, self.validation_seconds = 0.0, [0.02], 0.0

    @property
    def step_seconds(self) -> float:
        """Median time of the latest steps, without validations."""
        return statistics.median(self._steps)

    def on_start(self, run: Run) -> None:
        """Start the clock."""
        self._last, self._steps = self.budget.spent, []

    def on_validation(self, run: Run, better: bool) -> None:
        """Measure the time of the validation."""
        now = self.budget.spent
        self.validation_seconds, self._last, self.validations = now - self._last, now, self.validations - 1

    def on_step_end(self, run: Run) -> None:
        """Correct the number of steps by the time that they take, and what validations will take."""
        now, step = self.budget.spent, run.state.step
        self._steps, self._last = [*self._steps[-50:], now - self._last], now
        if self.until < math.inf and step % self.every == 0:
            left = self.until - now - max(0, self.validations) * self.validation_seconds
            self.planned = step + max(0, int(left / self.step_seconds))

    def stop_reason(self, run: Run) -> str | None:
        """Return ``"steps"`` when the planned steps are done."""
        return "steps" if run.state.step >= self.planned else None


@dataclass(eq=False)
class Start:
    """A flow of latents on a mixture, with its history.

    Attributes:
        candidate: the transform and the mixture that it began from.
        flow: of the latents.
        recipe: of its training.
        validation: mean negative log-likelihood of the table's validation rows that were scored last, in nats.
        steps: taken so far.
        step_seconds: of one step, by the latest training.
        row_seconds: of a validation, for each row.
        refinements: doublings of the training solver's steps.
        history: steps and validation of the races.
    """

    candidate: Candidate
    flow: Flow
    recipe: Recipe
    validation: float
    steps: int = 0
    step_seconds: float = 0.02
    row_seconds: float = 0.0
    refinements: int = 0
    history: tuple[tuple[int, float], ...] = ()

    def train(
        self, steps: int, budget: Budget, until: float = math.inf, *, seed: int = 0, rows: Tensor | None = None, validations: int = 0, decay: bool = False
    ) -> None:
        """Train for a number of steps, or until a time; the best weights are kept.

        Args:
            steps: number of steps, the first plan if the budget is limited and ``until`` finite.
            budget: the clock of the search.
            until: time by that clock at which to stop.
            seed: of the batches.
            rows: indices of the validation rows to score by; all if None.
            validations: during the training; the weights after it are validated in any case.
            decay: lower the learning rate to zero by a cosine.
        """
        recipe, table = self.recipe, self.candidate.table
        z = table.validation if rows is None else table.validation[rows]
        log_det = table.log_det if rows is None else table.log_det[rows]
        pace = Pace(steps, budget, until, validations)
        monitor = SolverMonitor(recipe.tolerance / self.flow.dim, every=recipe.every)
        rise = min(RISE, steps // 5 + 1)

        def rate(step: int, _: int) -> float:
            share = min(1.0, step / max(1, pace.planned))
            return min(1.0, (step + 1) / rise) * (0.5 * (1 + math.cos(math.pi * share)) if decay else 1.0)

        for block in self.flow.blocks:
            block.solver = FixedGrid("rk4", recipe.grid_steps * 2**self.refinements)
        every = max(1, steps // (validations + 1)) if validations else 10**9
        objective = Likelihood(self.flow)
        data = DataSplits(table.name, "table", table.train, z, z[:0])
        batches = Batches(data, recipe.batch_size, seed, z.device, dtype=z.dtype)
        trainer = Trainer(
            self.flow, [Phase(objective, batches, self._optimizer, rate)], steps=10**9 if math.isfinite(until) else steps,
            validation=Validation(z, None, torch.arange(len(z))), callbacks=[WeightAverage(recipe.average), monitor, NonFinitePolicy(), pace],
            validate_every=every, log_every=50, max_grad_norm=10.0, quiet=True,
        )  # fmt: skip
        trainer.run()
        monitor.reset()
        state, shift = trainer.state, float(log_det.mean())
        self.flow.load_state_dict(state.best_weights)
        self.flow.eval()
        self.steps, self.step_seconds, self.row_seconds = self.steps + state.step, pace.step_seconds, pace.validation_seconds / len(z)
        self.refinements += monitor.refinements
        self.validation = state.best - shift
        before = self.steps - state.step
        self.history += tuple((before + r["step"], r["validation"] - shift) for r in trainer.history if "validation" in r)

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        base = list(self.flow.base.parameters())
        known = {id(p) for p in base}
        others = [p for p in self.flow.parameters() if id(p) not in known]
        groups = [{"params": others, "lr": self.recipe.field_rate}, {"params": base, "lr": self.recipe.base_rate}]
        return torch.optim.Adam(groups, fused=True)

    def predicted(self, steps: float) -> float:
        """Return the validation that the race's course predicts after a number of steps.

        Flows fall by about as much with each doubling of their steps; mixtures of many components start low and stay.
        """
        (early, high), (late, low) = self.history[-2:]
        slope = min(0.0, low - high) / max(1e-9, math.log2(late / early))
        return low + DAMPING * slope * math.log2(max(1.0, steps / late))

    def score(self) -> float:
        """Return the validation nats by the evaluation solver, of all rows; infinite if one cannot be solved."""
        table = self.candidate.table
        try:
            return table.nll(evaluate(self.flow.eval(), table.validation).require_solved().log_prob.to(table.log_det))
        except SolverError:
            return math.inf

    def assemble(self) -> Flow:
        """Return the flow of the table's rows, in evaluation mode."""
        (block,) = self.flow.blocks
        solved = CNF(copy.deepcopy(block.field), solver=FixedGrid("rk4", self.recipe.grid_steps * 2**self.refinements))
        whole = Sequential([copy.deepcopy(self.candidate.table.transform), solved])
        return Flow(whole, self.flow.event_shape, base=copy.deepcopy(self.flow.base)).eval()


def start(candidate: Candidate, hidden: Sequence[int], seed: int) -> Start:
    """Return a flow whose field is zero, on a copy of the candidate's mixture."""
    z = candidate.table.train
    recipe = SHARP if candidate.base.components > FEW_COMPONENTS else FINE if z.shape[1] <= FEW_COLUMNS else SMOOTH
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        field = MLP(z.shape[1], hidden, layer=recipe.layer, zero_init=True)
    first, *later = field.time_layers[:-1]
    with torch.no_grad():
        for weight in first.parameters():
            factor = torch.logspace(math.log10(recipe.spread[0]), math.log10(recipe.spread[1]), len(weight))
            weight.mul_(factor.reshape(-1, *(1,) * (weight.ndim - 1)))
        for weight in (w for layer in later for w in layer.parameters()):
            weight.mul_(recipe.gain)
    block = CNF(field, solver=FixedGrid("rk4", recipe.grid_steps))
    flow = Flow(block, (z.shape[1],), base=copy.deepcopy(candidate.base)).to(z)
    return Start(candidate, flow, recipe, candidate.validation)
