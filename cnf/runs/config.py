"""config.json: the settings of a run and the shape of its data, from which its model is rebuilt."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cnf._utils.errors import CheckpointError
from cnf._utils.untrusted import require_file
from cnf.config import RunConfig
from cnf.config.decoding import decode, once
from cnf.config.former import from_format_4
from cnf.config.rules import setting
from cnf.data.schema import TableColumn, context_width, data_columns
from cnf.models import Model, build_model
from cnf.models.custom import field_maker
from cnf.runs.files import write_atomic, write_text

__all__ = ["FORMAT", "RunInfo", "config_digest", "read_config", "write_config"]

FORMAT = 5
LARGEST = 2**24  # bytes, limit of a config.json
CONVERTED = {4: from_format_4}  # former formats
_HEAD = ("format", "sha256")


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """Contents of config.json: the settings and the shape of the data, enough to rebuild the model without the data.

    ``context_dim`` is the width of the data set's second tensor: the condition of a flow, or the target of a predictor.
    ``table`` holds the columns of a user's table, so that later files are read as the training file was. ``custom_field``
    names a vector field of the user's own, whose code is not in the folder.
    """

    config: RunConfig
    event_shape: tuple[int, ...]
    levels: int | None
    context_dim: int
    classes: tuple[str, ...]
    columns: tuple[str, ...]
    table: tuple[TableColumn, ...] = setting((), later=True)
    custom_field: str = setting("", later=True)

    def build(self) -> Model:
        """Return the untrained model: a flow, a predictor for regression and classification, or an autoencoder."""
        config = self.config
        field = field_maker(self.custom_field) if self.custom_field else None
        return build_model(config.model, config.solver, self.event_shape, levels=self.levels, width=self.context_dim, field=field, cells=self.cells)

    @property
    def cells(self) -> list[tuple[float, float] | None] | None:
        """Origin and step of each dequantised column of a table, None for a continuous one; None without a table."""
        return [(c.origin, c.step) if c.dequantised else None for c in data_columns(self.table)] or None


def config_digest(fields: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the contents of config.json, independent of field order and white space.

    Example:
        >>> config_digest({"a": 1, "b": 2.5})[:8] == config_digest({"sha256": "", "b": 2.5, "a": 1})[:8]
        True
    """
    text = json.dumps({k: v for k, v in fields.items() if k not in _HEAD}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_config(folder: Path, info: RunInfo) -> None:
    """Write config.json with format version and checksum."""
    write_fields(folder, dataclasses.asdict(info))


def read_config(folder: Path) -> RunInfo:
    """Read the config.json of a run that a program has made.

    Raises:
        CheckpointError: if it is missing or damaged, if a field is unknown, missing, of the wrong type, or a number
            that is not finite or too large (the field is named), if the checksum differs, or for a model of ``cnf.fit``.
    """
    path, raw = folder / "config.json", read_fields(folder)
    if raw.get("kind") == "model":
        raise CheckpointError(
            f"{folder} holds a model of cnf.fit or cnf.save ({reprlib.repr(raw.get('model_class'))}), not a run of cnf train: "
            "load it in Python, cnf.load(folder)"
        )
    info: RunInfo = decode(RunInfo, present_fields(raw), str(path))
    _check(info, str(path))
    check_digest(raw, path)
    return info


def read_fields(folder: Path) -> dict[str, Any]:
    """Return the fields of config.json, of a format that this version reads; their checksum is not checked yet."""
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{folder} is no run folder: it has no config.json")
    if require_file(path, CheckpointError, str(path)) > LARGEST:
        raise CheckpointError(f"{path} is larger than any config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    recorded = raw.get("format") if isinstance(raw, dict) else None
    if type(recorded) is not int or recorded not in (FORMAT, *CONVERTED):
        if type(recorded) is not int:
            raise CheckpointError(f"{path} is no configuration of cnf: it has no number of a format (this version reads format {FORMAT})")
        raise CheckpointError(f"{path}: this version reads format {FORMAT} (this folder was written by another version, in format {recorded})")
    fields: dict[str, Any] = raw
    return fields


def present_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields without format and checksum, converted from a former format."""
    fields = CONVERTED[raw["format"]](raw) if raw["format"] in CONVERTED else raw
    return {name: value for name, value in fields.items() if name not in _HEAD}


def write_fields(folder: Path, fields: dict[str, Any]) -> None:
    """Write config.json with format version and checksum."""
    text = json.dumps({"format": FORMAT, "sha256": config_digest(fields), **fields}, indent=2)
    write_atomic(folder / "config.json", lambda p: write_text(p, text))


def check_digest(raw: dict[str, Any], path: Path) -> None:
    if raw.get("sha256") != config_digest(raw):
        raise CheckpointError(
            f"{path} is not what was written: its checksum differs. Options are changed on the command line, not in the file"
        )


def _check(info: RunInfo, where: str) -> None:
    """Validate the shape of the data and the columns of the table."""
    shape = info.event_shape
    if len(shape) not in (1, 3) or not all(1 <= n <= 2**31 for n in shape):
        raise CheckpointError(f"{where}: event_shape is {reprlib.repr(shape)}; expected (D,) or (C, H, W)")
    if info.levels is not None and not 2 <= info.levels <= 2**16:
        raise CheckpointError(f"{where}: levels is {info.levels}; expected 2 to 65536, or null for vectors")
    if (info.levels is None) != (len(shape) == 1):
        raise CheckpointError(
            f"{where}: levels is {info.levels} with event_shape {shape}; images have levels, vectors none"
        )
    for column in info.table:
        if fault := column.fault():
            raise CheckpointError(f"{where}: table: column {reprlib.repr(column.name)}: {fault}")
    if len({column.name for column in info.table}) < len(info.table):
        raise CheckpointError(f"{where}: table names a column twice")
    targets = info.config.train.objective.kind == "regression"  # regression targets, not classes
    conditioned = info.table and context_width(info.table)
    known_widths = (conditioned,) if conditioned else (0, len(info.classes))
    if not 0 <= info.context_dim <= 2**31 or not (targets or info.context_dim in known_widths):
        known = f"{conditioned} (conditions)" if conditioned else f"0, or {len(info.classes)} (classes)"
        raise CheckpointError(f"{where}: context_dim is {info.context_dim}; expected {known}")
    if info.columns and len(info.columns) != shape[0]:
        raise CheckpointError(
            f"{where}: columns names {len(info.columns)} of event_shape {shape}; expected all or none"
        )
    if info.table and (info.levels is not None or tuple(c.name for c in data_columns(info.table)) != info.columns):
        raise CheckpointError(f"{where}: table models other columns than {reprlib.repr(info.columns)}")
