"""Shared functions of the programs: run folders, devices and data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from cnf._utils.errors import ConfigError, DataError
from cnf.config import RunConfig
from cnf.data import DataSplits
from cnf.data import load as load_data
from cnf.data import names as data_names
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.runs import RunInfo, located, pretrained, read_config

__all__ = ["load_splits", "read_run", "usable_device"]


def read_run(folder: Path) -> RunInfo:
    """Read the description of a run from its folder, or of pretrained:NAME.

    Raises:
        ConfigError: if the folder is not a run folder.
        CheckpointError: if its config.json is damaged.
    """
    folder = located(folder)
    if not (folder / "config.json").is_file():
        why = "it has no config.json" if folder.is_dir() else "there is no such folder"
        expected = f"expected one that train_density.py made, such as runs/digits-0, or pretrained:{', pretrained:'.join(pretrained())}"
        raise ConfigError(f"{folder} is no run folder: {why}; {expected}")
    return read_config(folder)


def usable_device(name: str) -> str:
    """Check that a device works and return its name; on CUDA, disable TF32 convolutions.

    Raises:
        ConfigError: if the device cannot be used.
    """
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("expected cpu, cuda or cuda:1")
        torch.zeros(1, device=device)
        if device.type == "cuda":  # no reported figure uses TF32 convolutions, torch's default
            torch.backends.cudnn.allow_tf32 = False
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return name


def load_splits(config: RunConfig, *, run: RunInfo | None = None, download: bool = True, group: Group = SINGLE_PROCESS) -> DataSplits:
    """Load the data of a run, with labels or targets as context if it predicts; rank 0 downloads first.

    With a trained ``run``, tables are read with that run's column types.
    """
    return group.rank0_first(lambda: _load(config, run, download))


def _load(config: RunConfig, run: RunInfo | None, download: bool) -> DataSplits:
    d = config.data
    if run is not None and not run.table and run.columns and d.data.lower().replace("_", "-") not in data_names():
        # runs saved before column types were stored model all columns
        d = dataclasses.replace(d, dependent="keep")
        wanted: str | tuple[str, ...] | None = run.columns
    else:
        wanted = d.columns
    predicted = {"classification": "label", "regression": "target"}.get(config.train.objective.kind)
    found = load_data(
        d.data,
        root=d.data_root,
        seed=d.data_seed,
        split_seed=d.split_seed,
        condition=predicted or (None if d.condition == "none" else d.condition),
        discrete=d.discrete,
        duplicates=d.duplicates,
        download=download and d.download,
        limit=d.max_train_rows,
        validation_fraction=d.validation_fraction,
        test_fraction=d.test_fraction,
        nbits=d.nbits,
        image_size=d.image_size,
        invert=d.invert,
        binarize=d.binarize,
        flip=None if d.flip == "default" else d.flip == "yes",
        sizes=d.toy_sizes,
        hold_out_angle=d.hold_out_angle,
        columns=wanted,
        drop_columns=d.drop_columns,
        missing=d.missing,
        dependent=d.dependent,
        table=() if run is None else run.table,
    )
    if predicted == "label" and not found.classes:
        raise DataError(f"--objective classification needs classes, and the labels of {d.data!r} are a continuous quantity")
    return found
