"""Scripts and notebooks of examples/: short, alike, and they run."""

import ast
import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT

FOLDER = ROOT / "examples"
SCRIPTS = sorted(p for p in FOLDER.glob("*.py") if p.stem != "notebooks")
SHORTER = {"digits": ["--steps", "20"], "lightning": ["--steps", "50"], "posterior": ["--simulations", "300", "--epochs", "5"]}
NEEDS = {"lightning": "pytorch_lightning", "posterior": "sbi"}
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(notebook):
    """Source of the code cells, the one that installs first."""
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in found)
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def same(code):
    return ast.dump(ast.parse(code))


def test_examples_are_short_and_notebooks_are_their_scripts():
    assert len(SCRIPTS) == 8 and len(NOTEBOOKS) == 4
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        assert text.count("\n") <= 80 and ast.get_docstring(ast.parse(text)), script
    for notebook in NOTEBOOKS:
        install, *code = cells(notebook)
        assert "%pip install" in install
        tree = ast.parse(notebook.with_suffix(".py").read_text(encoding="utf-8"))
        assert same("\n".join(code)) == ast.dump(ast.Module(tree.body[1:], tree.type_ignores)), f"{notebook}: make notebooks"


def run(path, folder, *arguments):
    done = subprocess.run([sys.executable, str(path), *arguments], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", [pytest.param(p, id=p.stem) for p in SCRIPTS])
def test_scripts_run(script, tmp_path):
    needed = NEEDS.get(script.stem)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed: pip install 'cnf[contrib]'")
    run(script, tmp_path, *SHORTER.get(script.stem, ()))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", [pytest.param(p, id=p.stem) for p in NOTEBOOKS])
def test_notebooks_run(notebook, tmp_path):
    (tmp_path / "cells.py").write_text("\n\n".join(cells(notebook)[1:]), encoding="utf-8")
    assert run(tmp_path / "cells.py", tmp_path)
