"""What a result means, in sentences: for the summary on the screen and for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["interpret", "place", "warnings"]

NEAR = 2.0  # standard errors within which two figures are not told apart


def interpret(result: Mapping[str, Any]) -> list[str]:
    """Return sentences that say where a figure stands between a trivial model and a perfect one, and whether more steps help.

    Example:
        >>> interpret({"value": 2.7, "unit": "nats", "true_entropy": 2.6, "standard_error": 0.01})
        ['true entropy 2.6000 nats, the least that any model can have: 0.1000 above it']
        >>> interpret({"value": 2.0, "unit": "bits/dim", "levels": 256})
        ['a uniform density has 8.000 bits/dim: 6.000 below it']
    """
    value, unit, error = result["value"], result["unit"], result.get("standard_error") or 0.0
    lines = []
    if (entropy := result.get("true_entropy")) is not None:
        excess = value - entropy
        near = ", as good as the test items can tell" if abs(excess) < NEAR * error else ""
        place = "above" if excess >= 0 else "below"
        lines.append(f"true entropy {entropy:.4f} nats, the least that any model can have: {abs(excess):.4f} {place} it{near}")
    if unit == "bits/dim" and result.get("levels"):
        uniform = math.log2(result["levels"])
        lines.append(f"a uniform density has {uniform:.3f} bits/dim: {abs(uniform - value):.3f} {'below' if value <= uniform else 'above'} it")
    if (accuracy := result.get("accuracy")) is not None and result.get("classes"):
        chance = 1 / len(result["classes"])
        lines.append(f"guessing one of {len(result['classes'])} classes gives {100 * chance:.0f} %: {100 * accuracy:.1f} % here")
    if "parts" not in result and result.get("steps") and result.get("best_step") == result["steps"] and result.get("stopped") in ("steps", "max_time"):
        how = "resume=True" if result.get("config", {}).get("kind") == "model" else "--resume --steps"
        lines.append(f"the last validation is the best one: more than {result['steps']:,} steps would probably improve it ({how})")
    return lines


def place(result: Mapping[str, Any]) -> str:
    """Return in a few words where a figure stands, for a line of progress; "" where nothing is known to compare it with.

    Example:
        >>> place({"value": 3.4, "unit": "nats", "true_entropy": 2.64}), place({"value": 2.0, "unit": "bits/dim", "levels": 17})
        ('0.760 above the entropy', '2.087 below a uniform density')
    """
    if (accuracy := result.get("accuracy")) is not None and result.get("outputs"):
        return f"accuracy {100 * accuracy:.1f} %, by guessing {100 / result['outputs']:.0f} %"
    value, (reference, name) = result["value"], _reference(result)
    if reference is None or not math.isfinite(value):
        return ""
    return f"{abs(value - reference):.3f} {'above' if value >= reference else 'below'} {name}"


def _reference(result: Mapping[str, Any]) -> tuple[float | None, str]:
    """Return the entropy of the data, or the figure of a uniform density of images, and its name."""
    if result.get("true_entropy") is not None:
        return result["true_entropy"], "the entropy"
    if result["unit"] == "bits/dim" and result.get("levels"):
        return math.log2(result["levels"]), "a uniform density"
    return None, ""


def warnings(result: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know before using the figure.

    Example:
        >>> warnings({"skipped": 2, "unit": "nats"})
        ['2 training steps were skipped, since their loss or gradient was not finite']
    """
    found = [str(result[key]) for key in ("unsolved_note",) if result.get(key)]
    if result.get("note"):
        found.insert(0, f"the figure is not a bound: {result['note']}")
    if count := result.get("skipped"):
        found.append(f"{count:,} training step{'s were' if count > 1 else ' was'} skipped, since their loss or gradient was not finite")
    error, spread = result.get("solver_error"), result.get("standard_error")
    if error is not None and spread and abs(error) > spread:
        found.append(f"the solver's error, {error:+.1e} {result['unit']}, is larger than the standard error: evaluate with smaller --eval-rtol, --eval-atol")
    if result.get("items") and result["items"] < result.get("items_of", 0):
        found.append(f"only {result['items']:,} of {result['items_of']:,} {result['split']} items were scored (--test-items)")
    if result["unit"] == "bits/dim" and result.get("value") is not None and result["value"] < 0 and (result.get("levels") or 0) >= 2:
        found.append("a figure below 0 bits/dim cannot be right: no image takes less than no bits")
    return found
