"""Learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnf.plotting.canvas import new_figure, save_figure, set_loss_limits, subplots

__all__ = ["learning_curves", "validation_curves"]


def learning_curves(metrics: list[dict[str, Any]], path: Path, *, unit: str, name: str = "nll") -> Path:
    """Plot training and validation losses over the steps, and the evaluations of their solves below.

    A ``loss`` that falls by more than a factor of 100 has a log scale. Without solves there is no lower panel.

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
    solved = [line for line in solves if any(value for _, value in rows[line[0]])]
    figure = new_figure(8, 6)
    top, *below = subplots(figure, 2, 1, sharex=True, height_ratios=[2, 1]) if solved else [subplots(figure, 1, 1)]
    for axis, lines in zip((top, *below), (losses, solved), strict=False):
        for key, label, style in lines:
            if rows[key]:
                axis.plot(*zip(*rows[key], strict=True), label=label, **style)
                axis.legend(fontsize=8, loc="best")
        axis.grid(alpha=0.3)
    axis.set_xlabel("step")
    shown = [value for key, *_ in losses for _, value in rows[key]]
    if name == "loss" and shown and min(shown) > 0 and max(shown) > 100 * min(shown):  # it falls by orders of magnitude
        top.set_yscale("log")
    elif shown:
        set_loss_limits(top, shown, 0.97)
    top.set(ylabel=unit, title="learning curves")
    for bottom in below:
        bottom.set_ylabel("evaluations a solve")
        bottom.set_ylim(bottom=0)
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
