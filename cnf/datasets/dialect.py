"""The dialect of a text file with a table: delimiter, quotes, what is a number, and the names of columns."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["COMMA_NUMBER", "DATE", "Dialect", "find_dialect", "is_number", "unique_names"]

DELIMITERS = ";\t|,"
COMMA_NUMBER = re.compile(r"[+-]?\d*,\d+(?:[eE][+-]?\d+)?")
DATE = re.compile(r"\d{1,4}[-./]\d{1,2}[-./]\d{1,4}(?:[T ]\d{1,2}:\d{2}.*)?")


@dataclass(frozen=True)
class Dialect:
    """How cells are parted and quoted."""

    delimiter: str  # a space: any white space
    quote: str = '"'

    def cells(self, lines: Iterable[str]) -> list[str]:
        """The cells of one row, which may run over several lines."""
        if self.delimiter == " ":
            lines = (" ".join(line.split()) for line in lines)
        return next(csv.reader(lines, delimiter=self.delimiter, quotechar=self.quote, skipinitialspace=True, strict=True), [])

    def write(self, cells: list[str]) -> str:
        """A row as one line."""
        out = io.StringIO()
        csv.writer(out, delimiter=self.delimiter, quotechar=self.quote, lineterminator="\n").writerow(cells)
        return out.getvalue()


def unique_names(names: Sequence[str] | None, width: int) -> list[str]:
    """Names of columns, all different; numbers where there is no header, and pandas' own words for an empty one.

    Example:
        >>> unique_names(["", "a", "a"], 3), unique_names(None, 1)
        (['Unnamed: 0', 'a (1)', 'a (2)'], ['column 0'])
    """
    if names is None:
        return [f"column {j}" for j in range(width)]
    named = [name or f"Unnamed: {j}" for j, name in enumerate(names)]
    count = Counter(named)
    found = [f"{name} ({j})" if count[name] > 1 else name for j, name in enumerate(named)]
    return found if len(set(found)) == len(found) else [f"{name} ({j})" for j, name in enumerate(named)]


def is_number(cell: str) -> bool:
    """Whether a cell holds a number, with a decimal point or comma.

    Example:
        >>> is_number("-1e3"), is_number("0,5"), is_number("1_0")
        (True, True, False)
    """
    try:
        float(cell)
    except ValueError:
        return COMMA_NUMBER.fullmatch(cell.strip()) is not None
    return "_" not in cell


def find_dialect(lines: Sequence[str]) -> Dialect:
    """Delimiter and quote: those that give most rows the same number of cells, and most cells a number."""
    text = "".join(lines)
    single = '"' not in text and re.match(r"\s*'[^']*'\s*[;\t|,\r\n]", text) is not None
    quote = "'" if single else '"'
    best, found = (0.0, 0.0), None
    for delimiter in DELIMITERS:
        dialect = Dialect(delimiter, quote)
        rows = []
        for line in lines:
            try:
                rows.append(dialect.cells([line]))
            except csv.Error:  # a cell with a line end
                continue
        widths = Counter(len(row) for row in rows if len(row) > 1)
        if not widths:
            continue
        cells = [cell.strip() for row in rows for cell in row]
        score = max(widths.values()) / len(rows), sum(map(is_number, cells)) / len(cells)
        if score > best:
            best, found = score, dialect
    if found is None and lines and lines[-1].strip():
        widths = Counter(len(line.split()) for line in lines)
        if len(widths) == 1 and len(lines[-1].split()) > 1 and all(map(is_number, lines[-1].split())):
            return Dialect(" ", quote)
    return found or Dialect(",", quote)
