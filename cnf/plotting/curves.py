"""Learning curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cnf.plotting.canvas import new_figure, subplots, write

__all__ = ["learning_curves"]


def learning_curves(metrics: list[dict[str, Any]], path: Path, *, unit: str, name: str = "nll") -> Path:
    """Training and validation against steps, the solver's evaluations below; a ``loss`` that falls far on a log scale.

    Args:
        metrics: rows of metrics.jsonl: ``step``, and where they are due the loss, ``validation``, ``nfe``, ``nfe_backward``.
        path: of the PNG.
        unit: of the loss and of validation, such as ``"bits/dim"`` or ``"nats"``.
        name: of the loss in the rows.
    """
    figure = new_figure(8, 6)
    top, bottom = subplots(figure, 2, 1, sharex=True, height_ratios=[2, 1])
    lines = (
        (top, name, "training batch", {"lw": 0.9, "alpha": 0.7}),
        (top, "validation", "validation (averaged weights)", {"lw": 1.4, "marker": "o", "ms": 3.5, "color": "black"}),
        (bottom, "nfe", "forward", {"lw": 1.2}),
        (bottom, "nfe_backward", "backward", {"lw": 1.2}),
    )
    shown: list[float] = []
    for axis, key, label, style in lines:
        rows = [(m["step"], m[key]) for m in metrics if key in m and np.isfinite(m[key])]
        if not rows or (key == "nfe_backward" and not any(value for _, value in rows)):
            continue
        axis.plot(*zip(*rows, strict=True), label=label, **style)
        axis.legend(fontsize=8, loc="best")
        if axis is top:
            shown += [value for _, value in rows]
    if name == "loss" and shown and min(shown) > 0 and max(shown) > 100 * min(shown):  # it falls by orders of magnitude
        top.set_yscale("log")
    elif shown:  # the first steps would squeeze the rest
        low, high = min(shown), float(np.quantile(shown, 0.97))
        room = max(0.05 * (high - low), 1e-6)
        top.set_ylim(low - room, high + room)
    top.set(ylabel=unit, title="learning curves")
    top.grid(alpha=0.3)
    bottom.set(xlabel="step", ylabel="evaluations a solve")
    bottom.set_ylim(bottom=0)
    bottom.grid(alpha=0.3)
    return write(path, lambda p: figure.savefig(p, format="png"))
