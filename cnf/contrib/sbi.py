"""Density estimators for sbi: posteriors and likelihoods by likelihood or flow matching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sbi.neural_nets.estimators.base import ConditionalDensityEstimator
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from cnf._utils.errors import ConfigError, unknown_name
from cnf.bases import ConditionalMixture
from cnf.fields import MLP
from cnf.flow import Flow
from cnf.losses import FlowMatching, NegativeLogLikelihood
from cnf.ode.continuous import CNF
from cnf.solvers import FixedGrid
from cnf.transforms import Logit, Sequential, Standardize, Transform

__all__ = ["FlowEstimator", "build_cnf"]

LOSSES = ("likelihood", "matching")
TARGETS = ("posterior", "likelihood")


class FlowEstimator(ConditionalDensityEstimator):  # type: ignore[misc]
    """A conditional flow with the interface of sbi's density estimators.

    Args:
        flow: conditional flow on vectors; its context is the flattened condition.
        loss: ``"likelihood"`` or ``"matching"``.
        condition_shape: shape of one condition.

    Raises:
        ConfigError: for an unknown loss.
    """

    def __init__(self, flow: Flow, loss: str, condition_shape: tuple[int, ...]):
        super().__init__(flow, torch.Size(flow.event_shape), torch.Size(condition_shape))
        if loss not in LOSSES:
            raise unknown_name("loss", loss, LOSSES)
        self.objective: nn.Module = FlowMatching(flow) if loss == "matching" else NegativeLogLikelihood(flow)

    @property
    def embedding_net(self) -> nn.Module | None:
        """The standardisation and network of the condition."""
        embedding: nn.Module | None = self.net.embedding
        return embedding

    def log_prob(self, input: Tensor, condition: Tensor, **options: Any) -> Tensor:
        """Return log-densities (sample, batch) in nats; -inf outside of a box."""
        self._check_input_shape(input)
        self._check_condition_shape(condition)
        x, c, _ = self._broadcast_and_align(input, condition)
        distribution = self.net.distribution(self._context(c), validate_args=False)
        value: Tensor = distribution.log_prob(x)
        return value

    def loss(self, input: Tensor, condition: Tensor, **options: Any) -> Tensor:
        """Return the training loss (batch,); in evaluation mode, that of matching has fixed times and noise."""
        self._check_input_shape(input)
        self._check_condition_shape(condition)
        context, objective = self._context(condition), self.objective
        fixed = isinstance(objective, FlowMatching) and not self.training
        loss: Tensor = objective.validation_loss(input, context) if fixed else objective(input, context)  # type: ignore[operator]
        return loss

    def sample(self, sample_shape: torch.Size, condition: Tensor, **options: Any) -> Tensor:
        """Draw (\\*sample, batch, \\*event)."""
        self._check_condition_shape(condition)
        drawn: Tensor = self.net.distribution(self._context(condition)).sample(torch.Size(sample_shape))
        return drawn

    def sample_and_log_prob(self, sample_shape: torch.Size, condition: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Draw (\\*sample, batch, \\*event) with log-densities (\\*sample, batch) in nats, in one solve."""
        self._check_condition_shape(condition)
        with torch.no_grad():
            drawn: tuple[Tensor, Tensor] = self.net.distribution(self._context(condition)).rsample_and_log_prob(torch.Size(sample_shape))
        return drawn

    def _context(self, condition: Tensor) -> Tensor:
        return condition.reshape(*condition.shape[: condition.ndim - len(self.condition_shape)], -1)


@dataclass(frozen=True)
class build_cnf:
    """Builder of a conditional flow for sbi's NPE, NLE and their relatives.

    The condition is standardised and embedded inside the model, the parameters are standardised. The base is a Gaussian
    whose mean and covariance depend on the condition, fitted to the simulations by linear regression, and the field starts
    at zero: training starts at the best linear posterior, however narrow it is next to the prior. (From a base N(0, I) the
    same networks give posteriors that are too wide: docs/conditional.md.)

    Args:
        target: ``"posterior"`` for NPE, a density of parameters given data; ``"likelihood"`` for NLE, of data given
            parameters.
        loss: ``"likelihood"``, exact; or ``"matching"``, without ODE solves in training.
        hidden: widths of the field.
        embedding: network of the standardised condition, (N, \\*shape) -> (N, C'); none if None.
        prior: whose support is a box, such as sbi's BoxUniform: the density is on the box, with no mass outside.
        linear_start: use that base; False takes N(0, I).

    Raises:
        ConfigError: for unknown names, or a prior whose support is not a box.

    Example:
        >>> from sbi.inference import NPE
        >>> from sbi.utils import BoxUniform
        >>> prior = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
        >>> theta = prior.sample((200,))
        >>> trainer = NPE(prior, density_estimator=build_cnf(prior=prior, hidden=(16,)), show_progress_bars=False)
        >>> estimator = trainer.append_simulations(theta, theta + 0.1 * torch.randn(200, 2)).train(max_num_epochs=2)
        >>> trainer.build_posterior(estimator).sample((5,), x=torch.zeros(1, 2), show_progress_bars=False).shape
        torch.Size([5, 2])
    """

    target: str = "posterior"
    loss: str = "likelihood"
    hidden: tuple[int, ...] = (64, 64)
    embedding: nn.Module | None = None
    prior: Distribution | None = None
    linear_start: bool = True

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise unknown_name("target", self.target, TARGETS)
        if self.loss not in LOSSES:
            raise unknown_name("loss", self.loss, LOSSES)
        if self.prior is not None:
            _box(self.prior)

    def __call__(self, theta: Tensor, x: Tensor) -> FlowEstimator:
        """Return the estimator for simulations: parameters (N, D) and data (N, \\*shape)."""
        value, condition = (theta, x) if self.target == "posterior" else (x, theta)
        rows = condition.flatten(1).to(value)
        network = nn.Identity() if self.embedding is None else nn.Sequential(nn.Unflatten(1, condition.shape[1:]), self.embedding)
        with torch.no_grad():
            width = network(rows[:2]).shape[1]
        dim = value.shape[1]
        first: list[Transform] = [Logit(0.0, *_box(self.prior, value))] if self.prior is not None else []
        first.append(Standardize(torch.zeros(dim), torch.ones(dim)))
        block = CNF(MLP(dim, self.hidden, context_dim=width, zero_init=True), solver=FixedGrid("rk4", 4))
        base = ConditionalMixture((dim,), 1, width, (self.hidden[0],)) if self.linear_start else None
        flow = Flow(Sequential([*first, block]), (dim,), base=base, embedding=network, context_dim=rows.shape[1]).to(value)
        flow.fit_statistics(value, rows)
        if base is not None:
            with torch.no_grad():
                embedded = flow.embed(rows)
                assert embedded is not None
                base.fit_to(flow.encode(value, rows), embedded)
        return FlowEstimator(flow, self.loss, tuple(condition.shape[1:]))


def _box(prior: Any, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the borders of a prior's support."""
    support = getattr(prior, "support", None)
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    bounds = [torch.as_tensor(getattr(support, name, torch.nan)) for name in ("lower_bound", "upper_bound")]
    if not all(bool(bound.isfinite().all()) for bound in bounds):
        raise ConfigError(f"prior has support {support!r}, expected a box with finite borders: leave prior out")
    low, high = (bound if like is None else bound.to(like) for bound in bounds)
    return low, high
