"""Neural ODEs as predictors: plain (NODE), augmented (ANODE, 1904.01681), and the variants of 2002.08071."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from cnf._utils.errors import ConfigError, SolverError
from cnf.fields.custom import protect
from cnf.fields.signature import check_signature
from cnf.neural_ode.predictor import Prediction, Predictor
from cnf.ode.divergence import Bound, Divergence, Hutchinson, Linearization
from cnf.ode.quadratures import Quadrature, learned_modules
from cnf.random import Noise, child
from cnf.solvers import Adaptive, FixedGrid, Solver, Stats
from cnf.solvers.base import SolverOverride, solver_of

__all__ = ["NeuralODE"]

DEPTH_WIDTH = 16  # hidden units of the net that returns each row's end time


class _Along(NamedTuple):
    """What is integrated next to the state."""

    quadratures: tuple[Quadrature, ...]
    divergence: Divergence
    noise: Noise | None


class NeuralODE(Predictor):
    r"""Neural ODE on zero-augmented inputs with a linear head, :math:`y = A\,\phi_T([x; 0]) + b` (ANODE, 1904.01681).

    ``module.train()`` selects ``solver``, ``module.eval()`` ``eval_solver``. No log-det is computed. With several
    fields the weights are piecewise constant over depth: [0, T] is divided into equal pieces, each solved separately,
    so that no step of a grid straddles two of them (``solver`` and ``eval_solver`` are those of one piece).

    Args:
        fields: vector field f(t, x) -> dx on states, or one per piece of [0, T].
        event_shape: (D,) or (C, H, W).
        outputs: number of outputs.
        augment: p, number of zero features (channels) appended to the input.
        input_layer: in place of the zeros, a learned linear layer (images: 1x1 convolution) from the input's features
            to p more (IL-NODE, 2002.08071).
        data_control: the field is f(t, x, x₀), called as ``field(t, x, x0)``.
        adaptive_depth: each row has a learned end time T(x₀) > 0 from a small network: dx/ds = T(x₀) f over s in [0,
            1], initially T for all rows. The field should depend on t: an autonomous field on the line has one
            direction at each point, but x -> -x needs both.
        head: see :class:`~cnf.neural_ode.predictor.Predictor`.
        flatten: flatten images, for fields on vectors.
        solver: training solver; rk4 with 4 steps if None.
        eval_solver: evaluation solver; dopri5 at 1e-5 if None.
        end_time: T > 0.
        learn_end_time: learn T = τ², with τ the parameter ``sqrt_end_time``.
        levels: grey levels of uint8 images.

    Raises:
        ConfigError: for p < 0, an end time that is not positive, no field, or mutually exclusive options.
        DataError: from the methods, for inputs of another shape or dtype.
        SolverError: from the methods, if the ODE cannot be solved.

    Example:
        >>> from cnf.neural_ode import anode_mlp
        >>> model = anode_mlp(2, hidden=32, augment=5)
        >>> sum(p.numel() for p in model.parameters())
        1551
        >>> outputs, features, stats = model.predict(torch.randn(4, 2))
        >>> outputs.shape, features.shape, stats.nfe
        (torch.Size([4, 1]), torch.Size([4, 7]), 16)
    """

    sqrt_end_time: Tensor

    def __init__(
        self,
        fields: nn.Module | Sequence[nn.Module],
        event_shape: tuple[int, ...],
        outputs: int,
        *,
        augment: int = 0,
        input_layer: bool = False,
        data_control: bool = False,
        adaptive_depth: bool = False,
        head: str = "linear",
        flatten: bool = False,
        solver: Solver | None = None,
        eval_solver: Solver | None = None,
        end_time: float = 1.0,
        learn_end_time: bool = False,
        levels: int | None = None,
    ):
        if augment < 0:
            raise ConfigError(f"augment={augment}; expected zero or more features (channels) to append")
        if not (math.isfinite(end_time) and end_time > 0):
            raise ConfigError(f"end_time={end_time}; expected a positive number")
        if adaptive_depth and learn_end_time:
            raise ConfigError("adaptive_depth=True learns an end time for each sample: leave learn_end_time=False")
        channels, *size = (math.prod(event_shape),) if flatten else event_shape or (0,)
        super().__init__(event_shape, outputs, (channels + augment, *size), head, levels)
        each = list(fields) if isinstance(fields, Sequence | nn.ModuleList) else [fields]
        if not each:
            raise ConfigError("fields=() is empty; expected one vector field, or one for each piece of [0, T]")
        for field in each:
            check_signature(field)
        self.fields = nn.ModuleList(each)
        self.augment, self.flatten, self.data_control, self.learn_end_time = augment, flatten, data_control, learn_end_time
        self.solver: Solver = solver or FixedGrid("rk4", 4)
        self.eval_solver: Solver = eval_solver or Adaptive("dopri5", 1e-5, 1e-5)
        width = channels + augment
        self.lift: nn.Module | None = None
        if input_layer:
            self.lift = nn.Conv2d(channels, width, 1) if size else nn.Linear(channels, width)
        self.depth: nn.Module | None = None
        if adaptive_depth:
            last = nn.Linear(DEPTH_WIDTH, 1)
            self.depth = nn.Sequential(nn.Flatten(), nn.Linear(self.dim, DEPTH_WIDTH), nn.Tanh(), last)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        if learn_end_time:
            self.sqrt_end_time = nn.Parameter(torch.tensor(math.sqrt(end_time)))
        else:
            self.fixed_end_time = float(end_time)

    def end_time(self, x: Tensor) -> Tensor:
        """Return T (), or T(x₀) (N,) with ``adaptive_depth``, for inputs (N, \\*event)."""
        x = self._entering(x)
        if self.learn_end_time:
            return self.sqrt_end_time.to(x).square()
        if self.depth is None:
            return x.new_full((), self.fixed_end_time)  # filled on the device, not copied to it
        # softplus(0) = ln 2: every row starts with T itself
        rate: Tensor = nn.functional.softplus(self.depth(x)[:, 0])
        return rate * (self.fixed_end_time / math.log(2))

    def start(self, x: Tensor) -> Tensor:
        """Return x(0) (N, \\*state): the input with p zero features (channels) appended, or the lifted input."""
        x = self._entering(x)
        if self.lift is not None:
            return cast(Tensor, self.lift(x))
        if not self.augment:
            return x
        return torch.cat([x, x.new_zeros(x.shape[0], self.augment, *x.shape[2:])], 1)

    def _entering(self, x: Tensor) -> Tensor:
        x = self.numbers(x)
        return x.flatten(1) if self.flatten else x

    def predict(self, x: Tensor, *, solver: SolverOverride = None) -> Prediction:
        """Return outputs (N, outputs), features x(T) (N, \\*state) and solver statistics.

        ``solver`` replaces the model's own for this call: a solver, or a function of the model that returns one.
        """
        return self.predict_with_integrals(x, (), solver=solver)[0]

    def predict_with_integrals(
        self,
        x: Tensor,
        quadratures: Sequence[Quadrature],
        *,
        divergence: Divergence | None = None,
        noise: Noise | None = None,
        solver: SolverOverride = None,
    ) -> tuple[Prediction, dict[str, Tensor]]:
        """Return the prediction, and integrals over the path of each row (N,) by name, from the same solve.

        Args:
            x: inputs (N, \\*event).
            quadratures: integrands of :mod:`cnf.ode.quadratures`, evaluated at states (N, \\*state) with their zeros
                appended; with adaptive depth over each row's own time.
            divergence: supplies ‖J‖² where a quadrature needs it; Hutchinson's estimate with one probe if None.
            noise: of the probe.
            solver: as for :meth:`predict`.

        Example:
            >>> from cnf.neural_ode import anode_mlp
            >>> from cnf.ode.quadratures import Kinetic
            >>> prediction, integrals = anode_mlp(2, augment=1).predict_with_integrals(torch.randn(4, 2), [Kinetic()])
            >>> prediction.outputs.shape, integrals["kinetic"].shape
            (torch.Size([4, 1]), torch.Size([4]))
        """
        along = _Along(tuple(quadratures), divergence or Hutchinson(), noise)
        features, stats, values = self._advance(self.start(x), x, 0.0, 1.0, solver_of(self, solver), along)
        return Prediction(self.read(features), features, stats), dict(zip((q.name for q in quadratures), values, strict=True))

    @torch.no_grad()
    def trajectory(self, x: Tensor, times: Tensor) -> Tensor:
        """Return the states of inputs (N, \\*event) at ``times`` in [0, 1], fractions of T: (len(times), N, \\*state).

        Raises:
            ConfigError: for times outside [0, 1] or decreasing.
        """
        if times.ndim != 1 or not len(times) or not bool(((times >= 0) & (times <= 1)).all() and (times.diff() >= 0).all()):
            raise ConfigError(f"times={times.tolist()}: expected increasing times in [0, 1]")
        state, now, frames = self.start(x), 0.0, []
        for time in times.tolist():
            if time > now:
                state = self._advance(state, x, now, time, solver_of(self), _Along((), Hutchinson(), None))[0]
                now = time
            frames.append(state)
        return torch.stack(frames)

    def _advance(
        self, state: Tensor, x: Tensor, start: float, stop: float, solver: Solver, along: _Along
    ) -> tuple[Tensor, Stats, list[Tensor]]:
        """Integrate a state and the quadratures from ``start`` to ``stop``, fractions of T, through the pieces in between."""
        count, stats = len(self.fields), Stats()
        totals = [state.new_zeros(len(state)) for _ in along.quadratures]
        end, control = self.end_time(x), None
        if self.data_control:  # a view: the end time may depend on x, and an adjoint solver would count x twice
            entering = self._entering(x)
            control = entering.view_as(entering)
        for k, field in enumerate(self.fields):
            low, high = max(start, k / count), min(stop, (k + 1) / count)
            if low < high:
                part = along._replace(noise=child(along.noise, k))
                (state, *values), cost = self._piece(field, (state, *totals), control, end * low, end * (high - low), solver, part)
                totals, stats = list(values), stats + cost
        return state, stats, totals

    def _piece(
        self, field: nn.Module, state: tuple[Tensor, ...], control: Tensor | None, start: Tensor, span: Tensor, solver: Solver, along: _Along
    ) -> tuple[tuple[Tensor, ...], Stats]:
        """Solve one piece for the point and the quadratures; ``start`` and ``span`` are (), or (N,) with an end time per row."""
        x, evaluate, need = state[0], protect(field), frozenset[str]().union(*(q.need for q in along.quadratures))
        factor = span.reshape(-1, *(1,) * (x.ndim - 1)) if span.ndim else span
        bound, probe = Bound(evaluate, control), along.divergence.probe(x, along.noise, need, evaluate)

        def rhs(s: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            t = start + s * span
            if len(y) == 1:  # the point alone
                return (factor * evaluate(t, y[0], control),)
            linear = along.divergence.linearize(evaluate, t, y[0], probe, control, need) if need else Linearization(bound(t, y[0]))
            return (factor * linear.dx, *(span * q(t, y[0], linear, bound) for q in along.quadratures))

        learned = [p for module in learned_modules(along.quadratures) for p in module.parameters()]
        parameters = [*field.parameters(), *learned, start, span, *(() if control is None else (control,))]
        try:
            solution = solver.solve(rhs, state, dynamic=1, parameters=parameters)
        except SolverError as error:
            low, high = (float(v.detach().max()) for v in (start, start + span))
            raise SolverError(f"neural ODE on states {self.state_shape}, t {low:g} to {high:g}: {error}{error.where(low, high - low)}") from None
        return solution.state, solution.stats
