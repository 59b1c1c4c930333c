"""Base class of the objectives for densities."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from torch import Tensor, nn

from cnf._utils.errors import ConfigError, SolverError
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.evaluation import block_errors, evaluate, solver_error
from cnf.flow import Flow
from cnf.ode.trajectory import straightness
from cnf.random import Noise
from cnf.solvers import Solver, Stats, coarse

__all__ = ["DensityObjective"]

SHOWN = 16  # rows whose paths are measured in a validation


class DensityObjective(nn.Module):
    """Base class of density objectives: whatever the training loss, the validation is the likelihood.

    Args:
        flow: the density to fit.
    """

    metric = "loss"
    solves = True

    def __init__(self, flow: Flow):
        super().__init__()
        self.flow = flow

    @property
    def unit(self) -> str:
        """``"bits/dim"`` for images, ``"nats"`` for vectors."""
        return "nats" if self.flow.levels is None else "bits/dim"

    @property
    def metric_unit(self) -> str:
        """Unit of the metric shown during training."""
        return self.unit

    @property
    def per_dim_unit(self) -> str:
        """``"bits/dim"`` for images, ``"nats/dim"`` for vectors."""
        return "nats/dim" if self.flow.levels is None else "bits/dim"

    def prepare(self, x: Tensor) -> None:
        """Fit the flow's statistics (Standardize, Gaussianize, ...) to the training data (N, \\*event)."""
        self.flow.fit_statistics(x)

    def validate(
        self, model: Flow, x: Tensor, context: Tensor | None = None, *, index: Tensor, seed: int, group: Group = SINGLE_PROCESS
    ) -> dict[str, float]:
        """Return the mean negative log-likelihood of ``model`` as ``validation``; ``index`` selects the rows' noise.

        The solver is that of evaluation, in its coarse version if it has one (:func:`cnf.solvers.coarse`).

        Also return ``validation_nfe``, the evaluations of a batch's solve, and, for flows with paths, ``straightness``
        and ``path_energy`` of some rows (see :func:`cnf.ode.trajectory.straightness`).

        Raises:
            SolverError: if a row cannot be solved.
        """
        found = evaluate(model, x, context, seed=seed, index=index, group=group, solver=coarse).require_solved()
        terms = {"validation": found.mean, "validation_nfe": found.nfe}
        like, some = model.like, None if context is None else (context[:SHOWN] if context.ndim == 2 else context).to(model.like)
        points = x[:SHOWN].to(like if x.is_floating_point() else like.device)
        with suppress(ConfigError, SolverError):  # no path, or no smooth one: return the figure without them
            ratio, energy = straightness(model.transform, points, model.embed(some), noise=Noise(seed, "paths"))
            terms |= {"straightness": ratio, "path_energy": energy}
        return terms

    def solver_error(
        self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None, *, group: Group = SINGLE_PROCESS
    ) -> float:
        """Return the error of the mean likelihood of a batch under the training solver, in bits/dim or nats/dim."""
        return solver_error(self.flow, x, context, noise=noise, group=group)

    def block_errors(
        self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None, *, whole: bool = False, group: Group = SINGLE_PROCESS
    ) -> list[float]:
        """Return the rows' mean absolute error due to each block's solver alone, or to all together (``whole``)."""
        return block_errors(self.flow, x, context, noise=noise, whole=whole, group=group)

    @property
    def solvers(self) -> list[Solver]:
        """The training solver of each block."""
        return [block.solver for block in self.flow.blocks]

    def put_solvers(self, solvers: Sequence[Solver]) -> None:
        """Set the training solvers, one for each block."""
        for block, solver in zip(self.flow.blocks, solvers, strict=True):
            block.solver = solver

    def evaluate(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> tuple[dict[str, Tensor], Stats]:
        """Return the terms (see :meth:`forward`) and the statistics of the solve."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> dict[str, Tensor]:
        """Return ``loss`` (N,) and other reported terms by name."""
        return self.evaluate(x, context, noise)[0]

    def per_dim(self, difference: float) -> float:
        """Convert a difference of nll to bits/dim or nats/dim, for tolerances."""
        return difference if self.flow.levels is not None else difference / self.flow.dim
