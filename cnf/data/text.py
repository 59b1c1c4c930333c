"""Text tables (csv, tsv): dialect detection, row checks, and parsing with pandas."""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from array import array
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, TextIO, cast

import numpy as np

from cnf._utils.errors import DataError
from cnf._utils.untrusted import BOMB_BYTES, BOMB_RATIO, memory, require_file
from cnf.data.cells import numbers
from cnf.data.dialect import DATE, Dialect, decimal_points, find_dialect, is_number, is_numbered, unique_names
from cnf.data.rows import Array

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["HEAD_LINES", "MISSING", "bounded_lines", "read_csv", "read_text"]

LONGEST = 2**24  # characters of a line, enough for a million columns
HEAD_LINES, HEAD_CHARACTERS = 50, 2**20  # start of the file from which the dialect is detected
MISSING = ["?", "-"]  # in addition to pandas' own: "", NA, N/A, NaN, null, None, ...
_COMMENT = re.compile(r"#(?!(?:N/A|DIV/0!|VALUE!|REF!|NAME\?|NUM!|NULL!))")  # not a row whose first cell is an error of a spreadsheet
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


def bounded_lines(file: TextIO) -> Iterator[str]:
    """Iterate over the lines of a file.

    Raises:
        DataError: for a line of more than 16 million characters, which may not end.
    """
    for number, line in enumerate(iter(lambda: file.readline(LONGEST), ""), 1):
        if len(line) == LONGEST and not line.endswith("\n"):
            raise DataError(f"line {number} of {file.name!r} has more than {LONGEST:,} characters; expected rows of numbers")
        yield line


def read_csv(path: Path) -> tuple[Array, tuple[str, ...]]:
    """Read a table (N, D) of numbers in float64 and its column names; missing values are NaN.

    Raises:
        DataError: for an unreadable or empty file, rows of unequal length, or a non-numeric cell.
    """
    frame, _ = read_text(path)
    return numbers(frame, str(path)), tuple(frame.columns)


def read_text(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Read a csv or tsv file, optionally gzipped, as a frame of numbers and text; return it and notices.

    Delimiter (comma, semicolon, tab, bar or spaces), quotes, encoding (UTF-8, UTF-16, Windows-1252), Excel's ``sep=``
    and comment lines are detected. The first row is a header if none of its cells is a number or a date. The frame's
    index holds line numbers.

    Raises:
        DataError: for an unreadable or empty file, an endless line, rows of unequal length, an ambiguous header or
            ambiguous decimal points.
    """
    size = require_file(path, DataError)
    problem: Exception = ValueError("it is empty")
    try:
        for encoding in _encodings(path):
            try:
                with _open(path) as raw, io.TextIOWrapper(raw, encoding=encoding, newline="") as file:
                    frame, notices = _parse(path, size, file)
                if encoding == "cp1252":
                    notices.append(f"{str(path)!r} is not UTF-8 and is read as Windows-1252 (latin-1)")
                return frame, notices
            except UnicodeError as error:
                problem = error
    except DataError:
        raise
    except (OSError, EOFError, zlib.error, csv.Error, ValueError, RuntimeError) as error:  # ValueError: also pandas'
        problem = error
    raise DataError(f"{str(path)!r} cannot be read as a csv file: {problem}") from None


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _encodings(path: Path) -> tuple[str, ...]:
    with _open(path) as raw:
        start = raw.read(4096)
    if start.startswith(b"\xef\xbb\xbf"):
        return ("utf-8-sig",)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return ("utf-16",)
    for encoding, zeros, others in (("utf-16-le", start[1::2], start[::2]), ("utf-16-be", start[::2], start[1::2])):
        if zeros.count(0) > 0.3 * len(zeros) and others.count(0) <= 0.01 * len(others):
            return (encoding,)
    return ("utf-8", "cp1252")


class _Table:
    """Rows of a text file of ``size`` bytes, checked for equal numbers of cells, and their dialect."""

    def __init__(self, path: Path, size: int, file: TextIO):
        self.path, self.size, self.number = path, size, 0
        head, length = [], 0
        for line in self._checked(file):
            head.append(line)
            length += len(line)
            if len(head) == HEAD_LINES or length > HEAD_CHARACTERS:
                break
        file.seek(0)
        self.lines = self._checked(file)
        begun = [line for line in head if line.strip(" \r\n") and not _COMMENT.match(line)]
        declared = re.fullmatch(r'"?sep=(.)"?\s*', begun[0], re.IGNORECASE) if begun else None
        self.dialect = Dialect(declared[1]) if declared else find_dialect(begun)
        self.head = [cells for line in begun[declared is not None :] if (cells := self._split(line))]
        self.names: list[str] | None = None
        self.notices: list[str] = []
        self.width, self.comments = 0, 0
        self.numbers = array("q")  # first line number of each row
        self.text = self._records(declared is not None)

    def _split(self, line: str) -> list[str]:
        try:
            return [cell.strip() for cell in self.dialect.cells([line])]
        except csv.Error:  # a cell that contains a line end
            return []

    def _checked(self, file: TextIO) -> Iterator[str]:
        limit, total = memory(), 0
        for self.number, line in enumerate(bounded_lines(file), 1):
            total += len(line)
            if total > limit or (total > BOMB_BYTES and total > BOMB_RATIO * self.size):
                raise DataError(f"{str(self.path)!r} unpacks to more than {total:,} characters, {total // max(self.size, 1):,} times its size: a bomb?")
            if _CONTROL.search(line):
                raise DataError(f"{str(self.path)!r} cannot be read as a csv file: line {self.number} holds a control character, which no text has")
            yield line

    def _records(self, declared: bool) -> Iterator[str]:
        """Yield every row as a line; set ``names`` from the header."""
        comment, quote, delimiter = "", self.dialect.quote, self.dialect.delimiter
        header = True  # until the first row that is not a comment
        for line in self.lines:
            number = self.number
            if _COMMENT.match(line):
                comment, self.comments = line if header else comment, self.comments + 1
                continue
            if not line.strip(" \r\n"):
                continue
            if declared:
                declared = False
                continue
            if delimiter == " ":
                line = " ".join(line.split())
            if header or quote in line:
                try:
                    cells = self.dialect.cells(chain([line], self.lines))
                except csv.Error as error:
                    raise DataError(f"{str(self.path)!r} cannot be read as a csv file: {error} (row {number})") from None
                line, count = self.dialect.write(cells), len(cells)
            else:
                line, count = line.rstrip("\r\n") + "\n", line.count(delimiter) + 1
            if header:
                header, self.width = False, count
                if self._take_header([cell.strip() for cell in cells], comment):
                    continue
            # a single name that contains a delimiter: a header in another dialect
            odd = len(self.names or ()) == 1 and re.search(r"[;\t|, ]", (self.names or [""])[0])
            if count == self.width + 1 and self.names and not odd and not self.numbers and not line.endswith(f"{delimiter}\n"):
                self.names, self.width = ["", *self.names], count  # R writes row names without a header cell
                self.notices.append(f"the header of {str(self.path)!r} has one name fewer than its rows have cells: the first column has no name")
            if count != self.width:
                raise DataError(f"row {number} of {str(self.path)!r} has {count} cells; expected {self.width}")
            self.numbers.append(number)
            yield line

    def _take_header(self, cells: list[str], comment: str) -> bool:
        """Return whether the first row is a header; set ``names`` from it, or from NumPy's comment line above."""
        named = not any(is_number(cell) or DATE.fullmatch(cell) for cell in cells)
        if named or (not comment and is_numbered(cells, self.head[1:], str(self.path))):
            self.names = cells
            return True
        if comment:
            names = [cell.strip() for cell in self.dialect.cells([comment.lstrip("# ")])]
            if len(names) == len(cells) and not any(map(is_number, names)):
                self.names, self.comments = names, self.comments - 1
        return False


class _Stream(io.TextIOBase):
    """File-like view of an iterator of lines, for pandas."""

    def __init__(self, lines: Iterator[str]):
        self.source = lines

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> str:
        parts, length = [], 0
        for line in self.source:
            parts.append(line)
            length += len(line)
            if size is not None and 0 <= size <= length:
                break
        return "".join(parts)


def _parse(path: Path, size: int, file: TextIO) -> tuple[pd.DataFrame, list[str]]:
    import pandas as pd

    table = _Table(path, size, file)
    start = next(table.text, None)
    if start is None:
        raise DataError(f"{str(path)!r} has no rows of numbers")
    # pandas 3.1 and later always parse to the nearest float
    version = tuple(int(part) for part in pd.__version__.split(".")[:2] if part.isdigit())
    exact = {} if version >= (3, 1) else {"float_precision": "round_trip"}
    frame: pd.DataFrame = pd.read_csv(
        _Stream(chain([start], table.text)), header=None, names=list(range(table.width)), index_col=False,
        sep=table.dialect.delimiter, quotechar=table.dialect.quote, skipinitialspace=True, skip_blank_lines=False,
        na_values=MISSING, low_memory=False, engine="c", **exact,
    )  # fmt: skip
    frame.columns = pd.Index(unique_names(table.names, table.width), dtype=object)
    frame.index = pd.Index(np.frombuffer(table.numbers, dtype=np.int64), name="row")
    points, mixed = decimal_points(frame, table.head)
    if mixed is not None:
        raise DataError(
            f"{str(path)!r} has decimal commas, but column {frame.columns[mixed[0]]!r} holds {mixed[1]!r}, whose point may be a decimal point or part "
            "thousands; expected one kind of decimals, and thousands without a separator"
        )
    frame.attrs["comma"] = table.dialect.delimiter != "," and not points  # then commas in cells are decimal commas
    frame.attrs["rows"] = len(frame)
    if table.names is None:
        table.notices.append(f"{str(path)!r} has no header, since its first row holds a number: columns are numbered")
    for j, name in enumerate(frame.columns):
        codes = [cells[j] for cells in table.head if j < len(cells) and re.fullmatch(r"0\d+", cells[j])]
        if codes and frame.iloc[:, j].dtype.kind in "if":
            table.notices.append(f"column {name!r} holds {codes[0]!r}: leading zeros suggest codes, which are read as numbers and written without these zeros")
    if table.comments:
        table.notices.append(f"{table.comments:,} comment lines of {str(path)!r}, which begin with #, are skipped")
    return frame, table.notices
