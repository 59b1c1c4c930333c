"""Velocity between a Gaussian mixture and a standard normal, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from cnf.fields.base import VectorField

__all__ = ["MixtureVelocity"]


class MixtureVelocity(VectorField):
    r"""Marginal velocity of the straight paths :math:`x_t = (1 - t)\, y + t\, \varepsilon` from a Gaussian mixture to N(0, I).

    The density at time t is a mixture with means :math:`(1-t)\mu_k` and covariances :math:`C_k = (1-t)^2\Sigma_k + t^2 I`;
    with its responsibilities r the velocity is

    .. math:: f(t, x) = \sum_k r_k \bigl[(t I - (1-t)\Sigma_k)\, C_k^{-1}(x - (1-t)\mu_k) - \mu_k\bigr].

    A continuous flow of this field over t in [0, 1] on a standard normal has the density of the mixture: the optimum of
    flow matching (2210.02747), without training.

    Args:
        log_weights: (K,), up to a constant.
        means: (K, D).
        covariances: (K, D, D), positive definite.

    Example:
        >>> from cnf import CNF, Flow
        >>> field = MixtureVelocity(torch.zeros(2), torch.tensor([[-1.0], [1.0]]), torch.full((2, 1, 1), 0.1))
        >>> flow = Flow(CNF(field), (1,)).eval()
        >>> abs(float(flow.log_prob(torch.ones(1, 1))) + 0.4608) < 1e-3  # log(N(0; 0, 0.1) / 2)
        True
    """

    context_dim = 0
    log_weights: Tensor
    means: Tensor
    variances: Tensor
    axes: Tensor

    def __init__(self, log_weights: Tensor, means: Tensor, covariances: Tensor):
        super().__init__()
        variances, axes = torch.linalg.eigh(covariances.detach())
        self.register_buffer("log_weights", log_weights.detach().clone())
        self.register_buffer("means", means.detach().clone())
        self.register_buffer("variances", variances)
        self.register_buffer("axes", axes.mT.contiguous())

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (N, D) at t () and x (N, D)."""
        left, (k, d, _) = 1 - t, self.axes.shape
        turn = self.axes.reshape(k * d, d)  # products of matrices: einsum over components takes several times as long
        along = (x @ turn.mT).reshape(len(x), k, d) - left * (self.axes @ self.means[..., None])[..., 0]
        spread = left**2 * self.variances + t**2
        share = (self.log_weights - 0.5 * ((along.square() * spread.reciprocal()).sum(2) + spread.log().sum(1))).softmax(1)
        moved = along * ((t - left * self.variances) / spread) * share[..., None]
        return moved.reshape(len(x), k * d) @ turn - share @ self.means
