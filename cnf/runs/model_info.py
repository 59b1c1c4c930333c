"""config.json of cnf.save and cnf.fit: the settings of a built-in model, or the names of a custom one's classes."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from cnf._utils.errors import CNFError
from cnf.config import SolverConfig
from cnf.config.decoding import decode
from cnf.config.model import ModelConfig
from cnf.flow import Flow
from cnf.models import Model, build_model
from cnf.ode.continuous import CNF
from cnf.random import Noise
from cnf.runs.config import check_digest, present_fields, read_fields, write_fields
from cnf.solvers import FixedGrid
from cnf.transforms import Request

__all__ = ["Built", "ModelInfo", "describe", "fixed_values", "is_model", "read_model_info", "write_model_info"]


@dataclass(frozen=True)
class Built:
    """Settings of a model made by :func:`cnf.build`; ``width`` is that of the context, or the outputs of a predictor."""

    model: ModelConfig
    solver: SolverConfig
    event_shape: tuple[int, ...]
    levels: int | None
    width: int
    predicts: bool

    def build(self) -> Model:
        """Return the model, untrained."""
        return build_model(self.model, self.solver, self.event_shape, levels=self.levels, width=self.width)


@dataclass(frozen=True)
class ModelInfo:
    """Contents of config.json; ``built`` is None for a custom model, whose classes are recorded by name only."""

    kind: Literal["model"]
    model_class: str
    custom_classes: tuple[str, ...]
    parameters: int
    built: Built | None
    steps: int
    batch_size: int
    rows: int
    loss: str
    optimizer: str
    seed: int
    values: tuple[float, ...] = field(default=(), metadata={"optional": True})
    """Result of :func:`fixed_values` at the weights of ``cnf.save``; empty in a folder of ``cnf.fit``."""


@torch.no_grad()
def fixed_values(model: nn.Module) -> tuple[float, ...]:
    """Return what a flow computes at fixed points, by one Euler step per block; empty if it cannot be computed.

    They recognise another model with the same weights, such as one with another activation, end time or base.
    """
    if not isinstance(model, Flow) or model.context_dim is None:
        return ()
    modes, generator = [(m, m.training) for m in model.modules()], torch.Generator().manual_seed(0)
    x = 0.3 + 0.4 * torch.rand(2, *model.event_shape, generator=generator).to(model.like)
    context = torch.rand(2, model.context_dim, generator=generator).to(model.like) if model.context_dim else None
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            z = model.eval().evaluate(x, Request(context, Noise(0), log_det=False, solver=FixedGrid("euler", 1))).value
            found = torch.cat([z.flatten(1).mean(1), model.density(z, z.new_zeros(len(z)), context)])
    except Exception:  # a custom field's own, or points outside of its support
        return ()
    finally:
        for module, training in modes:
            module.training = training
    return tuple(found.tolist()) if bool(found.isfinite().all()) else ()


def describe(
    model: nn.Module, *, steps: int = 0, batch_size: int = 0, rows: int = 0, loss: str = "", optimizer: str = "", seed: int = 0
) -> ModelInfo:
    """Return what is recorded of a model and its training."""
    custom = dict.fromkeys(_name(m) for m in model.modules() if not type(m).__module__.startswith(("cnf.", "torch.")))
    count = sum(p.numel() for p in model.parameters())
    return ModelInfo("model", _name(model), tuple(custom), count, _built(model), steps, batch_size, rows, loss, optimizer, seed)


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _built(model: nn.Module) -> Built | None:
    """Return the settings of a built-in model, if building it again gives the same modules and weights."""
    settings = getattr(model, "built", None)
    if not isinstance(settings, dict) or not isinstance(model, Model):
        return None
    try:
        built = Built(**settings)
        with torch.device("meta"):
            again = built.build()
    except CNFError:
        return None
    same = [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    shapes = [{k: (v.shape, v.dtype) for k, v in m.state_dict().items()} for m in (again, model)]
    bases = [repr(getattr(m, "base", None)) for m in (again, model)]
    ends = [[m.fixed_end_time for m in each.modules() if isinstance(m, CNF) and not m.learn_end_time] for each in (again, model)]
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return built if same and shapes[0] == shapes[1] and bases[0] == bases[1] and ends[0] == ends[1] and not hooked else None


def write_model_info(folder: Path, info: ModelInfo) -> None:
    """Write config.json."""
    write_fields(folder, dataclasses.asdict(info))


def is_model(folder: Path) -> bool:
    """Return whether a folder was written by :func:`write_model_info`."""
    return read_fields(folder).get("kind") == "model"


def read_model_info(folder: Path) -> ModelInfo:
    """Read config.json; a CheckpointError says what is missing or damaged."""
    raw: dict[str, Any] = read_fields(folder)
    info: ModelInfo = decode(ModelInfo, present_fields(raw), str(folder / "config.json"))
    check_digest(raw, folder / "config.json")
    return info
