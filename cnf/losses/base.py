"""Interface of a training objective."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from cnf.distributed import SINGLE_PROCESS, Group
from cnf.random import Noise
from cnf.solvers import Solver, Stats

__all__ = ["Objective"]


class Objective(Protocol):
    """A loss with its model, its validation, and its training solver.

    ``context`` is the data set's second tensor: the condition of a flow, or the target of a predictor.
    """

    metric: str
    """Name of the term shown during training."""

    @property
    def unit(self) -> str:
        """Unit of the validation."""

    @property
    def metric_unit(self) -> str:
        """Unit of the metric; "" if it has none."""

    @property
    def per_dim_unit(self) -> str:
        """Unit of :meth:`solver_error`."""

    def train(self, mode: bool = True) -> Any:
        """Set training or evaluation mode."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the trained parameters."""

    def prepare(self, x: Tensor) -> None:
        """Fit statistics to the training data, once before the first step."""

    def evaluate(self, x: Tensor, context: Tensor | None, noise: Noise | None) -> tuple[dict[str, Tensor], Stats]:
        """Return ``loss`` and other reported terms, (N,) each, and the statistics of the solve."""

    def validate(
        self, model: Any, x: Tensor, context: Tensor | None, *, index: Tensor, seed: int, group: Group = SINGLE_PROCESS
    ) -> dict[str, float]:
        """Return ``validation`` (lower is better) and other reported figures of ``model`` in evaluation mode.

        All processes of ``group`` pass the same rows and share the work; each gets the whole result.
        """

    def solver_error(self, x: Tensor, context: Tensor | None, noise: Noise | None, *, group: Group = SINGLE_PROCESS) -> float:
        """Return the absolute change of the mean loss of a batch under a refined training solver.

        Each process of ``group`` passes its own rows of the batch.
        """

    def block_errors(
        self, x: Tensor, context: Tensor | None, noise: Noise | None, *, whole: bool = False, group: Group = SINGLE_PROCESS
    ) -> list[float]:
        """Return the mean absolute change of the rows' losses for each block refined alone.

        With ``whole`` all blocks are refined together, which gives a single number.
        """

    @property
    def solvers(self) -> list[Solver]:
        """The training solver of each block."""

    def put_solvers(self, solvers: Sequence[Solver]) -> None:
        """Set the training solvers, one for each block."""

    @property
    def solves(self) -> bool:
        """Whether the objective solves an ODE."""
