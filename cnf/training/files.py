"""Files of results: JSON, and tables of items."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cnf.checkpoint import write_atomic, write_text
from cnf.errors import ConfigError, DataError
from cnf.strangers import require_file

__all__ = ["read_json", "write_items", "write_json"]

LARGEST = 2**26  # bytes of a result.json


def write_json(path: Path, value: dict[str, Any]) -> None:
    """JSON, whole or not at all; what is not finite, which JSON cannot say, becomes null."""

    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: plain(inner) for key, inner in part.items()}
        if isinstance(part, list | tuple):
            return [plain(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    text = json.dumps(plain(value), indent=2, allow_nan=False)
    write_atomic(path, lambda p: write_text(p, text))


def read_json(path: Path) -> dict[str, Any]:
    """What :func:`write_json` wrote; nothing ({}) where there is no such file, or none that can be read."""
    try:
        if require_file(path, DataError) > LARGEST:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (DataError, OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_items(path: Path, arrays: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
    """What is known of each item, whole or not at all: ``arrays`` as an .npz, ``columns`` (N,) as a .csv.

    Raises:
        ConfigError: for another ending.
        CheckpointError: where the file cannot be written.
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
