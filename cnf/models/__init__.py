"""Flows, predictors and autoencoders built from the settings in a run folder's config.json."""

from cnf._utils.aliases import aliases
from cnf.models.autoencoders import build_autoencoder
from cnf.models.flows import build, count_parameters
from cnf.models.kinds import Model, build_model
from cnf.models.predictors import build_predictor
from cnf.models.solving import divergence, eval_solver, slow_bf16, train_solver

__all__ = [
    "Model",
    "build",
    "build_autoencoder",
    "build_model",
    "build_predictor",
    "count_parameters",
    "divergence",
    "eval_solver",
    "slow_bf16",
    "train_solver",
]

_NEURAL_ODE = ("NeuralODE", "Prediction", "Predictor", "ResidualNet", "anode_conv", "anode_mlp", "residual_net")

__getattr__ = aliases(__name__, ModelConfig="cnf.config.ModelConfig", SolverConfig="cnf.config.SolverConfig", **{name: f"cnf.neural_ode.{name}" for name in _NEURAL_ODE})
