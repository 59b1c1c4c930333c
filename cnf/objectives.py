"""What training minimises: the likelihood with its regularisers."""

from __future__ import annotations

from torch import Tensor, nn

from cnf.errors import ConfigError
from cnf.flow import Flow
from cnf.noise import Noise
from cnf.quadratures import JacobianFrobenius, Kinetic
from cnf.solvers import Stats

__all__ = ["Likelihood"]


class Likelihood(nn.Module):
    r"""Negative log-likelihood plus :math:`\lambda_K \int\|f\|^2 + \lambda_J \int\|J\|_F^2` (RNODE, 2002.02798, eq. 17).

    For images the loss is in bits/dim and the regularisers are divided by D of the whole flow; for vectors it is in nats
    and they are undivided. The regularisers' quadratures are put into every CNF block of the flow.

    Args:
        flow: the density to fit.
        kinetic: :math:`\lambda_K \ge 0`.
        jacobian: :math:`\lambda_J \ge 0`.

    Raises:
        ConfigError: for a negative weight.
    """

    def __init__(self, flow: Flow, kinetic: float = 0.0, jacobian: float = 0.0):
        super().__init__()
        if kinetic < 0 or jacobian < 0:
            raise ConfigError(f"kinetic={kinetic}, jacobian={jacobian}: a regulariser's weight must not be negative")
        self.flow = flow
        self.weights = {k: v for k, v in (("kinetic", kinetic), ("jacobian", jacobian)) if v}
        for block in flow.blocks:
            kept = [q for q in block.quadratures if q.name not in ("kinetic", "jacobian")]
            # the kinetic energy costs nothing beside the solve, so it is always reported in training
            block.quadratures = (*kept, Kinetic(), *([JacobianFrobenius()] if jacobian else []))

    @property
    def unit(self) -> str:
        """``"bits/dim"`` for images, ``"nats"`` for vectors."""
        return "nats" if self.flow.levels is None else "bits/dim"

    def evaluate(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> tuple[dict[str, Tensor], Stats]:
        """The terms (see :meth:`forward`) and what the solve cost."""
        out = self.flow.evaluate(x, context, noise=noise)
        log_prob = self.flow.base_log_prob(out.value) + out.log_det
        images = self.flow.levels is not None
        nll = self.flow.to_bits(log_prob, x.is_floating_point()) if images else -log_prob
        loss = nll
        for name, weight in self.weights.items():
            loss = loss + weight * out.integrals[name] / (self.flow.dim if images else 1)
        return {"loss": loss, "nll": nll, **out.integrals}, out.stats

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> dict[str, Tensor]:
        """``loss`` and ``nll`` (N,) in the objective's unit, and every raw integral (N,) by name."""
        return self.evaluate(x, context, noise)[0]

    def per_dim(self, difference: float) -> float:
        """A difference of nll as bits/dim or nats/dim, for tolerances."""
        return difference if self.flow.levels is not None else difference / self.flow.dim
