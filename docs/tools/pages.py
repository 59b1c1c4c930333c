"""Pages that mkdocs makes: the reference of the Python API, and the texts that lie outside docs/; mathematics as MathML."""

from __future__ import annotations

import html
import posixpath
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
from docstrings import entries

__all__ = ["on_config", "on_files", "on_page_content", "on_page_markdown"]

ROOT = Path(__file__).resolve().parents[2]

# page of the site -> file of the repository
OUTSIDE = {
    "benchmarks.md": "benchmarks/README.md",
    "data.md": "data/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}

# page -> title, what it is about, modules of the package
GROUPS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "flow": (
        "Flows", "A flow is a density: a transform to noise and a base density. `cnf.load` brings a trained one back.",
        ("flow", "distribution", "velocity", "guidance", "vae", "ode", "random"),
    ),
    "fields": ("Vector fields", "The right-hand side f(t, x) of the ODE, and how time enters it.", ("fields",)),
    "solvers": ("Solvers", "Methods that solve the ODE, and the gradients of their solutions.", ("solvers",)),
    "transforms": ("Transforms and bases", "Transforms without an ODE, and base densities.", ("transforms", "bases")),
    "training": (
        "Training", "`cnf.fit` trains any flow, predictor or module with a loss.",
        ("training", "losses", "flow_matching"),
    ),
    "estimators": ("scikit-learn estimators", "Densities of tables behind scikit-learn's interface.", ("estimators",)),
    "evaluation": ("Evaluation", "Likelihoods with standard errors, checks of the solver, ranking, pictures.", ("evaluation", "plotting")),
    "neural_ode": ("Neural ODEs and derivatives", "Neural ODEs that predict, and derivatives of flows.", ("neural_ode", "sensitivity")),
    "runs": ("Settings, data and runs", "Settings of a run, models built from them, data sets, run folders.", ("config", "models", "data", "runs")),
    "more": ("Errors, processes, programs", "Error classes, several processes, programs, published checkpoints.", ("errors", "distributed", "cli", "compat")),
    "contrib": ("Other packages", "Bridges to sbi, Pyro and the hub, each an extra.", ("contrib",)),
}  # fmt: skip


@cache
def package() -> griffe.Module:
    """Return the package, read without running it."""
    loader = griffe.GriffeLoader(search_paths=[str(ROOT)], allow_inspection=False)
    found = loader.load("cnf")
    loader.resolve_aliases(implicit=True)
    return found


def on_config(config: Any, **_: Any) -> Any:
    """Refuse public names without docstring or without a page, before anything is rendered."""
    rooms = entries(package())
    listed = [room for _, _, group in GROUPS.values() for room in group]
    if missing := sorted(set(rooms) ^ set(listed)):
        raise PluginError(f"docs/tools/pages.py, GROUPS: modules without a page, or pages without a module: {', '.join(missing)}")
    bare = [place for room, names in rooms.items() for name, thing in names for place in _bare(f"cnf.{room}.{name}", thing)]
    if bare:
        raise PluginError(f"no docstring: {', '.join(bare)}")
    return config


def _bare(path: str, thing: Any) -> list[str]:
    """Return the dotted paths, of a public object and its public methods, that have no docstring."""
    found = [] if thing.docstring or not (thing.is_class or thing.is_function) else [path]
    if thing.is_class:
        for name, member in thing.members.items():
            if name.startswith("_") or member.is_alias or not member.is_function or member.docstring:
                continue
            if not any(name in base.members and base.members[name].docstring for base in thing.mro()):
                found.append(f"{path}.{name}")
    return found


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the reference and the texts from outside docs/."""
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    rooms = entries(package())
    lines = ["# Python API", "", "Every public name. The examples run as tests.", ""]
    lines += ["| page | modules | |", "|---|---|---|"]
    for stem, (title, about, modules) in GROUPS.items():
        lines.append(f"| [{title}]({stem}.md) | {', '.join(f'`cnf.{m}`' for m in modules)} | {about} |")
        text = [f"# {title}", "", about, ""]
        done: set[str] = set()
        for module in modules:
            text += [f"## cnf.{module}", "", f"{package().modules[module].docstring.value}", ""]
            for name, thing in rooms[module]:
                if thing.path not in done:
                    done.add(thing.path)
                    text += [f"::: cnf.{module}.{name}", ""]
        files.append(File.generated(config, f"api/{stem}.md", content="\n".join(text)))
    lines += ["", "`import cnf` offers these directly:", "", ", ".join(f"`cnf.{name}`" for name in _top_level()) + "."]
    files.append(File.generated(config, "api/index.md", content="\n".join(lines)))
    return files


@cache
def _targets() -> dict[str, str]:
    """Return what a name in the text leads to: cnf.fit, cnf.fields.MLP -> the object's own path."""
    found = {f"cnf.{room}.{name}": thing.path for room, names in entries(package()).items() for name, thing in names}
    paths = set(found.values())
    for name in _top_level():
        member = package().members[name]
        target = member.final_target if member.is_alias else member
        if target.path in paths:
            found[f"cnf.{name}"] = target.path
    return found


def _top_level() -> list[str]:
    """Return what ``import cnf`` offers directly."""
    names = [name if isinstance(name, str) else name.name for name in package().exports]
    return [name for name in names if not name.startswith("_")]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files, **_: Any) -> str:
    """Lead links to files of the repository to their pages, and names of the library to the reference."""
    source = OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    here = posixpath.dirname(source)
    pages = {path: name for name, path in OUTSIDE.items()}
    start = posixpath.dirname(page.file.src_uri)

    def lead(match: re.Match[str]) -> str:
        target, _, anchor = match[2].partition("#")
        if not target or "://" in target or target.startswith(("/", "mailto:")):
            return match[0]
        path = posixpath.normpath(posixpath.join(here, target))
        place = pages.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if place is None:
            raise PluginError(f"{source}: the link to {target} leaves the site: name the file without a link")
        return f"{match[1]}({posixpath.relpath(place, start or '.')}{'#' + anchor if anchor else ''})"

    def name(match: re.Match[str]) -> str:
        target = _targets().get(match[1])
        return f"[`{match[1]}`][{target}]" if target else match[0]

    parts = re.split(r"(^```.*?^```|^    .*?$)", markdown, flags=re.MULTILINE | re.DOTALL)
    for i in range(0, len(parts), 2):
        text = re.sub(r"(\])\(([^)\s]+)\)", lead, parts[i])
        parts[i] = re.sub(r"(?<!\[)`(cnf\.[\w.]+)`(?!\])", name, text)
    return "".join(parts)


def on_page_content(content: str, **_: Any) -> str:
    r"""Convert \(...\) and \[...\] to MathML, which browsers draw without a script."""

    def mathml(match: re.Match[str]) -> str:
        formula = html.unescape(match[3])
        return str(convert(formula, display="block" if match[2] == "[" else "inline"))

    return re.sub(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', mathml, content, flags=re.DOTALL)
