"""The end of a run: the test set read once, result.json, pictures."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchdiffeq

from cnf.checkpoint import RunInfo, write_atomic, write_text
from cnf.datasets import DataSplits
from cnf.errors import SolverError
from cnf.flow import Flow
from cnf.likelihood import Evaluation, evaluate, integral_2d, round_trip_error, solver_error
from cnf.noise import Noise
from cnf.training.loop import Trainer

__all__ = ["finish", "score", "summary", "write_json"]

TEST_SEED = 30_000


def score(flow: Flow, info: RunInfo, data: DataSplits, split: str = "test", draws: int = 10) -> tuple[dict[str, Any], Evaluation]:
    """Everything that a reported likelihood depends on, and the likelihood."""
    device = next(flow.parameters()).device
    x: torch.Tensor = getattr(data, split).to(device)
    context = getattr(data, f"{split}_context")
    context = None if context is None else context.to(device)
    random = flow.levels is not None or info.config.solver.divergence == "hutchinson"
    found = evaluate(flow, x, context, draws=draws if random else 1, seed=TEST_SEED)
    few, some = x[:256], None if context is None else context[:256]
    noise = Noise(TEST_SEED, "check")
    solver = info.config.solver
    result: dict[str, Any] = {
        "bits_per_dim" if flow.levels is not None else "nats": found.mean,
        "standard_error": found.standard_error,
        "noise_standard_error": found.noise_standard_error,
        "split": split,
        "items": len(x),
        "levels": flow.levels,
        "dequantisation_draws": found.draws if flow.levels is not None else 0,
        "importance_samples": 1,
        "alpha": info.config.model.alpha if flow.levels is not None else None,
        "solver": solver.eval_method,
        "rtol": solver.eval_rtol,
        "atol": solver.eval_atol,
        "divergence": solver.divergence,
        "probes": solver.probes if solver.divergence == "hutchinson" else None,
        "nfe": found.nfe,
        "solver_error_per_dim": solver_error(flow, few, some, noise=noise),
        "round_trip_error": round_trip_error(flow, few, some, noise=noise),
        "parameters": sum(p.numel() for p in flow.parameters()),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchdiffeq": torchdiffeq.__version__},
    }
    if data.entropy is not None:
        result["true_entropy"] = data.entropy
    if data.kind == "toy":
        result["integral"] = integral_2d(flow, extent=1.6 * float(data.test.abs().max()))
    return result, found


def summary(result: dict[str, Any]) -> str:
    """The result in words: the figure and everything that it depends on."""
    bits = "bits_per_dim" in result
    value, unit = (result["bits_per_dim"], "bits/dim") if bits else (result["nats"], "nats")
    noise = f" (noise ± {result['noise_standard_error']:.4f})" if result["noise_standard_error"] else ""
    lines = [f"{result['split']}: {value:.4f} ± {result['standard_error']:.4f} {unit}{noise} over {result['items']:,} items"]
    if bits:
        lines.append(
            f"  {result['levels']} levels, uniform dequantisation, {result['dequantisation_draws']} draws an item, alpha {result['alpha']:g}"
        )
    lines.append(
        f"  {result['solver']} rtol {result['rtol']:g} atol {result['atol']:g}, {result['divergence']} trace, NFE {result['nfe']:.0f}; "
        f"solver error {result['solver_error_per_dim']:.1e} {'bits' if bits else 'nats'}/dim, "
        f"round trip {result['round_trip_error']:.1e}; {result['parameters']:,} parameters"
    )
    if "true_entropy" in result:
        lines.append(f"  true entropy {result['true_entropy']:.4f} nats: {value - result['true_entropy']:.4f} above it")
    if "integral" in result:
        lines.append(f"  the density integrates to {result['integral']:.4f} on a grid")
    return "\n".join(lines)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """JSON, whole or not at all."""
    text = json.dumps(value, indent=2)
    write_atomic(path, lambda p: write_text(p, text))


def finish(trainer: Trainer) -> dict[str, Any]:
    """Score the test set with the best validation's weights; write result.json, test_nll.npz and the pictures."""
    flow, info, folder = trainer.best_flow(), trainer.info, trainer.folder
    result, found = score(flow, info, trainer.data, draws=info.config.train.draws)
    result |= {
        "validation": trainer.best,
        "best_step": trainer.best_step,
        "steps": trainer.step,
        "skipped": trainer.skipped,
        "seconds": round(trainer.seconds, 1),
        "seed": info.config.train.seed,
        "notices": list(trainer.data.notices),
        "config": dataclasses.asdict(info.config),
    }
    write_json(folder / "result.json", result)
    nll = found.per_item.numpy()

    def save(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, nll=nll)

    write_atomic(folder / "test_nll.npz", save)
    try:
        pictures(flow, trainer.data, folder, trainer.metrics, trainer.unit)
    except SolverError as error:
        trainer.say(f"some pictures could not be drawn: {error}")
    return result


def pictures(flow: Flow, data: DataSplits, folder: Path, metrics: list[dict[str, Any]], unit: str) -> None:
    """Samples beside data and learning curves; in two dimensions the density, the field, the paths and the motion."""
    from cnf import plotting

    plots, samples = folder / "plots", folder / "samples"
    plots.mkdir(exist_ok=True)
    samples.mkdir(exist_ok=True)
    count = 64 if data.kind == "image" else min(5000, len(data.test))
    context = None if data.test_context is None else data.test_context[:count].to(next(flow.parameters()).device)
    noise = Noise(0, "sample")
    if context is None:
        x = flow.sample(count, noise=noise)
    else:
        x = flow.sample(1, context, noise=noise)[0]
    x = x.cpu()
    plotting.samples_beside_data(x, data.test[:count], samples / "samples.png", levels=data.levels, columns=data.columns)
    plotting.learning_curves(metrics, plots / "learning_curves.png", unit=unit)
    if data.event_shape == (2,) and context is None:
        plotting.density_2d(flow, data.test, plots / "density.png")
        plotting.vector_field_2d(flow, plots / "vector_field.png")
        plotting.trajectories_2d(flow, data.test, plots / "trajectories.png")
        plotting.flow_gif(flow, plots / "flow.gif")
