"""POWER, GAS, HEPMASS, MINIBOONE and BSDS300 with the preprocessing of the MAF paper (arXiv 1705.07057)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from cnf._utils.errors import ConfigError, DataError
from cnf._utils.untrusted import memory, require_file
from cnf.data.arrays import read_numpy
from cnf.data.checks import require_table, require_usable
from cnf.data.rows import Table, optional_module, reading
from cnf.data.splits import DataSplits, Options, assemble
from cnf.data.text import bounded_lines, read_csv

__all__ = ["NAMES", "load_tabular"]

Parts = tuple[Table, Table, Table]

NAMES = {
    "power": "UCI household power, 6 columns; root/power/data.npy",
    "gas": "UCI gas sensors, 8 columns; root/gas/ethylene_CO.npy or .csv",
    "hepmass": "UCI HEPMASS, 21 columns; root/hepmass/1000_train.csv and 1000_test.csv",
    "miniboone": "UCI MiniBooNE, 43 columns; root/miniboone/data.npy",
    "bsds300": "8x8 patches of BSDS300, 63 columns; root/BSDS300/BSDS300.hdf5",
}
WIDTH = {"power": 6, "gas": 8, "hepmass": 21, "miniboone": 43, "bsds300": 63}
_HEPMASS_FEATURES = 27
_CONVERT_GAS = (
    "; the published ethylene_CO.pickle is never opened, because a pickle can run code; where you trust it, convert it "
    "once: python -c \"import pandas; pandas.read_pickle('ethylene_CO.pickle').to_csv('ethylene_CO.csv', index=False)\""
)


def load_tabular(name: str, options: Options) -> DataSplits:
    """Load one of :data:`NAMES`, standardised by the training rows (BSDS300 as published).

    One difference from the published preprocessing, which standardises GAS by all rows and POWER and MINIBOONE by
    training and validation rows together. Rows, columns and their order are the published ones; nothing else is dropped
    or dequantised.

    Raises:
        DataError: for a missing or malformed file.
        ConfigError: for non-default ``discrete`` or ``duplicates``, which the published protocol fixes.
    """
    if options.discrete != "dequantize" or options.duplicates != "drop":
        raise ConfigError(f"discrete and duplicates are fixed by the published protocol of {name!r}; leave them at their defaults")
    parts, notices = _READERS[name](options.folder)
    width = parts[0].shape[1]
    if width != WIDTH[name]:
        notices.append(f"{width} columns, where the published preprocessing has {WIDTH[name]}: figures do not compare")
    columns = tuple(f"column {j}" for j in range(width))
    for part, table in zip(("training", "validation", "test"), parts, strict=True):
        if len(table) == 0 or not np.isfinite(table).all():
            raise DataError(f"the {part} part of {name!r} is empty or holds NaN; expected the published files, complete")
    require_usable(parts[0], columns, name)
    if name != "bsds300":
        mean, std = parts[0].mean(0), parts[0].std(0)
        parts = (parts[0] - mean) / std, (parts[1] - mean) / std, (parts[2] - mean) / std
        notices.append("standardised by the mean and deviation of the training rows: nats are in these units")
    return assemble(name, "table", parts, options, columns=columns, notices=notices)


def _find(name: str, folders: tuple[Path, ...], files: tuple[str, ...], advice: str = "") -> Path:
    """Return the first of the files that exists."""
    for folder in folders:
        for file in files:
            if (folder / file).is_file():
                return folder / file
    wanted = " or ".join(repr(str((folders[0] / f).resolve())) for f in files)
    raise DataError(f"{name} needs {wanted}, which does not exist; data/README.md says where to get it{advice}")


def _tenths(table: Table, notices: list[str]) -> Parts:
    """Split off the last tenth for testing and the last tenth of the rest for validation."""
    rest, test = np.split(table, [len(table) - len(table) // 10])
    train, validation = np.split(rest, [len(rest) - len(rest) // 10])
    notices.append("the last tenth is the test set, the last tenth of the rest validation (published split)")
    return train, validation, test


def _array(path: Path) -> Table:
    arrays = read_numpy(path)
    if set(arrays) != {"x"}:
        raise DataError(f"{str(path)!r} must be a plain .npy array, got the keys {sorted(arrays)}")
    require_table(arrays["x"], str(path))
    return arrays["x"].astype(np.float64)


def _power(root: Path) -> tuple[Parts, list[str]]:
    table = _array(_find("power", (root / "power",), ("data.npy",)))
    if table.shape[1] != 8:
        raise DataError(f"power/data.npy must have 8 columns (active and reactive power, voltage, intensity, 3 meters, minute), got {table.shape[1]}")
    rng = np.random.RandomState(42)
    rng.shuffle(table)
    table = np.delete(table, [1, 3], axis=1)
    n = len(table)
    voltage, active, meters = 0.01 * rng.rand(n, 1), 0.001 * rng.rand(n, 1), rng.rand(n, 3)
    table = table + np.hstack([active, voltage, meters, np.zeros((n, 1))])
    notices = ["uniform noise of 0.001, 0.01 and 1 on power, voltage and meters (published); the minute stays on its lattice"]
    return _tenths(table, notices), notices


def _gas(root: Path) -> tuple[Parts, list[str]]:
    path = _find("gas", (root / "gas",), ("ethylene_CO.npy", "ethylene_CO.csv"), _CONVERT_GAS)
    if path.suffix == ".csv":
        values, columns = read_csv(path)
        table = values[:, [j for j, c in enumerate(columns) if c not in ("Time", "Meth", "Eth")]]
    else:
        table = _array(path)
    if table.shape[1] == 19:  # the UCI file, with time and two concentrations first
        table = table[:, 3:]
    if table.shape[1] != 16:
        raise DataError(f"{str(path)!r} must have 16 sensor columns (or 19 with Time, Meth and Eth first), got {table.shape[1]}")
    if len(table) < 3:
        raise DataError(f"{str(path)!r} must have the published 4 million rows, got {len(table)}")
    while True:  # drop the first column that correlates above 0.98 with another, until none does
        crowded = (np.atleast_2d(np.corrcoef(table, rowvar=False)) > 0.98).sum(1) > 1
        if not crowded.any():
            break
        table = np.delete(table, int(crowded.argmax()), axis=1)
    notices = ["columns that correlate above 0.98 with another dropped"]
    return _tenths(table, notices), notices


def _hepmass(root: Path) -> tuple[Parts, list[str]]:
    tables = []
    for part in ("train", "test"):
        path = _find("hepmass", (root / "hepmass",), (f"1000_{part}.csv",))
        # label and 27 features; the trailing columns (a mass, a stray delimiter) differ between the two files
        used = range(1 + _HEPMASS_FEATURES)
        with reading(path, "a header, then rows of a label and 27 features"), path.open(encoding="utf-8") as file:
            table = np.loadtxt(bounded_lines(file), delimiter=",", skiprows=1, usecols=used, ndmin=2)
        tables.append(table[table[:, 0] == 1.0, 1:])
    if min(map(len, tables)) == 0:
        raise DataError("hepmass has no rows of class 1; expected the published files")
    # a feature whose smallest value occurs more than five times is not continuous
    keep = [j for j, column in enumerate(tables[0].T) if int((column == column.min()).sum()) <= 5]
    if not keep:
        raise DataError("hepmass has no continuous feature; expected the published files")
    rest, test = tables[0][:, keep], tables[1][:, keep]
    cut = len(rest) - len(rest) // 10
    return (rest[:cut], rest[cut:], test), ["class 1 only; the last tenth of the training file is validation (published split)"]


def _miniboone(root: Path) -> tuple[Parts, list[str]]:
    notices: list[str] = []
    return _tenths(_array(_find("miniboone", (root / "miniboone",), ("data.npy",))), notices), notices


def _bsds300(root: Path) -> tuple[Parts, list[str]]:
    path = _find("bsds300", (root / "BSDS300", root / "bsds300"), ("BSDS300.hdf5",))
    require_file(path, DataError)
    h5py = optional_module("h5py", "bsds300 is an HDF5 file and")
    with reading(path, "HDF5 with train, validation and test"), h5py.File(path, "r") as file:
        parts = [file[k] for k in ("train", "validation", "test")]
        if any(p.ndim != 2 or p.dtype.kind not in "iuf" for p in parts) or sum(8 * p.size for p in parts) > memory():
            raise ValueError("they are no tables of numbers, or more than the memory holds")
        train, validation, test = (np.asarray(p, dtype=np.float64) for p in parts)
    return (train, validation, test), ["split and preprocessed by the file"]


_READERS: dict[str, Callable[[Path], tuple[Parts, list[str]]]] = {
    "power": _power,
    "gas": _gas,
    "hepmass": _hepmass,
    "miniboone": _miniboone,
    "bsds300": _bsds300,
}
