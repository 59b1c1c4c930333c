"""Distributions of torch as base densities."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from cnf._utils.async_checks import to_device
from cnf._utils.distributions import Template
from cnf._utils.errors import ConfigError
from cnf.bases.base import Base, StandardNormal
from cnf.random import Noise, number

__all__ = ["DistributionBase", "as_base"]


class DistributionBase(Base):
    r"""Any continuous ``torch.distributions.Distribution`` as a base; ``Flow(..., base=distribution)`` makes it.

    The parameters of the distribution, those of nested distributions and transforms too, become buffers: they follow
    ``.to()`` and are saved with the weights, but are not trained. To train them, derive from
    :class:`~cnf.bases.Base` and build the distribution in ``log_prob``. Outside of the support log_prob is -inf.

    Args:
        distribution: with an empty batch shape.

    Raises:
        ConfigError: for anything else, a discrete distribution or one without log_prob, parameters that require a
            gradient or belong to a module; from ``sample``, for a temperature other than 1.

    Example:
        >>> from torch.distributions import Independent, StudentT
        >>> base = DistributionBase(Independent(StudentT(5.0, torch.zeros(2), torch.ones(2)), 1)).double()
        >>> base.log_prob(torch.zeros(3, 2, dtype=torch.float64)).dtype, sorted(base.state_dict())[-1]
        (torch.float64, 'value_base_dist__scale')
    """

    def __init__(self, distribution: Distribution):
        if not isinstance(distribution, Distribution):
            raise ConfigError(f"base is a {type(distribution).__name__}, expected a torch.distributions.Distribution or a cnf.bases.Base")
        name, batch, event = type(distribution).__name__, tuple(distribution.batch_shape), tuple(distribution.event_shape)
        if batch or not event:
            wrap = f": use torch.distributions.Independent(base, {len(batch)})" if batch else ""
            raise ConfigError(f"base {name} has batch shape {batch} and event shape {event}, expected no batch shape and that of one latent{wrap}")
        if type(distribution).log_prob is Distribution.log_prob or getattr(_support(distribution), "is_discrete", False):
            raise ConfigError(f"base {name} has no density: expected a continuous distribution with log_prob")
        super().__init__(event)
        self._template = Template(self, distribution, "base", "derive from cnf.bases.Base")

    def distribution(self, like: Tensor | None = None) -> Distribution:
        """Return the distribution, with floating-point parameters in the dtype and on the device of ``like``."""
        made: Distribution = self._template.filled(self, like)
        return made

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Return log q(z) (N,) in nats for z (N, \\*event); -inf outside of the support."""
        self._check(z)
        if not len(z):  # torch's distributions refuse an empty batch
            return z.flatten(1).sum(1)
        distribution = self.distribution(z)
        value, support = distribution.log_prob(z), _support(distribution)
        value = value if support is None else torch.where(support.check(z), value, -torch.inf)
        return torch.where(z.flatten(1).isnan().any(1), torch.nan, value)

    def _draw(self, n: int, context: Tensor | None, noise: Noise | None, temperature: float, like: Tensor) -> Tensor:
        if temperature != 1:
            raise ConfigError(f"temperature={temperature:g} is for a normal or mixture base, expected 1 for {self._template.kind}")
        if not n:
            return like.new_empty(0, *self.event_shape)
        if noise is None:
            return self.distribution(like).sample(torch.Size((n,)))
        # a seed shared by all rows of the joint batch, which is drawn whole, as Noise.draw does
        seed, start, total = int(number(noise, "latent") * 2**53), noise.start, noise.total or n
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            z = self.distribution(like.new_empty(0, device="cpu")).sample(torch.Size((total,)))
        return to_device(z[start : start + n], like.device)

    def extra_repr(self) -> str:
        """Return the distribution's class and the event shape for ``repr``."""
        return f"{self._template.kind}, {super().extra_repr()}"


def as_base(base: Base | Distribution | None, base_std: float, latent_shape: tuple[int, ...]) -> Base:
    """Return the base density of latents of a shape: ``base`` itself, wrapped, or N(0, base_std² I) if None.

    Raises:
        ConfigError: for both base and base_std, or a base of another shape.
    """
    if base is None:
        return StandardNormal(latent_shape, base_std)
    if base_std != 1:
        raise ConfigError(f"base_std={base_std} is the standard deviation of a normal base, but base={type(base).__name__} is given: leave one out")
    made = base if isinstance(base, Base) else None
    if made is None:
        made = DistributionBase(base)  # type: ignore[arg-type]
    if made.event_shape != tuple(latent_shape):
        raise ConfigError(f"base has event shape {made.event_shape}, but the transform's latents have shape {tuple(latent_shape)}")
    return made


def _support(distribution: Distribution) -> constraints.Constraint | None:
    """Return the support; None if the distribution does not state it."""
    try:
        return distribution.support
    except NotImplementedError:
        return None
