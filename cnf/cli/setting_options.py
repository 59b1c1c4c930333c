"""Settings as options of the command line: all of them by name, and those of one run with their help."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro

from cnf.config import RunConfig
from cnf.config.rules import Tags, cached, hints, lenient, outside
from cnf.config.tagged import Settings, members, schema, tag_of

__all__ = ["all_settings", "show_help"]


@cached
def _texts(kind: type) -> dict[str, str]:
    """Return the docstrings of a class's fields, each in one line (tyro keeps their line ends)."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base is Settings or not dataclasses.is_dataclass(base):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        except OSError:  # without sources, options have no help
            continue
        for field, text in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(re.sub(r"-\n\s*", "-", str(text.value.value)).split())
    return found


def all_settings() -> Any:
    """Return a dataclass with every setting of every family as an option, by name."""
    fields: list[Any] = []
    for name, places in schema((RunConfig,)).items():
        hint = places[0].hint
        if get_origin(hint) is Literal:  # the choices of all families
            hint = _literal(c for place in places for c in get_args(place.hint))
        if name == "name":
            hint = Annotated[str, tyro.conf.Suppress]
        fields.append((name, hint, dataclasses.field(default=places[0].field.default)))
    return dataclasses.make_dataclass("Settings", fields, frozen=True)


def _shown(part: Settings, tags: Tags, union: tuple[type[Settings], ...] = ()) -> Any:
    """Return a settings object of a dynamic class whose options are those that apply, with their help."""
    changed: list[Any] = []

    def show(name: str, hint: Any, value: Any) -> None:
        changed.append((name, Annotated[hint, tyro.conf.arg(help=_texts(type(part)).get(name, ""))], value))

    for field in dataclasses.fields(part):
        hint, value = hints(type(part))[field.name], getattr(part, field.name)
        if outside(field.metadata.get("given", ()), tags) or field.name == "kind":
            changed.append((field.name, Annotated[Any, tyro.conf.Suppress], value))
        elif isinstance(value, Settings):
            inner = _shown(value, tags)
            if tag_of(type(value)) == "kind":  # the tag of a family is named like the field that holds it
                show(field.name, _choices(members(hint)), value.kind)  # type: ignore[attr-defined]
                changed.append((f"{field.name}_settings", type(inner), inner))
            else:
                changed.append((field.name, type(inner), inner))
        elif field.metadata.get("tag"):
            show(field.name, _choices(union or (type(part),)), value)
        else:
            show(field.name, hint, value)
    kind = dataclasses.make_dataclass(type(part).__name__, changed, bases=(type(part),), frozen=True, kw_only=True)
    return kind(**{name: value for name, _, value in changed})


def _choices(kinds: tuple[type[Settings], ...]) -> Any:
    return _literal(c for kind in kinds for c in get_args(hints(kind)[tag_of(kind) or ""]))


def _literal(choices: Iterable[str]) -> Any:
    literal: Any = Literal
    return literal[tuple(dict.fromkeys(choices))]


def show_help(command: type, config: RunConfig, program: str, tags: Tags) -> None:
    """Print the options that apply to these settings, with their values as defaults, and exit."""
    flat: Any = tyro.conf.OmitArgPrefixes
    with lenient():
        models = members(hints(RunConfig)["model"])
        parts = {name: _shown(part, tags, models if name == "model" else ()) for name, part in config.parts.items()}
        run: Any = dataclasses.make_dataclass("RunConfig", [(name, type(part)) for name, part in parts.items()], frozen=True)
        kind: Any = dataclasses.make_dataclass("Command", [("config", flat[run])], bases=(command,), frozen=True)
        kind.__doc__ = command.__doc__
        tyro.cli(kind, default=kind(run(**parts)), args=["--help"], prog=program)
