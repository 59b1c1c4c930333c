"""model.safetensors: a model's weights with their checksum, and loading the model of a run folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from cnf.checkpoint.config import RunInfo, read_config
from cnf.checkpoint.files import one_line, write_atomic
from cnf.checkpoint.shelf import located
from cnf.errors import CheckpointError, ConfigError
from cnf.flow import Flow
from cnf.models import Predictor
from cnf.strangers import require_file

__all__ = ["load", "load_model", "weights_digest", "write_weights"]


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of CPU tensors: of their names, types, shapes and bytes, sorted by name.

    Example:
        >>> weights_digest({"a": torch.zeros(2), "b": torch.ones(())})[:8]
        '1670631c'
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_weights(folder: Path, flow: nn.Module, *, half: bool = False) -> None:
    """Write model.safetensors with a checksum in its metadata.

    Args:
        folder: the run folder.
        flow: the model, a flow or a predictor.
        half: store float32 parameters in half precision (11 bits, half the size); they load as float32.
    """
    rounded = {name for name, p in flow.named_parameters() if p.dtype == torch.float32} if half else set()
    tensors = {k: v.detach().cpu().to(torch.float16 if k in rounded else v.dtype).contiguous() for k, v in flow.state_dict().items()}
    metadata = {"sha256": weights_digest(tensors)}
    write_atomic(folder / "model.safetensors", lambda p: safetensors.torch.save_file(tensors, str(p), metadata))


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> Flow | Predictor:
    """Return the trained model of a run folder, a flow or a predictor, in evaluation mode; no code in the folder runs.

    ``pretrained:NAME`` selects a model of the package (:func:`pretrained` lists them).

    Raises:
        ConfigError: for an unknown NAME.
        CheckpointError: if the folder, its config or its weights are missing, damaged (by their checksums), or do not
            match.

    Example:
        >>> load_model("runs/anode-digits-0")(images).shape  # doctest: +SKIP
        torch.Size([540, 10])
    """
    folder = located(folder)
    info = read_config(folder)
    path = folder / "model.safetensors"
    if not path.exists():
        raise CheckpointError(f"{path} is missing: the run has not been validated yet")
    require_file(path, CheckpointError, str(path))
    try:
        tensors = _read(path)
        _check(info, tensors)
        flow = info.build()
        flow.load_state_dict(tensors)
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    except (
        OSError,
        RuntimeError,
        KeyError,
        TypeError,
        ValueError,
        OverflowError,
        safetensors.SafetensorError,
    ) as error:
        raise CheckpointError(f"{path} does not hold this model's weights: {one_line(error)}") from None
    return flow.to(device).eval()


def load(folder: str | Path, device: str | torch.device = "cpu") -> Any:
    """Return :func:`load_model` without its type.

    The model is a :class:`~cnf.flow.Flow`, or a :class:`~cnf.models.NeuralODE` or :class:`~cnf.models.ResidualNet` of a
    run of a predictor.

    Raises:
        ConfigError: for an unknown NAME of ``pretrained:NAME``.
        CheckpointError: if the folder, its config or its weights are missing, damaged (by their checksums), or do not
            match.

    Example:
        >>> flow = load("pretrained:fm-mnist")
        >>> flow.event_shape
        (1, 28, 28)
    """
    return load_model(folder, device)


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors after verifying their checksum."""
    with safetensors.safe_open(str(path), framework="pt") as file:
        known = (file.metadata() or {}).get("sha256")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    if known is None:
        raise ValueError("it carries no checksum")
    if weights_digest(tensors) != known:
        raise ValueError("it is damaged: its checksum differs")
    return tensors


def _check(info: RunInfo, tensors: Mapping[str, Tensor]) -> None:
    """Check that model and weights match before memory is allocated: a config may request more than any machine has."""
    model, count = info.config.model, len(tensors)
    stacked = model.depth_terms if model.depth == "stacked" else 0
    for name, asked in (("blocks", model.blocks), ("hidden", len(model.hidden)), ("unet_depth", model.unet_depth), ("stacked pieces", stacked)):
        if asked > count:
            raise ValueError(f"config.json asks for {asked} {name}, but there are {count} tensors in all")
    with torch.device("meta"):
        flow = info.build()
    flow.load_state_dict({name: value.to("meta") for name, value in tensors.items()})
    for name, expected in flow.state_dict().items():
        halved = tensors[name].dtype == torch.float16 and expected.dtype == torch.float32
        if tensors[name].dtype != expected.dtype and not halved:
            raise ValueError(f"{name} is {tensors[name].dtype}; expected {expected.dtype}")
