"""Every example runs, with fewer steps."""

import importlib.util

import pytest
from conftest import ROOT

ARGUMENTS = {"digits": ["--steps", "20"], "lightning": ["--steps", "50"], "posterior": ["--simulations", "300", "--epochs", "5"]}
NEEDS = {"lightning": "pytorch_lightning", "posterior": "sbi"}


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs(path, tmp_path, monkeypatch):
    needed = NEEDS.get(path.stem)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(ARGUMENTS[path.stem])
    assert len(path.read_text().splitlines()) <= 80
