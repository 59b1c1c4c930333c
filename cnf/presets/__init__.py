"""Presets of the command line."""

from __future__ import annotations

from difflib import get_close_matches

from cnf.errors import ConfigError
from cnf.presets.affjord import AFFJORD
from cnf.presets.density import DENSITY
from cnf.presets.exact import EXACT
from cnf.presets.images import IMAGES
from cnf.presets.matching import MATCHING
from cnf.presets.neural_ode import NEURAL_ODE
from cnf.presets.settings import DataConfig, Preset, RunConfig, TrainConfig

__all__ = ["PRESETS", "DataConfig", "Preset", "RunConfig", "TrainConfig", "preset"]

PRESETS = DENSITY | EXACT | IMAGES | MATCHING | AFFJORD | NEURAL_ODE


def preset(name: str) -> Preset:
    """Return a preset by name.

    Raises:
        ConfigError: for an unknown name; the message suggests the nearest.
    """
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(PRESETS)}; --data NAME chooses data"
        raise ConfigError(f"preset {name!r} is unknown: {hint} (--list shows all)")
    return PRESETS[name]
