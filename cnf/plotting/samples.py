"""Plots of samples and data: image grids, scatter plots, histograms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from cnf.plotting.canvas import PLANE, array, aspect_of, box_around, new_figure, save_figure, subplots, tiles, write, xy
from cnf.random import Noise
from cnf.vae import FlowVAE

__all__ = ["image_grid", "reconstructions", "samples_beside_data"]


def image_grid(images: Tensor, path: Path, *, columns: int | None = None, levels: int = 256) -> Path:
    """Save a grid of images (N, C, H, W), uint8 grey levels or floats in [0, 1], as PNG.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = image_grid(torch.rand(16, 1, 8, 8), Path(folder) / "grid.png")
        ...     Image.open(path).size  # 4 x 4 tiles, enlarged eightfold, 4 pixels around each
        (276, 276)
    """
    grid = Image.fromarray(tiles(images, columns, levels))
    return write(path, lambda p: grid.save(p, format="PNG"))


def samples_beside_data(
    samples: Tensor, data: Tensor | None, path: Path, *, levels: int | None = None, columns: tuple[str, ...] = ()
) -> Path:
    """Plot samples next to data: image grids, scatter plots, or overlaid histograms of up to twelve table columns.

    Args:
        samples: (N, C, H, W) or (N, D).
        data: same kind as ``samples``; None plots the samples alone.
        path: output PNG.
        levels: grey levels of images, 256 if None.
        columns: names of a table's columns.
    """
    parts = [(samples, "samples")] if data is None else [(data, "data"), (samples, "samples")]
    guide = samples if data is None else data
    if samples.ndim == 4:
        figure = new_figure(5.5 * len(parts), 5.8)
        for axis, (x, title) in zip(subplots(figure, 1, len(parts), squeeze=False)[0], parts, strict=True):
            axis.imshow(tiles(x, None, levels or 256), interpolation="nearest")
            axis.set_title(title)
            axis.axis("off")
    elif samples.shape[1] == 2:
        figure = new_figure(5 * len(parts), 4.8)
        box = box_around(guide)
        for axis, (x, title) in zip(subplots(figure, 1, len(parts), squeeze=False)[0], parts, strict=True):
            axis.scatter(*xy(x), min(12.0, max(2.5, 12_000 / len(x))), alpha=0.6, linewidths=0)
            axis.set(title=title, xlim=box[:2], ylim=box[2:], aspect=aspect_of(box))
            axis.set(**dict(zip(("xlabel", "ylabel"), columns or PLANE, strict=True)))
    else:
        count = min(12, samples.shape[1])
        across = min(4, count)
        rows = -(-count // across)
        figure = new_figure(3.25 * across, 2.6 * rows + 0.6)
        axes = subplots(figure, rows, across, squeeze=False).ravel()
        for j, axis in enumerate(axes):
            if j >= count:
                axis.axis("off")
                continue
            low, high = (float(v) for v in np.quantile(array(guide[:100_000, j]), (0.001, 0.999)))
            low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
            bins = np.linspace(low, high, 60)
            if data is not None:
                axis.hist(array(data[:, j]), bins, density=True, alpha=0.5, label="data")
            axis.hist(array(samples[:, j]), bins, density=True, histtype="step", label="samples", color="black")
            axis.set_title(columns[j] if columns else f"column {j}", fontsize=9)
            axis.set_yticks([])
            axis.tick_params(labelsize=8)
        axes[0].legend(fontsize=8)
        if count < samples.shape[1]:
            figure.supxlabel(f"the first {count} of {samples.shape[1]} columns", fontsize=9)
    return save_figure(figure, path)


def reconstructions(models: Mapping[str, FlowVAE], images: Tensor, path: Path) -> Path:
    """Plot the first half of images (N, C, H, W) and its reconstructions by autoencoders, above the other half and as many samples.

    Reconstructions and samples are expected values, for binary images probabilities.

    Args:
        models: by name.
        images: as the models take them.
        path: output PNG.
    """
    half = (len(images) + 1) // 2
    shown = images if images.is_floating_point() else images / (next(iter(models.values())).levels - 1)
    columns = [("data", "further data", shown[:half], shown[half:])]
    for name, model in models.items():
        x = images[:half].to(model.like.device)
        x = x.to(model.like.dtype) if x.is_floating_point() else x
        columns.append((f"{name}: reconstructions", f"{name}: samples", model.reconstruct(x, noise=Noise(0)), model.sample(half, noise=Noise(0))))
    figure = new_figure(2.6 * len(columns), 5.6)
    for pair, (above, below, first, second) in zip(subplots(figure, 2, len(columns), squeeze=False).T, columns, strict=True):
        for axis, title, part in ((pair[0], above, first), (pair[1], below, second)):
            if len(part):
                axis.imshow(tiles(part, None, 256), interpolation="nearest")
            axis.set_title(title, fontsize=9)
            axis.axis("off")
    return save_figure(figure, path)
