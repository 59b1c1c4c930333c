"""Solvers and divergence built from settings."""

from __future__ import annotations

import math

import torch

from cnf.config import SolverConfig
from cnf.flow import Flow
from cnf.ode.divergence import Divergence, Exact, Hutchinson
from cnf.solvers import Adaptive, FixedGrid, Reversible, Solver

__all__ = ["autocast", "divergence", "eval_solver", "slow_bf16", "train_solver"]

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
