"""Cells of a table to rank that the columns of training cannot hold: text among numbers, new categories, gaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cnf._utils.errors import DataError
from cnf.data.dialect import COMMA_NUMBER, DATE, THOUSANDS
from cnf.data.rows import Array, Table
from cnf.data.schema import TableColumn

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["blank_unseen", "gaps"]

BOOLEANS = {"True": True, "False": False, "true": True, "false": False, "TRUE": True, "FALSE": False}


def blank_unseen(frame: pd.DataFrame, schema: Sequence[TableColumn], name: str) -> tuple[pd.DataFrame, dict[int, str]]:
    """Empty the cells that the columns of training cannot hold; return the frame, and by row what was in them.

    A column without any cell that fits stays as it is, for the reader to refuse: it is another column, or another format.

    Args:
        frame: the columns of the model.
        schema: the columns of training.
        name: name of the file, for messages.

    Raises:
        DataError: if no row is left.
    """
    seen: dict[int, list[str]] = {}
    out = frame.copy(deep=False)
    for column in schema:
        if column.role == "left out":
            continue
        series = frame[column.name]
        filled = series.notna().to_numpy()
        fits, what, values = _fits(series, column)
        bad = filled & ~fits
        if not bad.any() or not fits.any():
            continue
        for row in np.flatnonzero(bad):
            seen.setdefault(int(row), []).append(f"{column.name} = {str(series.iloc[row])!r}, {what}")
        out[column.name] = values.where(~bad)
    if seen and len(seen) == len(frame):
        raise DataError(f"no row of {name!r} can be ranked: {next(iter(seen.values()))[0]}")
    return out, {row: "; ".join(said) for row, said in sorted(seen.items())}


def _fits(series: pd.Series, column: TableColumn) -> tuple[Array, str, pd.Series]:
    """Return which cells (N,) the column of training could hold, what the others are not, and the cells to read."""
    import pandas as pd

    what = "which is no category of training" if column.categories else "which is no date" if column.kind == "date" else "which is no number"
    if column.categories:
        keys = series.map(column.category, na_action="ignore")
        return keys.isin(column.categories).to_numpy(dtype=bool), what, series
    if getattr(series.dtype, "kind", "O") in "fiubM":  # all of one type, which the reader accepts or refuses as a whole
        return np.ones(len(series), dtype=bool), what, series
    text = series.map(lambda value: str(value).strip(), na_action="ignore").astype(object)
    blank = text.isna() | (text == "")
    if column.kind == "date":
        fits = text.str.fullmatch(DATE.pattern).eq(True)
        days = pd.to_datetime(text.where(fits), format="ISO8601", utc=True, errors="coerce")
        if 2 * int(days.notna().sum()) > int(fits.sum()):  # other formats are read, or refused, as a whole
            fits &= days.notna()
        return (fits | blank).to_numpy(dtype=bool), what, series
    if column.type == "bool":
        known = text.isin(BOOLEANS)
        if bool(known.any()):
            return (known | blank).to_numpy(dtype=bool), "which is neither True nor False", text.map(BOOLEANS)
    plain = pd.to_numeric(text.str.replace("\u2212", "-", regex=False), errors="coerce").notna() & ~text.str.contains("_", regex=False).eq(True)
    # separators of decimals and thousands are the format of a file, which the reader names
    marked = text.str.fullmatch(COMMA_NUMBER.pattern).eq(True) | text.str.fullmatch(THOUSANDS.pattern).eq(True)
    return (plain | marked | blank).to_numpy(dtype=bool), what, series


def gaps(values: Table, names: Sequence[str]) -> tuple[dict[int, str], dict[int, str]]:
    """Return by row which values (N, D) are missing, and which are beyond the numbers of float32.

    Example:
        >>> gaps(np.array([[1.0, np.nan], [np.inf, 2.0]]), ["a", "b"])
        ({0: "no value of 'b'"}, {1: 'a = inf, beyond the numbers of float32'})
    """
    with np.errstate(over="ignore"):
        huge = np.isinf(values.astype(np.float32))
    missing = np.isnan(values)
    lacking = {int(row): f"no value of {', '.join(repr(names[j]) for j in np.flatnonzero(missing[row]).tolist())}" for row in np.flatnonzero(missing.any(1))}
    beyond = {}
    for row in np.flatnonzero(huge.any(1)):
        beyond[int(row)] = "; ".join(f"{names[j]} = {values[row, j]:g}, beyond the numbers of float32" for j in np.flatnonzero(huge[row]).tolist())
    return lacking, beyond
