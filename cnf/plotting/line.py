"""Plots of 1-D flows: densities and paths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf._utils.errors import ConfigError
from cnf.flow import Flow
from cnf.plotting.canvas import array, new_figure, save_figure, subplots
from cnf.plotting.motion import to_standard_normal

__all__ = ["flow_1d"]


@torch.no_grad()
def flow_1d(flows: Mapping[str, Flow], data: Tensor, path: Path, *, n: int = 40, resolution: int = 400) -> Path:
    """Plot density and paths of flows of points on the line (RNODE, 2002.02798, figure 1), one row for each flow.

    From left to right: the density of the model and the data's histogram at t = 0, paths from data to noise, and the
    standard normal with the histogram of the points that arrive there. All are in the coordinates of the ODE
    (standardised data).

    Args:
        flows: by title; events of shape (1,), without context.
        data: (N, 1).
        path: output PNG.
        n: number of paths, at equally spaced quantiles of the data.
        resolution: points at which the density is evaluated.

    Raises:
        ConfigError: for events of another shape.
    """
    for title, flow in flows.items():
        if flow.event_shape != (1,):
            raise ConfigError(f"flows[{title!r}] has events of shape {flow.event_shape}; expected (1,)")
    figure = new_figure(9, 0.4 + 3.2 * len(flows))
    axes = subplots(figure, len(flows), 3, squeeze=False, sharey="row", width_ratios=[1, 3, 1])
    for (left, middle, right), (title, flow) in zip(axes, flows.items(), strict=True):
        _row(left, middle, right, flow, data.to(flow.like), n, resolution)
        middle.set_title(title, fontsize=10)
        left.set_ylabel("standardised x")
    for axis, label in zip(axes[-1], ("p(x)", "t / T", "p(z)"), strict=True):
        axis.set_xlabel(label)
    return save_figure(figure, path)


def _row(left: Any, middle: Any, right: Any, flow: Flow, data: Tensor, n: int, resolution: int) -> None:
    whole = to_standard_normal(flow)
    low, high = float(data.min()), float(data.max())
    room = 0.1 * (high - low)
    grid = torch.linspace(low - room, high + room, resolution).to(flow.like)[:, None]
    places = array(whole.trajectory(grid, torch.zeros(1)))[0, :, 0].astype(float)
    density = array(flow.log_prob(grid).exp()).astype(float) / np.gradient(places, array(grid)[:, 0])
    ends = array(whole.trajectory(data[:5000], torch.tensor([0.0, 1.0])))[..., 0]
    bins = np.linspace(min(places.min(), ends.min()), max(places.max(), ends.max()), 61)
    style = {"bins": bins, "density": True, "orientation": "horizontal", "alpha": 0.4}
    left.hist(ends[0], color="tab:red", **style)
    left.plot(density, places, color="black", lw=1)
    left.invert_xaxis()
    right.hist(ends[1], color="tab:blue", **style)
    heights = np.linspace(bins[0], bins[-1], 200)
    right.plot(np.exp(-(heights**2) / 2) / np.sqrt(2 * np.pi), heights, color="black", lw=1)
    times = torch.linspace(0, 1, 50)
    start = torch.quantile(data[:5000, 0].double(), torch.linspace(0.01, 0.99, n).double().to(data.device)).to(data)[:, None]
    middle.plot(array(times), array(whole.trajectory(start, times))[..., 0], color="grey", lw=0.7)
    middle.set(xlim=(0, 1))
