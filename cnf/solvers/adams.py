"""Exponential Adams methods for denoisers: log-likelihoods in few evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cnf._utils.async_checks import deferred, tracing
from cnf._utils.errors import ConfigError, SolverError, require_at_least, require_inside
from cnf.solvers.base import RHS, Counter, Solution, Solver, State, Stats, finite, interval, largest, solver_of
from cnf.solvers.spacing import Spacing, require_spacing

__all__ = ["ExponentialAdams", "Semilinear", "coarse"]

ORDERS = (3, 4)
COARSE = 20  # at order 3, which is stable there; order 4 is from 24 steps on
FEWEST = 4  # steps over a part of the path
GROWTH = 4.0  # largest factor on the number of steps
SAFETY = 1.1  # factor on the number of steps that the error estimate asks for


def coarse(block: Any) -> Solver:
    """Return the solver of a block in its present mode, in its coarse version if it has one."""
    solver = solver_of(block)
    return solver.coarse() if isinstance(solver, ExponentialAdams) else solver


class Semilinear(NamedTuple):
    r"""Linear part of a field :math:`f = (\dot r/r)\,x + r \dot\theta\, g(t, x)` at times (T,), float64.

    With y = x/r the ODE is :math:`dy/d\theta = g`.
    """

    scale: Tensor
    """r > 0."""
    rate: Tensor
    """(dr/dt)/r, the derivative of ln r in t."""
    angle: Tensor
    """θ, strictly monotone in t."""
    speed: Tensor
    """dθ/dt."""


class ExponentialAdams:
    r"""Exponential Adams method (variation of constants) for denoisers, with log-det and other integrals along.

    The linear part of a denoiser's field is integrated exactly: y = x/r has unit variance at every time, and
    :math:`dy/d\theta = g`, with g = -F the network's output and :math:`\theta = \arctan(b/(a s))`. A step predicts y by
    Adams-Bashforth in :math:`\theta`, evaluates g there, and corrects y by Adams-Moulton through the same values and the
    new one (predict, evaluate, correct): one evaluation a step, and one more at the start. The first steps have as many
    values as there are, from order one on.

    The integrals do not act on the point. They are integrated after the last step, by polynomials in t through
    ``order + 1`` neighbouring nodes; of the log-det's integrand only div g is approximated, since that of the linear part
    is D ln r. By default nodes are at equal steps of t, hence of ln b. On trained models of digits, MNIST and 32 x 32
    images this was the best of the grids of equal steps of :math:`b^{1/\rho}` at order 4 (docs/results.md).

    The error of a row's log-likelihood is estimated by embedded lower orders: the change of the log-det by a rule with
    one node fewer, and z·δ, the change of ln N(z) by the sum δ of the differences between the corrector and one of
    order three. If its mean over rows exceeds the tolerance, the solve is repeated with as many steps as the estimate
    asks for. Gradients are those of the discretisation.

    Args:
        steps: number of solver steps over the whole path, t in [0, 1], one fewer than the number of evaluations; a part of it
            has steps in proportion.
        order: of the predictor, 3 or 4.
        tolerance: for the mean over rows of the estimated error of the log-likelihood, in nats per dimension; None takes
            ``steps`` steps whatever the estimate. Under torch.compile and torch.func, which hide values, it is not used.
        max_steps: maximum number of solver steps.
        spacing: places the nodes in the block's time, such as :class:`~cnf.solvers.PowerSpacing`; None for equal steps.
        otherwise: solver of the point alone (samples, latents, trajectories) and of all solves from noise to data, such as
            :class:`~cnf.solvers.Adaptive`; None solves them alike. An error that moves a mean likelihood by 0.001 bits/dim
            was seen to change single pixels from black to white on the way back from the latent.

    Raises:
        ConfigError: for another order, fewer than one step, or a tolerance that is not positive; from :meth:`solve` for
            a field without a linear part (see :attr:`cnf.fields.base.SolveField.semilinear`) or with an augmented time.
        SolverError: from :meth:`solve`, for a non-finite state, or a tolerance that ``max_steps`` do not attain.

    Example:
        >>> solver = ExponentialAdams(32, tolerance=0.005)
        >>> solver.refined()
        ExponentialAdams(steps=64, order=4)
    """

    def __init__(
        self,
        steps: int = 32,
        order: int = 4,
        tolerance: float | None = None,
        max_steps: int = 512,
        *,
        spacing: Spacing | None = None,
        otherwise: Solver | None = None,
    ):
        require_at_least(1, steps=steps, max_steps=max_steps)
        if order not in ORDERS:
            raise ConfigError(f"order must be one of {', '.join(map(str, ORDERS))}, got {order!r}")
        if tolerance is not None:
            require_inside(0, math.inf, tolerance=tolerance)
        self.steps, self.order, self.tolerance, self.max_steps = steps, order, tolerance, max_steps
        self.spacing, self.otherwise = require_spacing(spacing), otherwise

    def __repr__(self) -> str:
        tolerance = "" if self.tolerance is None else f", tolerance={self.tolerance:g}"
        spacing = "" if self.spacing is None else f", spacing={self.spacing!r}"
        return f"ExponentialAdams(steps={self.steps}, order={self.order}{tolerance}{spacing})"

    def with_steps(self, steps: int) -> ExponentialAdams:
        """Return the same method with exactly ``steps`` steps."""
        return self._changed(steps, self.order, self.otherwise)

    def refined(self) -> ExponentialAdams:
        """Return the same method with twice the steps, and ``otherwise`` refined."""
        return self._changed(2 * self.steps, self.order, None if self.otherwise is None else self.otherwise.refined())

    def coarse(self) -> ExponentialAdams:
        """Return a version with at most 21 evaluations, whose mean error was 0.003 to 0.02 bits/dim, for validation in training."""
        return self._changed(min(self.steps, COARSE), 3, self.otherwise)

    def _changed(self, steps: int, order: int, otherwise: Solver | None) -> ExponentialAdams:
        return ExponentialAdams(steps, order, max_steps=max(steps, self.max_steps), spacing=self.spacing, otherwise=otherwise)

    def solve(self, rhs: RHS, state: State, *, dynamic: int = 1, parameters: Sequence[Tensor] = ()) -> Solution:
        """Return the state at s = 1."""
        span = float(interval(rhs, state[0])[1].detach())
        if self.otherwise is not None and (span < 0 or len(state) == dynamic):
            return self.otherwise.solve(rhs, state, dynamic=dynamic, parameters=parameters)
        counter, steps = Counter(), max(min(self.steps, FEWEST), math.ceil(self.steps * abs(span)))
        while True:
            end, error = self.attempt(rhs, state, steps, counter)
            bad, last = not deferred(*state) and not finite(end), self.tolerance is None or steps >= self.max_steps
            if bad and last:
                raise SolverError(
                    f"the state is not finite after {steps} steps of {self!r}, {counter.nfe} evaluations", largest=largest(state)
                )
            if self.tolerance is None or tracing(*state) or not len(error):
                break
            mean = math.inf if bad else float(error.mean()) / state[0].shape[1:].numel()
            if not mean > self.tolerance:
                break
            if last:
                raise SolverError(
                    f"{self!r} estimates an error of {mean:.2g} nats/dim after {steps} steps: a larger tolerance or max_steps "
                    f"(now {self.max_steps}), or an adaptive solver, may help",
                    exhausted=True,
                )
            # the embedded orders are three; an unstable solve says too little of how many steps it takes
            steps = min(self.max_steps, math.ceil(steps * min(GROWTH, SAFETY * (mean / self.tolerance) ** (1 / 3))))
        counter.backward, counter.accepted = True, steps
        return Solution(end, Stats([counter]))

    def attempt(self, rhs: RHS, state: State, steps: int, counter: Counter | None = None) -> tuple[State, Tensor]:
        """Return the state at s = 1 after ``steps`` steps, and the estimated error (N,) of each row's log-likelihood in nats."""
        counter = counter or Counter()
        x, grid = state[0], self._grid(rhs, state[0], steps)
        log_det = len(state) > 1 and bool(getattr(rhs, "log_det", True))
        slopes: dict[int, Tensor] = {}
        integrands: list[Tensor] = []  # (integrals, N), with respect to s

        def evaluate(i: int, x: Tensor) -> None:
            counter.count()
            slope, *rest = rhs(grid.s[i], (x, *state[1:]))
            slopes[i] = (slope - grid.rate[i] * x) / (grid.scale[i] * grid.speed[i])
            if rest:
                if log_det:
                    rest[0] = rest[0] - x.shape[1:].numel() * grid.rate[i]
                integrands.append(torch.stack(rest))

        y, apart = x / grid.scale[0], torch.zeros_like(x)
        evaluate(0, x)
        for i in range(steps):
            known = min(self.order, i + 1)
            past = range(i + 1 - known, i + 1)
            evaluate(i + 1, (y + _combined(grid.angle, past, i, slopes)) * grid.scale[i + 1])
            change = _combined(grid.angle, (*past, i + 1), i, slopes)
            with torch.no_grad():
                fewer = range(i + 1 - min(2, known - 1), i + 2)
                apart = apart + _combined(grid.angle, fewer, i, slopes) - change
            y = y + change
            slopes.pop(i + 1 - self.order, None)
        error = (y * apart).detach().flatten(1).sum(1).abs()
        if not integrands:
            return (y * grid.scale[-1],), error
        totals, lower = (_integral(grid.nodes, integrands, self.order + more) for more in (1, 0))
        if log_det:
            linear = x.shape[1:].numel() * math.log(grid.scale[-1] / grid.scale[0])
            error = error + (totals[0] - lower[0]).detach().abs()
            totals = torch.cat([totals[:1] + linear, totals[1:]])
        integrals = ((entry + total).to(entry) for entry, total in zip(state[1:], totals, strict=True))
        return (y * grid.scale[-1], *integrals), error

    def _grid(self, rhs: RHS, x: Tensor, steps: int) -> _Grid:
        """Return the nodes and the linear part there, with respect to s."""
        semilinear: Any = getattr(getattr(rhs, "field", None), "semilinear", None)
        if semilinear is None or getattr(rhs, "path", None) is not None:
            raise ConfigError(
                f"solver={self!r} is for denoisers (presets such as fm-mnist), whose linear part it integrates exactly: use FixedGrid(...) or "
                "Adaptive(...)"
            )
        start, span = (v.detach().double() for v in interval(rhs, x))
        s = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=x.device)
        if self.spacing is not None:
            s[1:-1] = (self.spacing.times(start, start + span, steps)[1:-1] - start) / span
        part: Semilinear = semilinear(start + s * span)
        rate, speed = (span * part.rate).tolist(), (span * part.speed).tolist()
        return _Grid(s.to(x), tuple(s.tolist()), part.scale.tolist(), rate, part.angle.tolist(), speed)


class _Grid(NamedTuple):
    """Nodes s (steps + 1,), as a tensor and in double precision, and the linear part there; rate and speed are derivatives in s."""

    s: Tensor
    nodes: tuple[float, ...]
    scale: list[float]
    rate: list[float]
    angle: list[float]
    speed: list[float]


def _combined(nodes: Sequence[float], used: Sequence[int], i: int, values: Mapping[int, Tensor]) -> Tensor:
    """Return the integral from node i to node i + 1 of the polynomial through the values at the nodes ``used``."""
    weights = _weights([nodes[j] for j in used], nodes[i], nodes[i + 1])
    total = weights[0] * values[used[0]]
    for weight, j in zip(weights[1:], used[1:], strict=True):
        total = torch.add(total, values[j], alpha=weight)
    return total


def _weights(nodes: Sequence[float], start: float, stop: float) -> list[float]:
    """Return the weights of the values at ``nodes`` in the integral of their polynomial from ``start`` to ``stop``."""
    size = stop - start
    z = torch.tensor([(node - start) / size for node in nodes], dtype=torch.float64)
    powers = torch.arange(len(nodes))
    weights: list[float] = (size * torch.linalg.solve(z[None] ** powers[:, None], 1 / (powers + 1).double())).tolist()
    return weights


@lru_cache(maxsize=64)
def _rule(nodes: tuple[float, ...], count: int) -> tuple[float, ...]:
    """Return weights on [0, 1] of values at ``nodes``: on each interval of the polynomial through ``count`` nodes around it."""
    last = len(nodes) - 1
    weights, count = [0.0] * (last + 1), min(count, last + 1)
    for i in range(last):
        first = min(max(0, i - (count - 2) // 2), last + 1 - count)
        used = range(first, first + count)
        for j, weight in zip(used, _weights([nodes[k] for k in used], nodes[i], nodes[i + 1]), strict=True):
            weights[j] += weight
    return tuple(weights)


def _integral(nodes: tuple[float, ...], values: Sequence[Tensor], count: int) -> Tensor:
    """Return the integral over [0, 1] of values (integrals, N) at ``nodes``, in double precision."""
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for weight, value in zip(_rule(nodes, count), values, strict=True):
        total = torch.add(total, value.double(), alpha=weight)
    return total
