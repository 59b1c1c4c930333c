"""AFFJORD's augmented time: the parts that its settings build."""

from __future__ import annotations

from cnf.config import (
    AugmentedTimeConfig,
    ConvConfig,
    FieldConfig,
    GeneratingTimeConfig,
    HypernetConfig,
    MLPConfig,
    UNetConfig,
)
from cnf.fields import AugmentedTimeConditioning, HyperMLP, TimePath

__all__ = ["hyper_mlp", "layer", "time_path"]


def conditioning(field: MLPConfig | ConvConfig | HypernetConfig) -> AugmentedTimeConditioning | None:
    """Return the conditioning on the augmented time that the settings select, or None."""
    time = field.augmented_time
    if not isinstance(time, AugmentedTimeConfig):
        return None
    entries, rank = (time.augmented_time_entries, time.augmented_time_rank) if isinstance(time, GeneratingTimeConfig) else (1, 0)
    return AugmentedTimeConditioning(time.kind, time.augmented_time_dim, entries, rank)


def layer(field: MLPConfig | ConvConfig) -> str | AugmentedTimeConditioning:
    """Return the layers' time conditioning: on the augmented time, if any, or the layer type."""
    return conditioning(field) or field.time_conditioning


def hyper_mlp(field: HypernetConfig, dim: int, context_dim: int) -> HyperMLP:
    """Build the vector field of ``field="hypernet"``."""
    return HyperMLP(
        dim,
        field.hidden,
        conditioning(field),
        field.generator,
        field.nonlinearity,
        context_dim,
        field.residual,
        field.zero_init,
    )


def time_path(field: FieldConfig) -> TimePath | None:
    """Build the augmented time a(t), or return None for time itself."""
    if isinstance(field, UNetConfig) or not isinstance(time := field.augmented_time, AugmentedTimeConfig):
        return None
    learned = time.augmented_time_start == "learned"
    return TimePath(time.augmented_time_dim, time.augmented_time_hidden or None, learned, time.augmented_time_nonlinearity)
