"""Tables that the estimators are given: values that are no numbers, and columns that single precision cannot hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cnf._utils.errors import DataError
from cnf._utils.validation import require_unmasked
from cnf.flow import Flow
from cnf.transforms import Sequential, Standardize

__all__ = ["Units", "require_numbers", "spread"]

Array = NDArray[np.float64]

FAR = 100.0  # standard deviations; at 1e5 of them a value in single precision has two digits left
WIDE = 30  # powers of two: with squares of larger or smaller values single precision overflows, or counts as zero


def require_numbers(x: Any, name: str = "X") -> None:
    """Raise a DataError for masked values, dates, and the first column of a DataFrame with another's name, text or dates.

    scikit-learn ignores a mask, and does not name the column.
    """
    require_unmasked(name, x)
    if getattr(getattr(x, "dtype", None), "kind", "") in tuple("Mm"):  # scikit-learn would count nanoseconds
        raise DataError(f"{name} holds dates or durations: convert it to numbers, such as days")
    if not hasattr(x, "select_dtypes"):
        return
    if len(twice := x.columns[x.columns.duplicated()]):
        raise DataError(f"{name} has two columns {twice[0]!r}: rename one of them")
    for label in x.columns[[t.kind not in "biufc" for t in x.dtypes]]:
        column = x[label].dropna()
        if getattr(column.dtype, "kind", "O") in "Mm":
            raise DataError(f"column {label!r} of {name} holds dates or durations: convert it to a number, such as days, or drop it")
        for value in column:
            try:
                float(value)
            except (TypeError, ValueError):
                raise DataError(f"column {label!r} of {name} holds {value!r}, which is no number: encode the column as numbers, or drop it") from None


def spread(x: Array) -> Array:
    """Return the standard deviations (D,) of columns, whose squares may be out of range."""
    largest = np.abs(x).max(0)
    unit = np.where(largest > 0, largest, 1.0)
    out: Array = (x / unit).std(0) * unit
    return out


@dataclass(frozen=True)
class Units:
    """Offset and unit (D,) of columns that single precision cannot hold, in which the fit computes; 0 and 1 for others."""

    shift: Array
    scale: Array

    @classmethod
    def of(cls, x: Array) -> Units:
        """Return the units of rows (N, D): the median as offset of a column far from 0, a power of two as unit of a huge or tiny one."""
        middle = np.median(x, axis=0)
        shift = np.where(np.abs(middle) > FAR * spread(x), middle, 0.0)
        largest = np.abs(x - shift).max(0)
        power = np.rint(np.log2(np.where(largest > 0, largest, 1.0)))
        return cls(shift, np.where(np.abs(power) > WIDE, 2.0**power, 1.0))

    @property
    def volume(self) -> float:
        """Nats per row by which a negative log-likelihood in these units is too low."""
        return float(np.log(self.scale).sum())

    def apply(self, x: Array) -> Array:
        """Return rows (N, D) in these units."""
        out: Array = (x - self.shift) / self.scale
        return out

    def undo(self, flow: Flow) -> Flow:
        """Return the flow of rows from that of rows in these units."""
        if not self.shift.any() and (self.scale == 1).all():
            return flow
        first = Standardize(torch.from_numpy(self.shift), torch.from_numpy(self.scale))
        return Flow(Sequential([first, flow.transform]), flow.event_shape, base=flow.base).eval()
