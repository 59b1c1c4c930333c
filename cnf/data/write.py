"""Output of samples as tables with the columns, names and types of the training table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnf._utils.errors import ConfigError
from cnf.data.lattice import to_lattice
from cnf.data.rows import Array, Table, optional_module
from cnf.data.schema import TableColumn, data_columns

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ENDINGS", "as_numbers_of", "category_value", "given_values", "require_writer", "sampled_frame", "write_frame"]

ENDINGS = (".csv", ".parquet")
SECONDS = 86_400
FIRST_DAY, LAST_DAY = -719_162, 2_932_896  # days since 1970-01-01 of the years 1 and 9999


def as_numbers_of(samples: Array, table: Sequence[TableColumn]) -> Array:
    """Round samples (N, D) to the table's lattices; dates become days since 1970-01-01, and the result float64."""
    out = _exact(samples, table)
    return out if any(c.kind == "date" for c in data_columns(table)) else out.astype(samples.dtype)


def _exact(samples: Array, table: Sequence[TableColumn]) -> Table:
    columns = data_columns(table)
    lattices = ([c.step for c in columns], [c.origin for c in columns], [c.last for c in columns], [c.dequantised for c in columns])
    out = to_lattice(samples.astype(np.float64), *lattices)
    for j, column in enumerate(columns):
        if column.type == "int":  # of a step that is no integer, the values were rounded to integers
            out[:, j] = np.rint(out[:, j])
        if column.kind == "date":
            out[:, j] += column.epoch
    return out


def sampled_frame(samples: Array, table: Sequence[TableColumn], given: Mapping[str, Any]) -> pd.DataFrame:
    """Return samples (N, D) as a frame of modelled columns and conditions, in the table's order and types.

    Args:
        samples: samples of the model.
        table: all columns.
        given: (N,) values of each condition, or one value for all rows.
    """
    import pandas as pd

    numbers = dict(zip([c.name for c in data_columns(table)], _exact(samples, table).T, strict=True))
    series = {}
    for column in table:
        if column.role == "left out":
            continue
        if column.role == "condition":
            series[column.name] = pd.Series(given[column.name], index=range(len(samples)))
            continue
        values = numbers[column.name]
        if column.kind == "date":
            days = np.clip(values, FIRST_DAY, LAST_DAY)
            time = np.rint(days * SECONDS) if column.type == "datetime" else np.floor(days) * SECONDS
            series[column.name] = pd.Series(time.astype(np.int64).astype("datetime64[s]"))
        elif column.type in ("int", "bool") and np.abs(values).max(initial=0) < 2**62:
            series[column.name] = pd.Series(values.astype(np.int64 if column.type == "int" else bool))
        else:
            series[column.name] = pd.Series(values if column.step else values.astype(samples.dtype))
    return pd.DataFrame(series)


def write_frame(frame: pd.DataFrame, path: Path, ending: str) -> None:
    """Write a frame as csv or Parquet, by ``ending`` (``".csv"`` or ``".parquet"``)."""
    if ending == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, index=False, engine="pyarrow")


def require_writer(path: Path) -> None:
    """Check that the writer for ``path`` is installed, before samples are drawn.

    Raises:
        ConfigError: for .parquet without pyarrow.
    """
    if path.suffix == ".parquet":
        optional_module("pyarrow", f"--out {path}", ", or name a .csv file", ConfigError)


def category_value(column: TableColumn, category: str) -> int | bool | str:
    """Return a category in the column's type.

    Example:
        >>> category_value(TableColumn("k", "condition", "categorical", "int", categories=("1", "2")), "2")
        2
    """
    return int(category) if column.type == "int" else category == "True" if column.type == "bool" else category


def given_values(texts: Mapping[str, str], table: Sequence[TableColumn]) -> tuple[dict[str, Array], dict[str, Any], list[str]]:
    """Convert the values of ``--given``.

    Returns:
        Numbers (1,) for :func:`cnf.data.schema.encode`, values in the table's types, and notices.

    Raises:
        ConfigError: for a category absent from training, or text that is not a number or date.
    """
    import pandas as pd

    numbers: dict[str, Array] = {}
    values: dict[str, Any] = {}
    notices: list[str] = []
    for column in table:
        if column.role != "condition":
            continue
        text = texts[column.name]
        if column.categories:
            if text not in column.categories:
                raise ConfigError(f"--given {column.name}={text}: category must be one of {', '.join(column.categories)}")
            numbers[column.name] = np.array([float(column.categories.index(text))])
            values[column.name] = category_value(column, text)
            continue
        try:
            if column.kind == "date":
                day = pd.to_datetime(text, format="ISO8601")
                number = float((day.to_datetime64() - np.datetime64(column.epoch, "D")) / np.timedelta64(1, "D"))
                values[column.name] = day if day.tzinfo is None else day.tz_convert("UTC").tz_localize(None)
            else:
                number = values[column.name] = float(text)
                if column.type == "int" and number.is_integer():
                    values[column.name] = int(number)
            if not np.isfinite(number):
                raise ValueError
        except (ValueError, OverflowError):
            expected = "a date such as 2024-01-31" if column.kind == "date" else "a finite number"
            raise ConfigError(f"--given {column.name}={text}: expected {expected}") from None
        numbers[column.name] = np.array([number])
        far = abs(number - column.mean) / column.std
        if far > 5:
            notices.append(f"{column.name}={text} is {far:.0f} standard deviations from the training rows' mean: the model has seen nothing like it")
    return numbers, values, notices
