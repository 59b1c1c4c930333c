"""Settings of a run, presets and published models; importing them needs neither torch nor tyro."""

from cnf.config.files import read_settings
from cnf.config.model import PREDICTIVE, ModelConfig
from cnf.config.presets import PRESETS, preset
from cnf.config.published import AFFJORD, FFJORD, PUBLISHED, RNODE, Published
from cnf.config.settings import DataConfig, Preset, RunConfig, TrainConfig
from cnf.config.solver import SolverConfig

__all__ = [
    "AFFJORD",
    "FFJORD",
    "PREDICTIVE",
    "PRESETS",
    "PUBLISHED",
    "RNODE",
    "DataConfig",
    "ModelConfig",
    "Preset",
    "Published",
    "RunConfig",
    "SolverConfig",
    "TrainConfig",
    "preset",
    "read_settings",
]
