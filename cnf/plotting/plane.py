"""Plots of 2-D flows: density, vector field, trajectories."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.collections import LineCollection
from torch import Tensor

from cnf.flow import Flow
from cnf.ode.continuous import CNF
from cnf.plotting.canvas import PLANE, array, aspect_of, box_around, new_figure, save_figure, subplots, xy
from cnf.plotting.motion import to_standard_normal
from cnf.transforms import Request, Transform
from cnf.transforms.chain import State, walk

__all__ = ["density_2d", "trajectories_2d", "vector_field_2d"]

FRAMES = 40  # times of a trajectory


@torch.no_grad()
def density_2d(flow: Flow, data: Tensor, path: Path, *, extent: float | None = None, resolution: int = 160) -> Path:
    """Plot the density p(x) next to the data's histogram, both on one colour scale.

    Args:
        flow: flow on points in the plane, without context.
        data: (N, 2).
        path: output PNG.
        extent: half-width of the square [-extent, extent]²; a frame around the data if None.
        resolution: cells along each axis.
    """
    box = box_around(data, 0.1) if extent is None else (-extent, extent, -extent, extent)
    cells = [low + (torch.arange(resolution) + 0.5) * (high - low) / resolution for low, high in (box[:2], box[2:])]
    grid = torch.cartesian_prod(*cells).to(flow.like)
    p = array(torch.cat([flow.log_prob(part).exp() for part in grid.split(20_000)]).reshape(resolution, resolution))
    bins = max(8, min(resolution // 2, int(len(data) ** 0.5)))  # few bins for few points, to suppress noise
    across, up = xy(data)
    counts, _, _ = np.histogram2d(across, up, bins=bins, range=[list(box[:2]), list(box[2:])])
    share = counts * bins**2 / (len(data) * (box[1] - box[0]) * (box[3] - box[2]))  # per unit area, like p
    # the peaks of either may be clipped, to keep the rest visible
    top = max((float(np.quantile(v[v > 0.01 * v.max()], 0.99)) for v in (p, share) if v.max() > 0), default=1.0)
    figure = new_figure(10.5, 4.6)
    pair = subplots(figure, 1, 2)
    for axis, values, title in zip(pair, (share, p), ("data (histogram)", "model"), strict=True):
        image = axis.imshow(values.T, origin="lower", extent=box, cmap="magma", vmin=0, vmax=top, aspect=aspect_of(box))
        axis.set(title=title, xlabel=PLANE[0], ylabel=PLANE[1])
    figure.colorbar(image, ax=list(pair), shrink=0.85, label="density p(x)", extend="max")
    return save_figure(figure, path)


@torch.no_grad()
def vector_field_2d(flow: Flow, path: Path, *, times: int = 5, extent: float = 3.0) -> Path:
    """Plot the blocks' vector fields over time, in the coordinates of the ODE (standardised data).

    All panels share their scales: colour is speed, arrow length its square root (slow regions would vanish otherwise).

    Args:
        flow: flow on points in the plane, without context; the first four blocks are drawn.
        path: output PNG.
        times: panels per block, from t = 0 to T.
        extent: half-width of the square [-extent, extent]².
    """
    ticks = torch.linspace(-extent, extent, 18)
    grid = torch.cartesian_prod(ticks, ticks).to(flow.like)
    panels: list[tuple[float, np.ndarray]] = []

    def draw(leaf: Transform, state: State, request: Request) -> State:
        shared = request.augmented_time
        for block in (m for m in leaf.modules() if isinstance(m, CNF)):
            if len(panels) == 4 * times:
                break
            end, a = block.end_time(grid), None if shared is None else shared.value
            for t in torch.linspace(0, 1, times).to(grid) * end:
                panels.append((float(t), array(block.velocity(t, grid, augmented_time=a))))
            if shared is not None:
                shared.value = block.advance_augmented_time(shared.value, end)
        return state

    walk(to_standard_normal(flow).transform, (grid,), Request(steer=False), draw)
    speeds = np.stack([np.hypot(*v.T) for _, v in panels])
    top = float(np.quantile(speeds, 0.99)) or 1.0
    rows = len(panels) // times
    figure = new_figure(2.7 * times + 0.8, 2.95 * rows + 0.3)
    axes = subplots(figure, rows, times, squeeze=False, sharex=True, sharey=True)
    for number, (axis, (t, v), speed) in enumerate(zip(axes.ravel(), panels, speeds, strict=True)):
        arrows = v.T * 1.5 * (2 * extent / 17) / np.sqrt(top * np.maximum(speed, 1e-12 * top))  # the fastest: one and a half cells
        image = axis.quiver(
            *xy(grid), *arrows, speed, cmap="viridis", clim=(0, top), angles="xy", scale_units="xy", scale=1, width=0.005
        )
        axis.set(title=f"block {number // times + 1}, t = {t:.2f}", aspect="equal")
        axis.tick_params(labelsize=7)
        axis.locator_params(nbins=5)
    figure.colorbar(image, ax=list(axes.ravel()), label="speed |f|", shrink=0.8, pad=0.01, extend="max")
    figure.supxlabel(f"{PLANE[0]}, standardised", fontsize=9)
    figure.supylabel(f"{PLANE[1]}, standardised", fontsize=9)
    return save_figure(figure, path)


def trajectories_2d(flow: Flow, data: Tensor, path: Path, *, n: int = 200) -> Path:
    """Plot the paths of the first ``n`` points of data (N, 2) to noise, in standardised coordinates; see :func:`.motion.to_standard_normal`."""
    way = array(to_standard_normal(flow).trajectory(data[:n].to(flow.like), torch.linspace(0, 1, FRAMES)))
    figure = new_figure(6.8, 6.4)
    axis = subplots(figure)
    pieces = np.stack([way[:-1], way[1:]], 2).reshape(-1, 2, 2)  # of all points at the first time, then at the second, ...
    times = np.repeat(np.linspace(0, 1, FRAMES - 1), way.shape[1])
    lines = axis.add_collection(LineCollection(list(pieces), array=times, cmap="viridis", linewidths=0.7, alpha=0.7))
    axis.scatter(*xy(way[0]), 9, color=lines.cmap(0.0), label="data (t = 0)", zorder=3)
    axis.scatter(*xy(way[-1]), 9, color="tab:orange", label="noise (t = T)", zorder=3)
    axis.set(aspect="equal", title="trajectories", xlabel=f"{PLANE[0]}, standardised", ylabel=f"{PLANE[1]}, standardised")
    figure.colorbar(lines, ax=axis, label="time t / T", shrink=0.7)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return save_figure(figure, path)
