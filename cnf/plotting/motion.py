"""Flows from noise to data, and animated GIFs of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from cnf._utils.errors import ConfigError
from cnf.bases import GaussianMixture, StandardNormal
from cnf.fields import MixtureVelocity
from cnf.flow import Flow
from cnf.ode.continuous import CNF
from cnf.plotting.canvas import PLANE, array, new_figure, subplots, tiles, write
from cnf.random import Noise
from cnf.solvers import FixedGrid
from cnf.solvers.base import SolverOverride
from cnf.transforms import Sequential, Squeeze, iter_leaves

__all__ = ["flow_gif", "to_standard_normal"]

MOVED = 0.01  # least mean distance from data to latents, in standardised coordinates, that a picture shows
PROBES = 256  # samples by which that is measured
TRAIL = 4  # frames
STEPS = 1  # of the mixture's velocity between two frames
COLOURS = 48  # of a frame: half the file of 256
CELLS = 120  # of a density, along each axis


@torch.no_grad()
def to_standard_normal(flow: Flow) -> Flow:
    """Return a flow of points in the plane whose base is a Gaussian mixture with a standard normal as base instead.

    The latents go on by the closed-form velocity of the mixture (:class:`~cnf.fields.MixtureVelocity`), and blocks that
    leave them where they are are left out, so that a picture shows the way from noise to data. Other flows are returned.
    """
    base = flow.base
    if not isinstance(base, GaussianMixture) or flow.event_shape != (2,) or flow.context_dim:
        return flow
    field = MixtureVelocity(base.logits.double().log_softmax(0), base.means.double(), base.covariances.double())
    leaves = [leaf for leaf, _ in iter_leaves(flow.transform)]
    way = flow.trajectory(flow.sample(PROBES, noise=Noise(0, "sample")), torch.linspace(0, 1, 2))
    if float((way[1] - way[0]).norm(dim=1).mean()) < MOVED:
        leaves = [leaf for leaf in leaves if not any(isinstance(m, CNF) for m in leaf.modules())]
    return Flow(Sequential([*leaves, CNF(field, eval_solver=FixedGrid("rk4", STEPS)).to(flow.like)]), (2,), base=StandardNormal(2)).to(flow.like).eval()


@torch.no_grad()
def flow_gif(
    flow: Flow,
    path: Path,
    *,
    n: int | None = None,
    frames: int = 32,
    seed: int = 0,
    temperature: float = 1.0,
    context: Tensor | None = None,
    solver: SolverOverride = None,
) -> Path:
    """Animate noise flowing to data: by default 2,000 points in the plane, or a grid of 64 images; see :func:`to_standard_normal`.

    Args:
        flow: flow on points in the plane or on images; the scales of a multiscale flow move one after another.
        path: output GIF.
        n: number of points or images.
        frames: number of frames, at least 2, evenly spaced in time; the last one is shown longer.
        seed: seed of the noise.
        temperature: factor on the base's standard deviation.
        context: (n, C), one row per sample.
        solver: solver of every block for this animation; the flow's own if None.

    Raises:
        ConfigError: for vectors of another dimension, or fewer than two frames.
    """
    images = len(flow.event_shape) == 3
    if not images and flow.event_shape != (2,):
        raise ConfigError(f"flow must have images or points in the plane for a GIF, got event shape {flow.event_shape}")
    if frames < 2:
        raise ConfigError(f"frames must be at least 2, got {frames}")
    n, noise = n or (64 if images else 2000), Noise(seed, "sample")
    if context is None:
        x = flow.rsample(n, noise=noise, temperature=temperature, solver=solver)
    else:
        x = flow.rsample(1, context, noise=noise, temperature=temperature, solver=solver)[0]
    way = to_standard_normal(flow).trajectory(x, torch.linspace(0, 1, frames), context, solver=solver).flip(0)
    if images:
        leaves = (leaf for leaf, _ in iter_leaves(flow.transform))
        before = list(itertools.takewhile(lambda leaf: not any(isinstance(m, CNF) for m in leaf.modules()), leaves))
        pictures = []
        for points in way:
            for leaf in before:  # squeezes are undone in the frames
                points = leaf(points).value if isinstance(leaf, Squeeze) else points
            for leaf in reversed(before):  # from ODE coordinates to pixels
                points = leaf.inverse(points).value
            pictures.append(Image.fromarray(tiles(points, None, 256)))
    else:
        pictures = _scatters(array(way))
    durations = [80] * (frames - 1) + [1500]
    return write(
        path, lambda p: pictures[0].save(p, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    )


def _scatters(way: Any) -> list[Image.Image]:
    """Draw frames of points (frames, N, 2), from noise to data: their density, trails of a few frames, the data in orange."""
    limit = float(np.quantile(np.abs(way), 0.999)) * 1.1
    box, clouds = (-limit, limit, -limit, limit), [_cloud(points, limit) for points in way]
    figure = new_figure(4.8, 5.1)
    axis = subplots(figure)
    density = axis.imshow(clouds[0], origin="lower", extent=box, cmap="Blues", vmin=0, vmax=1.3 * max(c.max() for c in clouds), zorder=0)
    axis.scatter(*way[-1].T, 2, color="tab:orange", alpha=0.5, linewidths=0, zorder=1)
    trails = axis.add_collection(LineCollection([], colors="#08306b", linewidths=0.4, alpha=0.3, zorder=2))
    dots = axis.scatter(*way[0].T, 2.2, color="#08306b", linewidths=0, zorder=3)
    axis.set(xlim=box[:2], ylim=box[2:], aspect="equal", xlabel=f"{PLANE[0]}, standardised", ylabel=f"{PLANE[1]}, standardised")
    axis.locator_params(nbins=5)
    canvas, pictures = FigureCanvasAgg(figure), []
    axis.set_title(" ")
    canvas.draw()  # the layout, which the frames share
    figure.set_layout_engine("none")
    for i, (points, cloud) in enumerate(zip(way, clouds, strict=True)):
        density.set_data(cloud)
        dots.set_offsets(points)
        trails.set_segments(way[max(0, i - TRAIL) : i + 1].swapaxes(0, 1) if i else [])
        axis.set_title(f"from noise (0) to data (1): {i / (len(way) - 1):.2f}")
        canvas.draw()
        shot = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
        pictures.append(shot.quantize(COLOURS, dither=Image.Dither.NONE))
    return pictures


def _cloud(points: Any, limit: float) -> Any:
    """Return the smoothed density (CELLS, CELLS) of points (N, 2) in the frame, its square root to keep thin parts visible."""
    counts, _, _ = np.histogram2d(points[:, 1], points[:, 0], bins=CELLS, range=[[-limit, limit]] * 2)
    return np.sqrt(gaussian_filter(counts, CELLS / 60))
