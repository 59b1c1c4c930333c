"""Column types of a table: inferred in training, stored in the run folder, applied to every later file."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cnf._utils.errors import ConfigError

__all__ = ["MAXIMUM_CATEGORIES", "TableColumn", "conditions", "context_width", "data_columns", "encode", "on_lattice", "parse_given", "plain_table", "snap", "split_names", "wanted"]  # fmt: skip

MAXIMUM_CATEGORIES = 1000
LARGEST = 1e30
OFF_LATTICE = 0.05  # in steps: values printed with few digits deviate from their lattice by this much

Values = NDArray[Any]


@dataclass(frozen=True)
class TableColumn:
    """Column of a table.

    Attributes:
        name: name in the table.
        role: ``"data"`` (modelled), ``"condition"`` or ``"left out"`` (ignored).
        kind: ``"continuous"``, ``"discrete"``, ``"categorical"``, ``"date"``, ``"identifier"`` or ``"unused"``.
        type: data type in which samples are written.
        step: spacing of the values' lattice; 0 for none.
        origin: a point of that lattice; the least value of the table, if ``last`` is given.
        last: the largest value of the table on that lattice: samples stay between the two. None for no limits.
        dequantised: whether value v represents the interval [v, v + step), filled with uniform noise in training.
        epoch: reference day of a date, in days since 1970-01-01.
        categories: categories of a categorical condition, in the order of the one-hot columns.
        mean, std: mean and standard deviation of a numeric condition over the training rows, which standardise it.
        extent: least and largest value of the table in a column without a lattice. None if unknown.
    """

    name: str
    role: Literal["data", "condition", "left out"] = "data"
    kind: Literal["continuous", "discrete", "categorical", "date", "identifier", "unused"] = "continuous"
    type: Literal["float", "int", "bool", "date", "datetime", "text"] = "float"
    step: float = 0.0
    origin: float = 0.0
    dequantised: bool = False
    epoch: int = 0
    categories: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    # older run folders lack these; a run resumes whether it has them or not
    last: float | None = field(default=None, compare=False, metadata={"optional": True})
    extent: tuple[float, float] | None = field(default=None, compare=False, metadata={"optional": True})

    @property
    def limits(self) -> tuple[float, float] | None:
        """Least and largest value of the training table, or None if they are unknown.

        Example:
            >>> TableColumn("k", step=1.0, origin=2.0, last=9.0).limits
            (2.0, 9.0)
        """
        return self.extent if self.last is None else (self.origin, self.last)

    def category(self, value: object) -> str:
        """Return the name of the category in a cell: a whole number without a point, True or False with a capital.

        Example:
            >>> z = TableColumn("z", "condition", "categorical", "int", categories=("1", "2"))
            >>> z.category(2.0), z.category(" 2"), z.category("two")
            ('2', '2', 'two')
        """
        text = str(value).strip()
        if self.type == "bool":
            return text.capitalize() if text.lower() in ("true", "false") else text
        if self.type != "int" and (isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number)):
            return text
        try:
            number = float(text)
        except ValueError:
            return text
        return str(int(number)) if number.is_integer() else text

    def fault(self) -> str | None:
        """Return the first inconsistency, as a clause of a message, or None.

        Example:
            >>> TableColumn("k", step=-1.0).fault()
            'its step must be 0 or a positive number, got -1.0'
        """
        if not 0 <= self.step < 1e30:
            return f"its step must be 0 or a positive number, got {self.step}"
        if self.dequantised and not self.step:
            return "it is dequantised and has no step"
        if not (0 < self.std < 1e30 and abs(self.mean) < 1e30 and abs(self.origin) < 1e30):
            return f"its mean, std or origin is out of range ({self.mean}, {self.std}, {self.origin})"
        if self.last is not None and not self.origin <= self.last < 1e30:
            return f"its last value must be at least its origin {self.origin}, got {self.last}"
        if self.extent is not None and not -LARGEST < self.extent[0] <= self.extent[1] < LARGEST:
            return f"its extent must be two numbers in order, got {self.extent}"
        if abs(self.epoch) > 10**6:
            return f"its epoch must be within 2,700 years of 1970, got day {self.epoch}"
        if (self.kind == "categorical") != bool(self.categories) and self.role != "left out":
            return f"it is {self.kind} with {len(self.categories)} categories"
        if len(self.categories) > MAXIMUM_CATEGORIES or len(set(self.categories)) < len(self.categories):
            return f"it must have at most {MAXIMUM_CATEGORIES} distinct categories, got {len(self.categories)}"
        if self.role == "data" and self.kind in ("categorical", "identifier", "unused"):
            return f"it must be a number since it is modelled, got {self.kind}"
        return None


def data_columns(table: Sequence[TableColumn]) -> tuple[TableColumn, ...]:
    """Return the modelled columns, in the table's order."""
    return tuple(c for c in table if c.role == "data")


def conditions(table: Sequence[TableColumn]) -> tuple[TableColumn, ...]:
    """Return the conditions, in the table's order."""
    return tuple(c for c in table if c.role == "condition")


def context_width(table: Sequence[TableColumn]) -> int:
    """Return the number of context columns C.

    Example:
        >>> z = TableColumn("z", "condition", "categorical", "text", categories=("a", "b"))
        >>> context_width([TableColumn("y"), TableColumn("x", "condition"), z])
        3
    """
    return sum(len(c.categories) or 1 for c in conditions(table))


def plain_table(columns: Sequence[str]) -> tuple[TableColumn, ...]:
    """Return continuous columns with these names."""
    return tuple(TableColumn(name) for name in columns)


def encode(table: Sequence[TableColumn], values: Mapping[str, Values]) -> NDArray[np.float64]:
    """Encode conditions as the context (N, C): numbers standardised by the training rows, categories one-hot.

    Args:
        table: all columns.
        values: (N,) numbers or category indices of each condition.
    """
    parts = []
    for column in conditions(table):
        given = values[column.name]
        if column.categories:
            parts.append(np.eye(len(column.categories))[given.astype(np.int64)])
        else:
            parts.append(((given - column.mean) / column.std)[:, None])
    return np.concatenate(parts, axis=1)


def on_lattice(column: TableColumn, values: NDArray[np.float64]) -> bool:
    """Return whether all values lie on the column's lattice, to within 5 % of a step."""
    indices = (values - column.origin) / column.step
    return bool((np.abs(indices - np.rint(indices)) <= OFF_LATTICE).all())


def snap(column: TableColumn, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Move integers to the lattice points that they were rounded from, if the lattice step is not an integer.

    Example:
        >>> mm = TableColumn("mm", kind="discrete", type="int", step=25.4, dequantised=True)
        >>> snap(mm, np.array([0.0, 76.0])).round(1).tolist()
        [0.0, 76.2]
    """
    if column.type != "int" or not column.step or column.step.is_integer():
        return values
    return column.origin + column.step * np.rint((values - column.origin) / column.step)


def split_names(text: str | Sequence[str] | None, option: str) -> tuple[str, ...]:
    """Split comma-separated column names; quotes enclose a name that contains a comma.

    Raises:
        ConfigError: for an empty list, or a repeated name.

    Example:
        >>> split_names('height, "mass, kg"', "columns")
        ('height', 'mass, kg')
    """
    if text is None:
        return ()
    try:
        names = next(csv.reader([text], skipinitialspace=True, strict=True), []) if isinstance(text, str) else list(text)
    except csv.Error as error:
        raise ConfigError(f"{option} must be names separated by commas, got {text!r}: {error}") from None
    names = [name.strip() for name in names]
    if not names or "" in names:
        raise ConfigError(f"{option} must be names of columns, separated by commas, got an empty name in {text!r}")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{option} must name each column once, got {twice!r} twice in {text!r}")
    return tuple(names)


def wanted(table: Sequence[TableColumn]) -> str:
    """Return the expected form of ``--given`` for a table.

    Example:
        >>> wanted([TableColumn("x", "condition"), TableColumn("m, kg", "condition")])
        'x=...,"m, kg=..."'
    """
    return ",".join(f'"{c.name}=..."' if "," in c.name else f"{c.name}=..." for c in conditions(table))


def parse_given(text: str, table: Sequence[TableColumn]) -> dict[str, str]:
    """Parse ``"x=1.5,z=low"`` into values by column.

    Raises:
        ConfigError: for an entry without ``=``, or a column that is not a condition, missing or repeated.

    Example:
        >>> parse_given("x=1.5", [TableColumn("x", "condition")])
        {'x': '1.5'}
    """
    known = [c.name for c in conditions(table)]
    expected = f"expected {wanted(table)}"
    values: dict[str, str] = {}
    for entry in split_names(text, "--given"):
        # a name may contain an equals sign
        name = max((n for n in known if entry.startswith(f"{n}=")), key=len, default=entry.partition("=")[0].strip())
        value = entry[len(name) :].lstrip()
        fault = None
        if not value.startswith("="):
            fault = f"{entry!r} is no name=value"
        elif name not in known:
            fault = f"this run is not conditioned on {name!r}"
        elif name in values:
            fault = f"{name!r} occurs twice"
        if fault:
            raise ConfigError(f"--given {text}: {fault}; {expected}")
        values[name] = value.removeprefix("=").strip()
    if missing := [name for name in known if name not in values]:
        raise ConfigError(f"--given {text}: {', '.join(map(repr, missing))} is missing; {expected}")
    return values
