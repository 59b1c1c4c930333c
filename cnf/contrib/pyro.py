"""Flows as distributions of Pyro programs."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from cnf.distribution import FlowDistribution

__all__ = ["PyroFlow", "to_pyro"]


class PyroFlow(FlowDistribution, TorchDistributionMixin):  # type: ignore[misc, override]
    """Distribution of a flow with the methods of Pyro's; ``flow(context).to_pyro()`` makes it.

    Samples that are drawn with gradient bring their density from the same solve: the guide of a step of SVI takes one
    solve. Register the flow's weights by ``pyro.module("flow", flow)``.

    Example:
        >>> import pyro
        >>> from cnf import CNF, Flow
        >>> from cnf.fields import MLP
        >>> guide = Flow(CNF(MLP(2)), (2,))
        >>> pyro.sample("z", guide().to_pyro()).shape
        torch.Size([2])
    """

    _drawn: tuple[Any, int, Tensor] | None = None  # the last sample, weakly, its version, and its log-density

    def expand(self, batch_shape: Any, _instance: Any = None) -> PyroFlow:
        """Return the same distribution, with the same noise, and a larger batch shape."""
        return PyroFlow(self.flow, self.context, tuple(batch_shape), self._validate_args, noise=self.noise)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 (torch.distributions' own signature)
        """Draw differentiable samples, whose log-density is kept for :meth:`log_prob`."""
        if not torch.is_grad_enabled():
            return super().rsample(sample_shape)
        x, log_prob = self.rsample_and_log_prob(sample_shape)
        self._drawn = weakref.ref(x), x._version, log_prob
        return x

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p in nats; of the last sample, as it was computed with it."""
        if self._drawn is not None and self._drawn[0]() is value and self._drawn[1] == value._version:
            return self._drawn[2]
        return super().log_prob(value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_drawn"}


def to_pyro(distribution: FlowDistribution) -> PyroFlow:
    """Return a flow's distribution for Pyro programs, with the same context, batch shape and noise."""
    shape = tuple(distribution.batch_shape)
    return PyroFlow(distribution.flow, distribution.context, shape, distribution._validate_args, noise=distribution.noise)
