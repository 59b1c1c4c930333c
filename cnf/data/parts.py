"""Duplicates, splits and classes of a custom data set."""

from __future__ import annotations

from typing import Any

import numpy as np

from cnf._utils.errors import ConfigError, DataError
from cnf.data.rows import Array, hold_out
from cnf.data.splits import Options, encode_labels, split_rows

__all__ = ["classes_of", "drop_duplicates", "split"]

MANY = 0.1  # share of duplicate rows above which they are probably intended


def drop_duplicates(repeated: Array, sizes: list[int], options: Options) -> tuple[Array, list[str]]:
    """Return the row numbers to keep, and notices; a given split keeps all rows."""
    count, everything = int(repeated.sum()), np.arange(len(repeated))
    if not count:
        return everything, []
    if len(sizes) == 1 and options.duplicates == "drop":
        notice = f"{count:,} exact duplicate rows dropped before splitting: they would leak into the test set"
        if count > MANY * len(repeated):
            notice += f" (they are {count / len(repeated):.0%} of all: where repetition is information, as in tables of categories, duplicates='keep')"
        return everything[~repeated], [notice]
    if len(sizes) == 1:
        notice = f"{count:,} exact duplicate rows kept (duplicates='keep'): those that fall into two splits leak"
    else:
        test = int(repeated[-sizes[-1] :].sum())
        notice = f"{count:,} exact duplicate rows kept, since the split is given; {test:,} of them in the test part"
    return everything, [notice]


def split(sizes: list[int], kept: Array, options: Options) -> tuple[list[Array], str]:
    """Return the row numbers of train, validation and test, and a notice.

    Args:
        sizes: number of rows of each given part: all in one, train and test, or train, validation and test.
        kept: row numbers without dropped duplicates.

    Raises:
        DataError: for an empty part, or too few rows.
        ConfigError: for split options that a given split overrides.
    """
    if len(sizes) == 1:
        chosen, notice = split_rows(len(kept), options)
        return [kept[i] for i in chosen], notice
    fixed = ["test_fraction"] if len(sizes) == 2 else ["test_fraction", "validation_fraction"]
    if len(sizes) == 3 and options.limit is None:
        fixed.append("split_seed")
    if idle := options.changed(fixed):
        raise ConfigError(f"{idle}={getattr(options, idle)} does not apply, since the data bring their own split")
    ends = np.cumsum(sizes)
    if min(sizes) == 0:
        part = (("train", "validation", "test") if len(sizes) == 3 else ("train", "test"))[sizes.index(0)]
        raise DataError(f"the {part} part that was given is empty; expected at least one row")
    if len(sizes) == 3:
        return [np.arange(e - n, e) for e, n in zip(ends, sizes, strict=True)], "split as it is given"
    held = max(1, round(sizes[0] * options.validation_fraction))
    if sizes[0] < held + 2:
        raise DataError(f"{sizes[0]} training rows are too few to hold some out for validation; expected at least 3")
    train, validation = hold_out(sizes[0], held, options.split_seed)
    notice = f"test set as it is given; validation split off the training part by split_seed {options.split_seed}"
    return [train, validation, np.arange(ends[0], ends[1])], notice


def classes_of(labels: Array | None, parts: list[Array]) -> dict[str, Any]:
    """Return the class indices of each part and the class names, as arguments of :func:`assemble`."""
    if labels is None:
        return {}
    codes, classes = encode_labels(labels)
    return {"codes": [codes[i] for i in parts], "classes": classes}
