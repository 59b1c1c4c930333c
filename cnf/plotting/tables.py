"""Plots of tables: pairs of columns of data and samples, and the calibration of conditional densities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from cnf.plotting.canvas import array, new_figure, save_figure, subplots

__all__ = ["calibration_plot", "corner_plot"]

LIMITS = (0.005, 0.995)  # quantiles of the data that each axis spans, widened by a tenth
MOST_ROWS = 100_000
MOST_COLUMNS = 8  # in a plot of calibration


def corner_plot(samples: Tensor, data: Tensor, path: Path, *, columns: tuple[str, ...] = (), most: int = 8) -> Path:
    """Plot all pairs of columns: data below the diagonal, samples above it, both distributions on it.

    Axes are in the columns' units and span the data's quantiles 0.5 to 99.5 %. A positive column with a long tail (its
    quantile 99.5 % further above the median than ten times the distance of the 0.5 % below) has a logarithmic one.

    Args:
        samples: (N, D).
        data: (M, D).
        path: output PNG.
        columns: names of the columns.
        most: number of columns drawn, the first ones.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = corner_plot(torch.randn(500, 3), torch.randn(400, 3), Path(folder) / "corner.png", columns=("a", "b", "c"))
        ...     path.name
        'corner.png'
    """
    count = min(most, data.shape[1])
    drawn, known = (array(x[:MOST_ROWS, :count]).astype(np.float64) for x in (samples, data))
    names = columns[:count] or tuple(f"column {j}" for j in range(count))
    for j in range(count):
        if _heavy(known[:, j]):  # linear axes would show one bar
            drawn[:, j], known[:, j] = (np.log10(np.maximum(x[:, j], np.finfo(float).tiny)) for x in (drawn, known))
            names = (*names[:j], f"log10 {names[j]}", *names[j + 1 :])
    spans = [_span(known[:, j]) for j in range(count)]
    figure = new_figure(1.9 * count + 0.8, 1.9 * count + 0.6)
    axes = subplots(figure, count, count, squeeze=False)
    bins = int(np.clip(np.sqrt(min(len(known), len(drawn))) / 2, 12, 60))
    for i in range(count):
        for j in range(count):
            axis = axes[i][j]
            if i == j:
                edges = np.linspace(*spans[j], bins + 1)
                axis.hist(known[:, j], edges, density=True, alpha=0.5, label="data")
                axis.hist(drawn[:, j], edges, density=True, histtype="step", color="black", label="samples")
                axis.set_yticks([])
            else:
                rows, colour = (known, "Blues") if i > j else (drawn, "Greys")
                axis.hist2d(rows[:, j], rows[:, i], bins, range=(spans[j], spans[i]), cmap=colour, norm="symlog", rasterized=True)
                axis.set_ylim(spans[i])
            axis.set_xlim(spans[j])
            axis.tick_params(labelsize=7)
            axis.locator_params(nbins=4)
            if i < count - 1:
                axis.set_xticklabels([])
            else:
                axis.set_xlabel(names[j], fontsize=9)
                axis.tick_params(axis="x", rotation=45)
            if j or not i:
                axis.set_yticklabels([])
            if not j:
                axis.set_ylabel(names[i], fontsize=9)
    axes[0][0].legend(fontsize=7)
    shown = "" if count == data.shape[1] else f"; the first {count} of {data.shape[1]} columns"
    figure.suptitle(f"data below the diagonal, samples above{shown}", fontsize=10)
    return save_figure(figure, path)


def calibration_plot(ranks: Tensor, path: Path, *, title: str = "", columns: tuple[str, ...] = ()) -> Path:
    """Plot the distribution of probability integral transforms F(y | x), which is uniform for a calibrated density.

    Args:
        ranks: (N,) values of F(y | x) in [0, 1] on held-out rows, or (N, D) for several columns, of which 8 are drawn.
        path: output PNG.
        title: title of the plot.
        columns: names of the columns.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     calibration_plot(torch.rand(300), Path(folder) / "pit.png").name
        'pit.png'
    """
    values = array(ranks).astype(np.float64)
    values = np.sort(values.reshape(len(values), -1)[:, :MOST_COLUMNS], axis=0)
    names = columns[:MOST_COLUMNS] or tuple(f"column {j}" for j in range(values.shape[1]))
    bins = int(np.clip(np.sqrt(len(values)) / 2, 5, 20))
    figure = new_figure(8.4, 3.9)
    left, right = subplots(figure, 1, 2, squeeze=False)[0]
    for own, name in zip(values.T, names, strict=True):
        several = {"histtype": "step", "label": name} if len(names) > 1 else {"alpha": 0.6}
        left.hist(own, np.linspace(0, 1, bins + 1), density=True, **several)
        right.plot(np.linspace(0, 1, len(own)), own, lw=1.2)
    spread = 1.96 * np.sqrt(bins / max(1, len(values)))  # of a bin's density, if the values are uniform
    left.axhspan(1 - spread, 1 + spread, color="black", alpha=0.12, label="95 % if calibrated")
    left.axhline(1.0, color="black", lw=0.8)
    left.set(xlabel="F(y | x)", ylabel="density", xlim=(0, 1))
    left.legend(fontsize=8)
    right.plot([0, 1], [0, 1], color="black", lw=0.8)
    right.set(xlabel="expected share of rows", ylabel="quantile of F(y | x)", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    if title:
        figure.suptitle(title, fontsize=10)
    return save_figure(figure, path)


def _heavy(x: np.ndarray) -> bool:
    low, middle, high = np.quantile(x, (LIMITS[0], 0.5, LIMITS[1]))
    return bool(x.min() > 0 and high - middle > 10 * (middle - low))


def _span(x: np.ndarray) -> tuple[float, float]:
    low, high = (float(v) for v in np.quantile(x, LIMITS))
    extra = 0.1 * (high - low) or 0.5
    return low - extra, high + extra
