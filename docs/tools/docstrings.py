"""Docstrings of the package as Markdown: roles become links where the name has an entry in the reference."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

__all__ = ["Markup", "entries"]

ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc|obj):`(~?)\.?([\w.]+)`")
MATH = re.compile(r":math:`([^`]*)`")
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)  # the name that griffe knows for prompts with their output
SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): (.*)$")
BLOCK = re.compile(r"^( *)\.\. math::(.*(?:\n(?: *|\1 +\S.*)(?=\n|$))*)", re.MULTILINE)


def entries(package: griffe.Module) -> dict[str, list[tuple[str, griffe.Object]]]:
    """Return the public names of every public module directly in the package: (name, the object that it stands for)."""
    rooms = {}
    for module in package.modules.values():
        if module.is_alias or module.name.startswith("_") or module.exports is None:
            continue
        names = [name if isinstance(name, str) else name.name for name in module.exports]
        rooms[module.name] = [(name, _final(module.members[name])) for name in names]
    return rooms


def _final(member: Any) -> Any:
    return member.final_target if member.is_alias else member


class Markup(griffe.Extension):
    """Rewrites reStructuredText roles, literals and mathematics of docstrings."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Rewrite every docstring once the package is loaded, so that names can be resolved."""
        if pkg.path != "cnf":
            return
        loader.resolve_aliases(implicit=True)
        self.known = set()
        for names in entries(pkg).values():
            for _name, thing in names:
                self.known.add(thing.path)
                self.known |= {f"{thing.path}.{member}" for member in thing.members if not member.startswith("_")}
        for thing in _walk(pkg):
            if thing.docstring is not None:
                thing.docstring.value = self._markdown(thing.docstring.value, thing)

    def _markdown(self, text: str, scope: Any) -> str:
        text = _separate(EXAMPLE.sub(r"\1Examples:", text))
        text = BLOCK.sub(lambda m: f"{m[1]}$${' '.join(m[2].split())}$$\n", text)
        text = MATH.sub(lambda m: f"${m[1]}$", text)
        return ROLE.sub(lambda m: self._link(m[2], m[1] == "~", scope), text).replace("``", "`")

    def _link(self, name: str, short: bool, scope: Any) -> str:
        shown = f"`{name.rpartition('.')[2] if short else name}`"
        for path in _candidates(name, scope):
            if path in self.known:
                return f"[{shown}][{path}]"
        return shown


def _separate(text: str) -> str:
    """Give each of the parameters that share a description, such as "x, context: ...", a copy of it."""
    lines, result, inside = text.splitlines(), [], False
    for i, line in enumerate(lines):
        if line.strip() == "Args:":
            inside = True
        elif line and not line.startswith("    "):
            inside = False
        if inside and (match := SHARED.match(line)):
            rest = []
            for following in lines[i + 1 :]:
                if not following.startswith(match[1] + " "):
                    break
                rest.append(following)
            *others, last = match[2].split(", ")
            for name in others:
                result += [f"{match[1]}{name}: {match[3]}", *rest]
            line = f"{match[1]}{last}: {match[3]}"
        result.append(line)
    return "\n".join(result)


def _candidates(name: str, scope: Any) -> Iterator[str]:
    """Yield the dotted paths that a name in a docstring may stand for."""
    while scope is not None:
        try:
            path = scope.resolve(name)
            found = scope.package.modules_collection
            yield path
            yield _final(found[path]).path
        except (griffe.GriffeError, KeyError):
            pass
        scope = scope.parent
    yield name


def _walk(thing: Any) -> Iterator[Any]:
    yield thing
    for member in thing.members.values():
        if not member.is_alias:
            yield from _walk(member)
