"""Dialects of text tables: delimiter, quotes, number format and column names."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cnf._utils.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["COMMA_NUMBER", "DATE", "THOUSANDS", "Dialect", "decimal_points", "find_dialect", "is_number", "is_numbered", "unique_names"]

DELIMITERS = ";\t|,"
COMMA_NUMBER = re.compile(r"[+-]?\d*,\d+(?:[eE][+-]?\d+)?")
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(?P<mark>[.,'\u2019 \u00a0\u202f\u2009])\d{3}(?:(?P=mark)\d{3})*(?:[.,]\d+)?")
FEW_ROWS = 5  # rows needed to decide whether a first row of integers is data
DATE = re.compile(r"\d{1,4}[-./]\d{1,2}[-./]\d{1,4}(?:[T ]\d{1,2}:\d{2}.*)?")


@dataclass(frozen=True)
class Dialect:
    """Delimiter and quote character of a text table."""

    delimiter: str  # a space stands for any white space
    quote: str = '"'

    def cells(self, lines: Iterable[str]) -> list[str]:
        """Parse one row, which may span several lines."""
        if self.delimiter == " ":
            lines = (" ".join(line.split()) for line in lines)
        return next(csv.reader(lines, delimiter=self.delimiter, quotechar=self.quote, skipinitialspace=True, strict=True), [])

    def write(self, cells: list[str]) -> str:
        """Return a row as one line."""
        out = io.StringIO()
        csv.writer(out, delimiter=self.delimiter, quotechar=self.quote, lineterminator="\n").writerow(cells)
        return out.getvalue()


def unique_names(names: Sequence[str] | None, width: int) -> list[str]:
    """Return distinct column names: ``column j`` without a header, ``Unnamed: j`` for an empty name.

    Example:
        >>> unique_names(["", "a", "a"], 3), unique_names(None, 1)
        (['Unnamed: 0', 'a (1)', 'a (2)'], ['column 0'])
    """
    if names is None:
        return [f"column {j}" for j in range(width)]
    named = [name or f"Unnamed: {j}" for j, name in enumerate(names)]
    count = Counter(named)
    unique = [f"{name} ({j})" if count[name] > 1 else name for j, name in enumerate(named)]
    return unique if len(set(unique)) == len(unique) else [f"{name} ({j})" for j, name in enumerate(named)]


def is_number(cell: str) -> bool:
    """Return whether a cell is a number, with a decimal point or comma.

    Example:
        >>> is_number("-1e3"), is_number("0,5"), is_number("1_0")
        (True, True, False)
    """
    try:
        float(cell)
    except ValueError:
        return COMMA_NUMBER.fullmatch(cell.strip()) is not None
    return "_" not in cell


def is_numbered(first: Sequence[str], others: Sequence[Sequence[str]], name: str) -> bool:
    """Return whether the first row is pandas' numeric header above an index: an empty cell, then 0, 1, 2, ...

    Args:
        first: cells of the first row.
        others: cells of some rows below.
        name: file name, for messages.

    Raises:
        DataError: for a row of integers that may be a header (0, 1, 2 or 2019, 2020) or data.
    """
    counted = [str(j) for j in range(len(first))]
    if len(first) > 1 and first[0] == "" and list(first[1:]) == counted[:-1]:
        return True
    if len(first) < 2 or len(set(first)) < len(first) or not all(re.fullmatch(r"\d+", cell) for cell in first):
        return False
    columns = [[row[j] for row in others if j < len(row) and is_number(row[j])] for j in range(len(first))]
    whole = [[re.fullmatch(r"[+-]?\d+", cell) is not None for cell in column] for column in columns]
    odd = [not any(column) for column in whole if column and not all(column)]  # only non-integers below the row
    if (len(first) > 2 and list(first) == counted) or (len(others) >= FEW_ROWS and odd and all(odd)):
        raise DataError(
            f"the first row of {name!r} is {', '.join(first[:5])}{', ...' if len(first) > 5 else ''}: it may be a header or data; if it is data, write a row "
            "of names above it; if it is a header, give each name a letter (x0, y2019)"
        )
    return False


def decimal_points(frame: pd.DataFrame, head: Sequence[Sequence[str]]) -> tuple[bool, tuple[int, str] | None]:
    """Return whether cells have decimal points, and a column whose points may separate thousands.

    Args:
        frame: parsed by pandas, decimal commas as text.
        head: unparsed cells of the first rows.

    Returns:
        Whether the file has decimal points; and, in a file with decimal commas, the index and one cell of a column with
        ambiguous points, else None.
    """
    points, commas, mixed = False, False, None
    for j in range(frame.shape[1]):
        cells = [row[j] for row in head if j < len(row)]
        if frame.iloc[:, j].dtype.kind == "f":
            pointed = [cell for cell in cells if "." in cell and is_number(cell)]
            points = points or bool(pointed)
            if pointed and all(map(THOUSANDS.fullmatch, pointed)):
                mixed = mixed or (j, pointed[0])
        else:
            commas = commas or any(COMMA_NUMBER.fullmatch(cell) and not THOUSANDS.fullmatch(cell) for cell in cells)
    return points, mixed if commas else None


def find_dialect(lines: Sequence[str]) -> Dialect:
    """Return the delimiter with the most rows of equal length, then with the most numeric cells."""
    text = "".join(lines)
    single = '"' not in text and re.match(r"\s*'[^']*'\s*[;\t|,\r\n]", text) is not None
    quote = "'" if single else '"'
    candidates = [Dialect(delimiter, quote) for delimiter in DELIMITERS]
    scores = [_score(dialect, lines) for dialect in candidates]
    if max(scores) > (0.0, 0.0):
        return candidates[scores.index(max(scores))]
    words = [line.split() for line in lines]
    spaced = bool(words) and len(words[0]) > 1 and len(set(map(len, words))) == 1 and all(map(is_number, words[-1]))
    return Dialect(" " if spaced else ",", quote)


def _score(dialect: Dialect, lines: Sequence[str]) -> tuple[float, float]:
    """Return the share of rows of the most frequent width, and of numeric cells; zeros if no row has two cells."""
    rows = []
    for line in lines:
        with suppress(csv.Error):  # a cell that contains a line end
            rows.append(dialect.cells([line]))
    widths = Counter(len(row) for row in rows if len(row) > 1)
    if not widths:
        return 0.0, 0.0
    cells = [cell.strip() for row in rows for cell in row]
    return max(widths.values()) / len(rows), sum(map(is_number, cells)) / len(cells)
