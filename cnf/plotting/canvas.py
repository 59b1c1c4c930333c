"""Shared plotting helpers: figures without a display, frames, image tiles, atomic writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from cnf.runs import write_atomic

__all__ = ["PLANE", "Box", "array", "aspect_of", "box_around", "new_figure", "save_figure", "set_loss_limits", "subplots", "tiles", "write", "xy"]

Box = tuple[float, float, float, float]  # left, right, bottom, top
PLANE = ("x", "y")  # names of the coordinates of points without column names, as those of the toy sets


def write(path: Path, save: Callable[[Path], Any]) -> Path:
    """Write a file atomically; return its path."""
    write_atomic(path, lambda temporary: save(temporary))
    return path


def save_figure(figure: Figure, path: Path, handles: Sequence[Any] = (), fontsize: int = 9) -> Path:
    """Write a figure as PNG, with a legend of the handles below it; return the path."""
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(10, len(handles)), fontsize=fontsize, frameon=False)
    return write(path, lambda p: figure.savefig(p, format="png"))


def set_loss_limits(axis: Any, values: Sequence[float], quantile: float, whole: Sequence[float] = ()) -> None:
    """Limit the y axis to the values up to a quantile, since the first steps would compress the rest, and to all of ``whole``."""
    low, high = min(*values, *whole, math.inf), max(float(np.quantile(values, quantile)), *whole, -math.inf)
    margin = max(0.05 * (high - low), 1e-6)
    axis.set_ylim(low - margin, high + margin)


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of the given size in inches, without a display."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure


def subplots(figure: Figure, *shape: int, **options: Any) -> Any:
    """Return ``figure.subplots(...)``, untyped: one axis or an array of them."""
    return figure.subplots(*shape, **options)


def array(x: Any) -> Any:
    """Convert a tensor on any device, or an array-like, to a NumPy array."""
    return np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x)


def xy(points: Any) -> Any:
    """Return the two coordinate arrays of points (N, 2)."""
    return array(points).T


def box_around(points: Any, margin: float = 0.05) -> Box:
    """Return a box around points (N, 2), with margins in units of its sides."""
    low, high = array(points).min(0), array(points).max(0)
    room = margin * np.maximum(high - low, 1e-6)
    (left, bottom), (right, top) = (low - room).tolist(), (high + room).tolist()
    return left, right, bottom, top


def aspect_of(box: Box) -> str:
    """Return the aspect: equal axes, or automatic ones for a side ratio of 3 or more (columns of different units)."""
    ratio = (box[1] - box[0]) / (box[3] - box[2])
    return "equal" if 1 / 3 < ratio < 3 else "auto"


def tiles(images: Tensor, columns: int | None, levels: int) -> np.ndarray:
    """Tile images (N, C, H, W), uint8 grey levels or floats in [0, 1], into one (rows, columns, 3) with borders."""
    x = images.detach().cpu()
    if x.is_floating_point():  # quantised to grey levels, like the data next to them
        x = (x * levels).floor().clamp(0, levels - 1)
    pixels = (x.float() * (255 / (levels - 1))).round().to(torch.uint8).numpy()
    if pixels.shape[1] not in (1, 3):  # neither grey nor RGB: the mean of the channels
        pixels = pixels.mean(1, keepdims=True).round().astype(np.uint8)
    n, _, h, w = pixels.shape
    columns = columns or max(1, round(n**0.5))
    rows = -(-n // columns)
    scale = max(1, 64 // max(h, w))  # small images are enlarged without smoothing
    gap = max(1, scale // 2)  # of half a pixel: narrower ones let small images run into each other
    canvas = np.full((rows * (h * scale + gap) + gap, columns * (w * scale + gap) + gap, 3), 128, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (h * scale + gap) + gap, (i % columns) * (w * scale + gap) + gap
        tile = np.repeat(np.repeat(image, scale, 1), scale, 2).transpose(1, 2, 0)
        canvas[top : top + h * scale, left : left + w * scale] = np.broadcast_to(tile, (h * scale, w * scale, 3))
    return canvas
