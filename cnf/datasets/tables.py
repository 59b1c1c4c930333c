"""Tables: duplicates, lattices, constant columns; and the benchmark sets of the MAF preprocessing (1705.07057)."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch

from cnf.datasets.splits import DataSplits, contexts, split_indices
from cnf.errors import DataError

__all__ = ["BENCHMARKS", "lattice_step", "load_benchmark", "load_table"]

BENCHMARKS = {
    "power": "household power, 6 columns (root/power/data.npy)",
    "gas": "gas sensors, 8 columns (root/gas/data.npy)",
    "hepmass": "particle collisions, 21 columns (root/hepmass/1000_train.csv and 1000_test.csv)",
    "miniboone": "particle detection, 43 columns (root/miniboone/data.npy)",
    "bsds300": "image patches, 63 columns (root/bsds300/train.npy, validation.npy, test.npy)",
}


def lattice_step(column: np.ndarray) -> float | None:
    """The step of a column whose values lie on a lattice, or None.

    A column counts as one if few values stand for many rows (at most a twentieth of the rows, or 20 values) and every gap
    between neighbouring values is a whole multiple of the smallest, to within float32's rounding.

    Example:
        >>> lattice_step(np.repeat([0.0, 0.5, 2.0], 100))
        0.5
    """
    values = np.unique(column)
    if len(values) < 2 or len(values) > max(20, len(column) // 20):
        return None
    gaps = np.diff(values)
    rounding = 4 * np.finfo(np.float32).eps * max(1e-30, float(np.abs(values).max()))
    gaps = gaps[gaps > rounding]
    step = float(gaps.min())
    multiples = np.round((values - values[0]) / step)
    # the step itself is known only to the rounding of one gap: refine it by the longest stretch
    step = float((values[-1] - values[0]) / multiples[-1])
    return step if bool(np.all(np.abs(values - values[0] - multiples * step) < 4 * rounding + 1e-3 * step)) else None


def load_table(
    name: str,
    values: np.ndarray,
    columns: tuple[str, ...],
    labels: np.ndarray | None,
    classes: tuple[str, ...],
    seed: int,
    condition: str | None,
    discrete: str,
    limit: int | None,
) -> DataSplits:
    """A table (N, D), checked, without exact duplicates, its lattices dequantised, split 80 / 10 / 10.

    Raises:
        DataError: NaN, a constant column, a lattice with ``discrete="error"``, too few rows, no labels to condition on.
    """
    columns = columns or tuple(f"{j}" for j in range(values.shape[1]))
    _check(name, values, columns)
    if condition and labels is None:
        raise DataError(f"condition={condition!r}, but {name} has no labels: give an npz file with an array 'labels'")
    if discrete not in ("dequantize", "keep", "error"):
        raise DataError(f"discrete={discrete!r}; expected 'dequantize', 'keep' or 'error'")
    keyed = values if labels is None else np.column_stack([values, labels])
    _, first = np.unique(keyed, axis=0, return_index=True)
    first.sort()
    notes = []
    if len(first) < len(values):
        notes.append(f"{len(values) - len(first):,} exact duplicate rows dropped: they would leak into the test set")
    values = values[first].astype(np.float64)
    labels = labels[first] if labels is not None else None
    rng = np.random.default_rng([seed, 1])
    for j, column in enumerate(columns):
        step = lattice_step(values[:, j])
        if step is None:
            continue
        what = f"column {column!r} takes {len(np.unique(values[:, j])):,} values on a lattice of step {step:.6g}"
        if discrete == "error":
            raise DataError(f"{name}: {what}, where a density is unbounded: --discrete dequantize adds one step of uniform noise")
        if discrete == "dequantize":
            values[:, j] += step * rng.random(len(values))
            notes.append(f"{what}: dequantised with one step of uniform noise")
        else:
            notes.append(f"{what}: kept as it is, so its density is unbounded and nats mean little")
    train, validation, test = split_indices(len(values), seed)
    train = train[:limit]
    notes.append(f"split by seed {seed}: {len(train):,} training, {len(validation):,} validation and {len(test):,} test rows")
    parts = [torch.from_numpy(values[i].astype(np.float32)) for i in (train, validation, test)]
    rows = contexts([labels[i] for i in (train, validation, test)] if labels is not None else [], len(classes), condition)
    return DataSplits(name, "table", parts[0], parts[1], parts[2], classes=classes, columns=columns, notices=tuple(notes), **rows)


def _check(name: str, values: np.ndarray, columns: tuple[str, ...]) -> None:
    if values.shape[1] < 1 or len(values) < 20:
        raise DataError(f"{name}: a table of shape {values.shape} is too small: expected at least 20 rows and 1 column")
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, j = bad[0]
        raise DataError(f"{name}: row {row + 1}, column {columns[j]!r} is {values[row, j]} ({len(bad):,} such cells): drop or fill them")
    for j, column in enumerate(columns):
        if values[:, j].min() == values[:, j].max():
            raise DataError(f"{name}: column {column!r} is constant ({values[0, j]:g}), which has no density: leave it out")


def load_benchmark(name: str, root: Path, limit: int | None) -> DataSplits:
    """POWER, GAS, HEPMASS, MINIBOONE or BSDS300: the last tenth for test, the last tenth of the rest for validation.

    The flow itself standardises by the training rows alone.

    Raises:
        DataError: where a file is missing, naming it.
    """
    folder = root / name
    if name == "bsds300":
        parts = [_array(folder / f"{part}.npy") for part in ("train", "validation", "test")]
    elif name == "hepmass":
        train, test = (_hepmass(folder / f"1000_{part}.csv") for part in ("train", "test"))
        # columns whose smallest value repeats are not continuous (the published preprocessing's rule)
        keep = [j for j in range(train.shape[1]) if np.unique(train[:, j], return_counts=True)[1].max() <= 5]
        cut = len(train) - len(train) // 10
        parts = [train[:cut, keep], train[cut:, keep], test[:, keep]]
    else:
        values = _array(folder / "data.npy")
        if name == "power":
            rng = np.random.RandomState(42)
            rng.shuffle(values)
            values = np.delete(values, [3, 1], axis=1)
            n = len(values)
            noise = [0.01 * rng.rand(n, 1), rng.rand(n, 3), np.zeros((n, 1))]
            values = values + np.hstack([0.001 * rng.rand(n, 1), *noise])
        if name == "gas":
            values = _decorrelate(values)
        test_n = len(values) // 10
        rest, test = values[:-test_n], values[-test_n:]
        parts = [rest[: -(len(rest) // 10)], rest[-(len(rest) // 10) :], test]
    columns = tuple(f"{j}" for j in range(parts[0].shape[1]))
    for part in parts:
        _check(name, part, columns)
    parts[0] = parts[0][:limit]
    note = f"{len(parts[0]):,} training, {len(parts[1]):,} validation and {len(parts[2]):,} test rows of {len(columns)} columns"
    tensors = [torch.from_numpy(p.astype(np.float32)) for p in parts]
    return DataSplits(name, "table", tensors[0], tensors[1], tensors[2], columns=columns, notices=(note,))


def _array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"{path} is missing: data/README.md says how to make it from the published files")
    try:
        return np.asarray(np.load(path, allow_pickle=False), dtype=np.float64)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a numeric .npy file: {error}") from None


def _hepmass(path: Path) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"{path} is missing: data/README.md says where it belongs")
    with path.open(newline="") as file:
        rows = [[float(c) for c in row] for i, row in enumerate(csv.reader(file)) if i]
    width = min(map(len, rows))  # one of the published files has a stray last column
    table = np.array([row[:width] for row in rows])
    return np.asarray(table[table[:, 0] == 1][:, 1:])


def _decorrelate(values: np.ndarray) -> np.ndarray:
    """Drop, greedily, columns that correlate above 0.98 with another (the published preprocessing's rule)."""
    while True:
        high = (np.corrcoef(values.T) > 0.98).sum(1)
        if high.max() <= 1:
            return values
        values = np.delete(values, int(np.argmax(high > 1)), axis=1)
