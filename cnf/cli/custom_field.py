"""--field FILE.py:CLASS: a vector field from a user's own file, whose code runs because the command line names it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from cnf._utils.errors import ConfigError

__all__ = ["take_field"]


def take_field(words: Sequence[str]) -> list[str]:
    """Load the class that ``--field FILE.py:CLASS`` names, and return the other words.

    Raises:
        ConfigError: for a file that cannot be loaded, or that has no such class.
    """
    if (known := sys.modules.get("cnf.models.custom")) is not None:  # an earlier call in this process; no torch for a help
        known.forget_fields()
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name != "--field":
            continue
        rest = list(words[place + 1 :])
        if not equals:
            value = rest.pop(0) if rest else ""
        if ".py:" in value:
            _load(value)
            return [*words[:place], *rest]
    return list(words)


def _load(value: str) -> None:
    from cnf.models.custom import register_field

    file, _, name = value.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"--field {value}: there is no file {file}; expected FILE.py:CLASS")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # where a class finds its module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"--field {value}: {file} fails: {type(error).__name__}: {error}") from error
    field = getattr(module, name, None)
    if not callable(field):
        raise ConfigError(f"--field {value}: {file} has no class {name}; expected FILE.py:CLASS")
    register_field(name, field)
