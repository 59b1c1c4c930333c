"""Presets of a survey of neural ODEs: eight nets of about 1,300 parameters on three spheres (variants of 2002.08071)."""

from __future__ import annotations

from dataclasses import replace

from cnf.config.model import NeuralODEConfig, ResNetConfig
from cnf.config.presets.neural_ode import NEURAL_ODE
from cnf.config.settings import Preset

__all__ = ["SURVEY"]

_START = NEURAL_ODE["anode-three-spheres"]  # 1,024 points, batches of 96, Adam at 1e-3, 50 epochs
# 15, 11 and 14 are the survey's hidden widths. It does not give the numbers of terms and pieces: they are inferred from its
# parameter counts of 1.3k, 1.4k and 1.4k with two hidden layers. For Fourier none rounds to 1.4k (7 terms 1,332, 8 terms 1,521)
_NODE = NeuralODEConfig.of(hidden=(33, 33), time_conditioning="ignore", nonlinearity="tanh", zero_init=False)


def _net(name: str, model: NeuralODEConfig | ResNetConfig, summary: str, seconds: int) -> dict[str, Preset]:
    name = f"survey-{name}"
    return {name: replace(_START, config=replace(_START.config, name=name, model=model), summary=summary, cost=f"about {seconds} seconds on one core")}


SURVEY = (
    _net("resnet", ResNetConfig.of(hidden=(32,), blocks=8, nonlinearity="tanh", zero_init=False), "residual net of 8 blocks", 5)
    | _net("node", _NODE, "vanilla NODE", 10)
    | _net("anode", _NODE.change(hidden=(28, 28), augment=5), "ANODE, p = 5", 10)
    | _net("il-node", _NODE.change(hidden=(28, 28), augment=5, input_layer=True), "learned input layer, p = 5", 10)
    | _net("data-control", _NODE.change(hidden=(32, 32), data_control=True), "data-controlled NODE", 10)
    | _net("chebyshev", _NODE.change(hidden=(15, 15), depth="chebyshev", depth_terms=4), "weights over depth: 4 Chebyshev terms", 20)
    | _net("fourier", _NODE.change(hidden=(11, 11), depth="fourier", depth_terms=7), "weights over depth: 7 Fourier terms", 25)
    | _net("stacked", _NODE.change(hidden=(14, 14), depth="stacked", depth_terms=5), "weights over depth: 5 constant pieces", 20)
)
