"""Test loss and accuracy, predictions and plots of a run of a predictor."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnf._utils.progress import Progress
from cnf.config.results import figure
from cnf.data import DataSplits
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.losses import Assessment, assess
from cnf.neural_ode import NeuralODE, Predictor
from cnf.runs import RunInfo
from cnf.solvers import Adaptive, refined
from cnf.training.batches import choose_rows
from cnf.training.feature_history import FeatureHistory, chosen_points
from cnf.training.files import write_items, write_json
from cnf.training.interpretation import interpret, warnings
from cnf.training.loop import Trainer
from cnf.training.report_page import write_report
from cnf.training.scoring import TEST_SEED, about, rows_checked, trained
from cnf.training.tensorboard import conclude

__all__ = ["PREDICTIONS", "finish_predictions", "predicted", "predictions_text", "score_predictions", "write_predictions"]

PREDICTIONS = "test_predictions.npz"  # outputs on the test split, in the run folder


def predicted(result: dict[str, Any]) -> bool:
    """Return whether a result is of a predictor rather than of a density."""
    return "loss" in result


def score_predictions(
    model: Predictor,
    data: DataSplits,
    kind: str,
    split: str = "test",
    *,
    items: int | None = None,
    check: bool = False,
    group: Group = SINGLE_PROCESS,
    quiet: bool = False,
) -> tuple[dict[str, Any], Assessment, torch.Tensor]:
    """Evaluate the loss (and accuracy) of a predictor on a split.

    Args:
        model: in evaluation mode.
        data: the run's data, with targets.
        kind: ``"regression"`` or ``"classification"``.
        split: ``"test"``, ``"validation"`` or ``"train"``.
        items: number of rows to score, a random subset that is always the same; all if None.
        check: solve all scored rows again at ten times tighter tolerances, instead of some of them.
        group: processes that all call this with the same arguments and share the work; each gets the result.
        quiet: report no progress on stderr.

    Returns:
        The result with all settings that it depends on, the assessment of each row, and the rows' indices in the split.

    Raises:
        ConfigError: for ``items`` below 1.
        SolverError: if a solve fails.
    """
    started = time.monotonic()
    total = len(getattr(data, split))
    index = choose_rows(total, items, TEST_SEED)
    x, targets = getattr(data, split)[index], getattr(data, f"{split}_context")[index]
    quiet = quiet or not group.main
    with Progress(f"{split} predictions", "batches", quiet=quiet) as work:
        found = assess(model, x, targets, kind, group=group, progress=work.update)
    result: dict[str, Any] = {
        "objective": kind,
        **figure("cross_entropy" if kind == "classification" else "mean_squared_error", found.mean, found.standard_error),
        "loss": found.mean,
        "accuracy": found.accuracy,
        "accuracy_standard_error": found.accuracy_standard_error,
        "data": data.name,
        "split": split,
        "items": len(x),
        "items_of": total,
        "dimensions": model.dim,
        "levels": data.levels,
        "outputs": model.outputs,
        "classes": list(data.classes),
        **_solver(model, x, found, kind, targets, check, group, quiet),
        "nfe": found.nfe,
        **about(model, started),
    }
    return result, found, index


def _solver(
    model: Predictor,
    x: torch.Tensor,
    found: Assessment,
    kind: str,
    targets: torch.Tensor,
    check: bool,
    group: Group,
    quiet: bool,
) -> dict[str, Any]:
    """Return the evaluation solver and the effect of ten times tighter tolerances on some rows."""
    none = {"solver": None, "rtol": None, "atol": None, "solver_error": None, "changed_predictions": None, "checked_items": 0}
    if not isinstance(model, NeuralODE):
        return none
    few = rows_checked(len(x), check)
    used = model.eval_solver
    with Progress("solver check", "batches", quiet=quiet) as work:
        finer = assess(model, x[:few], targets[:few], kind, group=group, progress=work.update, solver=refined)
    changed = None if finer.correct is None else int((finer.outputs.argmax(1) != found.outputs[:few].argmax(1)).sum())
    return {
        "solver": used.method if isinstance(used, Adaptive) else repr(used),
        "rtol": used.rtol if isinstance(used, Adaptive) else None,
        "atol": used.atol if isinstance(used, Adaptive) else None,
        "solver_error": float((finer.loss - found.loss[:few]).mean()),
        "changed_predictions": changed,
        "checked_items": few,
    }


def predictions_text(result: dict[str, Any]) -> str:
    """Format a result as text."""
    error = "" if result["standard_error"] is None else f" ± {result['standard_error']:.2g}"
    loss = f"{'cross entropy' if result['accuracy'] is not None else 'mean squared error'} {result['loss']:.4g}{error}"
    loss += " nats" if result["accuracy"] is not None else ""
    head = loss
    if result["accuracy"] is not None:
        head = f"accuracy {100 * result['accuracy']:.2f} ± {100 * result['accuracy_standard_error']:.2f} %, {loss}"
    lines = [f"{result['split']}: {head} over {result['items']:,} of {result['items_of']:,} items of {result['data']}"]
    lines += [f"  {line}" for line in interpret(result)]
    if result["solver"] is not None:
        tolerances = "" if result["rtol"] is None else f" rtol {result['rtol']:g} atol {result['atol']:g}"
        changed = "" if result["changed_predictions"] is None else f", {result['changed_predictions']} predictions changed"
        lines.append(
            f"  {result['solver']}{tolerances}, NFE {result['nfe']:.0f}; ten times tighter: loss {result['solver_error']:+.1e}"
            f"{changed} on {result['checked_items']:,} items"
        )
    lines.append(f"  {result['parameters']:,} parameters")
    return "\n".join(lines)


def write_predictions(path: Path, found: Assessment, index: torch.Tensor, classes: tuple[str, ...]) -> None:
    """Write each row's index in its split, outputs, loss and (classification) predicted class, as .npz or .csv.

    Raises:
        ConfigError: for a file name that ends in neither .npz nor .csv.
        CheckpointError: if the file cannot be written.
    """
    arrays: dict[str, Any] = {"index": index.numpy(), "loss": found.loss.numpy()}
    if found.correct is not None:
        arrays["predicted"] = np.array([str(c) for c in classes])[found.outputs.argmax(1).numpy()]
        arrays["correct"] = found.correct.numpy()
    columns = arrays | {f"output {i}": values for i, values in enumerate(found.outputs.T.numpy())}
    write_items(path, {"outputs": found.outputs.numpy(), **arrays}, columns)


def predictor_pictures(
    model: Predictor, info: RunInfo, data: DataSplits, folder: Path, metrics: list[dict[str, Any]], frames: dict[int, torch.Tensor]
) -> None:
    """Plot learning curves, the evolution of the features over depth and over training (``frames``), the learned depth.

    Data of one or two dimensions also get the decision boundary, data of one dimension the trajectories.
    """
    from cnf import plotting

    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    classification = info.config.train.objective.kind == "classification"
    unit = "cross entropy, nats" if classification else "mean squared error"
    plotting.learning_curves(metrics, plots / "learning_curves.png", unit=unit, name="loss")
    x, targets = data.test[:1000], data.test_context
    assert targets is not None
    if data.kind != "image":  # toy data sets may be sorted by class
        chosen = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[:1000]
        x, targets = data.test[chosen], targets[chosen]
    targets = targets[: len(x)]
    marks = targets.argmax(1) if classification else targets[:, 0]
    classes = data.classes if classification else ()
    if frames:
        assert data.validation_context is not None
        targets = data.validation_context[chosen_points(len(data.validation), math.prod(model.state_shape))]
        shown = targets.argmax(1) if classification else targets[:, 0]
        plotting.features_training(frames, shown, plots / "features_training.png", classes=classes)
    if isinstance(model, NeuralODE):
        plotting.feature_evolution(model, x, marks, plots / "features.png", classes=classes)
        if model.depth is not None:
            plotting.learned_depth(model, x, marks, plots / "depth.png", classes=classes)
        if data.event_shape == (1,):
            plotting.paths_1d(model, x[:200], marks[:200], plots / "trajectories.png")
    if data.event_shape in ((1,), (2,)):
        plotting.decision_boundary(model, x, marks, plots / "boundary.png", classes=classes)


def finish_predictions(
    trainer: Trainer, info: RunInfo, data: DataSplits, folder: Path, about: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Score the test split with the best validation's weights; write result.json, test_predictions.npz, plots and report.html.

    Args:
        trainer: after its last step.
        info, data: of the run.
        folder: of the run.
        about: further entries of result.json.

    Raises:
        SolverError: if a solve fails.
    """
    model = trainer.best_model()
    result, found, index = score_predictions(
        model, data, info.config.train.objective.kind, items=info.config.train.test_items, group=trainer.group, quiet=trainer.quiet
    )
    solved = [row for row in trainer.history if "nfe" in row]
    result |= {
        **trained(trainer, info.config.train.seed, data, dataclasses.asdict(info.config)),
        **(about or {}),
        "nfe_training": solved[-1]["nfe"] if solved else None,
        "nfe_backward_training": solved[-1]["nfe_backward"] if solved else None,
    }
    if not trainer.group.main:
        return result
    write_predictions(folder / PREDICTIONS, found, index, data.classes)
    # written last: --resume takes this file as proof that the test is complete
    write_json(folder / "result.json", result)
    history = trainer.callback(FeatureHistory)
    predictor_pictures(model, info, data, folder, trainer.history, {} if history is None else history.frames)
    conclude(trainer, result["loss"], result["accuracy"])
    head, *lines = predictions_text(result).splitlines()
    meaning = interpret(result)
    settings = [line.strip() for line in lines if line.strip() not in meaning]
    write_report(folder, head, meaning=meaning, settings=settings, warnings=warnings(result))
    return result
