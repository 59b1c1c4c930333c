"""What the training loop asks of an objective."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from cnf.distributed import ALONE, Group
from cnf.noise import Noise
from cnf.solvers import Solver, Stats

__all__ = ["Objective"]


class Objective(Protocol):
    """A loss with its model, its validation, and the solver that training uses.

    ``context`` is what the data set gives with each item: what a flow is conditioned on, or what a classifier predicts.
    """

    metric: str
    """The term that is told while training."""

    @property
    def unit(self) -> str:
        """Of the validation."""

    @property
    def metric_unit(self) -> str:
        """Of the metric; "" where it has none."""

    @property
    def per_dim_unit(self) -> str:
        """Of :meth:`solver_error`."""

    def train(self, mode: bool = True) -> Any:
        """Training mode, or not."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained."""

    def prepare(self, x: Tensor) -> None:
        """See the training data once, before the first step."""

    def evaluate(self, x: Tensor, context: Tensor | None, noise: Noise | None) -> tuple[dict[str, Tensor], Stats]:
        """``loss`` and whatever else is told, (N,) each, and what the solve cost."""

    def validate(
        self, model: Any, x: Tensor, context: Tensor | None, *, index: Tensor, seed: int, group: Group = ALONE
    ) -> dict[str, float]:
        """``validation``, the lower the better, of (averaged) weights in evaluation mode, and whatever else is told.

        A ``group`` of processes, all with the same items, shares the work, and each gets the whole result.
        """

    def solver_error(self, x: Tensor, context: Tensor | None, noise: Noise | None, *, group: Group = ALONE) -> float:
        """How far the training solver's loss on one batch, of which each process of ``group`` gives its rows, is from that of
        the same solver, finer."""

    def block_errors(
        self, x: Tensor, context: Tensor | None, noise: Noise | None, *, whole: bool = False, group: Group = ALONE
    ) -> list[float]:
        """The same, of each block's solver alone, or (``whole``) of all together, as one number; items without their sign."""

    @property
    def solvers(self) -> list[Solver]:
        """The solver that training uses, of each block."""

    def put_solvers(self, solvers: Sequence[Solver]) -> None:
        """The solvers that training uses from now on, one for each block."""

    @property
    def solves(self) -> bool:
        """Whether there is an ODE at all."""
