"""The benchmarks that draw the papers' figures: each command in its quick mode."""

import json
import sys

import pytest
from conftest import ROOT, mostly_slow

sys.path.insert(0, str(ROOT / "benchmarks"))

import anode_figures
import rnode_figures
import survey
import vae_flows

CASES = [(module, figure) for module in (anode_figures, rnode_figures) for figure in module.FIGURES]


@pytest.mark.parametrize("case", mostly_slow(CASES, (anode_figures, "generalisation")), ids=lambda case: case[1])
def test_a_figure_is_one_command(case, tmp_path, capsys):
    module, figure = case
    out = tmp_path / "rows.json"
    module.main([figure, "--quick", "--pictures", str(tmp_path), "--out", str(out)])
    (found,) = json.loads(out.read_text()).values()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert found["rows"] and len(said) >= 2 and all(line.count("|") == said[0].count("|") for line in said)
    assert all(row["cpu_seconds"] > 0 for row in found["rows"])
    assert list(tmp_path.glob("*.png"))


@pytest.mark.slow
def test_the_survey_is_eight_presets(tmp_path, capsys):
    survey.main(["--quick", "--pictures", str(tmp_path), "--out", str(tmp_path / "rows.json")])
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| survey-")]) == 8
    assert len(list(tmp_path.glob("survey-*.png"))) == 2


@pytest.mark.slow
def test_autoencoders_with_three_posteriors(tmp_path, capsys):
    vae_flows.main(["--quick", "--pictures", str(tmp_path), "--out", str(tmp_path / "rows.json")])
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:] == list(vae_flows.POSTERIORS)
    assert (tmp_path / "vae-digits.png").exists()
