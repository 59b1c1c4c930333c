"""torchdiffeq's solvers, with direct and adjoint gradients, and dopri5 by our own loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from cnf._utils.async_checks import vectorized
from cnf._utils.errors import ConfigError, SolverError, require_inside, unknown_name
from cnf.solvers.base import RHS, Counter, Solution, State, Stats, finite, largest
from cnf.solvers.checkpointing import Recompute, differentiable_once
from cnf.solvers.counted import GridFunction, StepCallback, StepFunction, UnsteppedFunction
from cnf.solvers.embedded import StepFailure, embedded

__all__ = ["Adaptive"]

LARGEST = 1e40  # cap of the error ratio: the first step is about its inverse and must not be zero
EMBEDDED = ("dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2")
ADAMS = ("explicit_adams", "implicit_adams")
SCIPY = "scipy_solver"
# options of torchdiffeq that a caller may set; the others follow from the arguments
OPTIONS = {
    **dict.fromkeys(EMBEDDED, ("first_step", "min_step", "max_step", "safety", "ifactor", "dfactor", "jump_t")),
    **dict.fromkeys(ADAMS, ("step_size", "max_order", "max_iters", "perturb")),
    SCIPY: ("solver", "min_step", "max_step"),
}
POSITIVE = ("first_step", "safety", "ifactor", "dfactor", "max_order", "max_iters")
CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


class Adaptive:
    """torchdiffeq's methods, with the last step ending at s = 1 and quadratures excluded from the error norm.

    dopri5 without the adjoint, options or callbacks takes the same steps in a loop of our own, which costs less per step.

    ``norm="batch"`` is the root mean square over all entries of a batch, to which one stiff row among 200 contributes a
    fourteenth of its error: cheap if a mean over rows is of interest. ``norm="row"`` is the largest root mean
    square of a row, so that no row's error depends on the other rows.

    Args:
        method: an adaptive method of torchdiffeq: ``"dopri5"``, ``"dopri8"``, ``"bosh3"``, ``"adaptive_heun"``, ``"fehlberg2"``;
            ``"explicit_adams"`` or ``"implicit_adams"``, multistep methods on a grid (``options={"step_size": h}``, a share
            of the solve; the tolerances are those of the implicit one's iteration); or ``"scipy_solver"``, which runs
            ``options={"solver": "LSODA"}`` or another of ``scipy.integrate.solve_ivp`` (BDF and Radau are implicit, for stiff
            fields) on the CPU, with the adjoint's gradient alone.
        rtol: relative tolerance.
        atol: absolute tolerance.
        gradient: ``"direct"`` (backpropagation through the solver steps) or ``"adjoint"`` (the continuous adjoint with
            the seminorm of 2009.09457).
        max_steps: maximum number of solver steps.
        quadratures_in_norm: include log-det and the other integrals in the error norm.
        quadrature_tolerance: solve the point alone and evaluate log-det and the other integrals at as few quadrature
            nodes of its path as the tolerance permits (see :mod:`cnf.ode.logdet_quadrature`). With ``norm="batch"`` it is in nats
            per dimension of the block for the mean over rows, and ten times that for any one row; with ``norm="row"``
            it is in nats for every row (from 100 dimensions on, times a hundredth of their number). None integrates
            them along with the point, with uncontrolled error unless they are in the norm. If a gradient is recorded,
            it is that of the integrals along with the point.
        norm: ``"batch"`` or ``"row"``; ``"row"`` raises tolerances to at least four machine epsilons. Other than ``"batch"``,
            and ``quadrature_tolerance``, for the adaptive methods alone.
        options: of the method, as torchdiffeq takes them: ``first_step``, ``min_step``, ``max_step``, ``safety``, ``ifactor``,
            ``dfactor``, ``jump_t`` of the adaptive methods; ``step_size``, ``max_order``, ``max_iters``, ``perturb`` of Adams;
            ``solver``, ``min_step``, ``max_step`` of scipy. Times and steps are shares of the solve, from 0 to 1.
        callbacks: functions of (s, state, step) by torchdiffeq's names, ``"callback_step"``, ``"callback_accept_step"``,
            ``"callback_reject_step"``, called in the forward solve.

    torchdiffeq's events are not offered: a solve that ends where its state says so is no map with this log-determinant.

    Raises:
        ConfigError: for an unknown method, gradient, norm, option or callback, or tolerances that are not positive and
            finite, or mutually exclusive.

    Example:
        >>> from cnf import CNF, Flow
        >>> from cnf.fields import MLP
        >>> adams = Adaptive("implicit_adams", options={"step_size": 0.05})
        >>> flow = Flow(CNF(MLP(2), eval_solver=adams), (2,)).eval()
        >>> flow.log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    METHODS = EMBEDDED  # with step control
    NORMS = ("batch", "row")

    def __init__(
        self,
        method: str = "dopri5",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        gradient: str = "direct",
        max_steps: int = 1000,
        quadratures_in_norm: bool = False,
        quadrature_tolerance: float | None = None,
        norm: str = "batch",
        options: Mapping[str, Any] | None = None,
        callbacks: Mapping[str, StepCallback] | None = None,
    ):
        if method not in OPTIONS:
            raise unknown_name("method", method, OPTIONS, "Adaptive")
        tolerances = {"rtol": rtol, "atol": atol} | ({} if quadrature_tolerance is None else {"quadrature_tolerance": quadrature_tolerance})
        require_inside(0, math.inf, **tolerances)
        if gradient not in ("direct", "adjoint"):
            raise unknown_name("gradient", gradient, ("direct", "adjoint"), "Adaptive")
        if quadrature_tolerance is not None and quadratures_in_norm:
            raise ConfigError("quadratures_in_norm=True excludes quadrature_tolerance: integrals outside the error norm only; set one of them")
        if norm not in self.NORMS:
            raise unknown_name("norm", norm, self.NORMS)
        for what, value in (("options", options), ("callbacks", callbacks)):
            if not isinstance(value, Mapping | None):
                raise ConfigError(f"{what} must be a dictionary, such as {{'first_step': 0.01}}, got {value!r}")
        self.options, self.callbacks = dict(options or {}), dict(callbacks or {})
        positive = {f"options[{k!r}]": v for k, v in self.options.items() if k in POSITIVE and v is not None}
        require_inside(0, math.inf, **{k: v for k, v in positive.items() if not isinstance(v, Tensor)})
        calls = CALLBACKS if method in EMBEDDED else CALLBACKS[:1] if method in ADAMS else ()
        for given, known, what in ((self.options, OPTIONS[method], "options"), (self.callbacks, calls, "callbacks")):
            if unknown := given.keys() - set(known):
                raise unknown_name(what, min(unknown), known, f"method {method!r}")
        if method not in EMBEDDED and (norm != "batch" or quadrature_tolerance is not None):
            raise ConfigError(f"norm={norm!r}, quadrature_tolerance={quadrature_tolerance}: method {method!r} has no step control of its own: leave both out")
        if method in ADAMS and not 0 < float(self.options.get("step_size", 0)) <= 1:
            raise ConfigError(f"options={self.options}: method {method!r} needs a step_size in (0, 1], such as options={{'step_size': 0.05}}")
        if method == SCIPY and gradient != "adjoint":
            raise ConfigError(f"gradient={gradient!r}: {SCIPY} runs outside of autograd: take gradient='adjoint'")
        self.norm = norm
        self.method, self.rtol, self.atol, self.gradient = method, rtol, atol, gradient
        self.max_steps, self.quadratures_in_norm = max_steps, quadratures_in_norm
        self.quadrature_tolerance = quadrature_tolerance

    def __repr__(self) -> str:
        options = f", options={self.options}" if self.options else ""
        return f"Adaptive({self.method!r}, rtol={self.rtol:g}, atol={self.atol:g}, gradient={self.gradient!r}{options})"

    def refined(self) -> Adaptive:
        """Return the same method with ten times tighter tolerances, and half the step size."""
        finer = copy.copy(self)
        if "step_size" in self.options:
            finer.options = {**self.options, "step_size": self.options["step_size"] / 2}
        finer.rtol, finer.atol, finer.max_steps = self.rtol / 10, self.atol / 10, 4 * self.max_steps
        if self.quadrature_tolerance is not None:
            finer.quadrature_tolerance = self.quadrature_tolerance / 10
        return finer

    def solve(self, rhs: RHS, state: State, *, dynamic: int = 1, parameters: Sequence[Tensor] = ()) -> Solution:
        """Return the state at s = 1; ``parameters`` lists all tensors that ``rhs`` closes over, for the adjoint.

        Raises:
            SolverError: for too many steps, an underflowing step, or a non-finite state.
        """
        ends = torch.tensor([0.0, 1.0], dtype=state[0].dtype, device=state[0].device)
        path, stats = self.path(rhs, state, ends, dynamic=dynamic, parameters=parameters)
        return Solution(tuple(entry[-1] for entry in path), stats)

    def path(
        self, rhs: RHS, state: State, times: Tensor, *, dynamic: int = 1, parameters: Sequence[Tensor] = ()
    ) -> Solution:
        """Return the state at ``times`` (T,), increasing from 0 to 1, with entries (T, ...) by interpolation.

        The steps are those of :meth:`solve`: further times cost no evaluations and have the same error.

        Raises:
            ConfigError: under torch.export or on the meta device.
            SolverError: for too many steps, an underflowing step, or a non-finite final state.
        """
        if state[0].is_meta or torch.compiler.is_exporting():
            raise ConfigError(f"{self!r} chooses its steps by values, which torch.export and the meta device do not have: use FixedGrid(...)")
        like, norm = state[0], self._norm(state, dynamic)
        adjoint = self.gradient == "adjoint" and torch.is_grad_enabled()
        plain = not self.options and not self.callbacks
        if vectorized() and not (plain and self.method in EMBEDDED):
            raise ConfigError(f"{self!r} does not run under torch.func: use one of {', '.join(EMBEDDED)} without options and callbacks, or FixedGrid(...)")
        if vectorized() or (self.method == "dopri5" and plain and not adjoint):  # torchdiffeq has neither torch.func nor fast steps
            return self._embedded(rhs, state, times, norm, dynamic)
        kind = StepFunction if self.method in EMBEDDED else GridFunction if self.method in ADAMS else UnsteppedFunction
        function = kind(rhs, like.dtype, self.max_steps, self.callbacks)

        def options(end: float) -> dict[str, Any]:
            if self.method not in EMBEDDED:
                return dict(self.options)
            # step_t ends the last step at the end time; by default torchdiffeq steps past it and interpolates
            return {**self.options, "step_t": like.new_tensor([end], dtype=torch.float64), "max_num_steps": self.max_steps}

        rtol, atol = self._tolerances(like)
        common: dict[str, Any] = {"rtol": rtol, "atol": atol, "method": self.method}
        try:
            if adjoint:
                if getattr(rhs, "custom", True):  # a custom field may close over an encoder's output, for example
                    parameters = (*parameters, *Recompute(parameters).unnamed(lambda *y: function(times[0], y), state))
                path = torchdiffeq.odeint_adjoint(
                    function,
                    state,
                    times,
                    options={**options(1.0), "norm": norm},
                    adjoint_options={**options(0.0), "norm": "seminorm"},
                    adjoint_params=tuple(p for p in parameters if p.requires_grad),
                    **common,
                )
                path = differentiable_once(self.gradient, tuple(path))
            else:
                path = torchdiffeq.odeint(function, state, times, options={**options(1.0), "norm": norm}, **common)
        except (AssertionError, RuntimeError, ValueError) as error:
            if not isinstance(error, AssertionError) and self.method != SCIPY:  # scipy's failures show as missing times
                raise
            raise self._failed(" ".join(str(error).split()), function.counter, function.attempt) from None
        if not finite(tuple(e[-1] for e in path)):
            raise self._failed("the final state is not finite", function.counter, function.attempt)
        function.counter.backward, function.attempt = True, None
        return Solution(tuple(path), Stats([function.counter]))

    def _embedded(self, rhs: RHS, state: State, times: Tensor, norm: Callable[[State], Tensor], dynamic: int) -> Solution:
        """Return the path by our own loop over torchdiffeq's tableau."""
        try:
            solution = embedded(
                self.method, rhs, state, self._tolerances(state[0]), norm, self.max_steps, times=times.tolist(), integrals=len(state) > dynamic
            )
        except StepFailure as failure:
            raise self._failed(str(failure), failure.counter, failure.attempt) from None
        if not vectorized() and not finite(tuple(e[-1] for e in solution.state)):
            raise self._failed("the final state is not finite", solution.stats.counters[0], None)
        return solution

    def integrating(self) -> Adaptive:
        """Return the same solver with every integral solved along with the point and in the error norm."""
        other = copy.copy(self)
        other.quadratures_in_norm, other.quadrature_tolerance = True, None
        return other

    def _norm(self, state: State, dynamic: int) -> Callable[[State], Tensor]:
        """Return the error norm of a state, over the dynamic entries or, with ``quadratures_in_norm``, over all."""
        used = len(state) if self.quadratures_in_norm else dynamic
        return lambda y: self._size(y[0]) if used == 1 else torch.stack([self._size(e) for e in y[:used]]).max()

    def _tolerances(self, like: Tensor) -> tuple[float, float]:
        least = 4 * torch.finfo(like.dtype).eps if self.norm == "row" else 0.0
        return max(self.rtol, least), max(self.atol, least)

    def _size(self, entry: Tensor) -> Tensor:
        """Return the norm of an entry's errors, in float64, since squares of outliers overflow float32."""
        if not entry.numel():
            return entry.new_zeros((), dtype=torch.float64)
        entry = entry.detach()  # steps depend on values only: a norm has no second derivative at zero
        rows = entry.reshape(len(entry) if self.norm == "row" else 1, -1)
        size: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) / math.sqrt(rows.shape[1])
        return size.max().clamp(max=LARGEST)

    def _failed(self, reason: str, counter: Counter, attempt: tuple[Any, State, Any] | None) -> SolverError:
        where = dict[str, Any]()
        if attempt is not None and not vectorized():
            s, y, h = attempt
            where = {"s": float(s), "step": float(h), "largest": largest(y)}
        return SolverError(
            f"{self!r} gave up after {counter.accepted} accepted and {counter.rejected} rejected steps, {counter.nfe} "
            f"evaluations ({reason[:200]}): looser tolerances, a larger max_steps (now {self.max_steps}), or a kinetic "
            "penalty may help",
            **where,
            exhausted=counter.accepted + counter.rejected >= self.max_steps,
        )
