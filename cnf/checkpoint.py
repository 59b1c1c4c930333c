"""Run folders: config.json, trainer.pt (the whole resume state), model.safetensors (the export)."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from cnf.errors import CheckpointError, ConfigError
from cnf.flow import Flow
from cnf.models import build
from cnf.presets import RunConfig

__all__ = [
    "FORMAT",
    "RunInfo",
    "has_trainer",
    "load",
    "load_trainer",
    "one_line",
    "read_config",
    "save_trainer",
    "write_atomic",
    "write_config",
    "write_text",
    "write_weights",
]

FORMAT = 1
TRAINER = ("trainer.pt", "trainer.previous.pt")


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What config.json says beside the settings: the data's shape, so that a flow can be rebuilt without the data."""

    config: RunConfig
    event_shape: tuple[int, ...]
    levels: int | None
    context_dim: int
    classes: tuple[str, ...]
    columns: tuple[str, ...]

    def build(self) -> Flow:
        """The flow, untrained."""
        return build(
            self.config.model, self.config.solver, self.event_shape, levels=self.levels, context_dim=self.context_dim
        )


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Write under a temporary name in the same folder, flush to the disk, rename: whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_config(folder: Path, info: RunInfo) -> None:
    """config.json, with the format's number."""
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(info)}, indent=2)
    write_atomic(folder / "config.json", lambda p: write_text(p, text))


def write_text(path: Path, text: str) -> None:
    """Text with its last newline."""
    path.write_text(text + "\n", encoding="utf-8")


def read_config(folder: Path) -> RunInfo:
    """What config.json says.

    Raises:
        CheckpointError: where it is missing or damaged, or a field is unknown, missing or of the wrong type (named).
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no run folder: it has no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path}: this version reads format {FORMAT}")
    info: RunInfo = _decode(RunInfo, raw, str(path))
    return info


def _decode(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as a dataclass, tuple, Literal or plain type; anything else is refused by name."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise CheckpointError(f"{where} is {value!r}; expected an object")
        hints = typing.get_type_hints(kind)
        for name in value.keys() - hints.keys():
            raise CheckpointError(f"{where}: unknown field {name!r}")
        for name in hints.keys() - value.keys():
            raise CheckpointError(f"{where}: field {name!r} is missing")
        return kind(**{name: _decode(hint, value[name], f"{where}: {name}") for name, hint in hints.items()})
    if origin is tuple:
        if not isinstance(value, list):
            raise CheckpointError(f"{where} is {value!r}; expected a list")
        return tuple(_decode(arguments[0], v, where) for v in value)
    if origin is typing.Literal:
        if value not in arguments:
            raise CheckpointError(f"{where} is {value!r}; expected one of {arguments}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _decode(next(a for a in arguments if a is not type(None)), value, where)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise CheckpointError(f"{where} is {value!r}; expected {kind.__name__}")
    return value


def one_line(error: BaseException, length: int = 300) -> str:
    """What torch says in many lines, in one."""
    text = " ".join(str(error).replace("Error(s) in loading state_dict for Flow:", "").split())
    return text if len(text) <= length else text[: length - 3] + "..."


def write_weights(folder: Path, flow: Flow) -> None:
    """model.safetensors."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in flow.state_dict().items()}
    write_atomic(folder / "model.safetensors", lambda p: safetensors.torch.save_file(tensors, str(p)))


def load(folder: str | Path, device: str | torch.device = "cpu") -> Flow:
    """The trained flow of a run folder, ready for evaluation; nothing in the folder is executed.

    Raises:
        CheckpointError: where the folder, its config or its weights are missing, damaged, or do not fit each other.

    Example:
        >>> flow = load("runs/digits-0")  # doctest: +SKIP
        >>> flow.sample(16).shape  # doctest: +SKIP
        torch.Size([16, 1, 8, 8])
    """
    folder = Path(folder)
    info = read_config(folder)
    path = folder / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the run has not been validated yet")
    try:
        flow = info.build()
        flow.load_state_dict(safetensors.torch.load_file(str(path)))
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    except (OSError, RuntimeError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} does not hold this model's weights: {one_line(error)}") from None
    return flow.to(device).eval()


def save_trainer(folder: Path, state: dict[str, Any]) -> None:
    """trainer.pt, the previous one kept as trainer.previous.pt."""
    path = folder / "trainer.pt"
    if path.exists():
        previous = folder / "trainer.previous.pt"
        previous.unlink(missing_ok=True)
        try:
            os.link(path, previous)  # a second name: at no moment is there no whole checkpoint
        except OSError:  # a file system without hard links
            shutil.copyfile(path, previous)
    write_atomic(path, lambda p: torch.save(state, p))


def has_trainer(folder: Path) -> bool:
    """Whether there is any checkpoint to resume from, damaged or not."""
    return any((folder / name).exists() for name in TRAINER)


def load_trainer(folder: Path) -> tuple[dict[str, Any], str]:
    """The resume state and, where trainer.pt is damaged and the previous one serves (and takes its place), a line about it.

    Raises:
        CheckpointError: if neither can be read. Nothing in them is executed: torch's ``weights_only`` reader refuses all but
            tensors and plain values.
    """
    reasons = []
    for name in TRAINER:
        try:
            state = torch.load(folder / name, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise TypeError(f"it holds a {type(state).__name__}")
        except Exception as error:  # torch raises many kinds for a damaged file; all mean the same here
            reasons.append(f"{name}: {type(error).__name__}: {one_line(error, 120)}")
            continue
        if reasons:  # else the next save would keep the damaged one as the previous
            os.replace(folder / name, folder / TRAINER[0])
        return state, f"{folder}: going back to the previous checkpoint ({'; '.join(reasons)})" if reasons else ""
    raise CheckpointError(f"{folder} has no checkpoint that can be read ({'; '.join(reasons)})")
