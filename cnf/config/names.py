"""Names of settings in options and files, where they differ from those in a run folder's config.json."""

from __future__ import annotations

__all__ = ["NAMES", "field_of", "option"]

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
}
_FIELDS = {name: field for field, name in NAMES.items()}


def option(field: str) -> str:
    """Return the command line option of a setting.

    Example:
        >>> option("batch_size"), option("draws")
        ('--batch-size', '--noise-samples')
    """
    return "--" + NAMES.get(field, field).replace("_", "-")


def field_of(name: str) -> str:
    """Return the setting of an option's name, such as ``"noise_samples"`` or ``"noise-samples"``.

    Example:
        >>> field_of("noise-samples"), field_of("lr")
        ('draws', 'lr')
    """
    name = name.replace("-", "_")
    return _FIELDS.get(name, name)
