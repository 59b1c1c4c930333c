"""Former names of settings, and config.json of format 4, which had them in four flat objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cnf.config.model import FlowConfig, ModelConfig, NeuralODEConfig, ResNetConfig
from cnf.config.rules import hints
from cnf.config.settings import RunConfig
from cnf.config.tagged import Settings, members, nested, schema

__all__ = ["NAMES", "from_format_4", "model_config", "present", "present_values"]

NAMES = {
    "tune_steps": "finetune_steps",
    "tune_batch_size": "finetune_batch_size",
    "tune_lr": "finetune_lr",
    "match_weights": "fm_weighting",
    "match_times": "fm_time_sampling",
    "watch_every": "solver_check_every",
    "watch_tolerance": "solver_check_tolerance",
    "draws": "noise_samples",
    "probe": "hutchinson_noise",
    "mode": "hutchinson_mode",
    "drive": "augmented_time",
    "drive_dim": "augmented_time_dim",
    "drive_entries": "augmented_time_entries",
    "drive_rank": "augmented_time_rank",
    "drive_start": "augmented_time_start",
    "drive_hidden": "augmented_time_hidden",
    "drive_nonlinearity": "augmented_time_nonlinearity",
    "layer": "time_conditioning",
    "marginals": "preprocess",
    "limit": "max_train_rows",
    "adaptive": "train_solver",
}


def present(name: str) -> str:
    """Return the present name of a setting, which may be a former one or have dashes.

    Example:
        >>> present("noise-samples"), present("draws"), present("lr")
        ('noise_samples', 'noise_samples', 'lr')
    """
    name = name.replace("-", "_")
    return NAMES.get(name, name)


def present_values(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by name under their present names, with the values that these take."""
    found = {}
    for name, value in flat.items():
        if name == "adaptive" and isinstance(value, bool):
            value = "adaptive" if value else "grid"
        found[present(name)] = value
    return found


def _nested(kinds: tuple[type[Settings], ...], flat: Any) -> Any:
    """Return a flat object of format 4 as a nested one; names that no version knew stay, and are refused later."""
    if not isinstance(flat, dict):
        return flat
    flat = present_values(flat)
    known = schema(kinds)
    return nested(kinds, flat) | {name: value for name, value in flat.items() if name not in known}


def from_format_4(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of a config.json of format 4, of a run or of a model, as format 5 has them.

    Settings that did nothing in their run are left out: format 4 recorded them all.
    """
    found = dict(fields)
    for whole in ("config", "built"):  # of a run, and of a model of cnf.save
        if isinstance(parts := found.get(whole), dict):
            found[whole] = {name: _nested(kinds, value) if (kinds := members(hints(RunConfig).get(name))) else value for name, value in parts.items()}
    return found


def model_config(architecture: str = "stack", field: str = "mlp", hidden: tuple[int, ...] = (64, 64), blocks: int = 1, **settings: Any) -> ModelConfig:
    """Return the settings of an architecture by name, as the former class ``ModelConfig`` took them.

    Now :class:`~cnf.config.FlowConfig`, :class:`~cnf.config.NeuralODEConfig` and :class:`~cnf.config.ResNetConfig`.
    """
    named = present_values({"architecture": architecture, "field": field, "hidden": hidden, "blocks": blocks} | settings)
    kinds: dict[str, type[ModelConfig]] = {"node": NeuralODEConfig, "resnet": ResNetConfig}
    kind = kinds.get(architecture, FlowConfig)
    had = {"node": ("blocks",), "resnet": ("field", "time_conditioning")}.get(architecture, ())  # which it took at one value
    return kind.of(**{name: value for name, value in named.items() if name not in had})
