"""Flow matching: regression of the field on the velocities of straight paths, without an ODE solve."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cnf._utils.async_checks import to_device
from cnf._utils.errors import ConfigError
from cnf.bases import StandardNormal
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.flow import Flow
from cnf.flow_matching import COUPLINGS, MatchingPath, TimeDistribution, couple, stratified
from cnf.flow_matching.path import GROUPS
from cnf.losses.density import DensityObjective
from cnf.random import Noise, SharedNoise, draw
from cnf.solvers import Stats
from cnf.solvers.base import Counter

__all__ = ["FlowMatching"]

CLOSEST = 0.02  # standard deviations: cut-off of the likelihood weight near t = 0 where the data have no noise


class FlowMatching(DensityObjective):
    r"""Flow-matching loss on straight paths between data and noise (2210.02747, 2209.03003).

    The loss is the mean of :math:`w(t)\,\|f(t, x_t) - \dot x_t\|^2 / D` with :math:`x_t = a(t)\, x_0 + b(t)\, z`.

    Time 0 is data and time 1 noise. The minimiser, the mean velocity of all paths through a point, transports the
    data's distribution to the noise's. The loss costs one evaluation of the field for each row, and no Jacobian.
    Validation uses the likelihood of the flow. z is drawn from the flow's base, whose own parameters get no gradient: fit a
    mixture first (:meth:`cnf.bases.GaussianMixture.fit`), or train it by the likelihood.

    Args:
        flow: the density to fit: blocks on the whole event, one after another (see
            :class:`~cnf.flow_matching.MatchingPath`).
        coupling: ``"independent"``, or ``"optimal-transport"`` within the batch (and the context).
        weights: ``"likelihood"`` (:meth:`cnf.fields.Interpolant.likelihood_weight`): for images on a path with noise, the
            loss is the bound on bits/dim of the diffusion model with the same denoiser, up to the overlap of grey
            levels; otherwise w is cut off near t = 0. ``"even"``: :math:`w = 1/\dot b(t)^2`, which is 1 on a path
            without noise. ``"default"``: likelihood on a path with noise, even otherwise.
        times: ``"importance"``: sampled where the loss is large, as measured at intervals (:meth:`learn`); ``"even"``:
            uniform. Both are stratified over the batch and give the same loss in expectation.
        drop_context: share of the rows whose (embedded) context is replaced by zeros in training, for guidance
            (:func:`cnf.guided`, 2207.12598).

    Raises:
        ConfigError: for unknown settings, a flow without such a path, optimal transport on a path with noise, which must
            be independent of the data, or a base other than a normal on a path with noise or with likelihood weights.

    Example:
        >>> from cnf import FlowConfig, SolverConfig, build
        >>> objective = FlowMatching(build(FlowConfig.of(hidden=(8,)), SolverConfig(), (2,)))
        >>> objective(torch.randn(5, 2)).shape, objective.validation_loss(torch.randn(5, 2)).shape
        (torch.Size([5]), torch.Size([5]))
    """

    solves = False

    def __init__(
        self, flow: Flow, coupling: str = "independent", weights: str = "default", times: str = "importance", drop_context: float = 0.0
    ):
        super().__init__(flow)
        for name, value, known in (
            ("coupling", coupling, COUPLINGS),
            ("weights", weights, ("default", "likelihood", "even")),
            ("times", times, ("importance", "even")),
        ):
            if value not in known:
                raise ConfigError(f"{name}={value!r} is unknown: expected {' or '.join(map(repr, known))}")
        if not 0 <= drop_context < 1:
            raise ConfigError(f"drop_context must be at least 0 and less than 1, got {drop_context:g}")
        if drop_context and flow.context_dim == 0:
            raise ConfigError(f"drop_context={drop_context:g} is for a conditional flow, and this one takes no context: leave it out")
        self.drop_context = drop_context
        self.path = MatchingPath(flow)
        if coupling != "independent" and self.path.interpolant.sigma:
            raise ConfigError(
                f"coupling={coupling!r} ties the noise to the data, and on this path part of it dequantises them: it has to be independent"
            )
        if not isinstance(flow.base, StandardNormal) and (self.path.interpolant.sigma or weights == "likelihood"):
            reason = "the noise of the data is part of a normal z on this path" if self.path.interpolant.sigma else "likelihood weights are those of a diffusion from a normal z"
            raise ConfigError(f"base is a {type(flow.base).__name__}, but {reason}: use a normal base, or a path without noise and weights='even'")
        self.coupling = coupling
        # without noise the likelihood weight is unbounded near the data, where the target is nearly all noise: a 2-D
        # Gaussian came within 0.24 nats of the truth, and within 0.02 with even weights
        self.weights = weights if weights != "default" else "likelihood" if self.path.interpolant.sigma else "even"
        self.times = TimeDistribution() if times == "importance" else TimeDistribution(1)

    @property
    def bounds(self) -> bool:
        """Whether the loss is a bound in bits/dim: likelihood weights on a path with noise."""
        return self.weights == "likelihood" and bool(self.path.interpolant.sigma)

    @property
    def metric_unit(self) -> str:
        """``"bits/dim"`` if the loss is a bound; "" otherwise."""
        return "bits/dim" if self.bounds else ""

    def weight(self, t: Tensor) -> Tensor:
        """Return w(t) (N,), float64."""
        interpolant = self.path.interpolant
        if self.bounds:
            return interpolant.likelihood_weight(t) / math.log(2)
        if self.weights == "likelihood":
            return (1 - t) / (t + CLOSEST)
        return interpolant(t).db.square().reciprocal()

    def evaluate(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> tuple[dict[str, Tensor], Stats]:
        """Return ``{"loss": (N,)}`` and the statistics of one evaluation of the field."""
        return {"loss": self._losses(x, context, noise, fair=True)[1]}, _one()

    def forward(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> Tensor:  # type: ignore[override]
        """Return the loss (N,), which other packages' loops train by its mean."""
        return self.evaluate(x, context, noise)[0]["loss"]

    def validation_loss(self, x: Tensor, context: Tensor | None = None, *, draws: int = 32, seed: int = 0) -> Tensor:
        """Return the mean loss (N,) over fixed times and noise, which are the same for every row and at every call.

        It is a function of the row and the weights alone, whatever the batch: early stopping and selection see changes
        of the weights, not of the draws (of which ``forward`` takes one for each row).

        Args:
            x: points (N, \\*event).
            context: (N, C), (C,) or None.
            draws: number of times, stratified, each with its noise.
            seed: of times and noise.
        """
        self.flow._check("x", x, self.flow.event_shape, context)
        times = stratified(Noise(seed, "validation"), draws)
        losses = []
        for k, t in enumerate(times.split(1)):
            # one time at a time, which a field that takes one for all rows needs too
            rows = t.expand(len(x))
            losses.append(self._regression(x, context, rows, self.weight(rows), SharedNoise(seed, k)))
        return torch.stack(losses).mean(0)

    def _losses(self, x: Tensor, context: Tensor | None, noise: Noise | None, fair: bool = False) -> tuple[Tensor, Tensor]:
        """Return times, float64 on the CPU, and weighted losses (N,).

        ``fair`` divides by the density of the times, for a loss that does not depend on it in expectation.
        """
        self.flow._check("x", x, self.flow.event_shape, context)
        t, density = self.times.quantile(stratified(noise, len(x), GROUPS if self.path.together else None))
        return t, self._regression(x, context, t, self.weight(t) / density if fair else self.weight(t), noise, self.drop_context)

    def _regression(
        self, x: Tensor, context: Tensor | None, t: Tensor, weight: Tensor, noise: Noise | None, drop: float = 0.0
    ) -> Tensor:
        """Return the weighted squared errors of the velocity (N,) at times t (N,), float64 on the CPU."""
        context = self.flow.embed(context)
        start = self.path.start(x, noise)
        z = self.flow.base.sample(len(start), context, noise=noise, like=start)
        z = couple(start, z, context, self.coupling)
        if drop and context is not None:
            u = draw(noise, "drop_context", "uniform", (len(x), 1), dtype=context.dtype, device=context.device)
            context = torch.where(u < drop, torch.zeros_like(context), context)
        # computed on the CPU from the times alone and copied at once, without synchronisation
        known = to_device(torch.stack([*self.path.interpolant(t), weight]).to(start.dtype), start.device)
        a, b, da, db = (c.reshape(-1, *(1,) * (start.ndim - 1)) for c in known[:4])
        velocity = self.path.velocity(t, a * start + b * z, context, noise)
        loss: Tensor = (velocity - (da * start + db * z)).flatten(1).square().mean(1) * known[4]
        return loss

    @torch.no_grad()
    def learn(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None, *, group: Group = SINGLE_PROCESS) -> dict[str, Any]:
        """Update the time distribution from the loss on a batch, and return its median as ``early_times``.

        Each process of ``group`` passes its own rows of the batch.
        """
        with group.together():
            t, loss = self._losses(x, context, noise)
            found = self.times.sums(t, loss)
        self.times.take(*group.sum(torch.stack(found)))
        return {"early_times": float(self.times.quantile(torch.tensor([0.5], dtype=torch.float64))[0])}


def _one() -> Stats:
    """Return the statistics of one evaluation."""
    counter = Counter()
    counter.count()
    return Stats([counter])
