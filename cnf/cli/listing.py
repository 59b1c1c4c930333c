"""Tables of the presets and of the published models, from data: no model is built."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cnf._utils.output import emit
from cnf.config import PRESETS, PUBLISHED, Preset
from cnf.config.presets.counts import PARAMETERS

__all__ = ["columns", "list_presets", "list_published"]


def columns(rows: Iterable[Sequence[str]], right: Sequence[int] = (), gap: str = "  ") -> list[str]:
    """Align rows of text in columns; those of the indices ``right`` to the right.

    Example:
        >>> columns([("a", "10"), ("bcd", "9")], right=(1,))
        ['a    10', 'bcd   9']
    """
    table = [list(row) for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append(gap.join(cells).rstrip())
    return lines


def _task(entry: Preset) -> str:
    objective = entry.config.train.objective.kind
    if not entry.config.train.density:
        return "predictions by neural ODEs"
    if objective != "likelihood":
        return "images by flow matching"
    return {3: "images by likelihood"}.get(len(entry.shape), "points in the plane" if entry.shape == (2,) else "tables")


def list_presets() -> int:
    """Print the presets by task, and return 0."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for name, e in PRESETS.items():
        groups.setdefault(_task(e), []).append((f"  {name}", e.config.data.data, f"{PARAMETERS[name]:,}", e.summary, e.cost))
    lines = []
    for task, rows in groups.items():
        lines += [task, *columns([("  preset", "data", "parameters", "", "cost"), *rows], (2,)), ""]
    lines.append("cnf train PRESET --help shows a preset's options, cnf list --published the parameters of the published models")
    presets = {name: {"task": _task(e), "data": e.config.data.data, "parameters": PARAMETERS[name], "summary": e.summary} for name, e in PRESETS.items()}
    emit("result", "\n".join(lines), presets=presets)
    return 0


def list_published() -> int:
    """Print the published models with their parameters and ours where they differ, and return 0."""
    rows = [("published model", "parameters", "here", "why")]
    for m in PUBLISHED:
        rows.append((m.name, f"{m.parameters:,}", "" if m.count == m.parameters else f"{m.count:,}", m.reason))
    head = "parameters of the published image models, as stated in the papers or built by the released code:\n"
    models = {m.name: {"parameters": m.parameters, "here": m.count, "why": m.reason} for m in PUBLISHED}
    emit("result", "\n".join([head, *columns(rows, right=(1, 2))]), models=models)
    return 0
