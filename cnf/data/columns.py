"""Classification of table columns as modelled, condition or left out, and their conversion to numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np

from cnf._utils.errors import ConfigError, DataError
from cnf.data.cells import typed
from cnf.data.checks import column_name
from cnf.data.identifiers import UNNAMED, are_days, identifies, is_index, is_text, is_whole
from cnf.data.rows import Array, Table
from cnf.data.schema import MAXIMUM_CATEGORIES, TableColumn, conditions, data_columns, split_names
from cnf.data.splits import Options

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Columns", "by_schema", "own_names", "understand"]

DAY = np.timedelta64(1, "D")


@dataclass
class Columns:
    """Classified columns of a table and their values.

    Attributes:
        schema: every column of the table, in the table's order.
        table: (N, D) values of the modelled columns.
        given: (N,) numbers or category indices of each condition.
        rows: (N,) row numbers in the file, without the rows dropped for missing values.
        notices: one sentence for each change to the data.
    """

    schema: tuple[TableColumn, ...]
    table: Table
    given: dict[str, Array]
    rows: Array
    notices: list[str] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the modelled columns."""
        return tuple(c.name for c in data_columns(self.schema))

    @property
    def joint(self) -> Table:
        """Modelled columns, then conditions, (N, D + number of conditions)."""
        return np.column_stack([self.table, *self.given.values()])


def own_names(columns: Sequence[str]) -> bool:
    """Return whether any column has a name other than its default ``column j``.

    Example:
        >>> own_names(["column 0", "column 1"]), own_names(["age", "height"])
        (False, True)
    """
    return any(name != f"column {j}" for j, name in enumerate(columns))


def understand(frame: pd.DataFrame, options: Options, name: str, *, label: bool = False) -> Columns:
    """Select, convert and classify the columns of a training table.

    Args:
        frame: table returned by :func:`~cnf.data.frames.read_frame`.
        options: ``columns``, ``drop_columns``, ``condition`` and ``missing``.
        name: name of the data set, for messages.
        label: condition on the column ``label``, whose integers are classes.

    Raises:
        DataError: for missing values, text in a modelled column, unknown columns, or no column to model.
        ConfigError: for contradictory options.
    """
    used, given, explicit = _selection(list(frame.columns), options, name, label)
    notices: list[str] = []
    roles: dict[str, TableColumn] = {c: TableColumn(c, "left out", "unused") for c in frame.columns if c not in used}
    values: dict[str, pd.Series] = {}
    for column in used:
        series, said = typed(frame[column], name)
        if UNNAMED.fullmatch(column) and column not in explicit and (bool(series.isna().all()) or is_index(series)):
            roles[column] = TableColumn(column, "left out", "identifier", _type(series))
            what = "is empty" if bool(series.isna().all()) else "is a row number or index"
            notices.append(f"column {column!r} has no name in the file and {what}: left out (--columns keeps it)")
            continue
        notices += said
        values[column] = series
    rows, said = _missing(frame, values, options, name, given)
    notices += said
    refused: list[tuple[str, str]] = []
    for column, series in values.items():
        if len(rows) < len(frame):
            series = values[column] = series.iloc[rows].infer_objects()
        if column in given:
            roles[column] = _condition(column, series, name, classes=label)
            if roles[column].kind == "date":
                notices.append(f"column {column!r} holds dates, which enter as days since {_day(roles[column].epoch)}")
        elif column not in explicit and (why := identifies(column, series)):
            roles[column] = TableColumn(column, "left out", "identifier", _type(series))
            notices.append(f"column {column!r} {why}: an identifier or row number, left out (--columns keeps it)")
        elif is_text(series):
            refused.append((column, f"{column!r} ({_few(series)})"))
        else:
            roles[column] = _data(column, series)
            if roles[column].kind == "date":
                notices.append(f"column {column!r} holds dates: converted to days since {_day(roles[column].epoch)}")
            elif are_days(series):
                notices.append(f"column {column!r} holds numbers that read as dates ({series.iloc[0]:.0f}) and is taken for numbers: dates are written 2024-01-31")
    if refused:
        names = ",".join(column for column, _ in refused)
        raise DataError(
            f"{name!r} has text in {'columns' if len(refused) > 1 else 'column'} {', '.join(text for _, text in refused)}, which has no density: condition on it "
            f"(--condition {names}), leave it out (--drop-columns {names}), or encode it as integers (quantities: as numbers without units; dates: as 2024-01-31)"
        )
    schema = tuple(roles[c] for c in frame.columns)
    modelled = data_columns(schema)
    if not modelled:
        raise DataError(f"{name!r} has no column to model: {'; '.join(notices) or 'all are conditions or dropped'}")
    table = np.stack([_numbers(values[c.name], c, name) for c in modelled], axis=1)
    return Columns(schema, table, {c.name: _numbers(values[c.name], c, name) for c in conditions(schema)}, rows, notices)


def by_schema(
    frame: pd.DataFrame, schema: Sequence[TableColumn], name: str, prepare: Callable[[pd.DataFrame], pd.DataFrame] = lambda frame: frame
) -> Columns:
    """Convert a table with the column types of training, after ``prepare`` of its cells; missing values stay NaN.

    Raises:
        DataError: for unknown or missing columns, a category absent from training, or values of another type.
    """
    used = [c for c in schema if c.role != "left out"]
    wanted, present = [c.name for c in used], list(frame.columns)
    named = own_names(wanted)
    listed = f" ({', '.join(wanted)})" if named else ""
    whole = [c.name for c in schema]
    notices = []
    if not (named and own_names(present)):
        order = whole if len(present) == len(whole) != len(wanted) else wanted
        if len(present) != len(order):
            raise DataError(f"{name!r} has {len(present)} columns, but the model has {len(wanted)}{listed}")
        frame = frame.set_axis(order, axis=1)
    else:
        ignored = [c for c in present if c not in wanted and (c in whole or UNNAMED.fullmatch(c))]
        odd = [c for c in present if c not in wanted and c not in ignored]
        lacking = [c for c in wanted if c not in present]
        if odd or lacking:
            fault = f"has the additional column {odd[0]!r}" if odd else f"lacks {', '.join(map(repr, lacking))}"
            raise DataError(f"the run models the columns {', '.join(wanted)}, but {name!r} {fault} (columns are matched by name if there is a header)")
        if ignored:
            notices.append(f"{', '.join(map(repr, ignored))} of {name!r} left out, as in training")
    frame, arrays = prepare(frame), {}
    for column in used:
        series, said = typed(frame[column.name], name)
        notices += said
        arrays[column.name] = _numbers(series, column, name)
    table = np.stack([arrays[c.name] for c in data_columns(schema)], axis=1)
    return Columns(tuple(schema), table, {c.name: arrays[c.name] for c in conditions(schema)}, np.arange(len(frame)), notices)


# --- selection --------------------------------------------------------------------------------------------------------


def _selection(names: list[str], options: Options, name: str, label: bool) -> tuple[list[str], tuple[str, ...], tuple[str, ...]]:
    """Return the columns to read, the conditions, and the columns requested by name."""
    wanted, dropped = split_names(options.columns, "columns"), split_names(options.drop_columns, "drop_columns")
    given = ("label",) if label else () if options.condition in (None, "label", "target") else split_names(options.condition, "condition")
    for option, chosen in (("columns", wanted), ("drop_columns", dropped), ("condition", given)):
        for column in chosen:
            if column not in names:
                near = get_close_matches(column, names, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(repr, names[:20]))}"
                raise DataError(f"{option}: {name!r} has no column {column!r}; {hint}")
            if option == "drop_columns" and column in wanted + given:
                raise ConfigError(f"drop_columns names {column!r}, which {'columns' if column in wanted else 'condition'} asks for; expected one of them")
    used = [c for c in names if (not wanted or c in wanted or c in given) and c not in dropped]
    # a condition that is also listed in ``columns`` stays a condition
    return used, given, wanted


def _missing(frame: pd.DataFrame, values: dict[str, pd.Series], options: Options, name: str, given: Sequence[str]) -> tuple[Array, list[str]]:
    """Return the row numbers without missing values, and notices."""
    lacking = {c: series.isna().to_numpy() for c, series in values.items()}
    counts = {c: int(bad.sum()) for c, bad in lacking.items() if bad.any()}
    rows = np.arange(len(frame))
    if not counts:
        return rows, []
    bad = np.any([lacking[c] for c in counts], axis=0)
    listed = ", ".join(f"{c!r} {n:,}" for c, n in list(counts.items())[:20])
    if options.missing == "drop":
        if bad.all():
            raise DataError(f"{name!r}: every row has a missing value ({listed}); leave such columns out: --drop-columns")
        return rows[~bad], [f"{int(bad.sum()):,} of {len(bad):,} rows dropped, since they have missing values (missing='drop'): {listed}"]
    row = int(bad.argmax())
    column = next(c for c in counts if lacking[c][row])
    where = _place(frame, row)
    empty = [c for c, n in counts.items() if n == len(frame)]
    formulas = " (formulas without stored values read as empty: open the file in Excel and save it)" if empty and frame.index.name == "sheet row" else ""
    advice = (
        f"{', '.join(map(repr, empty))} without any value{formulas}: --drop-columns {','.join(empty)}"
        if empty
        else "drop those rows (--missing drop), leave the columns out (--drop-columns), or fill them in"
    )
    if texts := ",".join(c for c, series in values.items() if c not in given and is_text(series) and not identifies(c, series)):
        advice += f"; text has no density either: condition on it (--condition {texts}), or leave it out"
    raise DataError(
        f"{name!r} has {sum(counts.values()):,} values that are NaN or missing, the first in {where}, "
        f"{column_name(tuple(frame.columns), list(frame.columns).index(column))}; missing by column: {listed}; {advice}"
    )


# --- types and values -------------------------------------------------------------------------------------------------


def _type(series: pd.Series) -> Any:
    kind = series.dtype.kind
    if kind == "M":
        return "date" if bool((series.dropna().dt.normalize() == series.dropna()).all()) else "datetime"
    return {"b": "bool", "i": "int", "u": "int", "f": "float"}.get(kind, "text")


def _epoch(series: pd.Series) -> int:
    return int(series.min().to_datetime64().astype("datetime64[D]").astype(np.int64))


def _day(epoch: int) -> str:
    return str(np.datetime64(epoch, "D"))


def _data(column: str, series: pd.Series) -> TableColumn:
    kind = _type(series)
    if kind in ("date", "datetime"):
        # a date without a time covers the whole day, so its step is 1, repeated or not
        return TableColumn(column, "data", "date", kind, step=1.0 if kind == "date" else 0.0, epoch=_epoch(series))
    if kind == "float" and series.dtype.itemsize == 8 and _was_integer(series):
        kind = "int"
    return TableColumn(column, "data", "continuous", kind)


def _was_integer(series: pd.Series) -> bool:
    """Return whether a float column of a text or Excel file held integers; pandas converts them if some are missing."""
    return len(series) < int(series.attrs.get("rows", 0)) and is_whole(series)


def _condition(column: str, series: pd.Series, name: str, classes: bool) -> TableColumn:
    kind = _type(series)
    if kind in ("text", "bool") or (classes and is_whole(series)):
        categories = np.unique(series.to_numpy(dtype={"text": str, "bool": bool}.get(kind, np.int64)))
        if not 2 <= len(categories) <= MAXIMUM_CATEGORIES:
            raise DataError(f"condition: column {column!r} of {name!r} must have 2 to {MAXIMUM_CATEGORIES:,} categories, got {len(categories):,}")
        return TableColumn(column, "condition", "categorical", kind, categories=tuple(map(str, categories)))
    if kind in ("date", "datetime"):
        return TableColumn(column, "condition", "date", kind, epoch=_epoch(series))
    return TableColumn(column, "condition", "continuous", kind)


def _place(rows: pd.Series | pd.DataFrame, row: int) -> str:
    """Return where a row stands in its file: the line of a text file, the row of another."""
    return f"line {rows.index[row]}" if rows.index.name == "row" else f"row {rows.index[row]}"


def _few(series: pd.Series) -> str:
    values = sorted(map(str, series.unique()[:1000]))
    return ", ".join(map(repr, values[:3])) + (f", ... {series.nunique():,} in all" if len(values) > 3 else "")


def _numbers(series: pd.Series, column: TableColumn, name: str) -> Array:
    """Convert a column to numbers: its values, days since its epoch, or category indices."""
    where = f"column {column.name!r} of {name!r}"
    if column.categories:
        codes = {category: code for code, category in enumerate(column.categories)}
        numbers = series.map(lambda value: codes.get(column.category(value)))
        unknown = (numbers.isna() & series.notna()).to_numpy()
        if unknown.any():
            value = str(series[unknown].iloc[0])
            raise DataError(
                f"{where} must hold the categories of training, {', '.join(column.categories)}, got {value!r} in {_place(series, int(unknown.argmax()))}: the "
                f"model knows nothing of other categories; take such rows out ({int(unknown.sum()):,} of {len(series):,}), or train with them"
            )
        return np.asarray(numbers, dtype=np.float64)
    if column.kind == "date":
        if series.dtype.kind != "M":
            raise DataError(f"{where} must hold dates, as in training, got {_few(series)}")
        # microseconds, since nanoseconds are limited to the years 1677 to 2262
        days = (series.to_numpy().astype("datetime64[us]") - np.datetime64(column.epoch, "D")) / DAY
        return np.asarray(days, dtype=np.float64)
    booleans = series.dtype.kind == "O" and set(map(type, series.dropna())) <= {bool, np.bool_}  # some are missing
    if series.dtype.kind not in "biuf" and not booleans:
        raise DataError(f"{where} must hold numbers, as in training, got {_few(series)}")
    return np.asarray(series.to_numpy(dtype=np.float64, na_value=np.nan))
