"""Settings as tagged unions: read, written and changed by the names of single settings.

Each family of a union is a dataclass with the settings that apply to it, and a tag that names it. All settings of a
run have different names: ``field`` is the tag of the vector field's family, ``hidden`` a setting within it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, Self, cast, get_args, get_origin

from cnf.config.rules import Family, SettingError, cached, check_settings, hints

__all__ = ["Place", "Settings", "members", "nested", "schema", "select", "tag_of", "values"]

Kinds = tuple[type["Settings"], ...]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base class of settings: validated when constructed, and changed by name."""

    def __post_init__(self) -> None:
        check_settings(self)

    @classmethod
    def of(cls, **named: Any) -> Self:
        """Return settings by their names, whichever nested dataclass each belongs to.

        Raises:
            SettingError: for a value that is out of bounds, or a setting that does not exist in these families.

        Example:
            >>> from cnf.config import FlowConfig
            >>> FlowConfig.of(field="conv", hidden=(8, 8), strides=(1, 1, 1)).field
            ConvConfig(hidden=(8, 8), ...)
        """
        return cast(Self, _configured((cls,), None, named))

    def change(self, **named: Any) -> Self:
        """Return these settings with some of them, or whole families, changed by name.

        A changed tag selects another family; settings that both families have keep their values.

        Raises:
            SettingError: for a value that is out of bounds, or a setting that does not exist in these families.
        """
        return cast(Self, _configured((type(self),), self, named))


    def complete(self, named: Mapping[str, Any], otherwise: Mapping[str, Any], *, strict: bool = True) -> Self:
        """Return these settings changed by name, and by those of ``otherwise`` whose family was not chosen before.

        With ``strict=False``, settings that the chosen families do not have are left out, not refused.
        """
        before = {each.name for each in values(self)}
        more = {name: value for name, value in otherwise.items() if name not in before}
        return cast(Self, _configured((type(self),), self, named, more, strict))


def members(hint: Any) -> Kinds:
    """Return the settings classes of a type: those of a union, the class itself, or none."""
    return tuple(k for k in get_args(hint) or (hint,) if isinstance(k, type) and issubclass(k, Settings))


@cached
def tag_of(kind: type[Settings]) -> str | None:
    """Return the name of the field that holds a class's tag."""
    return next((f.name for f in dataclasses.fields(kind) if f.metadata.get("tag")), None)


def _choices(kind: type[Settings]) -> tuple[str, ...]:
    """Return the values of a class's tag."""
    name = tag_of(kind)
    return get_args(hints(kind)[name]) if name else ()


def _name(field: dataclasses.Field[Any], parent: str) -> str:
    return parent if field.name == "kind" else field.name


class Value(NamedTuple):
    """A setting with its name, its field, its value, and the runs that it is for."""

    name: str
    field: dataclasses.Field[Any]
    value: Any
    given: tuple[Family, ...]


def values(part: Settings, parent: str = "", given: tuple[Family, ...] = ()) -> Iterator[Value]:
    """Yield every setting, in order."""
    for field in dataclasses.fields(part):
        value, own = getattr(part, field.name), (*given, *field.metadata.get("given", ()))
        if isinstance(value, Settings):
            yield from values(value, field.name, own)
        else:
            yield Value(_name(field, parent), field, value, own)


class Place(NamedTuple):
    """Where a setting is defined: its field and type, and the tags that lead to it."""

    field: dataclasses.Field[Any]
    hint: Any
    tags: tuple[tuple[str, tuple[str, ...]], ...]


@cached
def schema(kinds: Kinds, parent: str = "", tags: tuple[tuple[str, tuple[str, ...]], ...] = ()) -> dict[str, list[Place]]:
    """Return every setting of these classes by name, with the places where it is defined."""
    found: dict[str, list[Place]] = {}
    for kind in kinds:
        name = tag_of(kind)
        own = (*tags, (_name(kind.__dataclass_fields__[name], parent), _choices(kind))) if name else tags
        for field in dataclasses.fields(kind):
            hint = hints(kind)[field.name]
            if inner := members(hint):
                for setting, places in schema(inner, field.name, own).items():
                    found.setdefault(setting, []).extend(places)
            else:
                # a tag belongs to all members of its union
                place = Place(field, hint, tags if field.metadata.get("tag") else own)
                found.setdefault(_name(field, parent), []).append(place)
    return found


def select(kinds: Kinds, chosen: Any) -> type[Settings] | None:
    """Return the member of a union whose tag is ``chosen``; None if there is none."""
    return next((kind for kind in kinds if chosen in _choices(kind)), None)


def _configured(
    kinds: Kinds, start: Settings | None, named: Mapping[str, Any], otherwise: Mapping[str, Any] | None = None, strict: bool = True
) -> Settings:
    """Return settings of one of these classes with those in ``named``, the others as in ``start``, or at their defaults."""
    made, used = _assemble(kinds, start, {**(otherwise or {}), **named}, "")
    for name, value in named.items():
        if strict and name not in used:
            _refuse(kinds, made, name, value)
    return made


def _assemble(kinds: Kinds, start: Settings | None, named: Mapping[str, Any], parent: str) -> tuple[Settings, set[str]]:
    name = tag_of(kinds[0]) or ""
    known = parent if name == "kind" else name
    used: set[str] = set()
    if known in named:
        chosen = select(kinds, named[known])
        if chosen is None:
            raise SettingError(known, named[known], f"expected one of {', '.join(c for k in kinds for c in _choices(k))}")
    elif start is None or type(start) in kinds:
        chosen = type(start) if start is not None else None
    else:  # the family of the same tag, such as a predictor's perceptron for a flow's
        chosen = select(kinds, getattr(start, tag_of(type(start)) or "", None))
    kind = chosen or kinds[0]
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        hint, before = hints(kind)[field.name], getattr(start, field.name, None)
        setting = _name(field, parent)
        if (inner := members(hint)) and isinstance(named.get(field.name), inner):
            arguments[field.name] = named[field.name]
            used.add(field.name)
        elif inner:
            arguments[field.name], below = _assemble(inner, before if isinstance(before, Settings) else None, named, field.name)
            used |= below
        elif setting in named:
            arguments[field.name] = named[setting]
            used.add(setting)
        elif hasattr(start, field.name) and (get_origin(hint) is not Literal or before in get_args(hint)):
            arguments[field.name] = before
    return kind(**arguments), used


def _refuse(kinds: Kinds, made: Settings, name: str, value: Any) -> None:
    """Reject a setting that the chosen families do not have, unless it is at its default."""
    places = schema(kinds).get(name)
    if places is None:
        near = get_close_matches(name, schema(kinds), 1)
        raise SettingError(name, value, f"is no setting of {type(made).__name__}" + (f": did you mean {near[0]!r}?" if near else ""))
    default = places[0].field.default
    if value == default:
        return
    chosen = {each.name: each.value for each in values(made)}
    found = (next(((depth, tag) for depth, tag in enumerate(place.tags) if chosen.get(tag[0]) not in tag[1]), None) for place in places)
    missed = [each for each in found if each]
    if not missed:
        raise SettingError(name, value, "is no setting of these families")
    _, deepest = max(missed, key=lambda m: (m[1][0] in chosen, m[0]))  # the family that is chosen the most of the way
    wanted = dict.fromkeys(c for _, tag in missed if tag[0] == deepest[0] for c in tag[1])
    *most, last = map(repr, wanted)
    words = f"{', '.join(most)} or {last}" if most else last
    raise SettingError(name, value, f"is for {deepest[0]}={words}, not for {deepest[0]}={chosen.get(deepest[0])!r}: leave it at {default!r}")


def nested(kinds: Kinds, flat: Mapping[str, Any], parent: str = "") -> dict[str, Any]:
    """Return JSON values by the names of settings as nested objects, as a settings class is written.

    Values are not checked here, and those of families that are not chosen are left out.
    """
    name = tag_of(kinds[0]) or ""
    known = parent if name == "kind" else name
    kind = (select(kinds, flat[known]) if known in flat else None) or kinds[0]
    # a union that joined later is of its first family
    found: dict[str, Any] = {} if not name or known in flat else {name: kind.__dataclass_fields__[name].default}
    for field in dataclasses.fields(kind):
        if inner := members(hints(kind)[field.name]):
            found[field.name] = nested(inner, flat, field.name)
        elif _name(field, parent) in flat:
            found[field.name] = flat[_name(field, parent)]
    return found
