"""Presets of densities for digits, points in the plane and tables."""

from __future__ import annotations

from cnf.config.model import FlowConfig
from cnf.config.settings import DataConfig, Preset, RunConfig, TrainConfig
from cnf.config.solver import SolverConfig

__all__ = ["DENSITY"]

# threads=1: matrices are small, and two threads are slower (digits: 2,000 images a second instead of 3,600)
DENSITY = {
    "digits": Preset(
        RunConfig(
            "digits",
            DataConfig("digits"),
            # two hidden layers: closed-form trace; a quarter of the pixels is nearly always black, which the marginals
            # handle in place of the field
            FlowConfig.of(hidden=(270, 270), preprocess="gaussianize", alpha=1e-4),
            # one solver step suffices for most of the training, two at its end
            SolverConfig.of(grid_steps=1, automatic_steps=True),
            # 1,077 images overfit, hence weight decay and kinetic energy; 0.0693 = 0.1 ln 2 is the weight tuned when
            # the penalty was divided by D alone
            TrainConfig.of(
                steps=3000,
                batch_size=256,
                lr=2e-3,
                weight_decay=1.0,
                kinetic=0.0693,
                validate_every=250,
                solver_check_tolerance=0.005,
                threads=1,
            ),
        ),
        "real 8x8 digits, MLP with the closed-form exact trace",
        "about 2 minutes on one core",
        (1, 8, 8),
        17,
    ),
    "ffjord-toy": Preset(
        RunConfig(
            "ffjord-toy",
            DataConfig("8gaussians"),
            # FFJORD's toy network (three hidden layers, T = 0.5); exact trace, since D = 2
            FlowConfig.of(hidden=(64, 64, 64), end_time=0.5, zero_init=False),
            SolverConfig.of(method="rk4", grid_steps=6),
            TrainConfig.of(steps=8000, batch_size=512, lr=3e-3, validate_every=500, solver_check_tolerance=0.005, threads=1),
        ),
        "two-dimensional densities (--data 2spirals, checkerboard, rings, picture.png, ...), FFJORD's network",
        "about 12 minutes on one core (checkerboard)",
        (2,),
    ),
    "tabular": Preset(
        RunConfig(
            "tabular",
            DataConfig("power"),
            FlowConfig.of(hidden=(128, 128), blocks=2, residual="linear"),
            SolverConfig.of(grid_steps=4),
            TrainConfig.of(
                steps=6000, batch_size=1024, lr=3e-3, validate_every=500, patience=6, solver_check_tolerance=0.005, threads=1
            ),
        ),
        "tables (--data file.npy, file.csv, power, gas, ...), two blocks with the closed-form exact trace",
        "about 22 minutes on one busy core for 35,000 rows of 10",
        (6,),
    ),
}
