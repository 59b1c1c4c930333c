"""Tables in text files."""

from __future__ import annotations

import csv
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np

from cnf.datasets.rows import Array
from cnf.errors import DataError
from cnf.strangers import require_file

__all__ = ["bounded_lines", "read_csv"]

LONGEST = 2**24  # characters of a line: a million columns


def bounded_lines(file: TextIO) -> Iterator[str]:
    """The lines of a file.

    Raises:
        DataError: for one of more than 16 million characters, which may have no end.
    """
    number = 0
    while line := file.readline(LONGEST):
        number += 1
        if len(line) == LONGEST and not line.endswith("\n"):
            raise DataError(f"line {number} of {file.name!r} has more than {LONGEST:,} characters; expected rows of numbers")
        yield line


def read_csv(path: Path) -> tuple[Array, tuple[str, ...]]:
    """A table (N, D) in float64 and its column names. The first row is a header if none of its cells is a number.

    Cells are parted by semicolons or tabs if the first line has any, else by commas. Rows are read one by one: the file
    may be much larger, as text, than its numbers.

    Raises:
        DataError: for an unreadable or empty file, rows of unequal length, or a cell that is no number.
    """
    require_file(path, DataError)
    numbers, columns, width = array("d"), (), 0  # type: tuple[array[float], tuple[str, ...], int]
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for i, row in _rows(file):
                if not width:
                    width = len(row)
                    if not any(_is_number(cell) for cell in row):
                        columns = tuple(cell.strip() or f"column {j}" for j, cell in enumerate(row))
                        continue
                if len(row) != width:
                    raise DataError(f"row {i} of {str(path)!r} has {len(row)} cells; expected {width}")
                try:
                    numbers.extend(map(float, row))
                    if "_" in "".join(row):  # Python reads 1_0 as ten
                        raise ValueError
                except ValueError:
                    raise DataError(_complaint(path, i, row, columns)) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{str(path)!r} cannot be read as a csv file: {error}") from error
    if not numbers:
        raise DataError(f"{str(path)!r} has no rows of numbers")
    columns = columns or tuple(f"column {j}" for j in range(width))
    count = Counter(columns)
    if len(count) < width:
        columns = tuple(f"{c} ({j})" if count[c] > 1 else c for j, c in enumerate(columns))
    return np.array(numbers).reshape(-1, width), columns


def _rows(file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Numbered rows that are not empty."""
    lines = bounded_lines(file)
    first = next(lines, "")
    delimiter = next((d for d in ";\t" if d in first), ",")

    def all_lines() -> Iterator[str]:
        yield first
        yield from lines

    for i, row in enumerate(csv.reader(all_lines(), delimiter=delimiter), start=1):
        if row:
            yield i, row


def _complaint(path: Path, i: int, row: list[str], columns: tuple[str, ...]) -> str:
    j = next(j for j, cell in enumerate(row) if not _is_number(cell))
    cell = row[j]
    advice = "encode categories as integers; if this row is a header, none of its names may be a number"
    if not cell.strip():
        advice = "the cell is empty: fill it in, or remove the row"
    elif "," in cell and _is_number(cell.replace(",", ".")):
        advice = "write decimals with a point"
    where = columns[j] if columns else f"column {j}"
    return f"row {i}, column {where!r} of {str(path)!r} is {cell!r}; expected a number ({advice})"


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell
