"""Pictures: samples beside data, densities, vector fields, trajectories, learning curves, the flow in motion."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from cnf.flow import Flow
from cnf.noise import Noise

__all__ = ["density_2d", "flow_gif", "image_grid", "learning_curves", "samples_beside_data", "trajectories_2d", "vector_field_2d"]


def _write(path: Path, save: Callable[[Path], Any]) -> Path:
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    save(temporary)
    os.replace(temporary, path)
    return path


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, *shape: int, **options: Any) -> Any:
    """figure.subplots, untyped: it returns one axis or an array of them."""
    return figure.subplots(*shape, **options)


def _xy(points: Any) -> Any:
    """Points (N, 2) as the two coordinate arrays."""
    return np.asarray(points.cpu() if isinstance(points, Tensor) else points).T


def _tiles(images: Tensor, columns: int | None, levels: int) -> np.ndarray:
    """(N, C, H, W) uint8 grey levels or floats in [0, 1] as one picture (rows, columns, 3) with thin borders."""
    x = images.detach().cpu()
    x = x.float() / (levels - 1) if x.dtype == torch.uint8 else x.float()
    pixels = (x.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    n, _, h, w = pixels.shape
    columns = columns or max(1, round(n**0.5))
    rows = -(-n // columns)
    scale = max(1, 32 // max(h, w))  # small images are enlarged without smoothing
    canvas = np.full((rows * (h * scale + 1) + 1, columns * (w * scale + 1) + 1, 3), 128, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (h * scale + 1) + 1, (i % columns) * (w * scale + 1) + 1
        tile = np.repeat(np.repeat(image, scale, 1), scale, 2).transpose(1, 2, 0)
        canvas[top : top + h * scale, left : left + w * scale] = np.broadcast_to(tile, (h * scale, w * scale, 3))
    return canvas


def image_grid(images: Tensor, path: Path, *, columns: int | None = None, levels: int = 256) -> Path:
    """A grid of images (N, C, H, W), uint8 grey levels or floats in [0, 1]."""
    picture = Image.fromarray(_tiles(images, columns, levels))
    return _write(path, lambda p: picture.save(p, format="PNG"))


def samples_beside_data(
    samples: Tensor, data: Tensor, path: Path, *, levels: int | None = None, columns: tuple[str, ...] = ()
) -> Path:
    """Images as two grids, points as two scatters, tables as overlaid marginal histograms of up to twelve columns."""
    if samples.ndim == 4:
        figure = _figure(11, 5.8)
        for axis, x, title in zip(_axes(figure, 1, 2), (data, samples), ("data", "samples"), strict=True):
            axis.imshow(_tiles(x, None, levels or 256))
            axis.set_title(title)
            axis.axis("off")
    elif samples.shape[1] == 2:
        figure = _figure(10, 5.2)
        low, high = data.min(0).values - 0.5, data.max(0).values + 0.5
        for axis, x, title in zip(_axes(figure, 1, 2), (data, samples), ("data", "samples"), strict=True):
            axis.scatter(*_xy(x), 2, alpha=0.5, linewidths=0)
            axis.set(title=title, xlim=(float(low[0]), float(high[0])), ylim=(float(low[1]), float(high[1])), aspect="equal")
    else:
        count = min(12, data.shape[1])
        rows = -(-count // 4)
        figure = _figure(13, 2.6 * rows + 0.6)
        axes = _axes(figure, rows, 4, squeeze=False).ravel()
        for j, axis in enumerate(axes):
            if j >= count:
                axis.axis("off")
                continue
            ends = torch.quantile(data[:100_000, j], torch.tensor([0.001, 0.999]))
            bins = np.linspace(float(ends[0]), float(ends[1]), 60)
            axis.hist(data[:, j].numpy(), bins, density=True, alpha=0.5, label="data")
            axis.hist(samples[:, j].numpy(), bins, density=True, histtype="step", label="samples", color="black")
            axis.set_title(f"column {columns[j] if columns else j}", fontsize=9)
            axis.set_yticks([])
        axes[0].legend(fontsize=8)
    return _write(path, lambda p: figure.savefig(p, format="png"))


def _extent(data: Tensor) -> float:
    return float(data.abs().max()) * 1.1


@torch.no_grad()
def density_2d(flow: Flow, data: Tensor, path: Path, *, extent: float | None = None, resolution: int = 160) -> Path:
    """Heat map of the density beside the data's histogram."""
    extent = extent or _extent(data)
    ticks = torch.linspace(-extent, extent, resolution)
    grid = torch.cartesian_prod(ticks, ticks).to(next(flow.parameters()))
    p = torch.cat([flow.log_prob(part).exp() for part in grid.split(20_000)]).reshape(resolution, resolution).cpu()
    figure = _figure(10.5, 5.2)
    left, right = _axes(figure, 1, 2)
    box = (-extent, extent, -extent, extent)
    counts, _, _ = np.histogram2d(
        _xy(data)[0], _xy(data)[1], bins=resolution // 2, range=[[-extent, extent]] * 2, density=True
    )
    top = float(np.quantile(counts[counts > 0], 0.99)) if (counts > 0).any() else None
    left.imshow(counts.T, origin="lower", extent=box, cmap="magma", vmax=top)
    left.set_title("data (histogram)")
    image = right.imshow(p.T.numpy(), origin="lower", extent=box, cmap="magma", vmax=top)
    right.set_title("model density p(x)")
    figure.colorbar(image, ax=(left, right), shrink=0.85)
    return _write(path, lambda q: figure.savefig(q, format="png"))


@torch.no_grad()
def vector_field_2d(flow: Flow, path: Path, *, times: int = 5, extent: float = 3.0) -> Path:
    """The blocks' vector fields over time, in the coordinates the ODE lives in (standardised data)."""
    blocks = flow.blocks[:4]
    figure = _figure(3 * times, 3.2 * len(blocks))
    axes = _axes(figure, len(blocks), times, squeeze=False)
    ticks = torch.linspace(-extent, extent, 20)
    grid = torch.cartesian_prod(ticks, ticks).to(next(flow.parameters()))
    for i, block in enumerate(blocks):
        end = float(block.end_time(grid))
        for j, axis in enumerate(axes[i]):
            t = end * j / max(1, times - 1)
            v = block.field(grid.new_tensor(t), grid, None).cpu().numpy()
            axis.quiver(*_xy(grid), *v.T, np.hypot(*v.T), cmap="viridis")
            axis.set(title=f"block {i + 1}, t = {t:.2f}", aspect="equal")
            axis.tick_params(labelsize=7)
    figure.supxlabel("standardised coordinates", fontsize=9)
    return _write(path, lambda p: figure.savefig(p, format="png"))


def trajectories_2d(flow: Flow, data: Tensor, path: Path, *, n: int = 200) -> Path:
    """Paths from data (red) to latent (blue), in standardised coordinates."""
    paths = flow.trajectory(data[:n].to(next(flow.parameters())), torch.linspace(0, 1, 40)).cpu().numpy()
    figure = _figure(6.4, 6.2)
    axis = _axes(figure)
    axis.plot(paths[:, :, 0], paths[:, :, 1], color="grey", lw=0.5, alpha=0.6)
    axis.scatter(*_xy(paths[0]), 8, color="tab:red", label="data (t = 0)", zorder=3)
    axis.scatter(*_xy(paths[-1]), 8, color="tab:blue", label="latent (t = T)", zorder=3)
    axis.set(aspect="equal", title="trajectories (standardised coordinates)")
    axis.legend(loc="upper right", fontsize=8)
    return _write(path, lambda p: figure.savefig(p, format="png"))


@torch.no_grad()
def flow_gif(flow: Flow, path: Path, *, n: int = 2000, frames: int = 32, seed: int = 0) -> Path:
    """Noise flowing into data: points in two dimensions, a grid of images otherwise."""
    images = len(flow.event_shape) == 3
    x = flow.sample(64 if images else n, noise=Noise(seed, "sample"))
    way = flow.trajectory(x, torch.linspace(0, 1, frames)).flip(0).cpu()
    pictures = []
    limit = float(torch.quantile(way.abs().flatten()[:100_000], 0.999)) * 1.1
    for i, points in enumerate(way):
        if images:
            pictures.append(Image.fromarray(_tiles(torch.sigmoid(points), 8, 256)))
            continue
        figure = _figure(4.2, 4.4)
        axis = _axes(figure)
        axis.scatter(*_xy(points), 3, alpha=0.6, linewidths=0)
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", title=f"t = {1 - i / (frames - 1):.2f} T")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pictures.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
    durations = [80] * (frames - 1) + [1500]
    return _write(
        path, lambda p: pictures[0].save(p, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    )


def learning_curves(metrics: list[dict[str, Any]], path: Path, *, unit: str) -> Path:
    """Training and validation against steps, the solver's evaluations below."""
    figure = _figure(8, 6)
    top, bottom = _axes(figure, 2, 1, sharex=True, height_ratios=[2, 1])
    for name, label, axis in (("nll", "training batch", top), ("validation", "validation (averaged weights)", top), ("nfe", "NFE", bottom)):
        rows = [(m["step"], m[name]) for m in metrics if name in m]
        if rows:
            axis.plot(*zip(*rows, strict=True), label=label, marker="o" if name == "validation" else None, ms=3, lw=1.2)
    values = [m[name] for m in metrics for name in ("nll", "validation") if name in m and np.isfinite(m[name])]
    if values:  # the first steps would squeeze the rest
        low, high = min(values), float(np.quantile(values, 0.97))
        top.set_ylim(low - 0.05 * (high - low) - 1e-6, high + 0.05 * (high - low) + 1e-6)
    top.set(ylabel=unit, title="learning curves")
    top.legend(fontsize=8)
    bottom.set(xlabel="step", ylabel="evaluations a solve")
    return _write(path, lambda p: figure.savefig(p, format="png"))
