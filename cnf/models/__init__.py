"""Models from plain settings: what a run folder's config.json describes and rebuilds."""

from cnf.models.flows import ModelConfig, SolverConfig, build, divergence, eval_solver, train_solver

__all__ = ["ModelConfig", "SolverConfig", "build", "divergence", "eval_solver", "train_solver"]
