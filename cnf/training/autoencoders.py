"""Test bound, pictures and report of a run of an autoencoder."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf._utils.errors import ConfigError
from cnf._utils.progress import Progress
from cnf.config.results import figure
from cnf.data import DataSplits
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.losses.elbo import ELBO, ELBOEstimate, estimate_elbo
from cnf.ode.divergence import Exact
from cnf.random import Noise
from cnf.runs import RunInfo
from cnf.solvers import refined
from cnf.training.batches import choose_rows
from cnf.training.files import write_items, write_json
from cnf.training.interpretation import interpret, warnings
from cnf.training.loop import Trainer
from cnf.training.report_page import write_report
from cnf.training.scoring import TEST_SEED, about, rows_checked, solver_facts, trained
from cnf.training.tensorboard import conclude
from cnf.vae import FlowVAE

__all__ = ["BOUNDS", "bounds_text", "encoded", "finish_bounds", "score_bounds", "write_bounds"]

BOUNDS = "test_elbo.npz"  # bounds of the test split, in the run folder
SHOWN = 16  # images of each kind in the picture


def encoded(result: Mapping[str, Any]) -> bool:
    """Return whether a result is of an autoencoder."""
    return "negative_elbo" in result


def score_bounds(
    model: FlowVAE,
    data: DataSplits,
    binarize: str,
    split: str = "test",
    draws: int = 1,
    *,
    items: int | None = None,
    check: bool = False,
    importance: int = 1,
    importance_images: int = 64,
    group: Group = SINGLE_PROCESS,
    quiet: bool = False,
) -> tuple[dict[str, Any], ELBOEstimate, Tensor]:
    """Estimate the evidence lower bound of a split, and on request the likelihood of some of its images.

    Args:
        model: in evaluation mode.
        data: the run's data.
        binarize: how they were made binary, for the result.
        split: ``"test"``, ``"validation"`` or ``"train"``.
        draws: of z for each image.
        items: number of images, a random subset that is always the same; all if None.
        check: solve all scored images again at ten times tighter tolerances, instead of some of them.
        importance: number of draws of z of the importance-weighted likelihood; 1 leaves it out.
        importance_images: number of images of that, the first of the scored ones.
        group: processes that all call this with the same arguments and share the work; each gets the result.
        quiet: report no progress on stderr.

    Returns:
        The result with all settings that it depends on, the bound, and the images' indices in the split.

    Raises:
        ConfigError: for ``items`` below 1, or weights whose density is only estimated.
        SolverError: if a solve fails.
    """
    started = time.monotonic()
    if importance > 1 and not all(isinstance(block.divergence, Exact) for block in model.blocks):
        raise ConfigError(f"--importance {importance} weights draws of z by their density, which Hutchinson's trace only estimates: add --divergence exact")
    index = choose_rows(len(getattr(data, split)), items, TEST_SEED)
    x, quiet = getattr(data, split)[index], quiet or not group.main
    if split == "train" and data.train_levels:  # the training's own draws are those of its steps
        x = ELBO(model, redraw=data.train_levels).images(x, Noise(TEST_SEED, "train")).cpu()
    with Progress(f"{split} bound", "batches", quiet=quiet) as work:
        found = estimate_elbo(model, x, draws, TEST_SEED, group=group, progress=work.update)
    result: dict[str, Any] = {
        "objective": "elbo",
        **figure("negative_elbo", -found.elbo, found.standard_error),
        "negative_elbo": -found.elbo,
        "noise_standard_error": found.noise_standard_error,
        "kl": found.kl,
        "reconstruction": -found.log_likelihood,
        **({} if model.levels == 2 else {"bits_per_dim": -found.elbo / x[0].numel() / math.log(2)}),
        "data": data.name,
        "split": split,
        "items": len(x),
        "items_of": len(getattr(data, split)),
        "dimensions": x[0].numel(),
        "latent": model.latent,
        "levels": model.levels,
        "binarisation": binarize,
        "noise_draws": draws,
        "importance": _weighted(model, x[:importance_images], importance, group, quiet) if importance > 1 else None,
        **solver_facts(model.blocks),
        **_solver_error(model, x[: rows_checked(len(x), check)], group),
        "nfe": found.nfe,
        **about(model, started),
    }
    return result, found, index


def _solver_error(model: FlowVAE, x: Tensor, group: Group) -> dict[str, Any]:
    """Return how much the bounds of these images change under ten times tighter tolerances."""
    if not model.blocks:
        return {"solver_error": None, "solver_error_largest": None, "checked_items": 0}
    coarse, fine = (estimate_elbo(model, x, 1, TEST_SEED, solver=solver, group=group).rows for solver in (None, refined))
    change = (coarse[0] - coarse[1]) - (fine[0] - fine[1])
    return {"solver_error": float(change.mean()), "solver_error_largest": float(change.abs().max()), "checked_items": len(x)}


@torch.no_grad()
def _weighted(model: FlowVAE, x: Tensor, samples: int, group: Group, quiet: bool) -> dict[str, Any]:
    """Return the importance-weighted log p of these images, and by how much it is above their bound."""
    found, done = torch.zeros(len(x), dtype=torch.float64), 0
    with group.together(), Progress("importance weights", "images", quiet=quiet) as work:
        for i in range(len(x)):
            if group.owns(i):
                found[i] = model.log_likelihood(x[i : i + 1].to(model.like.device), samples, noise=Noise(TEST_SEED, "weighted", i)).double().cpu()[0]
                done += 1
                work.update(done, group.owned(len(x)))
    found = group.sum(found)
    bound = estimate_elbo(model, x, 10, TEST_SEED, group=group).elbo
    error = float(found.std()) / math.sqrt(len(x)) if len(x) > 1 else None
    return {"samples": samples, "images": len(x), "log_likelihood": float(found.mean()), "standard_error": error, "gain": float(found.mean()) - bound}


def bounds_text(result: Mapping[str, Any]) -> str:
    """Format a result as text: the bound and every setting that it depends on."""
    error = "" if result["standard_error"] is None else f" ± {result['standard_error']:.2f}"
    noise = result["noise_standard_error"]
    aside = " (noise: one draw cannot tell)" if noise is None else f" (noise ± {noise:.2f})"
    bits = f", {result['bits_per_dim']:.3f} bits/dim" if "bits_per_dim" in result else ""
    lines = [f"{result['split']}: negative ELBO {result['value']:.2f}{error} nats{aside}{bits} over {result['items']:,} of {result['items_of']:,} images of {result['data']}"]
    lines.append(f"  reconstruction {result['reconstruction']:.2f}, KL {result['kl']:.2f} nats of {result['latent']} latents")
    if (weighted := result["importance"]) is not None:
        spread = "" if weighted["standard_error"] is None else f" ± {weighted['standard_error']:.2f}"
        lines.append(
            f"  log p by {weighted['samples']:,} weighted draws: {weighted['log_likelihood']:.2f}{spread} nats on {weighted['images']:,} images, "
            f"{weighted['gain']:.2f} above their ELBO"
        )  # fmt: skip
    lines += [f"  {line}" for line in interpret(result)]
    binary = {"once": "binary images drawn once", "redraw": "binary images drawn once (training: anew at each step)"}.get(result["binarisation"])
    draws = f"{result['noise_draws']} draw{'s' if result['noise_draws'] > 1 else ''} of z"
    parts = [f"{result['levels']} levels" + (f", {binary}" if binary else ""), draws]
    if result["solver"] is not None:
        trace = f"{result['divergence']} trace" + (f" ({result['probes']} {result['probe']} probes)" if result["probes"] else "")
        parts += [trace, f"{result['solver']} rtol {result['rtol']:g} atol {result['atol']:g}, NFE {result['nfe']:.0f}"]
        parts.append(f"ten times tighter: {result['solver_error']:+.1e} nats on {result['checked_items']:,} images, at most {result['solver_error_largest']:.1e}")
    return "\n".join([*lines, f"  {'; '.join(parts)}", f"  {result['parameters']:,} parameters"])


def write_bounds(path: Path, found: ELBOEstimate, index: Tensor) -> None:
    """Write each image's index in its split, negative ELBO, reconstruction term and KL term in nats, as .npz or .csv.

    Raises:
        ConfigError: for a file name that ends in neither .npz nor .csv.
        CheckpointError: if the file cannot be written.
    """
    log_p, kl = (row.numpy() for row in found.rows)
    arrays = {"index": index.numpy(), "negative_elbo": kl - log_p, "reconstruction": -log_p, "kl": kl}
    write_items(path, {"unit": np.array("nats"), **arrays}, arrays)


def finish_bounds(trainer: Trainer, info: RunInfo, data: DataSplits, folder: Path, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Estimate the bound of the test split with the best validation's weights; write result.json, test_elbo.npz, plots and report.html.

    Args:
        trainer: after its last step.
        info, data: of the run.
        folder: of the run.
        about: further entries of result.json.

    Raises:
        SolverError: if a solve fails.
    """
    from cnf import plotting

    model, config = trainer.best_model(), info.config
    result, found, index = score_bounds(
        model, data, config.data.binarize, draws=config.train.noise_samples, items=config.train.test_items, group=trainer.group, quiet=trainer.quiet
    )  # fmt: skip
    result |= {**trained(trainer, config.train.seed, data, dataclasses.asdict(config)), **(about or {})}
    if not trainer.group.main:
        return result
    write_bounds(folder / BOUNDS, found, index)
    # written last: --resume takes this file as proof that the test is complete
    write_json(folder / "result.json", result)
    plots, samples = folder / "plots", folder / "samples"
    plots.mkdir(exist_ok=True)
    samples.mkdir(exist_ok=True)
    plotting.learning_curves(trainer.history, plots / "learning_curves.png", unit="negative ELBO, nats", name="loss")
    plotting.reconstructions({"autoencoder": model}, data.test[: 2 * SHOWN], plots / "reconstructions.png")
    shown = data.test[: 4 * SHOWN] / (model.levels - 1)  # floats, since samples are probabilities
    plotting.samples_beside_data(model.sample(len(shown), noise=Noise(0, "sample")).cpu(), shown, samples / "samples.png")
    conclude(trainer, result["value"])
    head, *lines = bounds_text(result).splitlines()
    meaning = interpret(result)
    settings = [line.strip() for line in lines if line.strip() not in meaning]
    write_report(folder, head, meaning=meaning, settings=settings, warnings=warnings(result))
    return result
