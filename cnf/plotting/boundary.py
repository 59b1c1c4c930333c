"""Plots of a predictor's outputs over the input space, and what plots of predictors share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from torch import Tensor

from cnf._utils.errors import ConfigError
from cnf.neural_ode import Predictor
from cnf.plotting.canvas import Box, array, aspect_of, box_around, new_figure, save_figure, subplots

__all__ = ["decision_boundaries", "decision_boundary", "input_grid", "input_line", "mark_colours"]


def mark_colours(marks: Tensor, classes: Sequence[str]) -> tuple[Any, list[Line2D]]:
    """Return a colour for each row, and the legend's entries."""
    values = array(marks)
    if classes:
        names, codes = list(classes), values.astype(int)
        palette = [f"C{i}" for i in range(len(names))]
    else:
        levels = np.unique(values)
        if len(levels) > 6:  # a continuous target: shades without a legend
            return values, []
        names, codes = [f"target {v:g}" for v in levels], np.searchsorted(levels, values)
        palette = ["tab:blue", "tab:red", "tab:green", "tab:orange", "tab:purple", "tab:brown"]
    handles = [Line2D([], [], color=palette[i], marker="o", ls="", ms=5, label=name) for i, name in enumerate(names)]
    return np.array(palette)[codes], handles


def input_line(model: Predictor, x: Tensor) -> Tensor:
    """Return points (400, 1) along the axis of inputs (N, 1), with margins."""
    low, high = float(x.min()), float(x.max())
    room = 0.15 * (high - low)
    return torch.linspace(low - room, high + room, 400)[:, None].to(model.like)


def input_grid(model: Predictor, x: Tensor, resolution: int) -> tuple[Box, Tensor]:
    """Return a frame around inputs (N, 2), and the points (resolution**2, 2) of a grid on it."""
    box = box_around(x, 0.1)
    ticks = [torch.linspace(low, high, resolution) for low, high in (box[:2], box[2:])]
    return box, torch.cartesian_prod(*ticks).to(model.like)


@torch.no_grad()
def decision_boundary(
    model: Predictor, x: Tensor, marks: Tensor, path: Path, *, classes: Sequence[str] = (), resolution: int = 160
) -> Path:
    """Plot the model's predictions over the input space, together with the data, in one or two dimensions.

    Regression shows the first output, classification the most probable class shaded by its probability; in one
    dimension, curves.

    Args:
        model: in evaluation mode.
        x: inputs (N, 1) or (N, 2).
        marks: (N,) class indices, or targets.
        path: output PNG.
        classes: names of the classes; empty for regression.
        resolution: cells along each axis.

    Raises:
        ConfigError: for inputs of another dimension.
    """
    figure = new_figure(6.2, 5.2)
    axis = subplots(figure)
    handles = _panel(axis, model, x, marks, classes, resolution)
    axis.set_title("decision boundary" if classes else "prediction")
    return save_figure(figure, path, handles)


@torch.no_grad()
def decision_boundaries(
    models: Mapping[str, Predictor], x: Tensor, marks: Tensor, path: Path, *, classes: Sequence[str] = (), resolution: int = 100
) -> Path:
    """Plot :func:`decision_boundary` of several models on the same data, four panels a row.

    Args:
        models: in evaluation mode, by title.
        x, marks, path, classes, resolution: as for :func:`decision_boundary`.

    Raises:
        ConfigError: for no model, or inputs of another dimension.
    """
    if not models:
        raise ConfigError("models is empty: expected at least one")
    across = min(4, len(models))
    rows = math.ceil(len(models) / across)
    figure = new_figure(3.1 * across, 3.2 * rows + 0.4)
    axes = subplots(figure, rows, across, squeeze=False, sharex=True, sharey=True).ravel()
    for axis, (title, model) in zip(axes, models.items(), strict=False):
        handles = _panel(axis, model, x, marks, classes, resolution)
        axis.set_title(title, fontsize=10)
        axis.label_outer()
    for axis in axes[len(models) :]:
        axis.set_axis_off()
    return save_figure(figure, path, handles)


def _panel(axis: Any, model: Predictor, x: Tensor, marks: Tensor, classes: Sequence[str], resolution: int) -> list[Line2D]:
    """Plot one model's predictions and the data; return the legend's entries."""
    if model.event_shape not in ((1,), (2,)):
        raise ConfigError(f"model must have inputs of one or two dimensions for a decision boundary, got event shape {model.event_shape}")
    colours, handles = mark_colours(marks, classes)
    if model.event_shape == (1,):
        _curves(model, x, marks, axis, colours, classes)
    else:
        box, grid = input_grid(model, x, resolution)
        out = torch.cat([model(part) for part in grid.split(20_000)]).double().cpu()
        if classes:
            probability, chosen = out.softmax(1).max(1)
            palette = np.array([to_rgb(f"C{i}") for i in range(len(classes))])
            strength = 0.55 * array(probability)[:, None]  # white where no class is probable
            picture = 1 - strength * (1 - palette[array(chosen)])
            axis.imshow(picture.reshape(resolution, resolution, 3).swapaxes(0, 1), origin="lower", extent=box, aspect="auto")
        else:
            values = array(out[:, 0]).reshape(resolution, resolution).T
            top = max(1.0, float(np.quantile(np.abs(values), 0.99)))
            image = axis.imshow(values, origin="lower", extent=box, cmap="coolwarm", vmin=-top, vmax=top, aspect="auto")
            axis.figure.colorbar(image, ax=axis, label="prediction", extend="both")
            if values.min() < 0 < values.max():
                axis.contour(values, levels=[0.0], extent=box, colors="black", linewidths=1)
        axis.scatter(*array(x).T, 9, c=colours, edgecolors="black", linewidths=0.25)
        axis.set(xlabel="$x_1$", ylabel="$x_2$", aspect=aspect_of(box))
    return handles


def _curves(model: Predictor, x: Tensor, marks: Tensor, axis: Any, colours: Any, classes: Sequence[str]) -> None:
    """Plot the outputs over the one coordinate."""
    line = input_line(model, x)
    out = model(line).double().cpu()
    if classes:
        for i, p in enumerate(out.softmax(1).T):
            axis.plot(array(line), array(p), color=f"C{i}")
        heights = np.full(len(x), -0.05)
    else:
        axis.plot(array(line), array(out[:, 0]), color="black", label="prediction")
        heights = array(marks)
    axis.scatter(array(x)[:, 0], heights, 10, c=colours, alpha=0.5, linewidths=0)
    axis.set(xlabel="$x$", ylabel="probability" if classes else "output and target")
    axis.grid(alpha=0.3)
