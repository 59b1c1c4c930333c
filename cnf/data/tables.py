"""Custom tables: classification, checks, split, dequantisation and report of the columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cnf._utils.errors import ConfigError, DataError
from cnf.data.checks import dequantize, duplicate_rows, find_lattices, require_finite, require_table, require_usable
from cnf.data.columns import Columns, by_schema, own_names, understand
from cnf.data.dependence import dependent_columns
from cnf.data.parts import classes_of, drop_duplicates, split
from cnf.data.rows import Array
from cnf.data.schema import LARGEST, TableColumn, conditions, data_columns, encode, on_lattice
from cnf.data.splits import DataSplits, Options, Rows, assemble

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["as_frame", "load_table", "off_lattice", "without_missing"]

# a column is bounded at an end if the outer 2 % of its range there contain 1 % of its values, at least 5
EDGE, EDGE_SHARE, EDGE_COUNT = 0.02, 0.01, 5
HEAVY = 7.0  # 99 % range over 50 % range: 3.8 for a normal, 6.6 for a Laplace distribution
MOST_LINES = 60  # columns above which the report omits unremarkable continuous columns


def as_frame(rows: Rows, name: str) -> pd.DataFrame:
    """Return a table as a frame; the columns of an array are numbered.

    Raises:
        DataError: for an array that is not a table of numbers.
    """
    import pandas as pd

    if isinstance(rows.x, pd.DataFrame):
        return rows.x
    require_table(rows.x, name)
    return pd.DataFrame(rows.x, columns=[f"column {j}" for j in range(rows.x.shape[1])])


def load_table(rows: Sequence[Rows], labels: Array | None, name: str, options: Options, notices: Sequence[str]) -> DataSplits:
    """Build the data set of a custom table: classify the columns, drop duplicates, split, dequantise.

    Args:
        rows: a single part, or the parts of a given split.
        labels: labels of all rows, or None.
        name: name of the data set.
        options: see :func:`cnf.data.load`.
        notices: notices of the readers.

    Raises:
        DataError: for a table that no density can be fitted to; the message states the fault.
        ConfigError: for options that apply to images only.
    """
    if options.nbits != 8 or options.flip is not None:
        raise ConfigError(f"nbits and flip do not apply to {name!r}, which is a table")
    frame, parts_of_rows = _joined([as_frame(r, name) for r in rows], name)
    label = options.condition == "label" and labels is None and "label" in frame.columns
    if options.table:
        columns = by_schema(frame, options.table, name)
        columns = without_missing(columns, name) if options.missing == "drop" else columns
    else:
        columns = understand(frame, options, name, label=label)
    table, given, names = columns.table, columns.given, columns.names
    labels = None if labels is None else labels[columns.rows]
    sizes = [int((parts_of_rows[columns.rows] == part).sum()) for part in range(len(rows))]
    require_finite(columns.joint, (*names, *given), name)
    if not options.table:
        require_usable(table, names, name)
    kept, dropped = drop_duplicates(duplicate_rows([columns.joint], labels), sizes, options)
    parts, how = split(sizes, kept, options)
    # lattices are detected, and noise is drawn, on the kept rows only
    parts = [np.searchsorted(kept, i) for i in parts]
    raw, labels, given = table[kept], None if labels is None else labels[kept], {c: v[kept] for c, v in given.items()}
    if options.table:
        schema, said = _as_in_training(raw, columns.schema, options)
    else:
        schema, said = _complete(raw, given, parts[0], columns, options, _epsilon(rows), name)
    table = dequantize(raw, data_columns(schema), options.seed)
    more: dict[str, Any] = classes_of(labels, parts) | {"columns": names, "table": schema, "report": _report(schema, raw, given)}
    if given:
        context = encode(schema, given)
        classes = next((c.categories for c in conditions(schema) if c.name == options.condition == "label"), ())
        more |= {"given": [context[i] for i in parts], "codes": None, "classes": classes}
    notices = [*notices, *columns.notices, *dropped, *said, how]
    return assemble(name, "table", [table[i] for i in parts], options, notices=notices, **more)


def _joined(frames: list[pd.DataFrame], name: str) -> tuple[pd.DataFrame, Array]:
    """Return the concatenated parts, and the part index of each row."""
    import pandas as pd

    first = list(frames[0].columns)
    for frame in frames[1:]:
        if set(frame.columns) != set(first) and own_names(first) and own_names(list(frame.columns)):
            odd = next(iter(set(frame.columns) ^ set(first)))
            raise DataError(f"the parts of {name!r} differ in their columns: {odd!r} is not in all of them")
    which = np.repeat(np.arange(len(frames)), [len(f) for f in frames])
    if len(frames) == 1:
        return frames[0], which
    same = [f[first] if set(f.columns) == set(first) else f.set_axis(first, axis=1) for f in frames]
    return pd.concat(same, ignore_index=True), which


def _epsilon(rows: Sequence[Rows]) -> float:
    """Return the largest machine epsilon of the dtypes in which the values are stored."""
    kinds = [getattr(r.x, "dtype", np.dtype(np.float64)) for r in rows]
    return max(float(np.finfo(k if k in (np.float16, np.float32) else np.float64).eps) for k in kinds)


def without_missing(columns: Columns, name: str) -> Columns:
    """Return the rows without missing values, with a notice of how many were dropped.

    Raises:
        DataError: if every row of ``name`` has one.
    """
    good, total = np.flatnonzero(~np.isnan(columns.joint).any(1)), len(columns.rows)
    if len(good) == total:
        return columns
    if not len(good):
        raise DataError(f"{name!r}: every row has a missing value")
    said = f"{total - len(good):,} of {total:,} rows dropped from {name!r}, since they have missing values (missing='drop')"
    given = {c: v[good] for c, v in columns.given.items()}
    return Columns(columns.schema, columns.table[good], given, columns.rows[good], [*columns.notices, said])


def off_lattice(columns: Sequence[TableColumn], table: Array) -> list[str]:
    """Return the names of the dequantised columns with values off their lattice."""
    return [c.name for c, values in zip(columns, table.T, strict=True) if c.dequantised and not on_lattice(c, values)]


def _as_in_training(table: Array, schema: tuple[TableColumn, ...], options: Options) -> tuple[tuple[TableColumn, ...], list[str]]:
    """Return the columns, dequantised if their values lie on the lattices of training, and notices."""
    kept = {c.name for c in schema if c.dequantised} if options.discrete == "keep" else set()
    odd = set(off_lattice(data_columns(schema), table)) - kept
    said = [f"column {c!r} has values between the steps of training: taken as they are, without noise" for c in sorted(odd)]
    spread = [c.name for c in schema if c.dequantised and c.name not in odd | kept]
    if spread:
        said.append(f"columns {', '.join(map(repr, spread))} dequantised by one step of uniform noise, as in training, seed {options.seed}")
    return tuple(replace(c, dequantised=False) if c.name in odd | kept else c for c in schema), said


def _complete(
    table: Array, given: dict[str, Array], train: Array, columns: Columns, options: Options, epsilon: float, name: str
) -> tuple[tuple[TableColumn, ...], list[str]]:
    """Return the columns with their lattice steps and the scales of numeric conditions, and notices."""
    modelled, said = find_lattices(table, data_columns(columns.schema), options, epsilon, name)
    completed = {c.name: c for c in modelled}
    for column in conditions(columns.schema):
        if not column.categories:
            values = given[column.name][train]
            if values.min() == values.max():
                raise DataError(f"condition: column {column.name!r} of {name!r} is constant ({values[0]:g}) in the training rows; leave it out")
            column = replace(column, mean=float(values.mean()), std=float(values.std()))
        completed[column.name] = column
    numbers = dict(zip(columns.names, table.T, strict=True)) | given
    for key, column in completed.items():
        if not column.step and not column.categories and np.abs(numbers[key]).max() < LARGEST:
            completed[key] = replace(column, extent=(float(numbers[key].min()), float(numbers[key].max())))
    numeric = [c.name for c in conditions(columns.schema) if not c.categories]
    relations = dependent_columns(table, [*columns.names, *numeric], [given[c] for c in numeric])
    if relations:
        words = "; ".join(f"{', '.join(map(repr, involved))} ({relation[:200]}{' ...' if len(relation) > 200 else ''})" for involved, relation in relations[:10])
        if options.dependent == "error":
            raise DataError(
                f"columns of {name!r} depend on each other: {words}. Such a density is unbounded: leave one column of each relation out "
                "(--drop-columns), or keep them (--dependent keep)"
            )
        said.append(f"columns depend on each other, so that the density is unbounded and the likelihood not to be trusted (dependent='keep'): {words}")
    return tuple(completed.get(c.name, c) for c in columns.schema), said


# --- report -----------------------------------------------------------------------------------------------------------


def _report(schema: Sequence[TableColumn], table: Array, given: dict[str, Array]) -> str:
    """Return a text table with a line for each column: name, kind, values, treatment."""
    numbers = dict(zip([c.name for c in data_columns(schema)], table.T, strict=True)) | given
    lines = [("column", "kind", "values", "")]
    quiet = 0
    for column in schema:
        note = _note(column, numbers.get(column.name))
        if len(schema) > MOST_LINES and column.kind == "continuous" and column.role == "data" and not note:
            quiet += 1
            continue
        lines.append((" ".join(column.name.split()), column.kind, _range(column, numbers.get(column.name)), note))
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    text = ["  ".join(f"{part:{w}}" for part, w in zip(line, [*widths, 0], strict=True)).rstrip() for line in lines]
    return "\n".join([*text, *([f"and {quiet} continuous columns"] if quiet else [])])


def _range(column: TableColumn, values: Array | None) -> str:
    if column.role == "left out" or values is None:
        return ""
    if column.categories:
        few = ", ".join(column.categories[:5])
        return f"{len(column.categories)} categories: {few}{', ...' if len(column.categories) > 5 else ''}"
    low, high = float(values.min()), float(values.max())
    if column.kind == "date":
        day = np.datetime64(column.epoch, "D")
        return f"{day + int(low)} to {day + int(high)}"
    return f"{low:.6g} to {high:.6g}{f', step {column.step:.6g}' if column.step else ''}"


def _note(column: TableColumn, values: Array | None) -> str:
    if column.role == "left out":
        return "left out"
    if column.role == "condition":
        return "given, one-hot" if column.categories else "given, standardised"
    said = []
    if column.kind == "date":
        said.append(f"days since {np.datetime64(column.epoch, 'D')}")
    if column.dequantised:
        said.append("dequantised")
    elif values is not None and not column.step:
        low, high = float(values.min()), float(values.max())
        width = EDGE * (high - low)
        least = max(EDGE_SHARE * len(values), EDGE_COUNT)
        ends = [f"{end:.6g}" for end, count in ((low, (values < low + width).sum()), (high, (values > high - width).sum())) if count >= least]
        tails = np.quantile(values, [0.005, 0.25, 0.75, 0.995])
        heavy = tails[2] > tails[1] and (tails[3] - tails[0]) / (tails[2] - tails[1]) >= HEAVY
        said += [f"bounded at {' and '.join(ends)}"] * bool(ends) + ["heavy-tailed"] * bool(heavy)
    return ", ".join(said)
