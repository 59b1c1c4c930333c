"""Negative evidence lower bound of variational autoencoders, and its estimate with standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cnf._utils.errors import require_at_least
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.ode.continuous import CNF
from cnf.random import Noise, draw
from cnf.solvers import Solver, Stats, refined
from cnf.solvers.base import SolverOverride, solver_of
from cnf.vae import FlowVAE

__all__ = ["ELBO", "ELBOEstimate", "estimate_elbo"]

ROWS = 512  # of a validation or test batch


@dataclass(frozen=True)
class ELBOEstimate:
    """Mean evidence lower bound of a split, in nats."""

    elbo: float
    standard_error: float
    """Over rows."""
    noise_standard_error: float | None
    """Due to the draws of z; None for a single draw."""
    log_likelihood: float
    """Mean log p(x | z)."""
    kl: float
    """Mean log q(z | x) − log p(z)."""
    nfe: float
    """Evaluations of a batch's solve."""
    rows: Tensor = field(repr=False, compare=False)
    """log p(x | z) and log q(z | x) − log p(z) of each row, the means over its draws (2, N) in float64."""


@torch.no_grad()
def estimate_elbo(
    model: FlowVAE, x: Tensor, draws: int = 1, seed: int = 0, *, solver: SolverOverride = None, group: Group = SINGLE_PROCESS,
    progress: Callable[[int, int], object] | None = None,
) -> ELBOEstimate:  # fmt: skip
    """Estimate the mean evidence lower bound of x (N, \\*event), with ``draws`` of z per row.

    Args:
        model: in evaluation mode, to use its evaluation solver.
        x: images, as :class:`~cnf.vae.FlowVAE` takes them.
        draws: of z for each row.
        seed: of the draws.
        solver: in place of those of the model's blocks.
        group: processes that all call this with the same arguments and share the work; each gets the result.
        progress: called with the number of finished batches of this process and of all of them.

    Example:
        >>> from cnf.vae import vae_mlp
        >>> found = estimate_elbo(vae_mlp((4,), 2, 8, flow_hidden=(8,)).eval(), torch.ones(6, 4), draws=2)
        >>> abs(found.elbo - (found.log_likelihood - found.kl)) < 1e-6
        True
    """
    require_at_least(1, draws=draws)
    parts, done = [(k, start) for k in range(draws) for start in range(0, len(x), ROWS)], 0
    terms, nfe = torch.zeros(2, draws, len(x), dtype=torch.float64), torch.zeros(len(parts), dtype=torch.float64)
    own = group.owned(len(parts))
    with group.together():
        for place, (k, start) in enumerate(parts):
            if not group.owns(place):
                continue
            rows = slice(start, start + ROWS)
            some = x[rows].to(model.like.device)
            found = model.evaluate(some.to(model.like.dtype) if some.is_floating_point() else some, noise=Noise(seed, "elbo", k).child(start), solver=solver)
            terms[0, k, rows], terms[1, k, rows] = found.log_likelihood.double().cpu(), found.kl.double().cpu()
            nfe[place], done = found.stats.nfe, done + 1
            if progress is not None:
                progress(done, own)
    terms, nfe = group.sum(terms), group.sum(nfe)
    bound = terms[0] - terms[1]
    mean = bound.mean(0)
    spread = None if draws == 1 else math.sqrt(float(bound.var(0).mean()) / draws / len(mean))
    error = float(mean.std()) / math.sqrt(len(mean)) if len(mean) > 1 else math.nan
    return ELBOEstimate(float(mean.mean()), error, spread, float(terms[0].mean()), float(terms[1].mean()), float(nfe.mean()), terms.mean(1))


class ELBO(nn.Module):
    """Negative evidence lower bound in nats, an objective of :func:`cnf.fit`.

    Args:
        model: the autoencoder.
        warmup: steps in which the weight of the KL term rises linearly from 0 to 1; validations always have 1.
        redraw: number of grey levels of training images, from which each step draws binary ones (Omniglot, as published):
            a pixel is 1 with its grey level as probability. None trains on the images themselves, and so do validations.

    Example:
        >>> import cnf
        >>> from cnf.vae import vae_mlp
        >>> model, x = vae_mlp((4,), 2, 8, flow_hidden=(8,)), (torch.rand(64, 4) < 0.5).float()
        >>> result = cnf.fit(model, x, loss=ELBO(model), steps=5, quiet=True)
    """

    metric = "loss"
    unit = metric_unit = per_dim_unit = "nats"

    def __init__(self, model: FlowVAE, warmup: int = 0, redraw: int | None = None):
        super().__init__()
        self.model, self.warmup, self.redraw = model, warmup, redraw

    @property
    def solves(self) -> bool:
        """Whether the posterior has a CNF."""
        return bool(self.model.blocks)

    def prepare(self, x: Tensor) -> None:
        """Do nothing: no statistics are fitted."""

    def evaluate(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> tuple[dict[str, Tensor], Stats]:
        """Return the terms (see :meth:`forward`) and the statistics of the solve."""
        beta = min(1.0, noise.step / self.warmup) if noise is not None and self.warmup else 1.0
        terms = self.model.evaluate(self.images(x, noise), noise=noise)
        return {"loss": beta * terms.kl - terms.log_likelihood, "kl": terms.kl, "reconstruction": -terms.log_likelihood}, terms.stats

    def images(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """Return the images that a step takes, on the model's device: binary ones drawn from x with ``redraw``, else x."""
        x = x.to(self.model.like) if x.is_floating_point() else x.to(self.model.like.device)
        if self.redraw is None:
            return x
        grey = x if x.is_floating_point() else x.to(self.model.like.dtype) / (self.redraw - 1)
        u = draw(noise, "binarise", "uniform", tuple(x.shape), dtype=grey.dtype, device=grey.device)
        return (u < grey).to(grey.dtype)

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> dict[str, Tensor]:
        """Return ``loss``, ``kl`` and ``reconstruction`` (N,); the loss has the warm-up's weight of the KL term."""
        return self.evaluate(x, context, noise)[0]

    def validate(
        self, model: FlowVAE, x: Tensor, context: Tensor | None = None, *, index: Tensor, seed: int, group: Group = SINGLE_PROCESS
    ) -> dict[str, float]:
        """Return ``validation``, the negative evidence lower bound with one draw, its KL term, and ``validation_nfe``."""
        found = estimate_elbo(model, x, seed=seed, group=group)
        return {"validation": -found.elbo, "validation_kl": found.kl, "validation_nfe": found.nfe}

    @torch.no_grad()
    def _loss(self, x: Tensor, noise: Noise | None, solver: SolverOverride) -> Tensor:
        return -self.model.evaluate(self.images(x, noise), noise=noise, solver=solver).elbo.double()

    def solver_error(
        self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None, *, group: Group = SINGLE_PROCESS
    ) -> float:
        """Return the absolute change of the mean loss of a batch under a refined training solver."""
        return abs(group.mean(self._loss(x, noise, refined) - self._loss(x, noise, None)))

    def block_errors(
        self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None, *, whole: bool = False, group: Group = SINGLE_PROCESS
    ) -> list[float]:
        """Return the mean absolute change of the rows' losses for each block refined alone, or for all together (``whole``)."""
        plain = self._loss(x, noise, None)
        each = [refined] if whole else [_one_refined(block) for block in self.model.blocks]
        return [group.mean((self._loss(x, noise, solver) - plain).abs()) for solver in each]

    @property
    def solvers(self) -> list[Solver]:
        """The training solver of each block."""
        return [block.solver for block in self.model.blocks]

    def put_solvers(self, solvers: Sequence[Solver]) -> None:
        """Set the training solvers, one for each block."""
        for block, solver in zip(self.model.blocks, solvers, strict=True):
            block.solver = solver


def _one_refined(chosen: CNF) -> SolverOverride:
    return lambda block: refined(block) if block is chosen else solver_of(block)
