"""AFFJORD's augmented time: validation of its settings, and the parts that they build."""

from __future__ import annotations

from cnf.config import ModelConfig
from cnf.errors import ConfigError
from cnf.fields import AugmentedTimeConditioning, HyperMLP, TimePath

__all__ = ["check_drive_settings", "hyper_mlp", "layer", "time_path"]

# setting -> values of ``drive`` that use it
READ_BY = {
    "drive_dim": ("concat", "hyper", "both"),
    "drive_start": ("concat", "hyper", "both"),
    "drive_hidden": ("concat", "hyper", "both"),
    "drive_nonlinearity": ("concat", "hyper", "both"),
    "drive_entries": ("hyper", "both"),
    "drive_rank": ("hyper", "both"),
}


def check_drive_settings(model: ModelConfig) -> None:
    """Validate that the settings of drive and generator apply to the model.

    Raises:
        ConfigError: naming the first setting that does not apply.
    """
    plain = type(model)()
    for name, drives in READ_BY.items():
        if model.drive not in drives and getattr(model, name) != (idle := getattr(plain, name)):
            raise ConfigError(
                f"{name}={getattr(model, name)!r} is for drive={', '.join(map(repr, drives))}, got drive={model.drive!r}: "
                f"leave it at {idle!r}"
            )
    if model.field != "hypernet" and model.generator != plain.generator:
        raise ConfigError(f"generator={model.generator} is for field='hypernet': leave it at {plain.generator}")
    if model.field == "hypernet" and model.layer != plain.layer:
        raise ConfigError(f"layer={model.layer!r}: field='hypernet' generates its layers from time: leave it at {plain.layer!r}")


def drive(model: ModelConfig) -> AugmentedTimeConditioning | None:
    """Return the drive of these settings, or None."""
    if model.drive == "none":
        return None
    return AugmentedTimeConditioning(model.drive, model.drive_dim, 1 if model.drive == "concat" else model.drive_entries, model.drive_rank)


def layer(model: ModelConfig) -> str | AugmentedTimeConditioning:
    """Return the layers' time conditioning: the drive, if any, or the layer type."""
    return drive(model) or model.layer


def hyper_mlp(model: ModelConfig, dim: int, context_dim: int) -> HyperMLP:
    """Build the vector field of ``field="hypernet"``."""
    return HyperMLP(
        dim,
        model.hidden,
        drive(model),
        model.generator,
        model.nonlinearity,
        context_dim,
        model.residual,
        model.zero_init,
    )


def time_path(model: ModelConfig) -> TimePath | None:
    """Build the augmented time a(t), or return None without a drive.

    Raises:
        ConfigError: for a negative ``drive_hidden``.
    """
    if model.drive == "none":
        return None
    if model.drive_hidden < 0:
        raise ConfigError(f"drive_hidden={model.drive_hidden}: expected a width, or 0 for that of a")
    return TimePath(model.drive_dim, model.drive_hidden or None, model.drive_start == "learned", model.drive_nonlinearity)
