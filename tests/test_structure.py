"""The shape of the package: short modules, imports without circles, few floors."""

import functools
import subprocess
import sys

import pytest
from conftest import ROOT

LINES = 300  # of a module
FLOORS = 9  # of rooms


@pytest.fixture
def structure(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import structure

    # all measures are taken of the same files
    monkeypatch.setattr(structure.ast, "parse", functools.cache(structure.ast.parse))
    return structure


def test_modules_are_short_and_import_downwards(structure):
    size, graph = structure.lines(ROOT), structure.imports(ROOT)
    assert {n: count for n, count in size.items() if count > LINES} == {}
    assert structure.circles(graph) == structure.circles(structure.rooms(graph)) == []
    assert structure.changes_state(ROOT) == [] and structure.walkers(ROOT) == []
    assert structure.callers(ROOT, "base_log_prob") == ["cnf.distribution.density.Density.density"]
    assert len(structure.longest_chain(structure.rooms(structure.imports(ROOT, typing=False)))) <= FLOORS


def test_what_is_measured(structure, tmp_path):
    """A package whose measures are known."""
    texts = {
        "__init__": "", "low": "def base_log_prob(z): ...",
        "room/__init__": "from cnf.room.a import f", "room/a": "from cnf.low import base_log_prob\nimport os",
        "room/b": "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from cnf.top import g",
        "top": "from cnf.room import f\nfrom cnf.room.b import h\ndef g(t: Trainer, x):\n    t.step, x.y = 1, 2\n    t.flow.base_log_prob(x)\n"
        "class Sequential:\n    def f(self, other):\n        return other.transforms\n"
        "class Walk:\n    def f(self, x):\n        return [t for t in x.transforms]\n    def g(self, y: Trainer):\n        return y.step",
    }  # fmt: skip
    for name, text in texts.items():
        path = tmp_path / "cnf" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    graph = structure.imports(tmp_path)
    assert graph["cnf.top"] == {"cnf.room.a", "cnf.room.b"} and graph["cnf.room.a"] == {"cnf.low"}
    assert structure.circles(graph) == [["cnf.room.b", "cnf.top"]]
    loaded = structure.imports(tmp_path, typing=False)
    assert structure.circles(loaded) == [] and len(structure.longest_chain(loaded)) == 3
    assert structure.circles(structure.rooms(graph)) == [["cnf.room", "cnf.top"]]
    assert structure.changes_state(tmp_path) == ["cnf.top.g"] and structure.walkers(tmp_path) == ["cnf.top.Walk"]
    assert structure.callers(tmp_path, "base_log_prob") == ["cnf.top.g"]
    assert structure.lines(tmp_path)["cnf.top"] == 13


WITHOUT_EXTRAS = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

from cnf.cli.exits import EXTRAS
sys.meta_path.insert(0, Missing())
import torch
import cnf
flow = cnf.Flow(cnf.CNF(cnf.fields.MLP(2)), (2,))
assert flow.log_prob(torch.randn(5, 2)).shape == (5,) and flow.sample(3).shape == (3, 2)
from cnf.cli import train_main
assert train_main(["digits"]) == 2
"""


def test_the_library_needs_no_extra_and_a_program_says_which():
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "error: this needs tyro, which is not installed: pip install 'cnf[cli]'\n"
