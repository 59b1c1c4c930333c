"""Predictors that a neural ODE defines (NODE, ANODE and relatives), and residual networks next to them."""

from cnf.neural_ode.anode import anode_conv, anode_mlp
from cnf.neural_ode.neural_ode import NeuralODE
from cnf.neural_ode.odenet import ODENet, conv_maps, mlp_maps
from cnf.neural_ode.predictor import Prediction, Predictor
from cnf.neural_ode.residual import ResidualNet, residual_net

__all__ = [
    "NeuralODE", "ODENet", "Prediction", "Predictor", "ResidualNet", "anode_conv", "anode_mlp", "conv_maps", "mlp_maps",
    "residual_net",
]  # fmt: skip
