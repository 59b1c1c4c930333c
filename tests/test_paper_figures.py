"""The benchmarks that draw the papers' figures: each command in its quick mode."""

import importlib.util
import json
import pickle
import sys

import numpy as np
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
import vae_data
import vae_flows
import vae_parts

from cnf.errors import DataError
from cnf.random import Noise
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


def test_gated_convolutions_are_the_published_ones():
    with torch.device("meta"):
        plain, rank = (vae_parts.build(name, (1, 28, 28), 2, vae_flows.PUBLISHED) for name in ("normal", "cnf-rank"))
    assert sum(p.numel() for p in plain.parameters()) == 3_067_105
    # the released updates leave out the weights of time: 64 entries less for each of three layers of two blocks
    assert sum(p.numel() for p in rank.parameters()) == 145_473_121 + 2 * 3 * 64 * 257
    small = vae_parts.build("normal", (1, 28, 20), 256, vae_parts.Design("conv", 3))
    x = torch.randint(0, 256, (2, 1, 28, 20)).float() / 255
    assert small.evaluate(x).elbo.shape == (2,) and small.sample(2, noise=Noise(0)).shape == x.shape


def test_the_files_of_the_published_code(tmp_path):
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    for folder in ("MNIST_static", "OMNIGLOT", "Freyfaces", "Caltech101Silhouettes"):
        (tmp_path / folder).mkdir()
    image = np.zeros((28, 28))
    image[3, 20] = 1  # row 3, column 20
    for part in ("train", "valid", "test"):
        np.savetxt(tmp_path / "MNIST_static" / f"binarized_mnist_{part}.amat", image.reshape(1, -1), fmt="%d")
    grey = np.tile(image.T.reshape(-1, 1), (1, 1350))  # stored column by column, an image a column
    savemat(tmp_path / "OMNIGLOT" / "chardata.mat", {"data": 0.5 * grey, "testdata": grey[:, :4]})
    silhouettes = {f"{part}_data": (1 - image.T.reshape(1, -1)).astype(np.uint8) for part in ("train", "val", "test")}
    savemat(tmp_path / "Caltech101Silhouettes" / "caltech101_silhouettes_28_split1.mat", silhouettes)
    faces = rng.integers(0, 256, (1965, 560)).astype(float)
    (tmp_path / "Freyfaces" / "freyfaces.pkl").write_bytes(pickle.dumps([faces], protocol=2))
    expected = torch.tensor(image).float()
    for name in ("mnist", "omniglot", "caltech"):
        found = vae_data.load_images(name, tmp_path)
        assert torch.equal(found.test[0, 0], expected)
        assert found.redrawn == (name == "omniglot")
    omniglot = vae_data.load_images("omniglot", tmp_path)
    assert len(omniglot.train) == 5 and len(omniglot.validation) == 1345 and torch.equal(omniglot.train[0, 0], 0.5 * expected)
    assert 0.4 < float(omniglot.validation[:, 0, 3, 20].mean()) < 0.6  # drawn once
    frey = vae_data.load_images("freyfaces", tmp_path)
    assert [len(part) for part in frey[:3]] == [1565, 200, 200] and frey.levels == 256
    assert sorted((255 * torch.cat(frey[:3])).round().sum((1, 2, 3)).tolist()) == sorted(faces.sum(1).tolist())
    (tmp_path / "Freyfaces" / "freyfaces.pkl").write_bytes(pickle.dumps([print]))
    with pytest.raises(DataError, match="only arrays are read"):
        vae_data.load_images("freyfaces", tmp_path)
    with pytest.raises(DataError, match="was not found"):
        vae_data.load_images("omniglot", tmp_path / "nowhere")
