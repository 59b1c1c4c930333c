"""Pictures of benchmarks/anode_figures.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anode_runs import Curves, band, select, vector_field
from matplotlib.patches import Wedge
from torch import Tensor

from cnf.neural_ode import Predictor
from cnf.plotting.canvas import new_figure, save_figure, subplots
from cnf.plotting.features import draw_states

__all__ = ["draw_decay", "draw_flows", "draw_held_out", "draw_losses", "draw_stability", "draw_training", "draw_vector_fields"]

COLOURS = {"ResNet": "tab:green", "NODE": "tab:red", "ANODE": "tab:blue"}


def _curve(axis: Any, found: Sequence[Curves], key: str, label: str, colour: str, line: str = "-") -> None:
    """Plot the mean over seeds of a curve by epoch, and a band of one standard deviation, mirrored on the log scale."""
    if not found:
        return
    mean, deviation = band(found, key)
    epochs = np.arange(1, len(mean) + 1)
    axis.plot(epochs, mean, line, color=colour, label=label)
    axis.fill_between(epochs, mean**2 / (mean + deviation), mean + deviation, color=colour, alpha=0.2, linewidth=0)
    axis.grid(alpha=0.3)


def draw_losses(found: Sequence[Curves], path: Path, keys: Sequence[tuple[str, str]] = (("loss", "validation loss (MSE)"),)) -> None:
    """Draw the curves ``keys`` (key of the rows, label) over the epochs, one column for each data set."""
    sets = list(dict.fromkeys(one.row["data"] for one in found))
    figure = new_figure(3.6 * len(sets), 0.6 + 2.8 * len(keys))
    axes = subplots(figure, len(keys), len(sets), squeeze=False, sharex=True)
    for column, data in zip(axes.T, sets, strict=True):
        column[0].set_title(data)
        for axis, (key, label) in zip(column, keys, strict=True):
            for name, colour in COLOURS.items():
                if key != "nfe" or name != "ResNet":
                    _curve(axis, select(found, data=data, model=name), key, name, colour)
            axis.set_ylabel(label)
            if key != "nfe":
                axis.set_yscale("log")
        column[-1].set_xlabel("epoch")
    axes[0, 0].legend(fontsize=9)
    save_figure(figure, path)


def draw_vector_fields(found: Sequence[Curves], euler: Curves, steps: int, path: Path) -> None:
    """Draw field and trajectories of identity and flip, and the Euler steps of a field that was trained by them."""
    figure = new_figure(12, 4)
    axes = subplots(figure, 1, len(found) + 1, sharey=True)
    start = torch.cat([torch.linspace(-1.2, -0.8, 5), torch.linspace(0.8, 1.2, 5)])
    times = torch.linspace(0, 1, 40)
    for axis, one in zip(axes, found, strict=False):
        assert one.model is not None
        _quiver(axis, one.model)
        _lines(axis, times, one.model.trajectory(start[:, None], times)[..., 0])  # type: ignore[operator]
        axis.set_title(f"{one.row['model']} on {one.row['data']}")
    axis, model = axes[-1], euler.model
    assert model is not None
    _quiver(axis, model)
    grid, frames = torch.linspace(0, 1, steps + 1), [start]
    for _ in range(steps):
        frames.append(frames[-1] + vector_field(model, frames[-1]) / steps)
    _lines(axis, times, model.trajectory(start[:, None], times)[..., 0])  # type: ignore[operator]
    _lines(axis, grid, torch.stack(frames), "--o")
    axis.set_title(f"flip trained with {steps} Euler steps\ndashed: those steps; solid: the ODE", fontsize=10)
    for axis in axes:
        axis.set(xlabel="t", ylim=(-2, 2))
    axes[0].set_ylabel("h(t)")
    save_figure(figure, path)


def _quiver(axis: Any, model: Predictor) -> None:
    heights = torch.linspace(-1.9, 1.9, 15)
    slope = vector_field(model, heights).numpy()
    t, h = np.meshgrid(np.linspace(0, 1, 11), heights.numpy())
    length = np.hypot(1, slope)[:, None] * np.ones_like(t)
    axis.quiver(t, h, 1 / length, slope[:, None] / length, angles="uv", color="0.75", width=0.004)


def _lines(axis: Any, times: Tensor, states: Tensor, style: str = "-") -> None:
    """Plot paths (times, N), blue from below and red from above."""
    for path in states.T:
        axis.plot(times, path, style, color="tab:blue" if path[0] < 0 else "tab:red", lw=1, ms=3)


def _rows_of_states(rows: Sequence[tuple[Tensor, Tensor, Sequence[str], str]], path: Path) -> None:
    """Draw states (times, N, D) with their targets (N,), titles and label, one row each; those beyond the plane in three dimensions."""
    columns = max(len(titles) for _, _, titles, _ in rows)
    figure = new_figure(2.6 * columns, 2.8 * len(rows))
    figure.get_layout_engine().set(h_pad=0.15)  # type: ignore[union-attr]  # labels in three dimensions are not laid out
    for i, (states, marks, titles, label) in enumerate(rows):
        kind = "3d" if states.shape[2] > 2 else None
        axes = [figure.add_subplot(len(rows), columns, 1 + i * columns + j, projection=kind) for j in range(len(titles))]
        draw_states(axes, states.double().numpy(), marks.sign())
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(title, fontsize=8)
        if kind:
            axes[0].text2D(-0.3, 0.5, label, transform=axes[0].transAxes, rotation=90, va="center", ha="center", fontsize=8)
        else:
            axes[0].set_ylabel(f"{label}\n\n{axes[0].get_ylabel()}", fontsize=8)
    save_figure(figure, path)


def draw_training(found: Sequence[Curves], path: Path) -> None:
    """Draw the features of fixed validation points at steps of the training, one row for each run."""
    from cnf.training.feature_history import chosen_points

    rows = []
    for one in found:
        if one.frames:
            steps = sorted(one.frames)
            assert one.data is not None and one.data.validation_context is not None and one.model is not None
            size = int(np.prod(one.model.state_shape))
            marks = one.data.validation_context[chosen_points(len(one.data.validation), size)][:, 0]
            titles = [f"step {step:,}" for step in steps]
            rows.append((torch.stack([one.frames[step].cpu() for step in steps]), marks, titles, f"{one.row['model']}\n{one.row['data']}"))
    _rows_of_states(rows, path)


def draw_flows(found: Sequence[Curves], path: Path, times: int = 5) -> None:
    """Draw the states of test points over depth, one row for each run, with the loss and NFE of its last epoch."""
    rows = []
    for one in found:
        if one.model is not None:
            assert one.data is not None and one.data.test_context is not None
            chosen = torch.randperm(len(one.data.test), generator=torch.Generator().manual_seed(0))[:400]
            ticks = torch.linspace(0, 1, times)
            states = one.model.trajectory(one.data.test[chosen], ticks)  # type: ignore[operator]
            label = f"{one.row['model']}, {one.row['data']}\nMSE {one.row['test']:.2g}, NFE {one.row['nfe'][-1]:.0f}"
            rows.append((states, one.data.test_context[chosen, 0], [f"t = {tick:g}" for tick in ticks.tolist()], label))
    _rows_of_states(rows, path)


def draw_held_out(found: Sequence[Curves], angle: float, path: Path) -> None:
    """Draw training and held-out losses, and the predictions of the first seed with the slice marked."""
    figure = new_figure(12, 4)
    left, *maps = subplots(figure, 1, 3)
    for name in ("NODE", "ANODE"):
        some = select(found, model=name)
        _curve(left, some, "train_loss", f"{name}, training", COLOURS[name])
        _curve(left, some, "loss", f"{name}, held-out slice", COLOURS[name], "--")
    left.set(xlabel="epoch", ylabel="loss (MSE)", yscale="log")
    left.legend(fontsize=8)
    for axis, name in zip(maps, ("NODE", "ANODE"), strict=True):
        some = select(found, model=name)
        if some:
            _map(axis, some[0], angle)
            axis.set_title(f"{name}, seed {some[0].row['seed']}: prediction,\nslice of {angle:g} degrees held out", fontsize=9)
    save_figure(figure, path)


@torch.no_grad()
def _map(axis: Any, one: Curves, angle: float, size: int = 100) -> None:
    assert one.model is not None and one.data is not None
    ticks = torch.linspace(-1.8, 1.8, size)
    values = one.model(torch.cartesian_prod(ticks, ticks))[:, 0].reshape(size, size).T
    axis.imshow(values.numpy(), origin="lower", extent=(-1.8, 1.8, -1.8, 1.8), cmap="coolwarm", vmin=-1.2, vmax=1.2)
    x = one.data.train[torch.randperm(len(one.data.train), generator=torch.Generator().manual_seed(0))[:500]]
    axis.scatter(x[:, 0], x[:, 1], 3, c="black", linewidths=0)
    axis.add_patch(Wedge((0, 0), 1.8, -angle / 2, angle / 2, fill=False, edgecolor="black"))


def draw_stability(found: Sequence[Curves], path: Path) -> None:
    """Draw loss and NFE of every initialisation, failed ones dashed."""
    figure = new_figure(10, 5.6)
    axes = subplots(figure, 2, 2, sharex=True, sharey="row")
    for column, name in zip(axes.T, ("NODE", "ANODE"), strict=True):
        some = select(found, model=name)
        for one in some:
            for axis, key in zip(column, ("loss", "nfe"), strict=True):
                axis.plot(range(1, len(one.row[key]) + 1), one.row[key], "--" if one.row["failed"] else "-", lw=0.9, alpha=0.8)
                axis.grid(alpha=0.3)
        every = [one for one in found if one.row["model"] == name]
        column[0].set_title(f"{name}: {sum(one.row['failed'] for one in every)} of {len(every)} failed (dashed)")
        column[0].set_yscale("log")
        column[1].set_xlabel("epoch")
    axes[0, 0].set_ylabel("validation loss (MSE)")
    axes[1, 0].set_ylabel("NFE of a training solve")
    save_figure(figure, path)


def draw_decay(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw test loss and NFE over weight decay, a line for each augmentation: means, bars of one standard deviation."""
    figure = new_figure(10, 4)
    axes = subplots(figure, 1, 2)
    decays = sorted({row["weight_decay"] for row in rows})
    for axis, (key, label) in zip(axes, (("test", "test loss (MSE)"), ("last_nfe", "NFE, last epoch")), strict=True):
        for p in sorted({row["augment"] for row in rows}):
            parts = [[r[key] for r in rows if r["augment"] == p and r["weight_decay"] == decay and key in r] for decay in decays]
            means = [np.mean(part) if part else np.nan for part in parts]
            bars = [np.std(part, ddof=1) if len(part) > 1 else 0.0 for part in parts]
            axis.errorbar(range(len(decays)), means, bars, marker="o", capsize=3, label=f"p = {p}")
        axis.set_xticks(range(len(decays)), [f"{decay:g}" for decay in decays])
        axis.set(xlabel="weight decay", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend(fontsize=9)
    save_figure(figure, path)
