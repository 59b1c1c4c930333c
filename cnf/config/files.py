"""Files of settings: JSON or YAML, or the config.json of a run."""

from __future__ import annotations

import dataclasses
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from cnf._utils.errors import CheckpointError, ConfigError, DataError
from cnf._utils.untrusted import require_file
from cnf.config.decoding import decode, once
from cnf.config.names import field_of
from cnf.config.presets import preset
from cnf.config.rules import lenient
from cnf.config.settings import RunConfig

__all__ = ["read_settings"]

LARGEST = 2**20  # bytes


def read_settings(path: Path, name: str | None, fallback: str) -> tuple[RunConfig, frozenset[str]]:
    """Read a file of settings on top of a preset, strictly; return the settings, and the names of those in the file.

    The file holds ``{"preset": NAME, "data": {...}, "model": {...}, "solver": {...}, "train": {...}}``, each optional,
    or is the config.json of a run.

    Args:
        path: ends in .json, .yaml or .yml.
        name: preset to start from; the file's own if None.
        fallback: preset to start from if neither names one.

    Raises:
        ConfigError: for a file that cannot be read, an unknown preset, or a field that is unknown or of another type.
    """
    try:
        if require_file(path, DataError, f"--config {path}") > LARGEST:
            raise ConfigError(f"--config {path} is larger than any file of settings")
        found = _parse(path)
    except (DataError, OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--config {path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"--config {path}: expected an object of settings, such as {{\"train\": {{\"lr\": 1e-3}}}}")
    whole = "config" in found  # a run's config.json, which holds every setting
    if whole:
        found = found["config"] if isinstance(found["config"], dict) else {}
    own = found.pop("preset", found.pop("name", None))
    if not isinstance(own, str | None):
        raise ConfigError(f"--config {path}: preset is {own!r}; expected a name")
    start = _lists(dataclasses.asdict(preset(name or own or fallback).config))
    for part, values in list(found.items()):
        if isinstance(start.get(part), dict) and isinstance(values, dict):
            found[part] = values = {field_of(name): value for name, value in values.items()}
            start[part] |= values
        else:
            start[part] = values
    try:
        with lenient():  # checked once options have been read
            settings: RunConfig = decode(RunConfig, start, f"--config {path}")
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    named = (name for values in found.values() if isinstance(values, dict) for name in values)
    return settings, frozenset(() if whole else named)


def _parse(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text, object_pairs_hook=once)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--config {path}: expected a file ending in .json, .yaml or .yml")
    try:
        yaml = import_module("yaml")
    except ModuleNotFoundError:
        raise ConfigError(f"--config {path}: reading YAML needs the package pyyaml: pip install pyyaml, or write JSON") from None
    try:
        return yaml.load(text, Loader=_loader(yaml))
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from None


def _loader(yaml: Any) -> Any:
    """Return a safe loader that refuses repeated names and reads 1e-3 as a number, which YAML 1.1 takes for text."""

    class Strict(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            return once([(self.construct_object(k, True), self.construct_object(v, True)) for k, v in node.value])

    number = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
    Strict.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    return Strict


def _lists(value: Any) -> Any:
    """Return the settings as JSON has them: lists in place of tuples."""
    if isinstance(value, dict):
        return {key: _lists(inner) for key, inner in value.items()}
    return [_lists(inner) for inner in value] if isinstance(value, list | tuple) else value
