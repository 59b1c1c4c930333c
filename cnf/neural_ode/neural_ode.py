"""Neural ODEs as predictors: plain (NODE), augmented (ANODE, 1904.01681), and the variants of 2002.08071."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cnf._utils.errors import ConfigError, SolverError
from cnf.fields.custom import protect
from cnf.fields.signature import check_signature
from cnf.neural_ode.odenet import ODENet, conv_maps, mlp_maps
from cnf.neural_ode.predictor import Prediction, Predictor
from cnf.solvers import Adaptive, FixedGrid, Solver, Stats
from cnf.solvers.base import SolverOverride, solver_of

__all__ = ["NeuralODE", "anode_conv", "anode_mlp"]

DEPTH_WIDTH = 16  # hidden units of the net that returns each row's end time


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
        features, stats = self._advance(self.start(x), x, 0.0, 1.0, solver_of(self, solver))
        return Prediction(self.read(features), features, stats)

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
                state = self._advance(state, x, now, time, solver_of(self))[0]
                now = time
            frames.append(state)
        return torch.stack(frames)

    def _advance(self, state: Tensor, x: Tensor, start: float, stop: float, solver: Solver) -> tuple[Tensor, Stats]:
        """Integrate a state from ``start`` to ``stop``, fractions of T, through the pieces in between."""
        count, stats = len(self.fields), Stats()
        end, control = self.end_time(x), None
        if self.data_control:  # a view: the end time may depend on x, and an adjoint solver would count x twice
            entering = self._entering(x)
            control = entering.view_as(entering)
        for k, field in enumerate(self.fields):
            low, high = max(start, k / count), min(stop, (k + 1) / count)
            if low < high:
                state, cost = self._piece(field, state, control, end * low, end * (high - low), solver)
                stats = stats + cost
        return state, stats

    def _piece(
        self, field: nn.Module, state: Tensor, control: Tensor | None, start: Tensor, span: Tensor, solver: Solver
    ) -> tuple[Tensor, Stats]:
        """Solve one piece; ``start`` and ``span`` are (), or (N,) with an end time per row."""
        factor, evaluate = span.reshape(-1, *(1,) * (state.ndim - 1)) if span.ndim else span, protect(field)

        def rhs(s: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (factor * evaluate(start + s * span, y[0], control),)

        parameters = [*field.parameters(), start, span, *(() if control is None else (control,))]
        try:
            solution = solver.solve(rhs, (state,), dynamic=1, parameters=parameters)
        except SolverError as error:
            low, high = (float(v.detach().max()) for v in (start, start + span))
            raise SolverError(f"neural ODE on states {self.state_shape}, t {low:g} to {high:g}: {error}{error.where(low, high - low)}") from None
        return solution.state[0], solution.stats


def _layer(time_dependent: bool | None, options: Mapping[str, Any]) -> str:
    """Return the layer type; by default time enters only with adaptive depth, which needs it."""
    return "concat" if (options.get("adaptive_depth", False) if time_dependent is None else time_dependent) else "ignore"


def anode_mlp(
    dim: int,
    hidden: int = 32,
    outputs: int = 1,
    augment: int = 0,
    *,
    time_dependent: bool | None = None,
    nonlinearity: str = "relu",
    **options: Any,
) -> NeuralODE:
    """Build ANODE's model of vectors (1904.01681): three linear layers, time in the first; ``augment=0`` is a NODE.

    Args:
        dim: dimension of the inputs.
        hidden: width of both hidden layers.
        outputs: number of outputs.
        augment: p, number of zero features appended.
        time_dependent: condition the first layer on t, unlike the published runs; by default only with
            ``adaptive_depth``.
        nonlinearity: ``"relu"`` or ``"softplus"`` as published.
        options: keyword arguments of :class:`NeuralODE`.

    Raises:
        ConfigError: as :class:`NeuralODE`.

    Example:
        >>> [sum(p.numel() for p in anode_mlp(1, augment=p, time_dependent=True).parameters()) for p in (0, 5)]
        [1187, 1517]
    """
    maps, layers = mlp_maps(dim + max(0, augment), (hidden, hidden), _layer(time_dependent, options))
    return NeuralODE(ODENet(maps, layers, nonlinearity), (dim,), outputs, augment=augment, **options)


def anode_conv(
    event_shape: tuple[int, int, int],
    filters: int = 64,
    outputs: int = 10,
    augment: int = 0,
    *,
    time_dependent: bool | None = None,
    nonlinearity: str = "relu",
    **options: Any,
) -> NeuralODE:
    """Build ANODE's model of images (1904.01681): 1x1, 3x3 and 1x1 convolutions; ``augment=0`` is a NODE.

    Args:
        event_shape: (C, H, W).
        filters: channels of both hidden layers.
        outputs: number of outputs.
        augment: p, number of zero channels appended.
        time_dependent: append t as a channel in every convolution, unlike the published counts; by default only with
            ``adaptive_depth``.
        nonlinearity: ``"relu"`` or ``"softplus"`` as published.
        options: keyword arguments of :class:`NeuralODE`.

    Raises:
        ConfigError: as :class:`NeuralODE`.

    Example:
        >>> [sum(p.numel() for p in anode_conv((1, 28, 28), k, augment=p).parameters()) for k, p in ((92, 0), (64, 5))]
        [84395, 84816]
    """
    maps, layers = conv_maps(
        event_shape[0] + max(0, augment), (filters, filters), _layer(time_dependent, options), (0, 1, 0)
    )
    return NeuralODE(ODENet(maps, layers, nonlinearity), event_shape, outputs, augment=augment, **options)
