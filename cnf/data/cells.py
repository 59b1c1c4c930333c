"""Conversion of table cells to numbers, booleans, dates or text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from cnf._utils.errors import DataError
from cnf.data.dialect import COMMA_NUMBER, DATE, THOUSANDS, is_number
from cnf.data.rows import Array

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["numbers", "typed"]

DATE_FORMATS = ("%d.%m.%Y", "%Y/%m/%d", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%m-%d-%Y")
TIMES = ("", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f")
NUMBERS_SHARE = 0.5  # share of numbers or dates in a column from which other cells are errors, not categories


def typed(column: pd.Series, name: str) -> tuple[pd.Series, list[str]]:
    """Convert a column to numbers, booleans, dates (UTC, without time zone) or stripped text; return it and notices.

    Raises:
        DataError: for a non-numeric cell in a numeric column, values that are not scalars, or ambiguous dates or
            decimals.
    """
    import pandas as pd

    label = column.name
    where = f"column {label!r} of {name!r}"
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(object)
    kind = getattr(column.dtype, "kind", "O")
    if kind in "fiu" or (kind == "b" and not column.isna().any()):
        return column, []
    if kind == "M":
        zone = column.dt.tz
        return _naive(column), [] if zone is None else [f"column {label!r} has the time zone {zone}: converted to UTC"]
    if kind in "cmV":
        raise DataError(f"{where} has the type {column.dtype}; expected numbers, text or dates: convert it, or leave it out (--drop-columns {label})")
    filled = column.dropna()
    if not len(filled):
        return column.astype(np.float64), []
    kinds = set(map(type, filled))
    if kinds <= {bool, np.bool_}:
        return (column.astype(bool) if len(filled) == len(column) else column), []
    if not any(issubclass(t, str | bytes | dict | list | tuple | np.ndarray | bool) for t in kinds):
        return _of_objects(column, where)
    if any(issubclass(t, bytes | dict | list | tuple | np.ndarray) for t in kinds):
        raise DataError(f"{where} holds values of type {next(iter(kinds)).__name__}; expected numbers, text or dates")
    present = column.notna().to_numpy()
    text = filled.map(lambda v: str(v).strip()).astype(object)
    blank = (text == "").to_numpy(dtype=bool)
    text = text[~blank]
    text.attrs = column.attrs
    converted, notices = _of_text(text, name)
    if len(converted) < len(column):
        empty = {"f": np.nan, "M": np.datetime64("NaT")}.get(converted.dtype.kind)
        values = np.full(len(column), empty, dtype=converted.dtype)
        values[np.flatnonzero(present)[~blank]] = converted.to_numpy()
        converted = pd.Series(values, index=column.index, name=label)
    return converted, notices


def _naive(column: pd.Series) -> pd.Series:
    return column.dt.tz_convert("UTC").dt.tz_localize(None) if column.dt.tz is not None else column


def _of_objects(column: pd.Series, where: str) -> tuple[pd.Series, list[str]]:
    """Convert a column of Python objects (numbers or dates)."""
    import pandas as pd

    try:
        return column.map(_as_float).astype(np.float64), []
    except (TypeError, ValueError):
        pass
    try:
        return _naive(pd.to_datetime(column)), []
    except (TypeError, ValueError, OverflowError):
        kinds = sorted({type(v).__name__ for v in column.dropna()})
        raise DataError(
            f"{where} holds values of type {', '.join(kinds)}; expected numbers, text or dates: convert them, or leave it out (--drop-columns {column.name})"
        ) from None


def _as_float(value: Any) -> float:
    try:
        return np.nan if value is None else float(value)
    except OverflowError:  # an integer beyond the range of float64
        return np.inf if value > 0 else -np.inf


def _first(text: pd.Series, chosen: Array, name: str) -> str:
    """Return the first of the chosen cells with its row and column, for messages."""
    i = int(chosen.argmax())
    return f"row {text.index[i]}, column {text.name!r} of {name!r} is {text.iloc[i]!r}"


def _of_text(text: pd.Series, name: str) -> tuple[pd.Series, list[str]]:
    """Convert stripped cells to numbers or dates, or keep them as text."""
    import pandas as pd

    if not len(text):
        return text.astype(np.float64), []
    text = text.str.replace(r"^\u2212(?=[\d.,])", "-", regex=True)  # the typographic minus sign
    plain = pd.to_numeric(text, errors="coerce")
    good = (plain.notna() & ~text.str.contains("_", regex=False)).to_numpy(dtype=bool)
    if good.all():
        return plain.astype(np.float64), []
    comma = text.str.fullmatch(COMMA_NUMBER.pattern).to_numpy(dtype=bool) & ~good
    if (good | comma).all():
        return _with_commas(text, comma, name)
    dates = text.str.fullmatch(DATE.pattern).to_numpy(dtype=bool)
    if dates.all():
        return _dates(text, name)
    if dates.mean() > NUMBERS_SHARE:
        raise DataError(
            f"{_first(text, ~dates, name)}; expected a date, as in the other rows (correct it, leave it empty for --missing drop, or leave "
            f"the column out: --drop-columns {text.name})"
        )
    thousands = text.str.fullmatch(THOUSANDS.pattern).to_numpy(dtype=bool) & ~good
    if thousands.any() and (good | comma | thousands).all():
        raise DataError(f"{_first(text, thousands, name)}; expected numbers without separators of thousands")
    if good.mean() >= NUMBERS_SHARE:
        advice = f"correct it, encode categories as integers, or leave the column out: --drop-columns {text.name}"
        if comma[~good][0]:
            advice = "write all decimals with a point, or all with a comma"
        elif is_number(re.sub(r"[,. ']", "", text[~good].iloc[0])):
            advice = "write numbers without separators of thousands"
        raise DataError(
            f"{_first(text, ~good, name)}; expected a number ({advice}; a header is the first row, with no title above and no number in it)"
        )
    return text, []


def _with_commas(text: pd.Series, comma: Array, name: str) -> tuple[pd.Series, list[str]]:
    """Convert decimal commas; return the numbers and notices."""
    cell = _first(text, comma, name)
    if bool(text[~comma].str.contains(".", regex=False).any()):
        raise DataError(f"{cell}, and other cells have a decimal point; expected decimals with a point, and thousands without a separator")
    if not text.attrs.get("comma") and bool(text[comma].str.fullmatch(r"[+-]?[1-9]\d{0,2},\d{3}").all()):
        raise DataError(f"{cell}, whose comma may be a decimal comma or part thousands; expected decimals with a point and thousands without a separator")
    values = text.str.replace(",", ".", regex=False).astype(np.float64)
    return values, [f"column {text.name!r} has decimal commas: {text[comma].iloc[0]!r} is read as {values[comma].iloc[0]:g}"]


def _dates(text: pd.Series, name: str) -> tuple[pd.Series, list[str]]:
    """Convert dates, all in one unambiguous format; return them and notices."""
    import pandas as pd

    where = f"column {text.name!r} of {name!r}"
    try:
        times = _naive(pd.to_datetime(text, format="ISO8601", utc=True))
        zones = text.str.fullmatch(r".*(?:Z|:\d\d.*[+-]\d\d(?::?\d\d)?)").any()
        return times, [f"column {text.name!r} has times with a time zone: converted to UTC"] if zones else []
    except (ValueError, OverflowError):
        pass
    fits = []
    plain = text.str.replace("T", " ", regex=False)
    for date in DATE_FORMATS:
        for time in TIMES:
            try:
                fits.append(pd.to_datetime(plain, format=date + time))
                break
            except (ValueError, OverflowError):
                continue
    cell = text.iloc[0]
    if not fits:
        formats = [date + time for date in ("%Y-%m-%d", *DATE_FORMATS) for time in TIMES]
        bad = min((pd.to_datetime(plain, format=one, errors="coerce").isna().to_numpy() for one in formats), key=np.sum)
        if not bad.all():
            raise DataError(f"{_first(text, bad, name)}; expected dates in one format, such as {text[~bad].iloc[0]!r}")
        raise DataError(f"{where} holds dates such as {cell!r} in no known format; expected 2024-01-31, or 2024-01-31 12:30:00")
    if any(not dates.equals(fits[0]) for dates in fits[1:]):
        raise DataError(f"{where} holds dates such as {cell!r}, whose day and month are ambiguous; expected 2024-01-31")
    return fits[0], []


def numbers(frame: pd.DataFrame, name: str) -> Array:
    """Return all columns as numbers (N, D) in float64.

    Raises:
        DataError: for a column of text or dates.
    """
    if all(dtype.kind in "biuf" for dtype in set(frame.dtypes)):
        return np.asarray(frame.to_numpy(dtype=np.float64))
    columns = []
    for label in frame.columns:
        column, _ = typed(frame[label], name)
        if column.dtype.kind not in "biuf":
            cell = next(v for v in frame[label] if v is not None and v == v)
            raise DataError(f"row {frame.index[0]}, column {label!r} of {name!r} is {cell!r}; expected a number")
        columns.append(column.to_numpy(dtype=np.float64, na_value=np.nan))
    return np.stack(columns, axis=1)
