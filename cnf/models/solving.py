"""Solvers and divergence built from settings."""

from __future__ import annotations

import math

import torch

from cnf.config import AdamsConfig, AdaptiveConfig, HutchinsonConfig, SolverConfig
from cnf.fields import Denoiser
from cnf.flow import Flow
from cnf.ode.divergence import Divergence, Exact, Hutchinson
from cnf.solvers import Adaptive, ExponentialAdams, FixedGrid, Reversible, Solver

__all__ = ["autocast", "divergence", "eval_solver", "slow_bf16", "train_solver"]


def train_solver(config: SolverConfig, grid_steps: int | None = None) -> Solver:
    """Return the training solver; ``grid_steps`` overrides that of the settings."""
    train = config.train_solver
    if isinstance(train, AdaptiveConfig):
        return Adaptive(train.method, train.rtol, train.atol, train.gradient)
    steps = grid_steps or train.steps
    if train.gradient == "reversible":
        return Reversible(train.method, steps)
    return FixedGrid(train.method, steps, train.gradient)


def eval_solver(config: SolverConfig, flow: Flow | None = None) -> Solver:
    """Return the evaluation solver: of a denoiser's likelihoods as their settings say, else :func:`_adaptive`."""
    chosen = config.likelihood_solver
    if flow is not None and isinstance(chosen, AdamsConfig) and all(isinstance(block.field, Denoiser) for block in flow.blocks):
        # images, whose tolerances are in bits/dim
        tolerance = chosen.likelihood_tolerance * math.log(2) or None
        return ExponentialAdams(chosen.likelihood_steps, chosen.likelihood_order, tolerance, otherwise=_adaptive(config, flow))
    return _adaptive(config, flow)


def _adaptive(config: SolverConfig, flow: Flow | None = None) -> Solver:
    """Return the adaptive solver of evaluation and sampling; with a flow, each block gets an equal share of the log-det's tolerance."""
    share = None
    if flow is not None and config.eval_tolerance:
        share = config.eval_tolerance * (1.0 if flow.levels is None else math.log(2)) / len(flow.blocks)
    return Adaptive(config.eval_method, config.eval_rtol, config.eval_atol, max_steps=10_000, quadrature_tolerance=share)


def divergence(config: SolverConfig) -> Divergence:
    """Return the divergence strategy."""
    trace = config.divergence
    if isinstance(trace, HutchinsonConfig):
        return Hutchinson(trace.hutchinson_noise, trace.hutchinson_mode, trace.probes)
    return Exact()


def autocast(config: SolverConfig) -> torch.dtype | None:
    """Return the autocast dtype of the fields in training, or None."""
    return torch.bfloat16 if config.precision == "bf16" else None


def slow_bf16(device: str) -> bool:
    """Return whether bfloat16 is no faster than float32 on this device: a CPU with neither AMX nor avx512_bf16."""
    return device == "cpu" and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
