"""Negative log-likelihood with regularisers."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from cnf._utils.errors import ConfigError
from cnf.flow import Flow
from cnf.losses.density import DensityObjective
from cnf.losses.penalties import Penalties, find_quadrature, penalised, released_factor
from cnf.ode.divergence import Bound, Linearization
from cnf.ode.quadratures import Kinetic, Quadrature, StepError
from cnf.ode.released import Released
from cnf.random import Noise
from cnf.solvers import FixedGrid, Stats
from cnf.transforms import Request

__all__ = ["Likelihood"]


class _BlockMean:
    """A regulariser as in RNODE's released code: its mean over the block's dimensions, times a factor."""

    def __init__(self, quadrature: Quadrature, factor: float):
        self.quadrature, self.factor = quadrature, factor
        self.name, self.need = f"{quadrature.name}_mean", quadrature.need

    def __call__(self, t: Tensor, x: Tensor, linearization: Linearization, field: Bound) -> Tensor:
        return self.quadrature(t, x, linearization, field) * (self.factor / x.shape[1:].numel())


class Likelihood(DensityObjective):
    r"""Negative log-likelihood with kinetic and Jacobian regularisers (RNODE, 2002.02798, eq. 17).

    The loss is the negative log-likelihood plus :math:`\lambda_K \int\|f\|^2 + \lambda_J \int\|J\|_F^2`. For images the
    published loss is in nats per dimension, and this one is the same in bits/dim: the negative log-likelihood and the
    regularisers are both divided by :math:`D \ln 2`, D being the dimension of the whole flow. For vectors the loss is
    in nats, undivided. The regularisers' quadratures are added to every CNF block of the flow.

    Args:
        flow: the density to fit.
        kinetic: :math:`\lambda_K \ge 0`.
        jacobian: :math:`\lambda_J \ge 0`.
        regularisers: ``"paper"``, as above, or ``"code"``, as in RNODE's released code, for images and vectors: the sum
            over blocks of :math:`\frac{\lambda_K}{2}` and :math:`\lambda_J` times the integrals' means over each
            block's dimensions, so that small blocks weigh as much as large ones (terms ``kinetic_mean`` and
            ``jacobian_mean``).
        step_error: weight of the solver's error on its grid (:class:`~cnf.ode.quadratures.StepError`), scaled like the
            other regularisers: favours flows that need few solver steps.
        penalties: weights of further integrals, by name (``"directional"``, ``"total-derivative"``) or by quadrature,
            scaled like the other regularisers; those of the released codes (:data:`cnf.compat.RELEASED`, ``"l1int"``) are
            means over each block's dimensions, added to the loss as they are.
        measure: integrals to report without penalising them, by name or quadrature.

    Attributes:
        scale: divisor of the weighted regularisers: :math:`D \ln 2` for images, 1 for vectors and for ``"code"``.

    Raises:
        ConfigError: for unknown regularisers, a step_error with a solver without an error estimate, a weight that is
            negative or not finite, or a quadrature called ``loss`` or ``nll``, which are the objective's own terms.

    Example:
        >>> from cnf.fields import MLP
        >>> from cnf.ode.continuous import CNF
        >>> objective = Likelihood(Flow(CNF(MLP(2)), (2,)), kinetic=0.01)
        >>> terms = objective(torch.randn(5, 2))
        >>> sorted(terms), terms["loss"].shape
        (['kinetic', 'loss', 'nll'], torch.Size([5]))
    """

    metric = "nll"

    def __init__(
        self,
        flow: Flow,
        kinetic: float = 0.0,
        jacobian: float = 0.0,
        regularisers: str = "paper",
        step_error: float = 0.0,
        penalties: Penalties | None = None,
        measure: Iterable[str | Quadrature] = (),
    ):
        super().__init__(flow)
        if regularisers not in ("paper", "code"):
            raise ConfigError(f"regularisers={regularisers!r} is unknown: expected 'paper' or 'code'")
        if not all(0 <= weight < math.inf for weight in (kinetic, jacobian, step_error)):
            raise ConfigError(f"kinetic={kinetic}, jacobian={jacobian}, step_error={step_error}: a regulariser's weight must be finite and not negative")
        released = regularisers == "code"
        self.scale = flow.dim * math.log(2) if flow.levels is not None and not released else 1.0
        self.weights: dict[str, float] = {}
        self._means: set[str] = set()
        given: dict[str | Quadrature, float] = {"kinetic": kinetic, "jacobian": jacobian}
        if repeated := next((name for name in penalties or () if given.get(name)), None):
            raise ConfigError(f"penalties has {repeated!r}, whose weight is {given[repeated]} already: give it once")
        # the kinetic energy is free next to the solve, so it is always reported in training
        reported = [Kinetic(), *map(find_quadrature, measure)]
        own, weights = penalised({**given, **(penalties or {})}, reported)
        own.sort(key=lambda q: q.name != "kinetic")
        for quadrature in [q for q in own if q.name in weights]:
            mean = isinstance(quadrature, Released)
            chosen = _BlockMean(quadrature, released_factor(quadrature)) if released and not mean else quadrature
            self.weights[chosen.name] = weights[quadrature.name]
            if mean:
                self._means.add(chosen.name)
            if chosen is not quadrature:
                own.append(chosen)
                own = own if quadrature.name in {q.name for q in reported} else [q for q in own if q is not quadrature]
        if step_error:
            if not all(type(b.solver) is FixedGrid and b.solver.tableau.error for b in flow.blocks):
                raise ConfigError(
                    f"step_error={step_error} needs a grid that tells its error: method 'rk4', 'rk4-classic', 'heun' or "
                    "'midpoint', and no gradient='reversible'"
                )
            self.weights["step_error"] = step_error
            own.append(StepError())
        for block in flow.blocks:
            # drop the quadratures of an earlier objective
            replaced = {"kinetic", "jacobian", "step_error", *(q.name for q in own)}
            kept = [q for q in block.quadratures if q.name not in replaced and not isinstance(q, _BlockMean)]
            if taken := {q.name for q in kept} & {"loss", "nll"}:
                raise ConfigError(f"quadrature name {min(taken)!r} is taken by the objective: give the integral another name")
            block.quadratures = (*kept, *own)

    def evaluate(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> tuple[dict[str, Tensor], Stats]:
        """Return the terms (see :meth:`forward`) and the statistics of the solve."""
        out = self.flow.evaluate(x, Request(context, noise))
        log_prob = self.flow.density(out.value, out.log_det, context)
        images = self.flow.levels is not None
        nll = self.flow.to_bits(log_prob, x.is_floating_point()) if images else -log_prob
        loss = nll
        for name, weight in self.weights.items():
            loss = loss + weight * out.integrals[name] / (1.0 if name in self._means else self.scale)
        return {"loss": loss, "nll": nll, **out.integrals}, out.stats

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> dict[str, Tensor]:
        """Return ``loss`` and ``nll`` (N,) in the objective's unit, and every integral (N,) by name."""
        return self.evaluate(x, context, noise)[0]
