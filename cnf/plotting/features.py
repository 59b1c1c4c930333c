"""Plots of predictors: evolution of the features, 1-D trajectories, learned depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.lines import Line2D
from torch import Tensor

from cnf._utils.errors import ConfigError
from cnf.neural_ode import NeuralODE
from cnf.plotting.boundary import input_grid, input_line, mark_colours
from cnf.plotting.canvas import array, aspect_of, box_around, new_figure, save_figure, subplots

__all__ = ["draw_states", "feature_evolution", "features_training", "learned_depth", "paths_1d"]

FITTED = 1000  # states used for the principal axes: all those of images would take minutes


def _space(states: Any) -> tuple[Any, tuple[str, ...]]:
    """Project states (times, N, D) to at most three coordinates: unchanged if D is 2 or 3, else their principal axes (fitted to a subset).

    These are turned so that the first states lie flat in the first two, as those of augmented points do.
    """
    if states.shape[2] <= 3:
        return states, ("$x_1$", "$x_2$", "$x_3$")[: states.shape[2]]
    flat = states.reshape(-1, states.shape[2]).astype(float)
    flat = flat - flat.mean(0)
    _, _, axes = np.linalg.svd(flat[:: 1 + len(flat) // FITTED], full_matrices=False)
    three = flat @ axes[:3].T
    first = three[: states.shape[1]]
    _, _, turn = np.linalg.svd((first - first.mean(0))[:: 1 + len(first) // FITTED], full_matrices=False)
    three = three @ turn.T if len(turn) == 3 else three
    share = (three**2).sum(0) / max(1e-300, (flat**2).sum())
    return three.reshape(*states.shape[:2], 3), tuple(f"axis {i + 1} ({100 * s:.0f} %)" for i, s in enumerate(share))


def _histograms(axis: Any, values: Any, marks: Any, edges: Any, handles: Sequence[Line2D]) -> None:
    """Plot histograms of values (N,), one for each level of the marks; a single one for a continuous target."""
    for handle, level in zip(handles, np.unique(marks), strict=False):
        axis.hist(values[marks == level], bins=edges, alpha=0.6, color=handle.get_color())
    if not handles:
        axis.hist(values, bins=edges, color="tab:blue")


def feature_evolution(
    model: NeuralODE, x: Tensor, marks: Tensor, path: Path, *, classes: Sequence[str] = (), times: int = 5
) -> Path:
    """Plot the states of points at several times, in two or three dimensions or on their first three principal axes.

    All panels share a frame, unless the spread of the states varies more than fourfold. States of one dimension are
    drawn as histograms.

    Args:
        model: in evaluation mode.
        x: inputs (N, \\*event).
        marks: (N,) class indices, or targets.
        path: output PNG.
        classes: names of the classes; empty for regression.
        times: number of panels, from 0 to T.

    Raises:
        ConfigError: for fewer than two panels.
    """
    if times < 2:
        raise ConfigError(f"times must be at least 2 panels, got {times}")
    ticks = torch.linspace(0, 1, times)
    states = array(model.trajectory(x.to(model.like.device), ticks).flatten(2))
    titles = [f"t = {tick:g} T" + ("(x)" if model.depth is not None else "") for tick in ticks.tolist()]
    return _panels(states, marks, titles, path, classes)


def features_training(frames: Mapping[int, Tensor], marks: Tensor, path: Path, *, classes: Sequence[str] = ()) -> Path:
    """Plot the features of the same points at several steps of a training (ANODE, 1904.01681, figure 6).

    Panels are as in :func:`feature_evolution`, with principal axes that all of them share.

    Args:
        frames: features (N, \\*state) by step.
        marks: (N,) class indices, or targets.
        path: output PNG.
        classes: names of the classes; empty for regression.

    Raises:
        ConfigError: without a frame.
    """
    if not frames:
        raise ConfigError("frames is empty: expected the features of at least one step")
    steps = sorted(frames)
    states = np.stack([array(frames[step].flatten(1).double()) for step in steps])
    return _panels(states, marks, [f"step {step:,}" for step in steps], path, classes)


def _panels(states: Any, marks: Tensor, titles: Sequence[str], path: Path, classes: Sequence[str]) -> Path:
    """Plot states (panels, N, D) side by side."""
    solid = states.shape[2] > 2
    figure = new_figure((3.1 if solid else 2.7) * len(titles), 3.7)
    axes = [figure.add_subplot(1, len(titles), 1 + i, projection="3d" if solid else None) for i in range(len(titles))]
    handles = draw_states(axes, states, marks, classes=classes)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=9)
    return save_figure(figure, path, handles, fontsize=8)


def draw_states(axes: Sequence[Any], states: Any, marks: Tensor, *, classes: Sequence[str] = ()) -> list[Line2D]:
    """Draw states (panels, N, D) on one axis each, of three dimensions if D is above 2; return the handles of a legend.

    All have one frame, unless the spread of the states varies more than fourfold.
    """
    colours, handles = mark_colours(marks, classes)
    spread = np.ptp(states.reshape(len(axes), -1), axis=1)
    shared = bool(spread.max() <= 4 * spread.min()) or states.shape[2] == 1
    points, names = _space(states)
    if states.shape[2] == 1:
        edges = np.linspace(states.min() - 1e-6, states.max() + 1e-6, 41)
        for axis, state in zip(axes, states[..., 0], strict=True):
            _histograms(axis, state, array(marks), edges, handles)
            axis.set_xlabel(names[0])
        axes[0].set_ylabel("points")
        top = max(axis.get_ylim()[1] for axis in axes)
        for axis in axes:
            axis.set(xlim=edges[[0, -1]], ylim=(0, top))
        return handles
    for i, (axis, state) in enumerate(zip(axes, points, strict=True)):
        own = (points if shared else state).reshape(-1, len(names))
        axis.scatter(*state.T, s=5, c=colours, alpha=0.6, linewidths=0)
        if len(names) == 3:
            low, high = own.min(0), own.max(0)
            axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), zlim=(low[2], high[2]))
            size = np.maximum(high - low, 1e-3 * (high - low).max())
            axis.set_box_aspect(size, zoom=0.85)
            for name, label in zip(names, (axis.set_xlabel, axis.set_ylabel, axis.set_zlabel), strict=True):
                label(name, fontsize=7, labelpad=-7)
            for name, share in zip("xyz", size / size.max(), strict=True):
                axis.locator_params(axis=name, nbins=1 + round(3 * share))
            axis.tick_params(labelsize=6, pad=-3)
        else:
            box = box_around(own)
            axis.set(xlim=box[:2], ylim=box[2:], aspect=aspect_of(box) if shared else "auto")
            axis.set_xlabel(names[0], fontsize=8)
            axis.tick_params(labelsize=7, labelleft=not (shared and i))
    if len(names) == 2:
        axes[0].set_ylabel(names[1], fontsize=8)
    return handles


def paths_1d(model: NeuralODE, x: Tensor, marks: Tensor, path: Path) -> Path:
    """Plot trajectories x(t) of one-dimensional points; of augmented states the first entry, whose paths may cross.

    With adaptive depth each path ends at its own T(x), and the axis is t: the paths cross only on a shared axis t / T.

    Args:
        model: in evaluation mode.
        x: inputs (N, 1).
        marks: (N,) class indices or targets, which colour the paths.
        path: output PNG.
    """
    ticks = torch.linspace(0, 1, 60)
    x = x.to(model.like.device)
    states, times = array(model.trajectory(x, ticks))[..., 0], array(ticks)[:, None]
    if model.depth is not None:
        times = times * array(model.end_time(x))
    colours, handles = mark_colours(marks, ())
    figure = new_figure(6.4, 4.6)
    axis = subplots(figure)
    for i in range(states.shape[1]):
        colour = colours[i] if handles else "tab:blue"
        axis.plot(times[:, i if model.depth is not None else 0], states[:, i], color=colour, lw=0.6, alpha=0.5)
        if model.depth is not None:
            axis.plot(times[-1, i], states[-1, i], ".", color=colour, ms=4)
    across = "t / T" if model.depth is None else "$t$, from 0 to $T(x)$"
    axis.set(xlabel=across, ylabel="$x(t)$" if model.augment == 0 else "first entry of the state", title="trajectories")
    axis.grid(alpha=0.3)
    return save_figure(figure, path, handles)


@torch.no_grad()
def learned_depth(
    model: NeuralODE, x: Tensor, marks: Tensor, path: Path, *, classes: Sequence[str] = (), resolution: int = 160
) -> Path:
    """Plot the end time T(x) of a model with adaptive depth, together with the data.

    Inputs of one dimension give a curve, of two a map; for others histograms of T over the data, one per class or
    target.

    Args:
        model: in evaluation mode.
        x: inputs (N, \\*event).
        marks: (N,) class indices, or targets.
        path: output PNG.
        classes: names of the classes; empty for regression.
        resolution: cells along each axis of the map.

    Raises:
        ConfigError: for a model without adaptive depth.
    """
    if model.depth is None:
        raise ConfigError("model must have adaptive depth, so that T(x) depends on x; got adaptive_depth=False")
    colours, handles = mark_colours(marks, classes)
    figure = new_figure(6.2, 4.6)
    axis = subplots(figure)
    ends = array(model.end_time(x.to(model.like.device)))
    if model.event_shape == (1,):
        line = input_line(model, x)
        axis.plot(array(line), array(model.end_time(line)), color="black", zorder=0)
        axis.scatter(array(x)[:, 0], ends, 12, c=colours, alpha=0.5, linewidths=0)
        axis.set(xlabel="$x$", ylabel="$T(x)$", ylim=(0, None))
    elif model.event_shape == (2,):
        box, grid = input_grid(model, x, resolution)
        values = torch.cat([model.end_time(part) for part in grid.split(20_000)])
        picture = array(values).reshape(resolution, resolution).T
        image = axis.imshow(picture, origin="lower", extent=box, cmap="viridis", aspect="auto")
        figure.colorbar(image, ax=axis, label="$T(x)$")
        axis.scatter(*array(x).T, 9, c=colours, edgecolors="black", linewidths=0.25)
        axis.set(xlabel="$x_1$", ylabel="$x_2$", aspect=aspect_of(box))
    else:
        _histograms(axis, ends, array(marks), np.linspace(ends.min() - 1e-6, ends.max() + 1e-6, 41), handles)
        axis.set(xlabel="$T(x)$", ylabel="events")
    axis.set_title("learned depth")
    return save_figure(figure, path, handles)
