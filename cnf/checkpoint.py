"""Run folders: config.json, trainer.pt (the whole resume state), model.safetensors (the export)."""

from __future__ import annotations

import dataclasses
import json
import os
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

__all__ = ["FORMAT", "RunInfo", "load", "load_trainer", "read_config", "save_trainer", "write_atomic", "write_config", "write_text", "write_weights"]

FORMAT = 1


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
    except (OSError, ValueError) as error:
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
        raise CheckpointError(f"{path} does not hold this model's weights: {str(error)[:400]}") from None
    return flow.to(device).eval()


def save_trainer(folder: Path, state: dict[str, Any]) -> None:
    """trainer.pt, the previous one kept as trainer.previous.pt."""
    path = folder / "trainer.pt"
    if path.exists():
        previous = folder / "trainer.previous.pt"
        previous.unlink(missing_ok=True)
        os.link(path, previous)  # a second name: at no moment is there no whole checkpoint
    write_atomic(path, lambda p: torch.save(state, p))


def load_trainer(folder: Path) -> dict[str, Any]:
    """The resume state; where trainer.pt is damaged, the previous one.

    Raises:
        CheckpointError: if neither can be read.
    """
    reasons = []
    for name in ("trainer.pt", "trainer.previous.pt"):
        try:
            state: dict[str, Any] = torch.load(folder / name, map_location="cpu", weights_only=True)
            return state
        except Exception as error:  # torch raises many kinds for a damaged file; all mean the same here
            reasons.append(f"{name}: {type(error).__name__}")
    raise CheckpointError(f"{folder} has no checkpoint that can be read ({'; '.join(reasons)})")
