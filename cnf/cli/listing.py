"""Tables of the presets and of the published models, from data: no model is built."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from cnf._utils.output import emit, terminal_width
from cnf.config import PRESETS, PUBLISHED, Preset
from cnf.config.presets.counts import PARAMETERS

__all__ = ["columns", "described", "list_presets", "list_published"]

ROOM, INDENT = 36, 6  # least width of a text next to its row, and its indent below the row


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


def described(rows: Sequence[Sequence[str]], right: Sequence[int] = (), width: int | None = None) -> list[str]:
    """Align rows as :func:`columns` does, the last column wrapped at the terminal's width, or indented below its row where little room is left.

    Example:
        >>> described([("a", "one of several words"), ("bcd", "two")], width=14)
        ['a', '      one of', '      several', '      words', 'bcd', '      two']
        >>> described([("a", "one of several words"), ("bcd", "two")], width=48)
        ['a    one of several words', 'bcd  two']
    """
    width = width or terminal_width()
    heads = columns((row[:-1] for row in rows), right)
    at = max(map(len, heads)) + 2
    aside = width - at >= ROOM
    lines = []
    for head, row in zip(heads, rows, strict=True):
        words = textwrap.wrap(row[-1], width - at if aside else max(1, width - INDENT), break_long_words=False, break_on_hyphens=False)
        indent, first = (at, head.ljust(at) + "".join(words[:1])) if aside else (INDENT, head)
        lines += [first.rstrip(), *(" " * indent + line for line in words[aside:])]
    return lines


def _task(entry: Preset) -> str:
    objective = entry.config.train.objective.kind
    others = {"predictor": "predictions by neural ODEs", "autoencoder": "images by autoencoders"}
    if (other := others.get(entry.config.train.model_kind)) is not None:
        return other
    if objective != "likelihood":
        return "images by flow matching"
    return {3: "images by likelihood"}.get(len(entry.shape), "points in the plane" if entry.shape == (2,) else "tables")


def list_presets() -> int:
    """Print the presets by task, and return 0."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for name, e in PRESETS.items():
        text = f"{e.summary}. Cost: {e.cost}"
        groups.setdefault(_task(e), []).append((f"  {name}", e.config.data.data, f"{PARAMETERS[name]:,}", text))
    lines = []
    for task, rows in groups.items():
        lines += [task, *described([("  preset", "data", "parameters", ""), *rows], (2,)), ""]
    hint = "cnf train PRESET --help shows a preset's options, cnf list --published the parameters of the published models"
    lines += textwrap.wrap(hint, terminal_width(), break_long_words=False, break_on_hyphens=False)
    presets = {name: {"task": _task(e), "data": e.config.data.data, "parameters": PARAMETERS[name], "summary": e.summary} for name, e in PRESETS.items()}
    emit("result", "\n".join(lines), presets=presets)
    return 0


def list_published() -> int:
    """Print the published models with their parameters and ours where they differ, and return 0."""
    rows = [("published model", "parameters", "here", "why")]
    for m in PUBLISHED:
        rows.append((m.name, f"{m.parameters:,}", "" if m.count == m.parameters else f"{m.count:,}", m.reason))
    head = textwrap.fill("parameters of the published image models, as stated in the papers or built by the released code:", terminal_width())
    models = {m.name: {"parameters": m.parameters, "here": m.count, "why": m.reason} for m in PUBLISHED}
    emit("result", "\n".join([head, "", *described(rows, right=(1, 2))]), models=models)
    return 0
