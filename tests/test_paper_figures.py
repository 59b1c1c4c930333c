"""The benchmarks that draw the papers' figures: each command in its quick mode."""

import importlib.util
import json
import sys

import pytest
import torch
from conftest import F64, ROOT, mostly_slow

sys.path.insert(0, str(ROOT / "benchmarks"))

import affjord_toy
import anode
import anode_figures
import anode_images
import rnode_figures
import survey
import vae_flows
import vae_parts

from cnf.transforms import Request

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
def test_images_with_added_channels(tmp_path, capsys):
    anode_images.main(["--quick", "--pictures", str(tmp_path), "--out", str(tmp_path / "rows.json")])
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:] == ["0", "5"]
    assert (tmp_path / "anode-images-digits.png").exists()


@pytest.mark.slow
def test_losses_and_nfe_over_the_epochs(tmp_path, capsys):
    anode.main(["--quick", "--picture", str(tmp_path / "fits.png"), "--out", str(tmp_path / "rows.json")])
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]) == 1 + 2 * len(anode.FITS)
    assert (tmp_path / "fits.png").exists()


@pytest.mark.slow
def test_affjord_against_ffjord(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    affjord_toy.main(["--quick", *(word for name in ("results", "densities", "pictures") for word in (f"--{name}", str(tmp_path / name)))])
    assert [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:] == ["FFJORD", "AFFJORD"]
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"affjord-checkerboard.png", "affjord-checkerboard-curves.png"}


needs_zuko = pytest.mark.skipif(importlib.util.find_spec("zuko") is None, reason="zuko is not installed")


@pytest.mark.slow
@needs_zuko
def test_autoencoders_with_six_posteriors(tmp_path, capsys):
    words = ["--quick", "--pictures", str(tmp_path), "--out", str(tmp_path / "rows.json"), "--runs", str(tmp_path / "runs")]
    vae_flows.main(words)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:] == list(vae_parts.POSTERIORS)
    assert (tmp_path / "vae-digits.png").exists()
    run = tmp_path / "runs" / "vae-digits" / "cnf-rank-0"
    assert {"config.json", "model.safetensors", "metrics.jsonl", "report.html", "result.json"} <= {path.name for path in run.iterdir()}
    before = json.loads((run / "result.json").read_text())
    vae_flows.main([*words, "--posteriors", "cnf-rank", "--resume"])  # of a finished run: its test again
    after = json.loads((run / "result.json").read_text())
    assert all(after[key] == before[key] for key in ("negative_elbo", "log_likelihood", "kl", "steps"))


@needs_zuko
@pytest.mark.parametrize("posterior", ["planar", "iaf", "sylvester"])
def test_flows_that_are_compared_have_the_log_det_of_their_jacobian(posterior):
    torch.manual_seed(0)
    model = vae_parts.build(posterior, (1, 2, 2), 2, vae_parts.Design(latent=3, hidden=8, flows=2)).double()
    context = torch.randn(4, model.amortise.out_features, dtype=F64)
    z = torch.randn(4, 3, dtype=F64)
    out = model.transform(z, Request(context))
    for n in range(4):
        j = torch.autograd.functional.jacobian(lambda y, n=n: model.transform(y[None], Request(context[n : n + 1])).value[0], z[n])
        torch.testing.assert_close(out.log_det[n], torch.linalg.slogdet(j)[1])
