"""Documentation that is true: every module's examples run, and every public name says what it is."""

import ast
import configparser
import doctest
import importlib
import importlib.util
import inspect
import os
import pkgutil
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, mostly_slow

import cnf

NEEDS = {"cnf.contrib.pyro": "pyro", "cnf.contrib.sbi": "sbi"}  # modules that an optional package brings
MODULES = sorted(["cnf", *(m.name for m in pkgutil.walk_packages(cnf.__path__, "cnf."))])
MODULES = [name for name in MODULES if name not in NEEDS or importlib.util.find_spec(NEEDS[name])]
NETWORK = re.compile(r"download|urlopen|https?://")  # examples that need more than this machine


def path_of(name):
    return Path(importlib.import_module(name).__file__)


def public(module):
    return [(name, getattr(module, name)) for name in module.__all__]


# what takes no time is one test for all modules, which are named where they fail


def for_every_module(check):
    def test():
        for name in MODULES:
            check(name)

    test.__doc__ = check.__doc__
    return test


@for_every_module
def test_module_opens_with_a_line_and_its_public_names(name):
    module = importlib.import_module(name)
    first = (module.__doc__ or "").split("\n\n")[0].strip()
    assert first and "\n" not in first, f"{name}: the first paragraph of the docstring must be one line"
    assert first.endswith((".", "?", "!")), f"{name}: {first!r} is no sentence"
    assert isinstance(getattr(module, "__all__", None), list | tuple), f"{name} has no __all__"
    assert len(set(module.__all__)) == len(module.__all__), name
    for public_name in module.__all__:
        assert hasattr(module, public_name), f"{name}.__all__ names {public_name}, which does not exist"
    exec(f"from {name} import *", {})


@for_every_module
def test_public_names_have_docstrings(name):
    module = importlib.import_module(name)
    bare = []
    for public_name, value in public(module):
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        if not inspect.getdoc(value) or (inspect.isclass(value) and value.__doc__ is None):
            bare.append(public_name)
        if not inspect.isclass(value):
            continue
        for attribute, member in vars(value).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            # an override says what its base says, unless it says more
            if attribute.startswith("_") or not inspect.isfunction(function) or inspect.getdoc(getattr(value, attribute)):
                continue
            bare.append(f"{public_name}.{attribute}")
    assert not bare, f"{name}: no docstring on {', '.join(bare)}"


def has_examples(name):
    """Whether there is a prompt in its file, which is not imported for that."""
    return ">>> " in Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in MODULES if has_examples(name)])
def test_examples_run(name, monkeypatch, tmp_path):
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    runner = doctest.DocTestRunner(optionflags=flags, verbose=False)
    report = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        if NETWORK.search(" ".join(e.source for e in test.examples)):
            continue
        torch.manual_seed(0)
        test.globs["torch"] = torch  # the one name that examples may use unsaid, beside their own module's
        runner.run(test, out=report.append)
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])
    assert runner.failures == 0, "".join(report)


def test_no_module_depends_on_this_machine():
    for path in [*ROOT.glob("*.py"), *(path_of(name) for name in MODULES), *ROOT.glob("tests/*.py")]:
        text = path.read_text(encoding="utf-8")
        if path == Path(__file__):
            continue
        assert not re.search(r"[\"' ](/root|/work|/home)/", text), path


def imports(name):
    found = set()
    for node in ast.walk(ast.parse(path_of(name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@for_every_module
def test_who_may_import_what(name):
    """The published codes' quirks stay in compat; pictures, data and progress bars stay out of the mathematics."""
    found = imports(name)
    if not name.startswith("cnf.compat"):
        assert not [m for m in found if m.startswith("cnf.compat")], f"{name} imports compat"
    heavy = {m.split(".")[0] for m in found} & {"matplotlib", "torchvision", "tqdm", "tensorboard"}
    if not name.startswith(("cnf.plotting", "cnf.data", "cnf.training", "cnf._utils.output")):
        assert not heavy, f"{name} imports {heavy}"
    mathematics = ("cnf.random", "cnf.ode.divergence", "cnf.ode.quadratures", "cnf.solvers", "cnf.fields")
    if name.startswith(mathematics):
        upper = ("cnf.flow", "cnf.sensitivity", "cnf.models", "cnf.training", "cnf.cli", "cnf.data")
        above = [m for m in found if m.startswith(upper)]
        assert not above, f"{name} imports {above}"


def blocks(page, languages="python"):
    """Return (language, code) of the fenced blocks of a page."""
    return re.findall(rf"```({languages})\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def page_examples():
    """Return every Python example of the pages that stand by themselves."""
    pages = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.parent.name != "tutorials")]
    for page in pages:
        for number, (_, code) in enumerate(blocks(page)):
            yield pytest.param(code, id=f"{page.stem}-{number}")


@pytest.mark.slow
@pytest.mark.parametrize("code", list(page_examples()))
def test_examples_of_the_pages_run(code, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if "from sbi" in code:
        pytest.importorskip("sbi", reason="sbi is not installed")
    exec(compile(code, "<page>", "exec"), {"__name__": "page"})


TUTORIALS = sorted(p for p in (ROOT / "docs" / "tutorials").glob("*.md") if blocks(p, "python|bash"))


@pytest.mark.parametrize("page", mostly_slow([p.stem for p in TUTORIALS], "custom"))
def test_tutorials_run(page, monkeypatch, tmp_path):
    """A tutorial's blocks run in the order of the page: Python in one namespace, commands in a shell, in one folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    names = {"__name__": "page"}
    for language, code in blocks(ROOT / "docs" / "tutorials" / f"{page}.md", "python|bash"):
        if language == "python":
            exec(compile(code, f"<{page}>", "exec"), names)
            continue
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{code}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_the_first_page_is_short_and_its_badges_are_true():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    oldest = settings["options"]["python_requires"].removeprefix(">=")
    torch_from = re.search(r"torch>=([\d.]+)", settings["options"]["install_requires"])[1]
    assert f"python-{oldest}_to_" in text and f"torch-{torch_from}_or_newer" in text and f"licence-{settings['metadata']['license']}" in text
    version = settings["metadata"]["version"]
    dated = re.search(r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert dated[1] == version == cnf.__version__
    assert f"version: {version}\ndate-released: {dated[2]}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_links_of_the_first_page_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (ROOT / target).exists(), f"{page.name}: {target}"
