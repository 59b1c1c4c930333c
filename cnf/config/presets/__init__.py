"""Presets of the command line."""

from __future__ import annotations

from difflib import get_close_matches

from cnf._utils.errors import ConfigError
from cnf.config.presets.affjord import AFFJORD
from cnf.config.presets.autoencoders import AUTOENCODERS
from cnf.config.presets.density import DENSITY
from cnf.config.presets.exact import EXACT
from cnf.config.presets.images import IMAGES
from cnf.config.presets.matching import MATCHING
from cnf.config.presets.minutes import MINUTES
from cnf.config.presets.neural_ode import NEURAL_ODE
from cnf.config.presets.survey import SURVEY
from cnf.config.settings import DataConfig, Preset, RunConfig, TrainConfig

__all__ = ["PRESETS", "DataConfig", "Preset", "RunConfig", "TrainConfig", "preset"]

PRESETS = MINUTES | DENSITY | EXACT | IMAGES | MATCHING | AFFJORD | NEURAL_ODE | SURVEY | AUTOENCODERS


def preset(name: str) -> Preset:
    """Return a preset by name.

    Raises:
        ConfigError: for an unknown name; the message suggests the nearest.
    """
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(PRESETS)}; --data NAME chooses data"
        raise ConfigError(f"preset {name!r} is unknown: {hint} (cnf list shows all)")
    return PRESETS[name]
