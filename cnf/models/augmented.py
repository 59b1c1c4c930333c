"""AFFJORD's augmented time: the parts that its settings build."""

from __future__ import annotations

from cnf.config import ModelConfig
from cnf.fields import AugmentedTimeConditioning, HyperMLP, TimePath

__all__ = ["hyper_mlp", "layer", "time_path"]


def drive(model: ModelConfig) -> AugmentedTimeConditioning | None:
    """Return the conditioning on the augmented time that the settings select, or None."""
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
    """Build the augmented time a(t), or return None for drive="none"."""
    if model.drive == "none":
        return None
    return TimePath(model.drive_dim, model.drive_hidden or None, model.drive_start == "learned", model.drive_nonlinearity)
