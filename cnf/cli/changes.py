"""Checks of a run's settings against each other, and of changes to those of an existing run."""

from __future__ import annotations

import dataclasses

from cnf._utils.errors import ConfigError
from cnf.cli.options import Command
from cnf.config import PREDICTIVE, RunConfig
from cnf.config.names import option

__all__ = ["check", "refuse_changes"]

# settings that --resume may change: duration, device and location of the data (a fingerprint verifies the data)
RESUME = {"data": ("data", "data_root", "download"), "train": ("steps", "patience", "max_time", "device", "threads", "accumulate"),
          "solver": ("compile",)}  # fmt: skip
# settings that --evaluate may change: the data to evaluate, solver and noise
EVALUATE = {
    "data": ("data", "data_root", "download"),
    "solver": ("eval_method", "eval_rtol", "eval_atol", "eval_tolerance", "divergence", "probe", "mode", "probes"),
    "train": ("draws", "test_items", "device", "threads"),
}
# settings that --evaluate --score may change (custom data, without the run's data set)
SCORE = {"solver": EVALUATE["solver"], "train": ("draws", "device", "threads")}


def _changed(old: RunConfig, new: RunConfig, allowed: dict[str, tuple[str, ...]]) -> list[str]:
    found = []
    for part in (f.name for f in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(getattr(old, f.name))):
        before, after = (dataclasses.asdict(getattr(config, part)) for config in (old, new))
        found += [option(k) for k in before if before[k] != after[k] and k not in allowed.get(part, ())]
    return found


def refuse_changes(old: RunConfig, new: RunConfig, command: Command) -> None:
    """Reject changed options that --resume cannot change, or that --evaluate (--score) does not use.

    Raises:
        ConfigError: for any such options.
    """
    allowed = RESUME if command.resume else SCORE if command.score else EVALUATE
    if allowed is EVALUATE and old.data.data != new.data.data:  # other data have their own data options
        fixed = {"columns", "drop_columns"} | ({"condition"} if old.data.condition not in ("none", "label") else set())
        allowed = {**EVALUATE, "data": tuple(name for name in dataclasses.asdict(new.data) if name not in fixed)}
    if changed := _changed(old, new, allowed):
        uses = "--score does not use" if command.score else "--evaluate does not use"
        what = "--resume cannot change" if command.resume else uses
        raise ConfigError(f"{what} {', '.join(changed)}: leave {'them' if len(changed) > 1 else 'it'} out, or start a new run")


def check(config: RunConfig, *, trains: bool = True) -> None:
    """Check combinations of settings; if ``trains``, also the precision on the device.

    Raises:
        ConfigError: for the first invalid option; the message states the value and what is expected.
    """
    objective, architecture = config.train.objective, config.model.architecture
    if config.train.density == (architecture in PREDICTIVE):
        wanted = "stack, multiscale or parallel" if config.train.density else "node or resnet"
        raise ConfigError(f"--objective {objective} with --architecture {architecture}: expected {wanted} (the presets node-..., anode-...)")
    if trains and config.solver.precision == "tf32" and not config.train.device.startswith("cuda"):
        raise ConfigError(f"--precision tf32 is for GPUs, not for --device {config.train.device}: fp32, or bf16, which a CPU may have")
    if objective == "both" and config.train.tune_steps >= config.train.steps:
        raise ConfigError(f"--finetune-steps {config.train.tune_steps}: expected fewer than --steps {config.train.steps}, of which they are the last")
