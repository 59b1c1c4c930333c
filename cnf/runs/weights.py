"""model.safetensors: a model's weights with their checksum, and loading the model of a run folder."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from cnf._utils.errors import CheckpointError, ConfigError
from cnf._utils.untrusted import require_file
from cnf.config.model import ModelConfig
from cnf.config.tagged import values
from cnf.runs.config import read_config
from cnf.runs.files import one_line, write_atomic
from cnf.runs.lock import locked
from cnf.runs.model_info import describe, fixed_values, is_model, read_model_info, write_model_info
from cnf.runs.shelf import located

__all__ = ["load", "save", "weights_digest", "write_weights"]

VALUE_ERROR = 1e-2  # relative, for reduced precision and other devices


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
    tensors, storages = {}, set()
    for name, value in flow.state_dict().items():
        tensor = value.detach().cpu().to(torch.float16 if name in rounded else value.dtype).contiguous()
        tensors[name] = tensor.clone() if tensor.data_ptr() in storages else tensor  # tied weights, which the file cannot share
        storages.add(tensor.data_ptr())
    metadata = {"sha256": weights_digest(tensors)}
    write_atomic(folder / "model.safetensors", lambda p: safetensors.torch.save_file(tensors, str(p), metadata))


def load(folder: str | Path, device: str | torch.device = "cpu", *, flow: nn.Module | None = None) -> Any:
    """Return the trained model of a folder in evaluation mode; no code in the folder runs.

    The model is a :class:`~cnf.flow.Flow`, a :class:`~cnf.neural_ode.NeuralODE` or :class:`~cnf.neural_ode.ResidualNet` of a
    run of a predictor, or a :class:`~cnf.vae.FlowVAE` of an autoencoder's. A custom model, whose classes the folder only names, takes the weights in place:
    ``load(folder, flow=my_flow)``. ``pretrained:NAME`` selects a model of the package (:func:`pretrained` lists them).

    Raises:
        ConfigError: for an unknown NAME of ``pretrained:NAME``.
        CheckpointError: if the folder, its config or its weights are missing, damaged (by their checksums), or do not
            match.

    Example:
        >>> flow = load("pretrained:fm-mnist")
        >>> flow.event_shape
        (1, 28, 28)
    """
    folder = located(folder)
    path = folder / "model.safetensors"
    build, settings, known = _builder(folder, flow)
    if not path.exists():
        raise CheckpointError(f"{path} is missing: the run has not been validated yet")
    require_file(path, CheckpointError, str(path))
    try:
        tensors = _read(path)
        if settings is not None:
            _check(settings, build, tensors)
        model = build()
        model.load_state_dict(tensors)
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, OverflowError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} does not hold this model's weights: {one_line(error)}") from None
    now = fixed_values(model) if known else ()
    if any(abs(a - b) > VALUE_ERROR * (1 + abs(b)) for a, b in zip(now, known, strict=False)):
        raise CheckpointError(
            f"{folder}: the model computes something else with these weights than the one that was saved: build it with the same field, "
            "activation, end time and base"
        )
    return model.to(device).eval()


def _builder(folder: Path, flow: nn.Module | None) -> tuple[Callable[[], nn.Module], ModelConfig | None, tuple[float, ...]]:
    """Return a function that builds the untrained model of a folder, the settings of a built-in one, and its fixed values."""
    if not (folder / "config.json").exists() or not is_model(folder):
        info = read_config(folder)
        if flow is not None:
            raise ConfigError(f"flow= is for a custom model, but {folder} is a run with all its settings: leave flow out")
        return info.build, info.config.model, ()
    known = read_model_info(folder)
    if flow is None:
        if known.built is None:
            custom = ", ".join(known.custom_classes) or "a flow composed by hand"
            raise CheckpointError(
                f"{folder} holds {known.model_class} with {custom}, whose code is not in the folder: build the model and call "
                "cnf.load(folder, flow=my_flow)"
            )
        return known.built.build, known.built.model, known.values
    name = f"{type(flow).__module__}.{type(flow).__qualname__}"
    if name.rpartition(".")[2] != known.model_class.rpartition(".")[2]:
        raise CheckpointError(f"flow= is {name}, but {folder} holds {known.model_class}")
    return lambda: flow, None, known.values


def save(flow: nn.Module, folder: str | Path) -> None:
    """Write a model into a folder, from which :func:`load` rebuilds it.

    A model made by :func:`cnf.build` is recorded with its settings; of any other one, only the names of its classes are,
    and :func:`load` needs it again. No code is saved.

    Args:
        flow: the model.
        folder: created if missing; a model of ``save`` or ``cnf.fit`` in it is overwritten.

    Raises:
        ConfigError: for a folder of a run of ``cnf train``, or one that another process writes.
        CheckpointError: if it cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from cnf import FlowConfig, SolverConfig, build
        >>> with TemporaryDirectory() as folder:
        ...     save(build(FlowConfig.of(hidden=(8,)), SolverConfig(), (2,)), folder)
        ...     load(folder).event_shape
        (2,)
    """
    folder = Path(folder)
    with locked(folder):
        if (folder / "config.json").exists() and not is_model(folder):
            raise ConfigError(f"{folder} is a run of cnf train, which keeps its own weights: use another folder")
        write_weights(folder, flow)
        write_model_info(folder, dataclasses.replace(describe(flow), values=fixed_values(flow)))


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors after verifying their checksum."""
    with safetensors.safe_open(str(path), framework="pt") as file:
        known = (file.metadata() or {}).get("sha256")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    if known is None:
        raise ValueError("it has no checksum")
    if weights_digest(tensors) != known:
        raise ValueError("it is damaged: its checksum differs")
    return tensors


def _check(model: ModelConfig, build: Callable[[], nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Check that model and weights match before memory is allocated: a config may request more than any machine has."""
    count = len(tensors)
    named = {each.name: each.value for each in values(model)}
    stacked = named["depth_terms"] if named.get("depth") == "stacked" else 0
    sizes = {"blocks": named.get("blocks", 0), "hidden": len(named.get("hidden", ())), "flow_hidden": len(named.get("flow_hidden", ())), "unet_depth": named.get("unet_depth", 0), "stacked pieces": stacked}
    for name, asked in sizes.items():
        if asked > count:
            raise ValueError(f"config.json asks for {asked} {name}, but there are {count} tensors in all")
    with torch.device("meta"):
        flow = build()
    flow.load_state_dict({name: value.to("meta") for name, value in tensors.items()})
    for name, expected in flow.state_dict().items():
        halved = tensors[name].dtype == torch.float16 and expected.dtype == torch.float32
        if tensors[name].dtype != expected.dtype and not halved:
            raise ValueError(f"{name} is {tensors[name].dtype}; expected {expected.dtype}")
