"""Flow matching: the field regressed on the velocities of straight paths between data and noise, with no ODE solved."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cnf.deferral import sent
from cnf.distributed import ALONE, Group
from cnf.errors import ConfigError
from cnf.flow import Flow
from cnf.matching import COUPLINGS, MatchingPath, TimeDistribution, couple, stratified
from cnf.matching.path import GROUPS
from cnf.noise import Noise, draw
from cnf.objectives.density import DensityObjective
from cnf.solvers import Stats
from cnf.solvers.base import Counter

__all__ = ["FlowMatching"]

CLOSEST = 0.02  # standard deviations: scales below it do not count more, where the data have no noise of their own


class FlowMatching(DensityObjective):
    r"""The mean of :math:`w(t)\,\|f(t, x_t) - \dot x_t\|^2 / D`, :math:`x_t = a(t)\, x_0 + b(t)\, z` (2210.02747, 2209.03003).

    Time 0 is data and time 1 noise. The field that minimises it, the mean velocity of all paths through a point, carries the
    data's distribution to the noise's: one evaluation of the field an item, no derivative. What it is worth is still the
    likelihood of the flow, which is what validates it.

    Args:
        flow: the density to fit: blocks on the whole event, one after another (see :class:`~cnf.matching.MatchingPath`).
        coupling: ``"independent"``, or ``"optimal-transport"`` within the batch (and the context).
        weights: ``"likelihood"`` (:meth:`cnf.fields.Schedule.likelihood_weight`): of images with noise the loss is then the bound of
            the diffusion with the same denoiser on their bits/dim, but for what grey levels overlap; otherwise w is cut off near
            t = 0. ``"even"``: w = 1, over the field's own size on a path with noise. ``"default"``: by likelihood where the path has
            noise, else even.
        times: ``"importance"``, drawn where the loss is large, as measured now and then (:meth:`learn`); ``"even"``. Either
            way spread evenly over the batch, and the loss is the same in expectation.

    Raises:
        ConfigError: for unknown settings, a flow without such a path, or transport on a path whose data have noise (which has to
            be independent of the data).

    Example:
        >>> from cnf import ModelConfig, SolverConfig, build
        >>> objective = FlowMatching(build(ModelConfig(hidden=(8,)), SolverConfig(), (2,)))
        >>> terms = objective(torch.randn(5, 2))
        >>> sorted(terms), terms["loss"].shape
        (['loss'], torch.Size([5]))
    """

    solves = False

    def __init__(
        self, flow: Flow, coupling: str = "independent", weights: str = "default", times: str = "importance"
    ):
        super().__init__(flow)
        for name, value, known in (
            ("coupling", coupling, COUPLINGS),
            ("weights", weights, ("default", "likelihood", "even")),
            ("times", times, ("importance", "even")),
        ):
            if value not in known:
                raise ConfigError(f"{name}={value!r} is unknown: expected {' or '.join(map(repr, known))}")
        self.path = MatchingPath(flow)
        if coupling != "independent" and self.path.schedule.noise:
            raise ConfigError(
                f"coupling={coupling!r} ties the noise to the data, and on this path part of it dequantises them: it has to be independent"
            )
        self.coupling = coupling
        # without noise a weight by likelihood grows without bound towards the data, where the target is nearly all noise: a Gaussian
        # in the plane then came within 0.24 nats of the truth, and with even weights within 0.02
        self.weights = weights if weights != "default" else "likelihood" if self.path.schedule.noise else "even"
        self.times = TimeDistribution() if times == "importance" else TimeDistribution(1)

    @property
    def bounds(self) -> bool:
        """Whether the loss is that bound, in bits/dim: weighted by likelihood on a path whose data have noise."""
        return self.weights == "likelihood" and bool(self.path.schedule.noise)

    @property
    def metric_unit(self) -> str:
        """``"bits/dim"`` where the loss is a bound; "" otherwise."""
        return "bits/dim" if self.bounds else ""

    def weight(self, t: Tensor) -> Tensor:
        """w(t) (N,), float64."""
        schedule = self.path.schedule
        if self.bounds:
            return schedule.likelihood_weight(t) / math.log(2)
        if self.weights == "likelihood":
            return (1 - t) / (t + CLOSEST)
        return schedule(t).db.square().reciprocal()

    def evaluate(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None) -> tuple[dict[str, Tensor], Stats]:
        """The terms (see :meth:`forward`); one evaluation of the field an item."""
        return {"loss": self._losses(x, context, noise, fair=True)[1]}, _one()

    def _losses(self, x: Tensor, context: Tensor | None, noise: Noise | None, fair: bool = False) -> tuple[Tensor, Tensor]:
        """Times, float64 on the CPU, and weighted losses (N,); ``fair``: over the density that the times were drawn with."""
        self.flow._check("x", x, self.flow.event_shape, context)
        t, density = self.times.quantile(stratified(noise, len(x), GROUPS if self.path.together else None))
        start = self.path.start(x, noise)
        z = draw(noise, "latent", "normal", start.shape, dtype=start.dtype, device=start.device)
        z = couple(start, z * self.flow.base_std, context, self.coupling)
        weight = self.weight(t) / density if fair else self.weight(t)
        # all that depends on the times alone, computed on the CPU and sent together: nothing waits for a GPU
        known = sent(torch.stack([*self.path.schedule(t), weight]).to(start.dtype), start.device)
        a, b, da, db = (c.reshape(-1, *(1,) * (start.ndim - 1)) for c in known[:4])
        velocity = self.path.velocity(t, a * start + b * z, context, noise)
        return t, (velocity - (da * start + db * z)).flatten(1).square().mean(1) * known[4]

    @torch.no_grad()
    def learn(self, x: Tensor, context: Tensor | None = None, noise: Noise | None = None, *, group: Group = ALONE) -> dict[str, Any]:
        """Measure the loss over time on a batch, of which each process of ``group`` gives its rows, and draw times by it from now on."""
        with group.together():
            t, loss = self._losses(x, context, noise)
            found = self.times.sums(t, loss)
        self.times.take(*group.sum(torch.stack(found)))
        return {"early_times": float(self.times.quantile(torch.tensor([0.5], dtype=torch.float64))[0])}


def _one() -> Stats:
    """One evaluation."""
    counter = Counter()
    counter.count()
    return Stats([counter])
