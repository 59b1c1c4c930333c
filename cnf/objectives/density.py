"""What all objectives of densities share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from torch import Tensor, nn

from cnf.distributed import ALONE, Group
from cnf.errors import ConfigError, SolverError
from cnf.flow import Flow
from cnf.likelihood import block_errors, evaluate, solver_error
from cnf.noise import Noise
from cnf.solvers import Solver, Stats
from cnf.trajectory import straightness

__all__ = ["DensityObjective"]

SHOWN = 16  # items whose paths are looked at in a validation


class DensityObjective(nn.Module):
    """Base: whatever is minimised in training, a density is validated by its likelihood.

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
        """Of what is told while training."""
        return self.unit

    @property
    def per_dim_unit(self) -> str:
        """``"bits/dim"`` for images, ``"nats/dim"`` for vectors."""
        return "nats/dim" if self.flow.levels is None else "bits/dim"

    def prepare(self, x: Tensor) -> None:
        """Fit the flow's statistics (Standardize, Gaussianize) to the training data (N, \\*event)."""
        self.flow.fit_statistics(x)

    def validate(
        self, model: Flow, x: Tensor, context: Tensor | None = None, *, index: Tensor, seed: int, group: Group = ALONE
    ) -> dict[str, float]:
        """``validation``: the mean negative log-likelihood of ``model``, whose noise belongs to the items ``index``.

        Beside it ``validation_nfe``, the evaluations of a batch's solve, and of some items, where the flow has paths,
        their ``straightness`` and ``path_energy`` (see :func:`cnf.trajectory.straightness`).
        """
        found = evaluate(model, x, context, seed=seed, index=index, group=group).require_solved()
        told = {"validation": found.mean, "validation_nfe": found.nfe}
        like, some = model.like, None if context is None else (context[:SHOWN] if context.ndim == 2 else context).to(model.like)
        points = x[:SHOWN].to(like if x.is_floating_point() else like.device)
        with suppress(ConfigError, SolverError):  # no path, or not a smooth one: the figure stands without
            ratio, energy = straightness(model.transform, points, some, noise=Noise(seed, "paths"))
            told |= {"straightness": ratio, "path_energy": energy}
        return told

    def solver_error(
        self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None, *, group: Group = ALONE
    ) -> float:
        """What the training solver's mean likelihood of a batch is off by, in bits/dim or nats/dim."""
        return solver_error(self.flow, x, context, noise=noise, group=group)

    def block_errors(
        self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None, *, whole: bool = False, group: Group = ALONE
    ) -> list[float]:
        """The mean over items of what each block's solver alone, or all together (``whole``), are off by, without its sign."""
        return block_errors(self.flow, x, context, noise=noise, whole=whole, group=group)

    @property
    def solvers(self) -> list[Solver]:
        """The training solver of each block."""
        return [block.solver for block in self.flow.blocks]

    def put_solvers(self, solvers: Sequence[Solver]) -> None:
        """The training solvers, one for each block."""
        for block, solver in zip(self.flow.blocks, solvers, strict=True):
            block.solver = solver

    def evaluate(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> tuple[dict[str, Tensor], Stats]:
        """The terms (see :meth:`forward`) and what the solve cost."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> dict[str, Tensor]:
        """``loss`` (N,), and whatever else is told, by name."""
        return self.evaluate(x, context, noise)[0]

    def per_dim(self, difference: float) -> float:
        """A difference of nll as bits/dim or nats/dim, for tolerances."""
        return difference if self.flow.levels is not None else difference / self.flow.dim
