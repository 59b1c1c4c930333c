"""Safe reading of checkpoints of the published codes, without executing anything in them."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cnf._utils.errors import CheckpointError
from cnf._utils.untrusted import check_pickle, refusal, require_file

__all__ = ["Arguments", "Reference", "check_shapes", "read_reference"]

PLAIN = (int, float, str, bool)
COUNTERS = ("_num_evals",)  # evaluation counts, which released modules keep in a buffer


class Arguments:
    """Arguments of a training script; only values of type int, float, str or bool are used.

    Args:
        values: recorded values; None counts as missing.
    """

    def __init__(self, values: Mapping[str, Any]):
        self.values = {k: v for k, v in values.items() if type(v) in PLAIN}
        self.other = {k: type(v).__name__ for k, v in values.items() if v is not None and type(v) not in PLAIN}

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """Return an argument of type ``kind``, or ``default`` if it is missing.

        Raises:
            CheckpointError: for a value of another type, one that is not finite, or a missing one without a default.
        """
        if name in self.other:
            raise CheckpointError(f"args.{name} must be of type {kind.__name__}, got {self.other[name]}")
        if name not in self.values:
            if default is None:
                raise CheckpointError(f"args has no {name!r}, which determines the architecture: pass args={{{name!r}: ...}}")
            return default
        value = self.values[name]
        if kind is float and type(value) is int:
            value = float(value) if abs(value) < 2**1023 else math.inf
        if type(value) is not kind:
            raise CheckpointError(f"args.{name} must be of type {kind.__name__}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"args.{name} must be finite, got {value!r}")
        return value

    def sizes(self, name: str) -> tuple[int, ...]:
        """Parse a list of integers such as "64,64,64" or "64-64-64"."""
        text = self.get(name, str)
        try:
            # strides may be negative, so a dash separates only if there is no comma
            return tuple(int(part) for part in (text.split(",") if "," in text else text.split("-")))
        except ValueError:
            raise CheckpointError(f"args.{name} must be whole numbers such as '64,64,64', got {text!r}") from None


class Reference(NamedTuple):
    """Released checkpoint: weights by released name (without module. and counters), and arguments."""

    state: dict[str, Tensor]
    args: Arguments


def read_reference(
    source: str | Path | Mapping[str, Any], args: argparse.Namespace | Mapping[str, Any] | None = None
) -> Reference:
    """Read weights and arguments from a checkpoint of FFJORD's, RNODE's or AFFJORD's code.

    A file is read by torch's ``weights_only`` reader, which here also accepts ``argparse.Namespace``, a container of
    values; only its int, float, str and bool are used.

    Args:
        source: a file (``checkpt.pth``), its content ``{"args": ..., "state_dict": ...}``, or a bare state dict.
        args: arguments that the file lacks, or that override its own.

    Raises:
        CheckpointError: for a file that is missing, truncated or holds anything else, or content of another form.
    """
    content = _load(Path(source)) if isinstance(source, (str, Path)) else source
    if not isinstance(content, Mapping):
        raise CheckpointError(f"the checkpoint holds a {type(content).__name__}, expected a dictionary with 'state_dict' and 'args'")
    state = content.get("state_dict", content.get("func_state_dict", content))  # the latter in AFFJORD's 2-D models
    if not isinstance(state, Mapping):
        raise CheckpointError(f"the checkpoint's state_dict is a {type(state).__name__}, expected a dictionary of tensors")
    named = {str(key).removeprefix("module."): value for key, value in state.items()}
    tensors = {name: _checked(name, value) for name, value in named.items() if name.rpartition(".")[2] not in COUNTERS}
    if not tensors:
        raise CheckpointError("the checkpoint has no weights")
    return Reference(tensors, Arguments({**_values(content.get("args")), **_values(args)}))


def check_shapes(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str = "the checkpoint", advice: str = ""
) -> None:
    """Validate names and shapes of weights; raise a CheckpointError for the first that differs."""
    for name in sorted(shapes.keys() | tensors.keys()):
        shape = tuple(tensors[name].shape) if name in tensors else None
        if shape != shapes.get(name):
            fault = "is missing" if shape is None else f"has shape {shape}"
            expected = f"expected {shapes[name]}" if name in shapes else "expected no such weight"
            raise CheckpointError(f"{where}: {name} {fault}, {expected}{advice}")


def _load(path: Path) -> Any:
    require_file(path, CheckpointError, str(path))
    try:
        check_pickle(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged or refused files
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {refusal(error)[:300]}): it is damaged, or holds more than "
            "tensors, plain values and an argparse.Namespace, which is refused"
        ) from None


def _values(args: Any) -> dict[str, Any]:
    if args is None:
        return {}
    values = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(values, Mapping):
        raise CheckpointError(f"the checkpoint's args is a {type(args).__name__}, expected an argparse.Namespace")
    return {str(k): v for k, v in values.items()}


def _checked(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.layout != torch.strided or not value.is_floating_point():
        kind = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise CheckpointError(f"state_dict[{name!r}] is {kind}, expected a dense tensor of floats")
    # a view that repeats a small storage can claim any size
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"state_dict[{name!r}] claims the shape {tuple(value.shape)}, more than its file holds")
    return value.detach()
