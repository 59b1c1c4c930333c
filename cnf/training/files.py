"""JSON files of results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from cnf.checkpoint import write_atomic, write_text

__all__ = ["write_json"]


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
