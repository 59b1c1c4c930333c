"""Score of a run of cnf.fit, with the entries of the programs' result.json."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from cnf._utils.errors import ConfigError
from cnf.data import DataSplits
from cnf.flow import Flow
from cnf.losses import CustomLoss, Supervised
from cnf.neural_ode import Predictor
from cnf.runs import ModelInfo
from cnf.training.files import write_json
from cnf.training.interpretation import interpret, warnings
from cnf.training.loop import Trainer
from cnf.training.predictions import predicted, predictions_text, score_predictions
from cnf.training.report import comparability, headline
from cnf.training.report_page import write_report
from cnf.training.scoring import score, trained
from cnf.training.tensorboard import conclude

__all__ = ["finish_fit", "require_scorable"]

DRAWS = 10  # of the noise of vectors, as in the presets; images have noise in every pixel, and one draw


def _scorable(model: Any, objective: Any) -> bool:
    """Return whether a model has a figure that compares: the likelihood of a flow, or a predictor's error or cross entropy."""
    return isinstance(model, Flow) or (isinstance(model, Predictor) and isinstance(objective, Supervised))


def require_scorable(model: Any, objective: Any) -> None:
    """Refuse test rows for a model whose loss is the user's own, and whose figure is thus unknown.

    Raises:
        ConfigError: for such a model.
    """
    if not _scorable(model, objective):
        raise ConfigError(f"test= scores a flow, or a predictor by its own loss, got {type(model).__name__} with a custom loss: leave test out, and score such rows yourself")


def finish_fit(trainer: Trainer, model: Any, data: DataSplits, info: ModelInfo, folder: Path | None) -> dict[str, Any] | None:
    """Score the test rows, or in a folder without them the validation rows; write result.json and report.html.

    Several processes share the scoring; rank 0 writes.

    Args:
        trainer: after its last step.
        model: with the best weights, in evaluation mode.
        data: the validation and test rows.
        info: of the run.
        folder: of the run, or None.

    Returns:
        The entries of result.json; None if nothing was scored.

    Raises:
        SolverError: if the test rows cannot be solved; the run folder is complete but for its figure.
    """
    state, objective, result = trainer.state, trainer.objective, None
    split = "test" if len(data.test) else "validation"
    known = math.isfinite(state.best)
    if len(data.test) or (folder is not None and known and _scorable(model, objective)):
        try:
            result = _score(trainer, model, data, split)
        except Exception as error:  # of memory, or of a custom inverse: the training is done
            if split == "test":
                raise
            trainer.say(f"the validation rows cannot be scored, so that the run has no figure: {error}")
    if result is not None:
        result |= trained(trainer, info.seed, data, dataclasses.asdict(info))
        if isinstance(objective, CustomLoss):  # another quantity than the figure
            result["validation"] = None
    if folder is None or not trainer.group.main:
        return result
    weights = f"the best of the validations, at step {state.best_step:,} of {state.step:,}" if known else f"the last weights, of step {state.step:,}, without validation"
    meaning = [f"{weights}; ended by {trainer.stop_reason() or 'max_time'}"]
    if result is None:
        found = f"validation {state.best:.4f} {objective.unit}".rstrip() if known else "no validation"
        write_report(folder, found, meaning=meaning)
        return None
    write_json(folder / "result.json", result)
    if split == "test":
        conclude(trainer, result["value"], result.get("accuracy"))
    head = predictions_text(result).splitlines()[0] if predicted(result) else headline(result)
    settings = [] if predicted(result) else comparability(result).split("; ")
    write_report(folder, head, meaning=[*interpret(result), *meaning], settings=settings, warnings=warnings(result))
    return result


def _score(trainer: Trainer, model: Any, data: DataSplits, split: str) -> dict[str, Any]:
    group, quiet = trainer.group, trainer.quiet
    if isinstance(model, Flow):
        return score(model, data, split, DRAWS if model.levels is None else 1, group=group, quiet=quiet)[0]
    return score_predictions(model, data, trainer.objective.kind, split, group=group, quiet=quiet)[0]  # type: ignore[attr-defined]
