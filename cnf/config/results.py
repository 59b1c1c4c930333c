"""Schema of result.json: what every program writes about a figure, and what compare and sweep read."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from cnf._utils.errors import DataError
from cnf._utils.untrusted import require_file

__all__ = ["CAUTION", "COMPARABLE", "UNITS", "figure", "read_json", "read_metrics", "read_result"]

LARGEST = 2**26  # bytes, limit of a result.json or metrics.jsonl

CAUTION = (
    "Likelihood alone is not an anomaly score: densities depend on units and on how plain an item is, and models of images are "
    "known to find plain images of other kinds likelier than their own data (1810.09136)."
)

UNITS = {"bits_per_dim": "bits/dim", "nats": "nats", "cross_entropy": "nats", "mean_squared_error": "squared error", "negative_elbo": "nats"}
"""Unit of each metric; of every metric, less is better."""

COMPARABLE = (
    "metric", "data", "split", "items", "items_of", "levels", "dequantisation", "importance_samples", "noise_draws", "alpha", "divergence",
)  # fmt: skip
"""Entries of a result that must agree between two runs for their values to compare."""


def figure(metric: str, value: float, standard_error: float | None) -> dict[str, Any]:
    """Return the entries of a result that state its figure.

    Args:
        metric: one of :data:`UNITS`.
        value: the figure, in the metric's unit.
        standard_error: of the mean over rows; None or NaN if unknown.

    Example:
        >>> figure("nats", 1.5, 0.25)
        {'metric': 'nats', 'value': 1.5, 'unit': 'nats', 'standard_error': 0.25}
    """
    error = None if standard_error is None or math.isnan(standard_error) else standard_error
    return {"metric": metric, "value": value, "unit": UNITS[metric], "standard_error": error}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; return {} if the file is missing or unreadable."""
    rows = _read_objects(path, lines=False)
    return rows[0] if rows else {}


def read_result(path: Path) -> dict[str, Any]:
    """Read a result.json or evaluation-N.json; results that state no metric (older ones) get it from their entries.

    Raises:
        DataError: if the file is missing, unreadable, or no result.
    """
    result = read_json(path)
    if "metric" not in result:
        supervised = "mean_squared_error" if result.get("accuracy") is None else "cross_entropy"
        keys = {"bits_per_dim": "bits_per_dim", "nats": "nats", "loss": supervised}
        key = next((key for key in keys if key in result), None)
        if key is None and read_json(path.parent / "config.json").get("kind") == "model":
            raise DataError(f"{path.parent} holds a model without a figure: cnf.fit writes one for a flow or a predictor that is given test= or validation=")
        if key is None:
            raise DataError(f"{path} {'is no result' if path.is_file() else 'is missing: the run has not been tested yet'}")
        result = figure(keys[key], result[key], result.get("standard_error")) | result
    if result["metric"] not in UNITS or not isinstance(result.get("value"), int | float | None):
        raise DataError(f"{path} is no result: its metric must be one of {', '.join(UNITS)}, got {result['metric']!r}")
    return result


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl, up to the first that is damaged; return [] if the file is missing."""
    return list(takewhile(lambda row: isinstance(row.get("step"), int), _read_objects(path, lines=True)))


def _read_objects(path: Path, *, lines: bool) -> list[dict[str, Any]]:
    """Return the JSON objects of a file, one of each line or of the whole, up to the first that is damaged."""
    objects: list[dict[str, Any]] = []
    with suppress(DataError, OSError, ValueError, RecursionError):
        if require_file(path, DataError) <= LARGEST:
            text = path.read_text(encoding="utf-8")
            for part in text.splitlines() if lines else [text]:
                value = json.loads(part)
                if not isinstance(value, dict):
                    break
                objects.append(value)
    return objects
