"""Tables of text, CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from cnf._utils.errors import ConfigError
from cnf.cli.listing import columns

__all__ = ["FORMATS", "format_of", "render"]

FORMATS = {"text": ".txt", "csv": ".csv", "markdown": ".md", "latex": ".tex"}
_LATEX = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"})


def format_of(suffix: str) -> str:
    """Return the format of a file name's ending.

    Raises:
        ConfigError: for an unknown ending.

    Example:
        >>> format_of(".md")
        'markdown'
    """
    for name, ending in FORMATS.items():
        if suffix == ending:
            return name
    raise ConfigError(f"--out: a table is written to {', '.join(FORMATS.values())}, and this file ends in {suffix!r}")


def render(rows: Sequence[Mapping[str, str]], form: str) -> str:
    """Return rows with the same columns as a table in one of :data:`FORMATS`.

    Example:
        >>> print(render([{"run": "a", "value": "1.5"}], "markdown"))
        | run | value |
        |---|---|
        | a | 1.5 |
    """
    names = list(rows[0])
    if form == "csv":
        file = io.StringIO()
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue().rstrip("\n")
    cells = [names, *([row[name] for name in names] for row in rows)]
    if form == "markdown":
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
        return "\n".join([lines[0], "|" + "---|" * len(names), *lines[1:]])
    if form == "latex":
        lines = [" & ".join(cell.translate(_LATEX) for cell in line) + r" \\" for line in cells]
        numbers = "".join("l" if i == 0 else "r" for i in range(len(names)))
        return "\n".join([rf"\begin{{tabular}}{{{numbers}}}", r"\hline", lines[0], r"\hline", *lines[1:], r"\hline", r"\end{tabular}"])
    return "\n".join(columns(cells, right=range(1, len(names))))
