"""Table files as pandas frames: text, Parquet and Excel; no file can execute code."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from cnf._utils.errors import DataError
from cnf._utils.untrusted import BOMB_BYTES, BOMB_RATIO, memory, require_file, zip_members
from cnf.data.dialect import DATE, is_number, is_numbered, unique_names
from cnf.data.rows import optional_module, reading
from cnf.data.text import HEAD_LINES, read_text

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TABLES", "is_table", "read_frame"]

TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet", ".xlsx", ".xlsm")
MANY_CELLS, CELLS_RATIO = 2**22, 50  # a sheet that claims more cells, and more cells per byte, is a bomb


def is_table(path: Path) -> bool:
    """Return whether :func:`read_frame` reads files with this ending."""
    return path.name.lower().endswith(TABLES)


def read_frame(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Read a table without converting its cells (:func:`~cnf.data.cells.typed` does); return it and notices.

    Raises:
        DataError: for an unreadable or empty file, or a reader that is not installed.
    """
    name = path.name.lower()
    notices: list[str] = []
    if name.endswith(".parquet"):
        frame = _read_parquet(path)
    elif name.endswith((".xlsx", ".xlsm")):
        frame, notices = _read_excel(path)
    else:
        frame, notices = read_text(path)
    if len(frame) == 0:
        raise DataError(f"{str(path)!r} has no rows of numbers")
    return frame, notices


def _read_parquet(path: Path) -> pd.DataFrame:
    size = require_file(path, DataError)
    parquet = optional_module("pyarrow.parquet", repr(str(path)), ", or save the table as csv")
    import pandas as pd

    with reading(path, "a Parquet file"), path.open("rb") as raw:
        file = parquet.ParquetFile(raw)
        rows, width = file.metadata.num_rows, file.metadata.num_columns
        claimed = max(8 * rows * width, sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)))
        if rows < 0 or claimed > memory() or (claimed > BOMB_BYTES and claimed > BOMB_RATIO * size):
            raise ValueError(f"it claims {rows:,} rows of {width:,} columns, {claimed:,} bytes: a bomb?")
        # pandas metadata is ignored: it would hide an index, and name types to construct
        table = file.read()
        frame: pd.DataFrame = table.to_pandas(ignore_metadata=True, date_as_object=False)
        for j, column in enumerate(table.columns):
            if column.null_count and str(column.type).startswith(("int", "uint")):  # pandas would convert to float
                frame.isetitem(j, column.to_pandas(types_mapper=lambda _: pd.Int64Dtype()))
    frame.columns = pd.Index(unique_names([str(c).strip() for c in frame.columns], frame.shape[1]), dtype=object)
    return frame


def _read_excel(path: Path) -> tuple[pd.DataFrame, list[str]]:
    size = require_file(path, DataError)
    openpyxl = optional_module("openpyxl", repr(str(path)), ", or save the table as csv")
    import pandas as pd

    with reading(path, "an Excel file"), path.open("rb") as raw, zipfile.ZipFile(raw) as archive:
        total = sum(m.file_size for m in zip_members(archive, size))
        if total > memory():
            raise ValueError(f"it unpacks to {total:,} bytes, more than the memory has")
        book = openpyxl.load_workbook(raw, read_only=True, data_only=True, keep_links=False)
        if not book.worksheets:
            raise ValueError("it has no sheet of cells")
        rows, numbers, count = [], [], 0
        for number, cells in enumerate(book.worksheets[0].iter_rows(values_only=True), 1):
            count += 1 + len(cells)  # a file may claim cells that it does not contain
            if count > MANY_CELLS and count > CELLS_RATIO * size:
                raise ValueError(f"its first sheet claims more than {count:,} cells: a bomb?")
            if any(cell is not None for cell in cells):
                numbers.append(number)
                rows.append(cells)
    if not rows:
        raise DataError(f"{str(path)!r} has no rows of numbers")
    head = [cell.strip() if isinstance(cell, str) else cell for cell in rows[0]]
    named = all(cell is None or (isinstance(cell, str) and not is_number(cell) and not DATE.fullmatch(cell)) for cell in head)
    width = max(map(len, rows))
    body = [[*cells, *[None] * (width - len(cells))] for cells in rows[named:]]
    if not named and all(isinstance(cell, int | float | None) and not isinstance(cell, bool) for cell in head):
        named = is_numbered(["" if cell is None else str(cell) for cell in head], [[str(c) for c in row] for row in body[1:HEAD_LINES]], str(path))
        head, body = [cell if cell is None else str(cell) for cell in head], body[named:]
    frame = pd.DataFrame(body, columns=range(width), dtype=object, index=pd.Index(numbers[named:], name="sheet row"))
    used = [j for j in range(width) if not frame[j].isna().all() or (named and j < len(head) and head[j])]
    names = [head[j] or "" if j < len(head) else "" for j in used] if named else None
    frame = frame[used].infer_objects()
    frame.columns = pd.Index(unique_names(names, len(used)), dtype=object)
    frame.attrs["rows"] = len(frame)
    notices = [] if named else [f"{str(path)!r} has no header, since its first row holds a number: columns are numbered"]
    if others := [sheet.title for sheet in book.worksheets[1:]]:
        notices.append(f"the first sheet of {str(path)!r} is read, not {', '.join(map(repr, others))}")
    return frame, notices
