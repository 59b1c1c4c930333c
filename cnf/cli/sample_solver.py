"""Solver and precision that sampling uses by its options."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from cnf._utils.errors import ConfigError
from cnf._utils.output import emit
from cnf.cli.sample_options import MULTISTEP
from cnf.fields import Denoiser, Interpolant
from cnf.flow import Flow
from cnf.models import slow_bf16
from cnf.solvers import Adaptive, ExponentialAdams, ExponentialMultistep, FixedGrid, PowerSpacing, RatioSpacing, Solver

__all__ = ["EVALUATIONS", "SamplePlan", "sample_plan"]

EVALUATIONS = {"draft": 6, "default": 12}  # of --quality; "exact" is the run's adaptive solver


class SamplePlan(NamedTuple):
    """Solver and precision of sampling."""

    solver: Solver | None
    """Solver of every block; None for the run's own."""
    autocast: torch.dtype | None
    """Dtype of the field's computations; None for that of the weights."""
    description: str
    """Solver and precision in words, such as "unipc, 12 evaluations"; empty for a flow without an ODE."""
    own: str
    """The run's own solver in words."""


def sample_plan(options: Any, flow: Flow, *, animated: bool = False) -> SamplePlan:
    """Return solver and precision of these options (see :mod:`cnf.cli.sample_options`) for a flow.

    Args:
        options: parsed options.
        flow: the flow to sample from.
        animated: the samples' paths are shown (a .gif), for which a multistep solver is replaced by the run's own.

    Raises:
        ConfigError: for a quality or method that needs a denoiser, if the flow is none or the paths are shown, and for
            bf16 with an adaptive solver or weights that are not float32.
    """
    path, steps = _path(flow), options.grid_steps
    if steps is not None:
        method, words = options.method, f"--method {options.method}"
    else:
        quality = options.quality or ("exact" if path is None or animated else "default")
        method, steps, words = "unipc", EVALUATIONS.get(quality), f"--quality {quality}"
    solver: Solver | None = None
    if steps is None and flow.blocks and isinstance(likelihood := flow.blocks[0].eval_solver, ExponentialAdams):
        solver = likelihood.otherwise
    elif steps is not None and method not in MULTISTEP:
        solver = FixedGrid(method, steps, spacing=None if path is None else PowerSpacing(path))
    elif steps is not None:
        instead = "--quality exact, or --grid-steps N --method rk4"
        if path is None:
            raise ConfigError(f"{words} is for denoisers (presets such as fm-mnist), and this run's field is none: use {instead}")
        if animated:
            raise ConfigError(f"{words} draws samples without the way to them, which a .gif shows: use {instead}")
        solver = ExponentialMultistep(method, steps, RatioSpacing(path))
    own = _words(flow.blocks[0].eval_solver, len(flow.blocks)) if flow.blocks else ""
    precision = _precision(options, flow, solver)
    words = own if solver is None or not own else _words(solver, len(flow.blocks))
    return SamplePlan(solver, precision, f"{words} in bf16" if precision and words else words, own)


def _path(flow: Flow) -> Interpolant | None:
    """Return the path between data and noise of a denoiser; None for other flows."""
    fields = [block.field for block in flow.blocks]
    return fields[0].interpolant if len(fields) == 1 and isinstance(fields[0], Denoiser) else None


def _precision(options: Any, flow: Flow, solver: Solver | None) -> torch.dtype | None:
    """Return the autocast dtype of ``--precision``."""
    if options.precision != "bf16":
        return None
    if any(isinstance(solver or block.eval_solver, Adaptive) for block in flow.blocks):
        raise ConfigError("--precision bf16 has three digits, too few for the error control of an adaptive solver: give --grid-steps N, or --quality draft or default for a denoiser")
    if flow.like.dtype != torch.float32:
        raise ConfigError(f"--precision bf16 is for float32 weights, and this run's are {str(flow.like.dtype).removeprefix('torch.')}: leave it out")
    if slow_bf16(options.device):
        emit("warning", "precision: this CPU has neither AMX nor avx512_bf16, so that bf16 is no faster here than fp32")
    return torch.bfloat16


def _words(solver: Solver, blocks: int) -> str:
    """Return the name and the size of a solver."""
    each = " in each block" if blocks > 1 else ""
    if isinstance(solver, ExponentialMultistep):
        return f"{solver.method}, {_counted(solver.steps, 'evaluation')}{each}"
    if isinstance(solver, FixedGrid):
        return f"{solver.method}, {_counted(solver.steps, 'solver step')} ({_counted(solver.steps * len(solver.tableau.b), 'evaluation')}){each}"
    if isinstance(solver, ExponentialAdams):
        paths = "" if solver.otherwise is None else f" (paths by {_words(solver.otherwise, blocks)})"
        return f"exponential Adams of order {solver.order}, {_counted(solver.steps + 1, 'evaluation')}{each}{paths}"
    if isinstance(solver, Adaptive):
        return f"{solver.method} at rtol {solver.rtol:g}"
    return repr(solver)


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"
