"""Descriptions of the first rows of cnf rank: cells, values out of range, and columns that are odd given the others."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnf._utils.errors import DataError, SolverError
from cnf.data.items import Items
from cnf.data.schema import TableColumn, conditions, data_columns, plain_table
from cnf.data.write import sampled_frame
from cnf.evaluation import Ranking, likeliest_values
from cnf.evaluation.likeliest import cost_of_value
from cnf.flow import Flow

__all__ = ["OddRow", "extrapolated", "odd_rows"]

DESCRIBED = 10  # rows
BUDGET = 2**15  # evaluations of the density: a few seconds
SHOWN = 8  # columns of a row
ODD = 2.0  # nats: two standard deviations of a normal conditional density
FEW = 5  # names in a line


@dataclass(frozen=True)
class OddRow:
    """Description of a row.

    Attributes:
        cells: of the model's columns, as in the file.
        outside: limits of the training table, as text, of the columns whose value is outside.
        odd: column, cell, likeliest value and gain in nats of the columns that are odd given the others, oddest first.
    """

    cells: dict[str, Any]
    outside: dict[str, str]
    odd: list[dict[str, Any]]

    def lines(self) -> list[str]:
        """Return the description as text."""
        kept = list(dict.fromkeys([*self.outside, *(each["column"] for each in self.odd), *self.cells]))[:SHOWN]
        limits = {name: f" (training: {text})" for name, text in self.outside.items()}
        parts = [f"{name} {_text(value)}{limits.get(name, '')}" for name, value in self.cells.items() if name in kept]
        more = f", and {len(self.cells) - len(kept)} more columns" if len(self.cells) > len(kept) else ""
        lines = [", ".join(parts) + more]
        if self.odd:
            said = [f"{each['column']} {_text(each['cell'])}, where {_text(each['likeliest'])} is {each['nats']:.1f} nats likelier" for each in self.odd]
            lines.append(f"odd given the others: {'; '.join(said)}")
        return lines


def odd_rows(flow: Flow, items: Items, table: Sequence[TableColumn], ranking: Ranking) -> dict[int, OddRow]:
    """Return descriptions of the first rows of a ranking, by their index among the items; none of images.

    Args:
        flow: of the ranking.
        items: the ranked rows.
        table: columns of training; names of columns as in ``items`` if empty.
        ranking: of the items.
    """
    if items.cells is None:
        return {}
    schema = tuple(table) or plain_table(list(items.cells.columns))
    first = [int(i) for i in ranking.order[:DESCRIBED] if int(i) not in ranking.incomplete]
    odd = _odd(flow, items, schema, [i for i in first if i not in ranking.unseen and i not in ranking.evaluation.unsolved])
    numbers = _numbers(items, schema)
    found, kinds = {}, {column.name: column for column in schema}
    for i in first:
        outside = {} if i in items.unseen else {c.name: _limits(c) for c in schema if c.name in numbers and _beyond(c, numbers[c.name][i])}
        found[i] = OddRow({name: _plain(value, kinds[name]) for name, value in items.cells.iloc[[i]].astype(object).iloc[0].items()}, outside, odd.get(i, []))
    return found


def extrapolated(items: Items, table: Sequence[TableColumn]) -> list[str]:
    """Return a line for each condition that is outside the range of training in some rows, whose likelihood is an extrapolation."""
    lines, numbers = [], _numbers(items, table) if conditions(table) else {}
    without = {*items.unseen, *items.incomplete}
    for column in conditions(table):
        rows = [i for i in np.flatnonzero(_beyond(column, numbers[column.name])).tolist() if i not in without] if column.name in numbers else []
        if rows:
            names = ", ".join(items.names[i] for i in rows[:FEW]) + (", ..." if len(rows) > FEW else "")
            lines.append(
                f"({len(rows):,} items have the condition {column.name} outside {_limits(column)}, the range of training: the model extrapolates, "
                f"and their likelihood says little: {names})"
            )
    return lines


def _odd(flow: Flow, items: Items, schema: Sequence[TableColumn], rows: list[int]) -> dict[int, list[dict[str, Any]]]:
    """Return the odd columns of rows that have a likelihood, as far as the budget reaches."""
    columns = data_columns(schema)
    rows = rows[: int(BUDGET / (cost_of_value(flow) * len(columns)))]
    if len(columns) < 2 or not rows or items.cells is None:
        return {}
    x = items.x[rows] if items.steps is None else items.x[rows] + items.steps[rows] / 2  # the middle of a step
    try:
        values, gains = likeliest_values(flow, x, None if items.context is None else items.context[rows])
    except (DataError, SolverError):  # of rows or samples far out; the ranking itself has the likelihood
        return {}
    likeliest = sampled_frame(values.numpy(), columns, {})
    found: dict[int, list[dict[str, Any]]] = {}
    for k, row in enumerate(rows):
        order = [j for j in gains[k].argsort(descending=True).tolist() if gains[k, j] >= max(ODD, 0.5 * float(gains[k].max()))]
        found[row] = []
        for j in order:
            name = columns[j].name
            cell, value = (_plain(part.iloc[i], columns[j]) for part, i in ((items.cells[name], row), (likeliest[name], k)))
            found[row].append({"column": name, "cell": cell, "likeliest": value, "nats": float(gains[k, j])})
    return found


def _numbers(items: Items, schema: Sequence[TableColumn]) -> dict[str, np.ndarray[Any, Any]]:
    """Return the values (N,) of the columns that are numbers, on their own scale."""
    found = dict(zip([c.name for c in data_columns(schema)], items.x.double().numpy().T, strict=True))
    at = 0
    for column in conditions(schema):
        if not column.categories and items.context is not None:
            found[column.name] = items.context[:, at].double().numpy() * column.std + column.mean
        at += len(column.categories) or 1
    return found


def _beyond(column: TableColumn, values: Any) -> Any:
    """Return which values are outside the training table's, by more than the rounding of float32."""
    if column.limits is None:
        return np.zeros(np.shape(values), dtype=bool)
    low, high = column.limits
    slack = 1e-6 * (abs(low) + abs(high) + column.std) + 0.01 * column.step
    return (values < low - slack) | (values > high + slack)


def _limits(column: TableColumn) -> str:
    assert column.limits is not None
    low, high = column.limits
    if column.kind == "date":
        day = np.datetime64(column.epoch, "D")
        return f"{day + int(low)} to {day + int(high)}"
    return f"{low:.6g} to {high:.6g}"


def _plain(value: Any, column: TableColumn) -> Any:
    """Return a cell as a number, text, or None where it is missing."""
    import pandas as pd

    if isinstance(value, np.generic):
        value = value.item()
    if pd.isna(value):
        return None
    if isinstance(value, bool | int | float):
        return value
    text = str(value).strip().removesuffix(" 00:00:00")
    with suppress(ValueError):  # a number in a column that holds text too
        return text if column.categories or column.kind == "date" else float(text)
    return text


def _text(value: Any) -> str:
    return "(none)" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
