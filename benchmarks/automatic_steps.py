"""Steps of the grid chosen while training, against a fixed grid trained as long and the published codes' computation.

The mean cost of training steps 1 to 200 (50 of warm-up) of rnode-mnist at batch 32; the published cost is the median of timed
steps on the weights at the end; both trainings are validated at the last step on 512 images by dopri5 at 1e-5 with the
same noise.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import published_formulation as published
import torch
from image_pair import CASES
from measure import seconds, training_step
from modes import LEVELS, Mode, images
from published_formulation import Published
from stopwatch import Stopwatch
from torch import Tensor

from cnf import data as datasets
from cnf.config import FlowConfig, RunConfig, preset
from cnf.data import DataSplits
from cnf.runs import RunInfo
from cnf.training import from_settings

__all__ = ["AUTOMATIC_COLUMNS", "automatic_steps"]

CASE = "rnode-mnist"
FIXED_STEPS = 4  # the published grid
AUTOMATIC_COLUMNS = {
    "case": "{case}",
    "mode": "{mode}",
    "grid": "{grid}",
    "batch": "{batch}",
    "updates": "{updates}",
    "published s": "{baseline_s:.3f}",
    "ours s, mean": "{ours_s:.3f}",
    "published / ours": "{ratio:.2f}",
    "s with compilation": "{with_compilation_s:.3f}",
    "steps a block, mean": "{mean_steps:.2f}",
    "at the end": "{last_steps}",
    "validation, bits/dim": "{validation:.4f}",
    "less the fixed grid's": "{difference:+.4f}",
}


def data(batches: int, batch: int, validation: int, data_root: str | None) -> DataSplits:
    """MNIST, or as many enlarged digits, moved by up to four pixels so that no two are the same."""
    if data_root is not None:
        return datasets.load("mnist", root=data_root, download=False)
    x = images(batches * batch + validation)
    shifts = torch.randint(-4, 5, (len(x), 2), generator=torch.Generator().manual_seed(0)).tolist()
    x = torch.stack([image.roll(shift, (1, 2)) for image, shift in zip(x, shifts, strict=True)])
    return DataSplits("enlarged digits", "image", x[validation:], x[:validation], x[:validation], levels=LEVELS)


def trained(config: RunConfig, splits: DataSplits) -> Stopwatch:
    """A finished training, validated at its last step."""
    info = RunInfo(config, splits.event_shape, splits.levels, 0, (), ())
    with tempfile.TemporaryDirectory() as folder:
        trainer = from_settings(info, splits, Path(folder), quiet=True, kind=Stopwatch)
        trainer.run()
    return trainer


def published_seconds(trainer: Stopwatch, model_config: FlowConfig, x: Tensor, repeats: int) -> float:
    """Median of a published step on the trainer's weights."""
    settings = replace(CASES[CASE], hidden=model_config.field.hidden[0], blocks=model_config.blocks)
    model = Published(tuple(x.shape[1:]), settings).to(x.device)  # type: ignore[arg-type]
    published.share_weights(trainer.model, model)
    step = training_step(model, lambda: model(x, published.draw(model, len(x)))["loss"].mean())
    return seconds(step, repeats)


def automatic_steps(
    mode: Mode,
    updates: int = 200,
    batch: int = 32,
    *,
    data_root: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    validation: int = 512,
    repeats: int = 5,
    change: dict[str, Any] | None = None,
    splits: DataSplits | None = None,
) -> list[dict[str, Any]]:
    """A row for the fixed grid and one for the automatic one, which is the preset's.

    Args:
        mode: of ours, for both.
        updates: of each training.
        batch: images an update.
        data_root: folder of MNIST.
        device: where to train.
        threads: of the CPU.
        validation: images.
        repeats: timed published steps.
        change: of the model's settings.
        splits: in place of MNIST or the digits.
    """
    config = preset(CASE).config
    train = config.train.change(steps=updates, batch_size=batch, warmup=min(50, updates), validate_every=updates, validation_items=validation, device=device, threads=threads)  # fmt: skip
    solver = config.solver.change(gradient="direct", **mode.options)
    automatic = replace(config, model=config.model.change(**(change or {})), solver=solver, train=train)
    fixed = replace(
        automatic,
        solver=solver.change(automatic_steps=False, grid_steps=FIXED_STEPS),
        train=train.change(max_grid_steps=FIXED_STEPS),
    )
    splits = splits or data(updates, batch, validation, data_root)
    configs = {"fixed": fixed, "automatic": automatic}
    rows: list[dict[str, Any]] = []
    for grid, used in configs.items():
        trainer = trained(used, splits)
        base = published_seconds(trainer, used.model, trainer.batches(0)[0], repeats)
        mean = (trainer.total - trainer.compilation) / updates
        rows.append(
            {
                "case": CASE,
                "mode": mode.name,
                "grid": grid,
                "batch": batch,
                "updates": updates,
                "baseline_s": base,
                "ours_s": mean,
                "ratio": base / mean,
                "with_compilation_s": trainer.total / updates,
                "compiling_updates": sum(trainer.compiling),
                "mean_steps": statistics.mean(s for steps in trainer.grids for s in steps),
                "last_steps": "-".join(map(str, trainer.grids[-1])),
                "validation": trainer.state.best,
                "difference": trainer.state.best - rows[0]["validation"] if rows else 0.0,
                "skipped": trainer.state.skipped,
            }
        )
    # one baseline for both: the cost of the published grid does not depend on the weights
    middle = math.fsum(row["baseline_s"] for row in rows) / len(rows)
    return [{**row, "baseline_s": middle, "ratio": middle / row["ours_s"]} for row in rows]
