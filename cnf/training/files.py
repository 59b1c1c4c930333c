"""JSON and per-row result files."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cnf._utils.errors import ConfigError
from cnf._utils.output import finite
from cnf.runs import write_atomic, write_text

__all__ = ["write_items", "write_json"]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON atomically; non-finite numbers become null."""
    text = json.dumps(finite(value), indent=2, allow_nan=False)
    write_atomic(path, lambda p: write_text(p, text))


def write_items(path: Path, arrays: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
    """Write per-row results atomically: ``arrays`` as .npz or ``columns``, (N,) each, as .csv.

    Raises:
        ConfigError: for a file name that ends in neither .npz nor .csv.
        CheckpointError: if the file cannot be written.
    """
    if path.suffix not in (".npz", ".csv"):
        raise ConfigError(f"{path}: per-item scores go into a file ending in .npz or .csv")

    def save_npz(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)

    def save_csv(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*(values.tolist() for values in columns.values()), strict=True))

    write_atomic(path, save_npz if path.suffix == ".npz" else save_csv)
