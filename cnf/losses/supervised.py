"""Supervised losses of predictors: mean squared error, and cross entropy with accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf._utils.errors import ConfigError, DataError
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.losses.penalties import Penalties, penalised
from cnf.neural_ode import NeuralODE, Predictor
from cnf.ode.quadratures import Quadrature, learned_modules
from cnf.random import Noise
from cnf.solvers import Solver, Stats, refined
from cnf.solvers.base import SolverOverride

__all__ = ["KINDS", "Assessment", "Supervised", "assess"]

KINDS = ("regression", "classification")
BATCH_NUMBERS = 2**18  # rows times dimensions of a solve, at most 4096 rows


@dataclass(frozen=True)
class Assessment:
    """Losses and outputs of a predictor on a split."""

    loss: Tensor
    """(N,) float64: squared error (mean over targets), or cross entropy in nats."""
    correct: Tensor | None
    """(N,) bool for a classification, None otherwise."""
    outputs: Tensor
    """(N, outputs)."""
    nfe: float
    """Evaluations of the field in a batch's solve, averaged over batches."""

    @property
    def mean(self) -> float:
        """The mean loss."""
        return float(self.loss.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of the mean loss over rows; NaN for a single row."""
        return float(self.loss.std()) / math.sqrt(len(self.loss))

    @property
    def accuracy(self) -> float | None:
        """Fraction of rows whose largest output is their class; None for a regression."""
        return None if self.correct is None else float(self.correct.double().mean())

    @property
    def accuracy_standard_error(self) -> float | None:
        """Binomial standard error of the accuracy a: √(a(1 − a)/N)."""
        a = self.accuracy
        return None if a is None else math.sqrt(a * (1 - a) / len(self.loss))


def _losses(outputs: Tensor, targets: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    """Return losses (N,) and, for a classification, which rows are correct."""
    if outputs.shape != targets.shape:
        raise DataError(f"targets have shape {tuple(targets.shape)}, but the model's outputs have {tuple(outputs.shape)}")
    if kind == "regression":
        return (outputs - targets).square().mean(1), None
    classes = targets.argmax(1)
    return F.cross_entropy(outputs, classes, reduction="none"), outputs.argmax(1) == classes


@torch.no_grad()
def assess(
    model: Predictor,
    x: Tensor,
    targets: Tensor,
    kind: str,
    *,
    batch_size: int | None = None,
    group: Group = SINGLE_PROCESS,
    progress: Callable[[int, int], object] | None = None,
    solver: SolverOverride = None,
) -> Assessment:
    """Predict every row of a split and compare with its target.

    Args:
        model: in evaluation mode, to use its evaluation solver.
        x: events (N, \\*event).
        targets: (N, outputs): values, or one-hot classes.
        kind: ``"regression"`` or ``"classification"``.
        batch_size: rows of a solve.
        group: processes that all call this with the same arguments: they share the batches, and each gets the whole
            result.
        progress: called with the number of this process's finished batches and of all its batches, before the first and
            after each.
        solver: replaces the model's own, see :meth:`cnf.neural_ode.NeuralODE.predict`.

    Raises:
        DataError: for targets whose shape differs from that of the outputs.
        SolverError: if a solve fails.
    """
    size = batch_size or max(1, min(4096, BATCH_NUMBERS // model.dim))
    parts = x.split(size)
    joined, nfes = torch.zeros(len(x), model.outputs, dtype=torch.float64), torch.zeros(len(parts), dtype=torch.float64)
    override = {} if solver is None else {"solver": solver}
    done, own = 0, group.owned(len(parts))
    if progress is not None:
        progress(done, own)
    with group.together():
        for place, part in enumerate(parts):
            if group.owns(place):
                found = model.predict(part.to(model.like.device), **override)
                joined[place * size : place * size + len(part)], nfes[place] = found.outputs.double().cpu(), found.stats.nfe
                done += 1
                if progress is not None:
                    progress(done, own)
    joined, nfes = group.sum(joined), group.sum(nfes)
    loss, correct = _losses(joined, targets.double().cpu(), kind)
    return Assessment(loss, correct, joined, float(nfes.mean()))


class Supervised(nn.Module):
    """Mean squared error (``"regression"``) or cross entropy in nats (``"classification"``) of a predictor.

    Args:
        model: the predictor.
        kind: ``"regression"`` or ``"classification"``.
        penalties: weights of integrals along the path of a neural ODE, added to its training loss: names
            (``"kinetic"``, ``"jacobian"``, ``"directional"``, ``"total-derivative"``) or quadratures, such as a
            :class:`~cnf.ode.quadratures.RunningCost`. The integrals are sums over the dimensions of the state, and come
            from the same solve (kinetic and Jacobian: RNODE, 2002.02798; running costs: 2002.08071).
        measure: integrals to report without penalising them.

    Raises:
        ConfigError: for another kind, penalties or measurements of a model without an ODE, or names that are taken.

    Example:
        >>> from cnf.neural_ode import anode_mlp
        >>> objective = Supervised(anode_mlp(2, outputs=3, augment=1), "classification")
        >>> terms = objective(torch.randn(5, 2), torch.eye(3)[[0, 1, 2, 0, 1]])
        >>> sorted(terms), terms["loss"].shape
        (['accuracy', 'loss'], torch.Size([5]))
    """

    metric = "loss"

    def __init__(
        self, model: Predictor, kind: str, penalties: Penalties | None = None, measure: Iterable[str | Quadrature] = ()
    ):
        super().__init__()
        if kind not in KINDS:
            raise ConfigError(f"kind={kind!r} is unknown: expected {' or '.join(map(repr, KINDS))}")
        self.model, self.kind = model, kind
        self.quadratures, self.weights = penalised(penalties or {}, measure)
        if self.quadratures and not isinstance(model, NeuralODE):
            raise ConfigError(f"penalties and measurements are of the path of a neural ODE, and {type(model).__name__} solves none: leave them out")
        if taken := {q.name for q in self.quadratures} & {"loss", "accuracy", "data_loss"}:
            raise ConfigError(f"quadrature name {min(taken)!r} is taken by the objective: give the integral another name")
        # learned running costs are trained with the model
        self.costs = nn.ModuleList(learned_modules(self.quadratures))

    @property
    def unit(self) -> str:
        """``"nats"`` (cross entropy) or ``"squared error"``."""
        return "nats" if self.kind == "classification" else "squared error"

    @property
    def metric_unit(self) -> str:
        """Same as :attr:`unit`."""
        return self.unit

    @property
    def per_dim_unit(self) -> str:
        """Same as :attr:`unit`."""
        return self.unit

    @property
    def solves(self) -> bool:
        """Whether the model solves an ODE."""
        return isinstance(self.model, NeuralODE)

    def prepare(self, x: Tensor) -> None:
        """Do nothing: no statistics are fitted."""

    def evaluate(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> tuple[dict[str, Tensor], Stats]:
        """Return the terms (see :meth:`forward`) and the statistics of the solve."""
        terms, stats, integrals = self._terms(x, context, None, self.quadratures, noise)
        if self.weights:
            terms["data_loss"] = terms["loss"]
        for name, weight in self.weights.items():
            terms["loss"] = terms["loss"] + weight * integrals[name]
        return {**terms, **integrals}, stats

    def _terms(
        self, x: Tensor, context: Tensor | None, solver: SolverOverride, quadratures: Sequence[Quadrature] = (), noise: Noise | None = None
    ) -> tuple[dict[str, Tensor], Stats, dict[str, Tensor]]:
        if context is None:
            raise DataError("there are no targets: a regression or a classification needs them as context (N, outputs)")
        integrals: dict[str, Tensor] = {}
        if quadratures:
            model = cast(NeuralODE, self.model)
            (outputs, _, stats), integrals = model.predict_with_integrals(x, quadratures, noise=noise, solver=solver)
        else:
            outputs, _, stats = self.model.predict(x) if solver is None else self.model.predict(x, solver=solver)
        loss, correct = _losses(outputs, context.to(outputs), self.kind)
        return {"loss": loss, **({} if correct is None else {"accuracy": correct.to(loss.dtype)})}, stats, integrals

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> dict[str, Tensor]:
        """Return ``loss`` (N,) and, for a classification, ``accuracy`` (N,) of 0 or 1; ``context`` is the targets.

        Integrals (N,) follow by name; with penalties ``data_loss`` is the loss without them.
        """
        return self.evaluate(x, context, noise)[0]

    def validate(
        self, model: Predictor, x: Tensor, context: Tensor | None = None, *, index: Tensor, seed: int, group: Group = SINGLE_PROCESS
    ) -> dict[str, float]:
        """Return ``validation``, the mean loss, ``validation_nfe``, and (classification) ``validation_accuracy``."""
        assert context is not None
        found = assess(model, x, context, self.kind, group=group)
        more = {} if found.accuracy is None else {"validation_accuracy": found.accuracy}
        return {"validation": found.mean, **more, "validation_nfe": found.nfe}

    @torch.no_grad()
    def solver_error(
        self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None, *, group: Group = SINGLE_PROCESS
    ) -> float:
        """Return the absolute change of the mean loss of a batch under a refined training solver."""
        with group.together():
            coarse = self._terms(x, context, None)[0]["loss"].double()
            moved = self._terms(x, context, refined)[0]["loss"].double() - coarse
        return abs(group.mean(moved))

    def block_errors(
        self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None, *, whole: bool = False, group: Group = SINGLE_PROCESS
    ) -> list[float]:
        """Return :meth:`solver_error` as a list of one number."""
        return [self.solver_error(x, context, noise, group=group)]

    @property
    def solvers(self) -> list[Solver]:
        """The model's training solver, as a list."""
        return [cast(NeuralODE, self.model).solver]

    def put_solvers(self, solvers: Sequence[Solver]) -> None:
        """Set the model's training solver, the single element of ``solvers``."""
        (cast(NeuralODE, self.model).solver,) = solvers
