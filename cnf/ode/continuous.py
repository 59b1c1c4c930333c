"""CNF: the transform defined by an ordinary differential equation."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from cnf._utils.async_checks import outside_inference_mode, vectorized
from cnf._utils.compilation import require_compile
from cnf._utils.errors import ConfigError, SolverError, require_inside
from cnf.fields.augmented import TimePath, check_augmented_time
from cnf.fields.base import SolveField, can_compile
from cnf.fields.custom import CustomField, precompute, protect
from cnf.fields.signature import check_signature
from cnf.ode.derivatives import check_derivative, check_time_derivative, first_order
from cnf.ode.divergence import Divergence, Exact, closed
from cnf.ode.dynamics import AugmentedDynamics, SampledStage
from cnf.ode.halving import separable, solve_in_halves
from cnf.ode.logdet_quadrature import solve
from cnf.ode.quadratures import Quadrature, check_names
from cnf.ode.refinement import Rows
from cnf.ode.traced import check_while_tracing
from cnf.random import Noise, draw, number
from cnf.solvers import Adaptive, FixedGrid, Solution, Solver
from cnf.transforms import Request, Transform, TransformOutput
from cnf.transforms.request import DEFAULT

__all__ = ["CNF", "EVALUATION"]

INNER = 0.37  # share of the time interval at which custom fields are checked
# for every row: local error 1e-6 of the point, 1e-3 nats of the log-det
EVALUATION = Adaptive("dopri5", 1e-6, 1e-6, max_steps=10_000, quadrature_tolerance=1e-3, norm="row")


class CNF(Transform):
    r"""x(T) of dx/dt = f(t, x), with log|det ∂x(T)/∂x(0)| = ∫ tr ∂f/∂x dt (NODE, 1806.07366; FFJORD, 1810.01367).

    ``module.train()`` selects ``solver``, ``module.eval()`` selects ``eval_solver``.

    Args:
        field: vector field, ``field(t, x, context) -> dx``.
        divergence: :class:`~cnf.ode.divergence.Exact` or :class:`~cnf.ode.divergence.Hutchinson`; Exact if None.
        solver: solver for training; rk4 with 4 steps if None.
        eval_solver: solver for evaluation; if None :data:`EVALUATION`, dopri5 with an error control of every row's
            log-det: for fields with kinks (ReLU, leaky ReLU, SELU) and smooth ones of a few dimensions, every row's
            log-density was within 5e-3 nats of a grid of 2,000 steps, for any batch (docs/results.md). If a gradient is
            recorded, it solves a second time: evaluate under ``torch.no_grad()``.
        quadratures: further integrals along the path (see :mod:`cnf.ode.quadratures`).
        end_time: T > 0.
        learn_end_time: learn T = τ²; the parameter τ is ``sqrt_end_time``.
        steer: half-width b of the random end time in [T - b, T + b], one per batch, in training (STEER, 2006.10711).
        path: learned augmented time a(t) of AFFJORD (2306.02731), :class:`~cnf.fields.TimePath`: a (1, k) is integrated
            with batch size 1 along with x, in both directions, and the field takes a (k,) in place of t. The map is
            injective in x and the log-det is the integral of the field's divergence, since a does not depend on x.
        autocast: dtype of the field in training, e.g. ``torch.bfloat16``; state, log-det and time keep x's dtype.
        compile: compile the right-hand side or a solver step (``torch.compile``) in training, once per shape. ``"solve"``
            compiles all steps of a fixed grid with gradient ``"direct"`` together: faster steps of small fields for a
            compilation that grows with the number of steps and is repeated when that changes. Where it does not apply
            (custom fields, one stage sampled for ‖J‖²), it is as True. If compilation fails, a warning is given and
            everything runs uncompiled.

    Raises:
        ConfigError: for end_time or steer out of range, an unknown ``compile``, or a field and a path that do not fit together.
        SolverError: from a failed solve; in evaluation ``rows`` lists the rows that cannot be solved.

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
        path: TimePath | None = None,
        autocast: torch.dtype | None = None,
        compile: bool | Literal["solve"] = False,
    ):
        super().__init__()
        require_inside(0, math.inf, end_time=end_time)
        require_compile(compile)
        if not 0 <= steer < end_time:
            raise ConfigError(f"steer must be at least 0 and less than end_time={end_time}, got {steer}")
        check_names(quadratures)
        check_signature(field)
        check_augmented_time(field, path)
        self.field = field
        self.path = path
        self.autocast, self.compiles = autocast, compile  # nn.Module has a method called compile
        self.divergence: Divergence = divergence or Exact()
        self.solver: Solver = solver or FixedGrid("rk4", 4)
        self.eval_solver: Solver = eval_solver or copy.copy(EVALUATION)
        self.quadratures = tuple(quadratures)
        self.steer = steer
        self.label = "block"  # for messages; a flow numbers its blocks
        self.learn_end_time = learn_end_time
        root = torch.tensor(math.sqrt(end_time))
        if learn_end_time:
            self.sqrt_end_time = nn.Parameter(root)
        else:
            self.fixed_end_time = float(end_time)

    def extra_repr(self) -> str:
        """Return divergence, solvers and end time for ``repr``."""
        end = f"{float(self.sqrt_end_time.detach()) ** 2:.4g} (learned)" if self.learn_end_time else f"{self.fixed_end_time:g}"
        return f"divergence={self.divergence!r}, solver={self.solver!r}, eval_solver={self.eval_solver!r}, end_time={end}"

    def end_time(self, x: Tensor) -> Tensor:
        """Return T as a scalar tensor with the dtype and device of x."""
        if self.learn_end_time:
            return self.sqrt_end_time.to(x).square()
        return x.new_full((), self.fixed_end_time)  # filled on the device, without a copy from the host

    def _run(self, x: Tensor, request: Request, reverse: bool) -> TransformOutput:
        """Integrate t from 0 to T, or back; with a shared augmented time, from its value, which is updated."""
        shared = request.augmented_time
        if shared is None:
            end, a = self.sample_end_time(x, request), self.initial_augmented_time(x)
            if reverse and a is not None:  # integrate g forward first, then a backward along with x
                a = self.advance_augmented_time(a, end, request)
        else:
            end, a = shared.end, shared.value
        zero = torch.zeros_like(end)
        value, integrals, solution = self.integrate(x, (end, zero) if reverse else (zero, end), request, augmented_time=a)
        if shared is not None:
            shared.value = solution.state[1]
        return TransformOutput(value, integrals.pop("log_det"), integrals, solution.stats)

    def sample_end_time(self, x: Tensor, request: Request = DEFAULT) -> Tensor:
        """Return the end time of one solve: T, or a random one in training with ``steer``."""
        end = self.end_time(x)
        if self.steer and self.training and request.steer:
            u = draw(request.noise, "end_time", "uniform", (), dtype=x.dtype, device=x.device, batch_dim=None)
            end = end + self.steer * (2 * u - 1)
        return end

    def initial_augmented_time(self, x: Tensor) -> Tensor | None:
        """Return a(0) (1, k) of the augmented time; None without a path."""
        return None if self.path is None else self.path.start(x)

    def advance_augmented_time(self, a: Tensor, span: Tensor, request: Request = DEFAULT) -> Tensor:
        """Return the augmented time (1, k) after ``span``, integrated alone (batch size 1) by the solver of x."""
        path = self.path
        assert path is not None
        named = (*path.parameters(), a, span)
        try:
            solution = request.solver_of(self).solve(lambda s, state: (span * path(state[0]),), (a,), parameters=named)
        except SolverError as error:
            raise error.inside(f"{self.label}, augmented time", (0.0, float(span))) from None
        return solution.state[0]

    def velocity(self, t: Tensor, x: Tensor, context: Tensor | None = None, *, augmented_time: Tensor | None = None) -> Tensor:
        """Return f at time t () and points x (N, \\*event); with a path the augmented time is integrated up to t.

        ``augmented_time`` (1, k) is its value at t = 0, for a block that continues another's; None starts from a(0).
        """
        a = self.initial_augmented_time(x) if augmented_time is None else augmented_time
        time = t if a is None else self.advance_augmented_time(a, t)[0]
        return protect(self.field)(time, x, context)

    def _sampled_stage(self, need: frozenset[str], solver: Solver, closed_form: bool, noise: Noise | None) -> SampledStage | None:
        """Return a random stage for ‖J‖², an extra product with a closed-form trace; training on a grid only."""
        if not (self.training and "jac_sq" in need and type(solver) is FixedGrid and closed_form):
            return None
        return SampledStage(*solver.stage(number(noise, "stage")))

    def _compiled_unit(self, field: SolveField, solver: Solver, stage: SampledStage | None) -> bool | str:
        """Return what is compiled: a step or evaluation (True), the whole solve ("solve"), or nothing (False)."""
        if not (self.compiles and self.training and torch.is_grad_enabled() and can_compile(field, self.label)):
            return False
        # a checkpoint recomputes steps, and a graph for each stage that may be sampled would have all steps
        whole = self.compiles == "solve" and type(solver) is FixedGrid and solver.gradient == "direct" and stage is None
        return "solve" if whole and not field.custom else True

    def integrate(
        self, x: Tensor, times: tuple[Tensor, Tensor], request: Request = DEFAULT, *, augmented_time: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor], Solution]:
        """Integrate x from ``times[0]`` to ``times[1]``; return point, integrals by name (N,) and solution.

        ``augmented_time`` (1, k) is its value at ``times[0]`` if there is a path; None integrates it up to there.
        """
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            return outside_inference_mode(self.integrate)(x, times, request, augmented_time=augmented_time)
        start, stop = (time.view_as(time) for time in times)  # distinct tensors for ``parameters`` below
        span = stop - start
        path, a, context, noise, log_det = self.path, augmented_time, request.context, request.noise, request.log_det
        solver, divergence = request.solver_of(self), request.divergence_of(self)
        if path is not None and a is None:
            a = self.advance_augmented_time(path.start(x), start, request)
        quadratures = self.quadratures if log_det and request.integrals else ()
        need = frozenset({"div"} if log_det else ()).union(*(q.need for q in quadratures))
        # custom fields are checked at an inner time: a part that is zero at the start acts there
        now = ((start if a is None else a[0]) + INNER * span).detach()
        field = precompute(self.field, x, context, noise, t=now)
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and isinstance(field, CustomField):
            field.reverse, field.normalizes, field.whole = check_while_tracing(
                self.field, getattr(divergence, "closed_form", None), getattr(divergence, "mode", "forward"), bool(need), INNER,
                tuple(int(n) for n in x.shape[1:]), (x.dtype, x.device),
                None if context is None else tuple(int(n) for n in context.shape[-1:]), None if context is None else context.dtype,
            )  # fmt: skip
        fault = check_derivative(field, divergence, need, now, x, context)
        if torch.is_grad_enabled() and (path is not None or span.requires_grad):
            check_time_derivative(field, divergence, now, x, context)
        # drawn once, before the solve and outside any checkpoint: a fixed probe defines one smooth ODE
        probe = divergence.probe(x, noise, need, field)
        stage = self._sampled_stage(need, solver, closed(divergence, field), noise)
        rhs = AugmentedDynamics(
            field,
            path,
            divergence,
            quadratures,
            start,
            span,
            context,
            probe,
            log_det,
            autocast=self.autocast if self.training else None,
            compile=self._compiled_unit(field, solver, stage),
            sampled_stage=stage,
        )

        def rows(index: Tensor) -> AugmentedDynamics:
            return rhs.part(index, lambda some: precompute(self.field, x[index], some, noise))

        def separate() -> Rows | None:
            return rows if separable(field, self.field, now, x, context) else None

        flat = x.new_zeros(x.shape[0])
        dynamic = (x,) if a is None else (x, a)
        entries = (*dynamic, *(flat for _ in range(bool(log_det) + len(quadratures))))
        parameters = (*rhs.weights(self.field), *(v for v in (start, stop, context) if v is not None))
        run = partial(solve, solver, dynamic=len(dynamic), parameters=parameters, products=bool(need))

        def part(index: Tensor) -> Solution:
            some = (x[index], *entries[1 : len(dynamic)], *(entry[index] for entry in entries[len(dynamic) :]))
            return run(rows(index), some, rows=lambda: lambda inner: rows(index[inner]))

        try:
            try:
                solution = run(rhs, entries, rows=separate)
            except SolverError as error:
                if self.training or vectorized() or separate() is None:
                    raise
                solution = solve_in_halves(part, x, len(dynamic), error)
        except SolverError as error:
            span_of = None if vectorized() else (float(start), float(stop))  # torch.func hides the times' values
            raise error.inside(f"{self.label} on events {tuple(x.shape[1:])}", span_of) from None
        names = (*(["log_det"] if log_det else []), *(q.name for q in quadratures))
        values = {"log_det": flat, **dict(zip(names, first_order(field, fault, solution.state[len(dynamic) :]), strict=True))}
        return solution.state[0], values, solution
