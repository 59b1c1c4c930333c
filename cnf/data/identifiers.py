"""Detection of row numbers, indices and identifiers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from cnf.data.splits import MINIMUM_ROWS

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["UNNAMED", "are_days", "identifies", "is_index", "is_text", "is_whole"]

UNNAMED = re.compile(r"Unnamed: \d+|__index_level_\d+__")
# text that is a quantity, a date or a time, not a row name: no letter, a number with a unit or words, or a month
_MONTH = r"\b(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\b"
_QUANTITY = re.compile(rf"(?i)[\W\d_]*|\W*[\d.,' ]*\d(?:\s*[^\d\s]{{1,8}}|\s.*|d[+-]?\d+)|.*{_MONTH}.*\d.*|.*\d.*{_MONTH}.*")
_IDENTIFIER = re.compile(r"(?i:index|level_0|id|idx|row|rows?[ _]?(?:id|nr|no|num|number|names?)|nr|key|uuid|guid|.*[ _]id)|.*[a-z]I[Dd]")


def is_text(series: pd.Series) -> bool:
    """Return whether a column holds neither numbers nor dates."""
    return series.dtype.kind not in "biufM"


def is_whole(series: pd.Series) -> bool:
    """Return whether a column holds integers only."""
    if series.dtype.kind in "iu":
        return True
    if series.dtype.kind != "f":
        return False
    values = series.to_numpy()
    return bool(np.isfinite(values).all() and (values == np.rint(values)).all())


def is_index(series: pd.Series) -> bool:
    """Return whether an unnamed column is a row number or an index."""
    return is_text(series) or is_whole(series.dropna())


def are_days(series: pd.Series) -> bool:
    """Return whether all values are integers that encode a date, such as 20240131."""
    import pandas as pd

    if not len(series) or not is_whole(series) or not bool(series.between(18_000_101, 22_001_231).all()):
        return False
    return bool(pd.to_datetime(series.astype("int64").astype(str), format="%Y%m%d", errors="coerce").notna().all())


def identifies(column: str, series: pd.Series) -> str:
    """Return the reason why a column is an identifier, as a clause of a message; empty otherwise."""
    if series.dtype.kind in "bM" or len(series) < MINIMUM_ROWS or series.nunique() < len(series):
        return ""
    if is_text(series):
        return "" if series.map(lambda v: _QUANTITY.fullmatch(v[:60]) is not None).any() else "holds a different text in every row"
    if not is_whole(series):
        return ""
    low, high = float(series.min()), float(series.max())
    if high - low == len(series) - 1:
        return f"holds the whole numbers {low:.0f} to {high:.0f}, each once"
    return "holds a different whole number in every row and is called so" if _IDENTIFIER.fullmatch(column) else ""
