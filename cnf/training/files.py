"""JSON files of results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from cnf.checkpoint import write_atomic, write_text
from cnf.errors import DataError
from cnf.strangers import require_file

__all__ = ["read_json", "write_json"]

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
