"""Checks of a run's settings against each other, and of changes to those of an existing run."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from cnf._utils.errors import ConfigError
from cnf._utils.output import emit
from cnf.cli.options import Command
from cnf.cli.spelling import option
from cnf.config import KINDS, BothConfig, RunConfig
from cnf.config.results import read_json
from cnf.config.tagged import values
from cnf.data import DataSplits
from cnf.models.custom import field_code, registered
from cnf.runs import located
from cnf.training.batches import fingerprint

__all__ = ["check", "refuse_changes", "warn_of_changed_data", "warn_of_changed_field"]

# settings that --resume may change: duration, device and location of the data (a fingerprint verifies the data)
RESUME = ("data", "data_root", "download", "steps", "patience", "max_time", "device", "threads", "accumulate", "compile", "compile_unit")
# settings that --evaluate --score may change (custom data, without the run's data set)
SCORE = ("eval_method", "eval_rtol", "eval_atol", "eval_tolerance", "likelihood_solver", "likelihood_steps", "likelihood_order",
         "likelihood_tolerance", "divergence", "hutchinson_noise", "hutchinson_mode", "probes", "noise_samples", "device", "threads")  # fmt: skip
# settings that --evaluate may change: the data to evaluate, solver and noise
EVALUATE = ("data", "data_root", "download", "test_items", *SCORE)


def _changed(old: RunConfig, new: RunConfig, allowed: Collection[str]) -> list[str]:
    before, after = ({each.name: each.value for each in values(config)} for config in (old, new))
    names = [*before, *(name for name in after if name not in before)]
    return [option(name) for name in names if before.get(name) != after.get(name) and name not in allowed]


def refuse_changes(old: RunConfig, new: RunConfig, command: Command) -> None:
    """Reject changed options that --resume cannot change, or that --evaluate (--score) does not use.

    Raises:
        ConfigError: for any such options.
    """
    allowed: Collection[str] = RESUME if command.resume else SCORE if command.score else EVALUATE
    if allowed is EVALUATE and old.data.data != new.data.data:  # other data have their own data options
        fixed = {"columns", "drop_columns"} | ({"condition"} if old.data.condition not in ("none", "label") else set())
        allowed = (*EVALUATE, *(each.name for each in values(new.data) if each.name not in fixed))
    if changed := _changed(old, new, allowed):
        uses = "--score does not use" if command.score else "--evaluate does not use"
        what = "--resume cannot change" if command.resume else uses
        raise ConfigError(f"{what} {', '.join(changed)}: leave {'them' if len(changed) > 1 else 'it'} out, or start a new run")


def warn_of_changed_data(folder: Path, data: DataSplits, name: str) -> None:
    """Warn if the data ``name`` of a run are not those of its training, whose rows may then be in its test."""
    result = read_json(located(folder) / "result.json")
    config, known = result.get("config"), result.get("data_fingerprint")
    own = isinstance(config, dict) and isinstance(config.get("data"), dict) and config["data"].get("data") == name
    if own and known and known != fingerprint(data):
        emit(
            "warning", f"{name} has changed since {folder} was trained: rows of its training may be among those of its test. Put the data back, "
            "or score new rows in a file of another name (--data)"
        )  # fmt: skip


def warn_of_changed_field(folder: Path) -> None:
    """Warn if the file of a custom field has changed since the run was trained."""
    known = read_json(located(folder) / "result.json").get("field_code")
    if known and field_code() and known != field_code():
        emit("warning", f"the file of the field {registered()} has changed since {folder} was trained: if it computes anything else, so does the density")


def check(config: RunConfig, *, trains: bool = True) -> None:
    """Check combinations of settings; if ``trains``, also the precision on the device.

    Raises:
        ConfigError: for the first invalid option; the message states the value and what is expected.
    """
    objective, architecture = config.train.objective, config.model.architecture
    expected = KINDS[config.train.model_kind].architectures
    if architecture not in expected:
        *most, last = expected
        wanted = f"{', '.join(most)} or {last}" if most else last
        raise ConfigError(f"--objective {objective.kind} with --architecture {architecture}: expected {wanted} (the presets node-..., anode-..., vae-...)")
    if trains and config.solver.precision == "tf32" and not config.train.device.startswith("cuda"):
        raise ConfigError(f"--precision tf32 is for GPUs, not for --device {config.train.device}: fp32, or bf16, which a CPU may have")
    if isinstance(objective, BothConfig) and objective.finetune_steps >= config.train.steps:
        raise ConfigError(f"--finetune-steps {objective.finetune_steps}: expected fewer than --steps {config.train.steps}, of which they are the last")
