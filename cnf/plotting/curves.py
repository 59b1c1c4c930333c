"""Learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnf.plotting.canvas import new_figure, save_figure, set_loss_limits, subplots

__all__ = ["learning_curves", "validation_curves"]


def learning_curves(metrics: list[dict[str, Any]], path: Path, *, unit: str, name: str = "nll") -> Path:
    """Plot training and validation losses over the steps, and below flow matching's loss and the evaluations of the solves.

    A loss that falls by more than a factor of 100 has a log scale. A panel without values is left out. Every validation
    is within the frame.

    Args:
        metrics: rows of metrics.jsonl: ``step`` and, where logged, the loss, ``validation``, ``nfe``, ``nfe_backward``
            and ``validation_nfe``.
        path: output PNG.
        unit: unit of the losses, such as ``"bits/dim"`` or ``"nats"``.
        name: key of the training loss in the rows.
    """
    averaged = {"lw": 1.4, "marker": "o", "ms": 3.5, "color": "black"}
    losses = ((name, "training batch", {"lw": 0.9, "alpha": 0.7}), ("validation", "validation (averaged weights)", averaged))
    solves = (
        ("nfe", "training, forward", {"lw": 1.2}),
        ("nfe_backward", "training, backward", {"lw": 1.2}),
        ("validation_nfe", "validation", averaged),
    )
    rows = {key: [(m["step"], m[key]) for m in metrics if key in m and np.isfinite(m[key])] for key, *_ in (*losses, *solves)}
    panels: list[tuple[Any, str]] = [(losses, unit)]
    if name == "nll" and any("loss" in row and "nll" not in row for row in metrics):  # flow matching's error is no likelihood
        rows["matching"] = [(m["step"], m["loss"]) for m in metrics if "loss" in m and "nll" not in m and np.isfinite(m["loss"])]
        panels.append(((("matching", "flow matching, training batch", {"lw": 0.9, "alpha": 0.7, "color": "C2"}),), "loss"))
    if solved := tuple(line for line in solves if any(value for _, value in rows[line[0]])):
        panels.append((solved, "evaluations a solve"))
    figure = new_figure(8, 3.4 + 1.6 * len(panels))
    axes = subplots(figure, len(panels), 1, sharex=True, squeeze=False, height_ratios=[2] + [1] * (len(panels) - 1))[:, 0]
    for axis, (lines, label_of) in zip(axes, panels, strict=True):
        axis.set_ylabel(label_of)
        for key, label, style in lines:
            if rows[key]:
                axis.plot(*zip(*rows[key], strict=True), label=label, **style)
                axis.legend(fontsize=8, loc="best")
        axis.grid(alpha=0.3)
    axis.set_xlabel("step")
    top = axes[0]
    shown, checked = ([value for key in keys for _, value in rows[key]] for keys in ((name, "validation"), ("validation",)))
    if shown and min(shown) > 0 and max(shown if name == "loss" else checked or shown) > 100 * min(shown):  # orders of magnitude
        top.set_yscale("log")
    elif shown:
        set_loss_limits(top, shown, 0.97, checked)
    top.set_title("learning curves")
    for axis, (_, label_of) in zip(axes, panels, strict=True):
        if label_of == "loss":
            axis.set_yscale("log")
        elif label_of == "evaluations a solve":
            axis.set_ylim(0, 1.08 * max(1.0, axis.dataLim.y1))
    return save_figure(figure, path)


def validation_curves(curves: Mapping[str, Sequence[tuple[int, float]]], path: Path, *, unit: str) -> Path:
    """Plot the validation curves of several runs.

    Args:
        curves: name of a run -> (step, validation) of each validation.
        path: output PNG.
        unit: unit of the values.
    """
    figure = new_figure(8, 5)
    axis = subplots(figure, 1, 1)
    for name, rows in curves.items():
        axis.plot(*zip(*rows, strict=True), label=name, lw=1.4, marker="o", ms=3.5)
    set_loss_limits(axis, [value for rows in curves.values() for _, value in rows], 0.9)
    axis.set(xlabel="step", ylabel=unit, title="validation")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="best")
    return save_figure(figure, path)
