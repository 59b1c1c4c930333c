"""Exponential multistep solvers for denoisers, which draw samples in few evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cnf._utils.async_checks import deferred
from cnf._utils.errors import ConfigError, SolverError, require_at_least, unknown_name
from cnf.solvers.base import RHS, Counter, Solution, State, Stats, finite, interval, largest
from cnf.solvers.spacing import RatioSpacing

__all__ = ["ExponentialMultistep"]


class _Node(NamedTuple):
    """Time, coefficients of the interpolant and log signal-to-noise ratio, bounded at the noise end."""

    t: float
    a: float
    b: float
    snr: float


class ExponentialMultistep:
    r"""Exponential multistep method in the log signal-to-noise ratio, for sampling with a denoiser.

    On the path x = a x₀ + b z every velocity f has a data prediction :math:`D = (\dot b x - b f)/(a \dot b - b \dot a)`,
    and the ODE is :math:`d(x/b) = D \, d(a/b)`. A step integrates it exactly for a polynomial D in
    :math:`\lambda = \ln a/b` (2211.01095); only D is approximated. Every step costs one evaluation:

    - ``"dpm++"``: DPM-Solver++(2M) (2211.01095), D linear through the last two nodes. The order is 2.
    - ``"unipc"``: UniPC-2 (2302.04867), the same predictor, and a corrector that repeats the step with D quadratic
      through the previous, the present and the new node. The evaluation at the predicted point is that of the next step,
      so that the corrector costs none. The order is 3.

    For constant D one step is exact. Both draw samples only, from noise to data.

    Args:
        method: ``"unipc"`` or ``"dpm++"``.
        steps: number of solver steps over [0, 1], which is the number of evaluations.
        spacing: the path and its time grid. A finite ``s_max`` leaves an error that more steps do not reduce.

    Raises:
        ConfigError: for an unknown method, fewer than one step, or a spacing of another type; from :meth:`solve` where
            integrals such as the log-determinant, gradients or the direction to noise are requested.

    Example:
        >>> from cnf.solvers.interpolant import Interpolant
        >>> solver = ExponentialMultistep("unipc", 6, RatioSpacing(Interpolant(0.01)))
        >>> solver.refined().steps
        12
    """

    METHODS = ("unipc", "dpm++")

    def __init__(self, method: str, steps: int, spacing: RatioSpacing):
        if method not in self.METHODS:
            raise unknown_name("method", method, self.METHODS, "ExponentialMultistep")
        require_at_least(1, steps=steps)
        if not isinstance(spacing, RatioSpacing):
            raise ConfigError(f"spacing must be a RatioSpacing(interpolant, rho, s_max), got {spacing!r}")
        self.method, self.steps, self.spacing = method, steps, spacing

    def __repr__(self) -> str:
        return f"ExponentialMultistep({self.method!r}, steps={self.steps}, spacing={self.spacing!r})"

    def with_steps(self, steps: int) -> ExponentialMultistep:
        """Return the same method and spacing with ``steps`` steps."""
        return ExponentialMultistep(self.method, steps, self.spacing)

    def refined(self) -> ExponentialMultistep:
        """Return the same method with twice the steps."""
        return self.with_steps(2 * self.steps)

    def solve(self, rhs: RHS, state: State, *, dynamic: int = 1, parameters: Sequence[Tensor] = ()) -> Solution:
        """Return the state at s = 1, for a state of the point x alone.

        Raises:
            ConfigError: for a state with further entries, a gradient, or an interval that does not run from noise to
                data within [0, 1].
            SolverError: for a non-finite state; inside :func:`cnf.defer_checks` it is not checked.
        """
        self._require_sampling(rhs, state, parameters)
        x, counter = state[0], Counter()
        start, span = (float(v.detach()) for v in interval(rhs, x))
        nodes = self._nodes(start, start + span)

        def prediction(node: _Node, x: Tensor) -> Tensor:
            """Return the data prediction D at a node."""
            counter.count()
            (slope,) = rhs(x.new_full((), (node.t - start) / span), (x,))
            _, b, da, db = (float(v) for v in self.spacing.interpolant(torch.tensor(node.t, dtype=torch.float64)))
            scale = node.a * db - b * da
            return (db / scale) * x - (b / scale / span) * slope

        before: Tensor | None = None
        now = prediction(nodes[0], x)
        for i in range(self.steps):
            step = _Step(nodes[max(0, i - 1)], nodes[i], nodes[i + 1])
            predicted = step.predict(x, now, before)
            if i + 1 == self.steps:
                x = predicted
                break
            after = prediction(nodes[i + 1], predicted)
            x = step.correct(x, now, before, after) if self.method == "unipc" else predicted
            before, now = now, after
        if not deferred(x) and not finite((x,)):
            raise SolverError(
                f"the state is not finite after {self.steps} steps ({self.method}), {counter.nfe} evaluations", largest=largest(state)
            )
        counter.backward, counter.accepted = True, self.steps
        return Solution((x,), Stats([counter]))

    def _require_sampling(self, rhs: RHS, state: State, parameters: Sequence[Tensor]) -> None:
        """Check that the right-hand side is that of a block, and that nothing but the point is requested."""
        name = f"ExponentialMultistep({self.method!r})"
        if not hasattr(rhs, "span") or getattr(rhs, "path", None) is not None:
            raise ConfigError(f"solver={name} is for a CNF without an augmented time, whose times it needs: use FixedGrid(...) or Adaptive(...)")
        if len(state) > 1:
            raise ConfigError(f"solver={name} draws samples and has no log-determinant or other integral: use FixedGrid(...) or Adaptive(...)")
        if torch.is_grad_enabled() and any(v.requires_grad for v in (*state, *parameters)):
            raise ConfigError(f"solver={name} has no gradient: call it under torch.no_grad(), or use FixedGrid(...) or Adaptive(...)")

    def _nodes(self, start: float, stop: float) -> list[_Node]:
        """Return the nodes (steps + 1) from time ``start`` down to ``stop``."""
        if not 1 >= start > stop >= 0:
            raise ConfigError(
                f"solver=ExponentialMultistep({self.method!r}) solves from noise to data within t in [0, 1], got t {start:g} to {stop:g}: "
                "use FixedGrid(...) or Adaptive(...)"
            )
        ends = torch.tensor([start, stop], dtype=torch.float64)
        t = self.spacing.times(ends[0], ends[1], self.steps)
        a, b, _, _ = self.spacing.interpolant(t)
        # At t = 1 the point is the latent, and the first evaluation is there, where a = 0 and λ = -∞. Its prediction takes
        # the point to the ratio s_max by an exponential Euler step, included in the first step's weights, and stands for
        # the one there: hence λ = -ln s_max at the first node.
        snr = -self.spacing.level(t).log()
        return [_Node(*values) for values in zip(t.tolist(), a.tolist(), b.tolist(), snr.tolist(), strict=True)]


class _Step:
    r"""One step between two nodes: weights of the exact integrals :math:`b \int (\lambda - \lambda_0)^k e^\lambda d\lambda`.

    Args:
        before: node before the start; the start itself for the first step, whose predictor has order 1.
        start: node at the start.
        stop: node at the end.
    """

    def __init__(self, before: _Node, start: _Node, stop: _Node):
        self.keep = stop.b / start.b
        self.size, self.past = stop.snr - start.snr, before.snr - start.snr
        self.constant = stop.a - start.a * self.keep
        self.last = math.isinf(self.size)  # the end without noise, where x = D: its predictor has order 1
        self.linear = stop.a * self.size - self.constant
        self.quadratic = stop.a * self.size**2 - 2 * self.linear

    def predict(self, x: Tensor, now: Tensor, before: Tensor | None) -> Tensor:
        """Return the point at the end from D at the start and before it."""
        x = self.keep * x + self.constant * now
        if before is None or self.last:
            return x
        # as published, the exact weight of the slope to leading order
        return x + (self.constant * self.size / 2 / self.past) * (before - now)

    def correct(self, x: Tensor, now: Tensor, before: Tensor | None, after: Tensor) -> Tensor:
        """Return the point at the end from D before and at the start, and at the end."""
        x = self.keep * x + self.constant * now
        if before is None:
            return x + (self.constant / 2) * (after - now)
        # divided differences of the quadratic through the three nodes
        new, old = (after - now) / self.size, (before - now) / self.past
        curvature = (new - old) / (self.size - self.past)
        return x + self.linear * (new - curvature * self.size) + self.quadratic * curvature
