"""CNF: the transform that an ordinary differential equation defines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from cnf.divergence import Bound, Divergence, Exact, linearize
from cnf.errors import ConfigError, SolverError
from cnf.noise import Noise, draw
from cnf.quadratures import Quadrature, check_names
from cnf.solvers import Adaptive, FixedGrid, Solution, Solver
from cnf.transforms import Transform, Transformed

__all__ = ["CNF"]


class CNF(Transform):
    r"""x(T) from dx/dt = f(t, x), with log|det ∂x(T)/∂x(0)| = ∫ tr ∂f/∂x dt (NODE, 1806.07366; FFJORD, 1810.01367).

    ``module.train()`` selects ``solver``, ``module.eval()`` ``eval_solver``: the only mode switch (but for ``steer``, which
    acts in training alone).

    Args:
        field: vector field, ``field(t, x, context) -> dx``.
        divergence: :class:`~cnf.divergence.Exact` or :class:`~cnf.divergence.Hutchinson`.
        solver: for training; rk4 with 4 steps if None.
        eval_solver: for evaluation; dopri5 at 1e-5 if None.
        quadratures: what else is integrated (see :mod:`cnf.quadratures`).
        end_time: T > 0.
        learn_end_time: learn T = τ², τ a parameter called ``sqrt_end_time``.
        steer: half-width b of a random end time T' in [T - b, T + b], one a batch, in training (STEER, 2006.10711).

    Raises:
        ConfigError: for a T or a b that cannot be.
        SolverError: from a solve that failed.

    Example:
        >>> from cnf.fields import MLP
        >>> block = CNF(MLP(2, hidden=(16,)))
        >>> z, log_det, _, stats = block(torch.randn(5, 2))
        >>> z.shape, log_det.shape, stats.nfe
        (torch.Size([5, 2]), torch.Size([5]), 16)
    """

    sqrt_end_time: Tensor

    def __init__(
        self,
        field: nn.Module,
        divergence: Divergence | None = None,
        solver: Solver | None = None,
        eval_solver: Solver | None = None,
        quadratures: Sequence[Quadrature] = (),
        end_time: float = 1.0,
        learn_end_time: bool = False,
        steer: float = 0.0,
    ):
        super().__init__()
        if not (math.isfinite(end_time) and end_time > 0):
            raise ConfigError(f"end_time={end_time}; expected a positive number")
        if not 0 <= steer < end_time:
            raise ConfigError(f"steer={steer}; expected 0 <= steer < end_time={end_time}")
        check_names(quadratures)
        self.field = field
        self.divergence: Divergence = divergence or Exact()
        self.solver: Solver = solver or FixedGrid("rk4", 4)
        self.eval_solver: Solver = eval_solver or Adaptive("dopri5", 1e-5, 1e-5)
        self.quadratures = tuple(quadratures)
        self.steer = steer
        self.learn_end_time = learn_end_time
        root = torch.tensor(math.sqrt(end_time))
        if learn_end_time:
            self.sqrt_end_time = nn.Parameter(root)
        else:
            self.fixed_end_time = float(end_time)

    def end_time(self, x: Tensor) -> Tensor:
        """T as a scalar tensor in x's dtype and device."""
        if self.learn_end_time:
            return self.sqrt_end_time.to(x).square()
        return x.new_tensor(self.fixed_end_time)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        noise: Noise | None = None,
        log_det: bool = True,
        integrals: bool = True,
    ) -> Transformed:
        """Data to noise: t from 0 to T."""
        return self._solve(x, context, noise, log_det, integrals, back=False)

    def inverse(
        self,
        z: Tensor,
        context: Tensor | None = None,
        *,
        noise: Noise | None = None,
        log_det: bool = True,
        integrals: bool = True,
    ) -> Transformed:
        """Noise to data: t from T to 0."""
        return self._solve(z, context, noise, log_det, integrals, back=True)

    def _solve(
        self, x: Tensor, context: Tensor | None, noise: Noise | None, log_det: bool, integrals: bool, back: bool
    ) -> Transformed:
        end = self.end_time(x)
        if self.steer and self.training:
            u = draw(noise, "end_time", "uniform", (), dtype=x.dtype, device=x.device, batch_dim=None)
            end = end + self.steer * (2 * u - 1)
        zero = torch.zeros_like(end)
        state, values, stats = self.integrate(
            x, (end, zero) if back else (zero, end), context, noise=noise, log_det=log_det, integrals=integrals
        )
        return Transformed(state, values.pop("log_det"), values, stats.stats)

    def integrate(
        self,
        x: Tensor,
        times: tuple[Tensor, Tensor],
        context: Tensor | None = None,
        *,
        noise: Noise | None = None,
        log_det: bool = True,
        integrals: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor], Solution]:
        """The point carried from ``times[0]`` to ``times[1]``, with every integral by name (N,) and the solution."""
        start, stop = times
        span = stop - start
        quadratures = self.quadratures if log_det and integrals else ()
        need = frozenset({"div"} if log_det else ()).union(*(q.need for q in quadratures))
        # drawn once, before the solve and outside anything checkpointed: a probe held fixed makes one smooth ODE
        probe = self.divergence.probe(x, noise, need, self.field)
        bound = Bound(self.field, context)

        def rhs(s: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            t = start + s * span
            point = state[0]
            parts = linearize(self.field, t, point, probe, context, need, self.divergence)
            out = [span * parts.dx]
            if log_det:
                out.append(span * cast(Tensor, parts.div))
            # regularisers are non-negative both ways, so they take the length of the step, not its sign
            out.extend(span.abs() * q(t, point, parts, bound) for q in quadratures)
            return tuple(out)

        flat = x.new_zeros(x.shape[0])
        entries = (x, *(flat for _ in range(bool(log_det) + len(quadratures))))
        # a running cost may be learned too
        learned = [m for q in quadratures for m in (q, getattr(q, "cost", None)) if isinstance(m, nn.Module)]
        parameters: list[Tensor] = [p for m in (self.field, *learned) for p in m.parameters()]
        parameters += [v for v in (start, stop, context) if v is not None]
        solver = self.solver if self.training else self.eval_solver
        try:
            solution = solver.solve(rhs, entries, dynamic=1, parameters=parameters)
        except SolverError as error:
            raise SolverError(f"block on events {tuple(x.shape[1:])}, t {float(start):g} to {float(stop):g}: {error}") from None
        names = (["log_det"] if log_det else []) + [q.name for q in quadratures]
        values = dict(zip(names, solution.state[1:], strict=True))
        values.setdefault("log_det", flat)
        return solution.state[0], values, solution
