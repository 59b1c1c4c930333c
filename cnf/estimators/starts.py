"""Flows that start from a mixture, with a field that is zero: their recipes and their training."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cnf._utils.errors import SolverError
from cnf.data import DataSplits
from cnf.estimators.budget import Budget
from cnf.estimators.mixtures import Candidate
from cnf.estimators.training import Pace, train
from cnf.evaluation import evaluate
from cnf.fields import MLP
from cnf.flow import Flow
from cnf.ode.continuous import CNF
from cnf.solvers import FixedGrid
from cnf.training import SolverMonitor
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
DAMPING = 0.35  # of the predicted gain: with 0.7, starts from one Gaussian were chosen that ended 0.06 nats behind (two spirals)


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
        history: steps and validation of the trainings so far.
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
        for block in self.flow.blocks:
            block.solver = FixedGrid("rk4", recipe.grid_steps * 2**self.refinements)
        trainer = train(
            self.flow, DataSplits(table.name, "table", table.train, z, z[:0]), self._optimizer, pace, pace.rate(min(RISE, steps // 5 + 1), decay=decay),
            batch_size=recipe.batch_size, seed=seed, average=recipe.average, callbacks=[monitor],
            validate_every=max(1, steps // (validations + 1)) if validations else 10**9,
        )  # fmt: skip
        monitor.reset()
        state, shift = trainer.state, float(log_det.mean())
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
        """Return the validation that the course so far predicts after a number of steps.

        Flows fall by about as much with each doubling of their steps; mixtures of many components start low and stay.
        """
        if len(self.history) < 2:  # the time was up before its first step
            return self.validation
        (early, high), (late, low) = self.history[-2:]
        slope = min(0.0, low - high) / max(1e-9, math.log2(max(1, late) / max(1, early)))
        return low + DAMPING * slope * math.log2(max(1.0, steps / max(1, late)))

    def score(self) -> Tensor:
        """Return the negative log-likelihood (M,) of the validation rows by the evaluation solver; infinite if one cannot be solved."""
        table = self.candidate.table
        try:
            return table.rows(evaluate(self.flow.eval(), table.validation).require_solved().log_prob.to(table.log_det))
        except SolverError:
            return torch.full_like(table.log_det, math.inf)

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
