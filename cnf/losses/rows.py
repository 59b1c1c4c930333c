"""Negative log-likelihood as a module, for training loops of other packages."""

from __future__ import annotations

from torch import Tensor, nn

from cnf._utils.errors import ConfigError
from cnf.flow import Flow
from cnf.random import Noise

__all__ = ["NegativeLogLikelihood"]


class NegativeLogLikelihood(nn.Module):
    """Negative log-likelihood of each row in nats, as a module that DDP, FSDP2, Lightning, accelerate and skorch wrap.

    These run code around a module's ``forward``, so that the flow has to be called through the module that they wrap.
    :class:`FlowMatching` is the other such module; ``cnf.fit`` and :class:`Likelihood` have regularisers and bits/dim.

    Args:
        flow: the density to train; fit its statistics first (:meth:`cnf.Flow.fit_statistics`).

    Raises:
        ConfigError: for a module without ``log_prob``.

    Example:
        >>> import torch
        >>> from cnf import CNF
        >>> from cnf.fields import MLP
        >>> loss = NegativeLogLikelihood(Flow(CNF(MLP(2, context_dim=3)), (2,)))
        >>> loss(torch.zeros(5, 2), torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(self, flow: Flow):
        super().__init__()
        if not callable(getattr(flow, "log_prob", None)):
            raise ConfigError(f"flow is a {type(flow).__name__} without log_prob, expected a cnf.Flow: let DDP wrap this loss, not the flow")
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """Return -log p(x | context) (N,) in nats; ``noise`` as for :meth:`cnf.Flow.log_prob`."""
        return -self.flow.log_prob(x, context, noise=noise)
