"""Solvers and divergence built from settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from cnf.divergence import Divergence, Exact, Hutchinson
from cnf.flow import Flow
from cnf.solvers import Adaptive, FixedGrid, Reversible, Solver

__all__ = ["LATER", "SolverConfig", "autocast", "divergence", "eval_solver", "slow_bf16", "train_solver"]

LATER = {"optional": True}  # metadata of settings that older run folders lack; their default applies


@dataclass(frozen=True)
class SolverConfig:
    """How the ODE is solved and the trace taken."""

    method: str = "rk4"
    """Training: a fixed grid's (euler, midpoint, heun, rk4, rk4-classic, dopri5); with --adaptive dopri5, dopri8, bosh3, ..."""
    grid_steps: int = 4
    """Training: steps of the fixed grid, per block (the watch may raise it)."""
    adaptive: bool = False
    """Training: solve adaptively (--method dopri5, say) instead of on a grid."""
    gradient: Literal["direct", "checkpoint", "reversible", "adjoint"] = "direct"
    """Training gradient: direct; checkpoint (grids); reversible (grids; a scheme of its own, of the same order); adjoint (adaptive)."""
    rtol: float = 1e-5
    """Training: relative tolerance of an adaptive method."""
    atol: float = 1e-5
    """Training: absolute tolerance of an adaptive method."""
    eval_method: str = "dopri5"
    """Evaluation and sampling: an adaptive method."""
    eval_rtol: float = 1e-5
    """Evaluation: relative tolerance."""
    eval_atol: float = 1e-5
    """Evaluation: absolute tolerance."""
    eval_tolerance: float = 1e-4
    """Evaluation: error of the log-det, bits/dim or nats/dim, taken at few nodes of the path; 0 takes it in every stage."""
    divergence: Literal["exact", "hutchinson"] = "exact"
    """The trace: exact, or Hutchinson's estimate."""
    probe: Literal["rademacher", "gaussian"] = "rademacher"
    """Hutchinson's probe."""
    mode: Literal["forward", "reverse"] = "forward"
    """Hutchinson's product: J e or eᵀJ."""
    probes: int = 1
    """Hutchinson's number of probes."""
    steer: float = 0.0
    """Half-width of a random end time in training (STEER)."""
    automatic_steps: bool = False
    """Training, grids: from --grid-steps on, as many steps in each block as --watch-tolerance takes, measured while training."""
    compile: bool = False
    """Training: compile the fields (torch.compile): faster steps, after a minute or so for every shape that a block has."""
    precision: Literal["fp32", "bf16", "tf32", "fp64"] = "fp32"
    """bf16: inside the fields, in training alone; tf32: in training alone, on a GPU; fp64: everything."""


def train_solver(config: SolverConfig, grid_steps: int | None = None) -> Solver:
    """Return the training solver; ``grid_steps`` overrides that of the settings."""
    if config.adaptive:
        return Adaptive(config.method, config.rtol, config.atol, config.gradient)
    steps = grid_steps or config.grid_steps
    if config.gradient == "reversible":
        return Reversible(config.method, steps)
    return FixedGrid(config.method, steps, config.gradient)


def eval_solver(config: SolverConfig, flow: Flow | None = None) -> Solver:
    """Return the evaluation solver; with a flow, each block gets an equal share of the log-det's tolerance."""
    share = None
    if flow is not None and config.eval_tolerance:
        share = config.eval_tolerance * (1.0 if flow.levels is None else math.log(2)) / len(flow.blocks)
    return Adaptive(config.eval_method, config.eval_rtol, config.eval_atol, max_steps=10_000, quadrature_tolerance=share)


def divergence(config: SolverConfig) -> Divergence:
    """Return the divergence strategy."""
    if config.divergence == "exact":
        return Exact()
    return Hutchinson(config.probe, config.mode, config.probes)


def autocast(config: SolverConfig) -> torch.dtype | None:
    """Return the autocast dtype of the fields in training, or None."""
    return torch.bfloat16 if config.precision == "bf16" else None


def slow_bf16(device: str) -> bool:
    """Return whether bfloat16 is no faster than float32 on this device: a CPU with neither AMX nor avx512_bf16."""
    return device == "cpu" and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
