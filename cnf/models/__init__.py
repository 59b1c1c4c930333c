"""Flows and predictors built from the settings in a run folder's config.json."""

from cnf.config import ModelConfig, SolverConfig
from cnf.models.flows import build, count_parameters
from cnf.models.neural_ode import NeuralODE, anode_conv, anode_mlp
from cnf.models.predictor import Prediction, Predictor
from cnf.models.predictors import build_predictor
from cnf.models.residual import ResidualNet, residual_net
from cnf.models.solving import divergence, eval_solver, slow_bf16, train_solver

__all__ = [
    "ModelConfig",
    "NeuralODE",
    "Prediction",
    "Predictor",
    "ResidualNet",
    "SolverConfig",
    "anode_conv",
    "anode_mlp",
    "build",
    "build_predictor",
    "count_parameters",
    "divergence",
    "eval_solver",
    "residual_net",
    "slow_bf16",
    "train_solver",
]
