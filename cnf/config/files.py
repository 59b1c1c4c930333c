"""Files of settings: JSON or YAML, or the config.json of a run."""

from __future__ import annotations

import json
import re
import reprlib
from importlib import import_module
from pathlib import Path
from typing import Any

from cnf._utils.errors import CheckpointError, ConfigError, DataError
from cnf._utils.untrusted import require_file
from cnf.config.decoding import decode, once
from cnf.config.former import from_format_4, present_values
from cnf.config.presets import preset
from cnf.config.rules import SettingError, hints
from cnf.config.settings import RunConfig
from cnf.config.tagged import Settings, members, schema

__all__ = ["read_settings"]

LARGEST = 2**20  # bytes


def read_settings(path: Path, name: str | None, fallback: str) -> tuple[RunConfig, dict[str, Any]]:
    """Read a file of settings strictly; return its preset's settings, and those in the file by name.

    Of a run's config.json, which holds every setting, return them all in place of the preset's.

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
        found = from_format_4(found) if found.get("format") == 4 else found
        found = found["config"] if isinstance(found["config"], dict) else {}
    own = found.pop("preset", found.pop("name", None))
    if not isinstance(own, str | None):
        raise ConfigError(f"--config {path}: preset is {own!r}; expected a name")
    start = preset(name or own or fallback).config
    named: dict[str, Any] = {}
    for part, values in found.items():
        if part not in start.parts:
            raise ConfigError(f"--config {path}: unknown field {part[:80]!r}; expected preset, {', '.join(start.parts)}")
        if not isinstance(values, dict):
            raise ConfigError(f"--config {path}: {part} is {reprlib.repr(values)}; expected an object")
        kinds = members(hints(RunConfig)[part])
        named |= _typed(kinds, present_values(_flat(kinds, values)), f"--config {path}: {part}")
    if not whole:
        return start, named
    try:
        return start.change(**named), {}
    except SettingError as error:
        raise ConfigError(f"--config {path}: {error}") from None


def _flat(kinds: tuple[type[Settings], ...], values: dict[str, Any], parent: str = "") -> dict[str, Any]:
    """Return settings by name from an object in which families may be nested or spelled out."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = tuple(m for kind in kinds for m in members(hints(kind).get(name)))
        if inner and isinstance(value, dict):
            found |= _flat(inner, value, name)
        else:
            found[parent if name == "kind" else name] = value
    return found


def _typed(kinds: tuple[type[Settings], ...], named: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the values of settings decoded by their types.

    Raises:
        ConfigError: for an unknown setting or a value of another type.
    """
    known, found = schema(kinds), {}
    for name, value in named.items():
        if name not in known:
            raise ConfigError(f"{where}: unknown field {name[:80]!r}")
        errors = []
        for place in known[name]:
            try:
                found[name] = decode(place.hint, value, f"{where}: {name}")
                break
            except CheckpointError as error:
                errors.append(str(error))
        else:
            raise ConfigError(errors[0])
    return found


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
