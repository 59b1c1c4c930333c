"""Presets with the closed-form exact trace: two hidden layers in place of three with an estimate."""

from __future__ import annotations

from cnf.config.model import FlowConfig
from cnf.config.presets.density import DENSITY
from cnf.config.presets.images import IMAGES
from cnf.config.published import RNODE
from cnf.config.settings import DataConfig, Preset, RunConfig
from cnf.config.solver import SolverConfig

__all__ = ["EXACT"]

# a field initialised to zero is straight, and the kinetic energy keeps it so for long: one step of rk4 per block at the
# start, later as many as the measured error requires
_SOLVER = SolverConfig.of(grid_steps=1, automatic_steps=True, divergence="exact")
_DIGITS, _MNIST, _TABLE = DENSITY["digits"], IMAGES["rnode-mnist"], DENSITY["tabular"]

EXACT = {
    "exact-digits": Preset(
        RunConfig(
            "exact-digits",
            DataConfig("digits"),
            # squeezed to 4x4, every pixel sees nearly all others through three layers. Validation after 40 CPU seconds
            # without the Jacobian penalty: this block 1.953 bits/dim (with concatsquash 2.012), two of them 1.979,
            # RNODE's multiscale architecture (48-48) 1.983, a block on 8x8 pixels 2.035. "concat" has no gate after the
            # last layer, so that one kernel of the trace serves a whole solve. Marginals as in the preset digits
            FlowConfig.of(
                field="conv", hidden=(64, 64), squeeze_first=True, time_conditioning="concat", preprocess="gaussianize", alpha=1e-4
            ),
            _SOLVER,
            # shared weights overfit less than the MLP's 109,876: higher lr, less decay (with half of digits' decay:
            # 1.961). The Jacobian penalty, one product per solve, limits stiffness: three solver steps suffice to the
            # end, instead of twelve after 1,100 updates; 1.923 after 70 CPU seconds (with 0.0693: 1.927). 0.0208 = 0.03
            # ln 2, tuned when the penalty was divided by D alone
            _DIGITS.config.train.change(batch_size=64, lr=1e-2, weight_decay=0.1, jacobian=0.0208),
        ),
        "real 8x8 digits, convolutions with the closed-form exact trace",
        "about 4 minutes on one core",
        _DIGITS.shape,
        _DIGITS.levels,
    ),
    "exact-mnist": Preset(
        RunConfig(
            "exact-mnist",
            DataConfig("mnist"),
            # the widest two hidden layers within the published 800,636 parameters: 791,946
            RNODE.change(hidden=(89, 89), alpha=1e-5),
            # checkpoints: at batch size 200 the direct gradient stores 6.5 GiB per solver step, this one 3.3 GiB in all
            _SOLVER.change(gradient="checkpoint"),
            # RNODE's, including the weights of the regularisers
            _MNIST.config.train,
        ),
        "RNODE's multiscale model with two hidden layers and the closed-form exact trace, regularised",
        "about 2 s a step of 16 images on two busy cores, at the start",
        _MNIST.shape,
        _MNIST.levels,
    ),
    "exact-tabular": Preset(
        RunConfig(
            "exact-tabular",
            DataConfig("power"),
            # five blocks of FFJORD's form for six columns, 60-60-60 wide, have 43,325 parameters; the widest two layers
            # within that: 42,865
            FlowConfig.of(hidden=(83, 83), blocks=5),
            _SOLVER,
            _TABLE.config.train,
        ),
        "tables, five blocks with two hidden layers and the closed-form exact trace",
        "0.11 s a step on one core, at the start",
        _TABLE.shape,
    ),
}
