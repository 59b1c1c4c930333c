"""Autoencoders as runs of the programs: train, resume, evaluate, sample, load; binary images and their files."""

import csv
import json
import os
import pickle
import re
import signal

import numpy as np
import pytest
import torch
from conftest import slow
from PIL import Image

import cnf
from cnf.cli import main, sample_main, train_main
from cnf.data import load
from cnf.distributed import Group
from cnf.errors import ConfigError, DataError
from cnf.losses.elbo import ELBO, estimate_elbo
from cnf.random import Noise
from cnf.runs import RunInfo, read_config
from cnf.training import Trainer
from cnf.training.batches import Batches
from cnf.training.scoring import TEST_SEED
from cnf.vae import FlowVAE

SIZE = ["--latent", "2", "--hidden", "12", "8", "--flow-hidden", "6", "--rank", "1"]
TINY = ["--steps", "6", "--batch-size", "20", "--warmup", "2", "--validate-every", "3", "--validation-items", "12", "--test-items", "20", "--kl-warmup", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on the digits."""
    folder = tmp_path_factory.mktemp("runs") / "vae"
    assert train_main(["vae-digits", *SIZE, *TINY, "--out", str(folder)]) == 0
    return folder


def result_of(path):
    return json.loads(path.read_text())


def test_the_result_is_the_bound_of_the_loaded_model(run):
    result, model = result_of(run / "result.json"), cnf.load(run)
    assert isinstance(model, FlowVAE) and model.latent == 2 and [layer.out_features for layer in model.encoder if hasattr(layer, "out_features")] == [12, 8]
    data, rows = load("digits", binarize="redraw"), np.load(run / "test_elbo.npz")
    assert data.levels == 2 and set(data.test.unique().tolist()) == {0, 1} and int(data.train.max()) == 16
    x = data.test[torch.from_numpy(rows["index"])]
    found = estimate_elbo(model, x, draws=2, seed=TEST_SEED)
    assert result["metric"] == "negative_elbo" and result["unit"] == "nats" and result["value"] == pytest.approx(-found.elbo, abs=1e-6)
    assert result["value"] == pytest.approx(result["reconstruction"] + result["kl"], abs=1e-9) == pytest.approx(rows["negative_elbo"].mean(), abs=1e-9)
    assert result["standard_error"] == pytest.approx(rows["negative_elbo"].std(ddof=1) / 20**0.5) and result["noise_standard_error"] > 0
    assert torch.equal(estimate_elbo(model, x.float(), 2, TEST_SEED).rows, found.rows)  # grey levels as integers are those in [0, 1]
    assert result["items"] == 20 and result["nfe"] > 0 and abs(result["solver_error"]) < 1e-3 and result["levels"] == 2
    assert {"plots/reconstructions.png", "plots/learning_curves.png", "samples/samples.png", "report.html", "metrics.jsonl", "trainer.pt"} <= {
        path.relative_to(run).as_posix() for path in run.rglob("*")
    }
    assert f"negative ELBO {result['value']:.2f}" in (run / "report.html").read_text()


def test_the_first_step_is_the_loss_of_images_drawn_from_the_grey_ones(run):
    """The loss at step 0 against the bound by its terms, of images drawn with the step's own noise."""
    info, data = read_config(run), load("digits", binarize="redraw")
    torch.manual_seed(0)
    model = info.build().train()
    x, _, noise = Batches(data, 20, 0, torch.device("cpu"))(0)
    drawn = (noise.draw("binarise", "uniform", tuple(x.shape)) < x / 16).float()
    terms = model.evaluate(drawn, noise=noise)
    loss = ELBO(model, warmup=4, redraw=16 + 1)(x, noise=noise)["loss"]  # weight 0 of the KL term at step 0
    torch.testing.assert_close(loss, -terms.log_likelihood)
    torch.testing.assert_close(ELBO(model, redraw=17)(x, noise=Noise(1))["loss"].mean(), -model.evaluate(ELBO(model, redraw=17).images(x, Noise(1)), noise=Noise(1)).elbo.mean())


def test_ranks_take_their_rows_of_the_joint_loss(run):
    data, model, cpu = load("digits", binarize="redraw"), cnf.load(run).double().train(), torch.device("cpu")
    objective = ELBO(model, warmup=9, redraw=data.train_levels)

    def loss(group):
        x, _, noise = Batches(data, 10, 0, cpu, group, torch.float64)(5)
        return objective(x, noise=noise)["loss"]

    whole, parts = loss(Group()), [loss(Group(rank, 3)) for rank in range(3)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_interrupted_and_resumed_is_never_stopped(tmp_path, monkeypatch, capsys, run):
    real = Trainer.update

    def update(self):
        if self.state.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", update)
        assert train_main(["vae-digits", *SIZE, *TINY, "--out", str(folder)]) == 130
    assert train_main(["--resume", "--out", str(folder)]) == 0
    for name in ("model.safetensors", "test_elbo.npz", "config.json"):
        assert (folder / name).read_bytes() == (run / name).read_bytes()
    assert train_main(["--resume", "--out", str(folder), "--rank", "2"]) == 2
    assert "--resume cannot change --rank" in capsys.readouterr().err


def test_evaluate_scores_again_and_weights_draws(tmp_path, capsys, run):
    words = ["evaluate", str(run), "--eval-rtol", "1e-7", "--eval-atol", "1e-7", "--check"]
    assert main([*words, "--importance", "40", "--importance-images", "3", "--per-item", str(tmp_path / "rows.csv")]) == 0
    said = capsys.readouterr().out
    first, again = result_of(run / "result.json"), result_of(run / "evaluation-1.json")
    assert again["value"] == pytest.approx(first["value"], abs=1e-3) and again["checked_items"] == 20 and again["rtol"] == 1e-7
    weighted = again["importance"]
    assert (weighted["samples"], weighted["images"]) == (40, 3) and weighted["gain"] > 0
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "negative_elbo", "reconstruction", "kl"]
    assert np.mean([float(row["negative_elbo"]) for row in rows]) == pytest.approx(again["value"], abs=1e-5)
    x = load("digits", binarize="redraw").test[[int(row["index"]) for row in rows[:3]]]
    model = cnf.load(run)
    expected = [float(model.log_likelihood(x[i : i + 1], 40, noise=Noise(TEST_SEED, "weighted", i)).detach()) for i in range(3)]
    assert weighted["log_likelihood"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert re.search(r"log p by 40 weighted draws: -\d+\.\d\d ± .* nats on 3 images, \d+\.\d\d above their ELBO", said)
    assert main(["compare", str(run), str(run / "evaluation-1.json")]) == 0
    assert "negative ELBO" in capsys.readouterr().out
    (run / "evaluation-1.json").unlink()


def test_samples_are_probabilities(tmp_path, capsys, run):
    for name in ("a.npz", "b.npz", "c.png"):
        assert sample_main([str(run), "-n", "300", "--out", str(tmp_path / name)]) == 0
    assert "300 samples" in capsys.readouterr().out
    x = np.load(tmp_path / "a.npz")["samples"]
    assert x.shape == (300, 1, 8, 8) and x.min() >= 0 and x.max() <= 1 and (x == np.load(tmp_path / "b.npz")["samples"]).all()
    assert Image.open(tmp_path / "c.png").size[0] > 100
    assert sample_main([str(run), "-n", "300", "--temperature", "1e-6", "--out", str(tmp_path / "d.npz")]) == 0
    assert np.load(tmp_path / "d.npz")["samples"].std(0).max() < 1e-5 < x.std(0).max()


@pytest.mark.parametrize(("words", "said"), [
    ("sample RUN --grid-steps 3", "--grid-steps is for flows, and .* is an autoencoder"),
    ("sample RUN --class 3", "--class is for flows"),
    ("sample RUN --trajectory --out x.npz", "--trajectory is for flows"),
    ("sample RUN --out x.gif", "--out x.gif: an autoencoder draws images, as .png or .npz"),
    ("rank RUN x.npz", "--score ranks by likelihood, and .* is an autoencoder, which has a bound"),
    ("evaluate RUN --mid-bin", "--mid-bin is for densities"),
    ("evaluate RUN --importance-images 3", "is for --importance K"),
    ("evaluate RUN --importance 0", "expected at least 1 sample"),
    ("evaluate RUN --divergence hutchinson --importance 5", "add --divergence exact"),
    ("evaluate RUN --eval-tolerance 0", "--eval-tolerance is for densities"),
    ("evaluate RUN --per-item RUN/test_elbo.npz", "holds the scores of the run's own test"),
    ("train vae-digits --kinetic 0.1", "--kinetic 0.1 is for --objective likelihood"),
    ("train vae-digits --condition label", "--condition is for densities"),
    ("train vae-digits --compile", "--compile is for densities"),
    ("train vae-digits --steer 0.1", "--steer is for densities"),
    ("train vae-digits --minutes 1", "--minutes is for densities"),
    ("train vae-digits --posterior normal --rank 3", "--rank 3 is for --posterior cnf-rank, not for --posterior normal"),
    ("train vae-digits --posterior cnf --rank 3", "not for --posterior cnf"),
    ("train vae-digits --posterior normal --eval-rtol 1e-3", "--eval-rtol is for models that solve an ODE"),
    ("train vae-digits --posterior normal --grid-steps 3", "--grid-steps is for training that solves an ODE"),
    ("train vae-digits --posterior normal --divergence hutchinson", "--divergence is for densities, and autoencoders with a CNF"),
    ("train vae-digits --posterior normal --precision bf16", "precision='bf16' is for the fields of ODEs"),
    ("train vae-digits --network conv --hidden 8", "--hidden 8 is for --network mlp, not for --network conv"),
    ("train vae-digits --latent 0", "--latent 0: expected 1 to 100,000"),
    ("train vae-digits --binarize no --data-seed 3", "--data-seed is for toy points, .* and images with --binarize"),
    ("train vae-digits --objective likelihood", "--objective likelihood with --architecture vae: expected stack, multiscale or parallel"),
    ("train digits --architecture vae", "--objective likelihood with --architecture vae"),
    ("train digits --binarize once", "--binarize is for autoencoders"),
    ("train vae-digits --data 8gaussians", "binarize='redraw' does not apply to '8gaussians'"),
    ("train vae-caltech --data 8gaussians", "architecture='vae' is for images, and an event is a vector"),
    ("train --data omniglot --data-root nowhere", "omniglot was not found"),
])  # fmt: skip
def test_what_does_not_apply_is_one_sentence(tmp_path, monkeypatch, capsys, run, words, said):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", images=np.zeros((3, 8, 8), dtype=np.uint8))
    assert main([word.replace("RUN", str(run)) for word in words.split()]) != 0
    assert re.search(said, " ".join(capsys.readouterr().err.split()))


def test_importance_images_is_refused_by_a_density(tmp_path, capsys):
    assert main(["evaluate", "pretrained:fm-mnist", "--importance", "2", "--importance-images", "3"]) == 2
    assert "--importance-images 3 is for autoencoders" in capsys.readouterr().err


@pytest.mark.parametrize("words", [
    "--posterior normal", slow("--posterior cnf --blocks 2 --flow-hidden 6"), slow("--network conv --binarize no"),
    slow("--precision fp64 --binarize once --divergence hutchinson"),
])  # fmt: skip
def test_other_designs(tmp_path, capsys, words):
    folder = tmp_path / "run"
    assert train_main(["vae-digits", "--latent", "2", *words.split(), *TINY[:-2], "--out", str(folder)]) == 0
    result, model = result_of(folder / "result.json"), cnf.load(folder)
    assert (result["nfe"] == 0) == (result["solver"] is None) == (result["solver_error"] is None) == ("normal" in words)
    if "--binarize no" in words:
        assert model.levels == result["levels"] == 17 and result["bits_per_dim"] == pytest.approx(result["value"] / 64 / np.log(2))
        assert "bits/dim over" in capsys.readouterr().out
    assert model.sample(2).dtype == (torch.float64 if "fp64" in words else torch.float32)
    assert main(["evaluate", str(folder), "--split", "train", "--test-items", "9"]) == 0
    if "normal" in words:
        assert main(["evaluate", str(folder), "--check"]) == 2
        assert "solves nothing" in capsys.readouterr().err


def test_a_saved_autoencoder_is_built_again(tmp_path):
    from cnf.config import AutoencoderConfig, SolverConfig
    from cnf.models import build_autoencoder

    model = build_autoencoder(AutoencoderConfig.of(latent=2, hidden=(6,), flow_hidden=(4,)), SolverConfig(), (1, 4, 4), levels=3)
    cnf.save(model, tmp_path / "m")
    again = cnf.load(tmp_path / "m")
    assert again.levels == 3 and torch.equal(again.sample(2, noise=Noise(0)), model.sample(2, noise=Noise(0)))


def test_the_published_sizes():
    from cnf.config import PRESETS

    words = {"network": "conv", "latent": 64}
    for more, count in (({"posterior": "normal"}, 3_067_105), ({"flow_hidden": (1024, 1024), "rank": 64, "blocks": 2}, 145_473_121 + 2 * 3 * 64 * 257)):
        # the released updates leave out the weights of time: 64 entries less for each of three layers of two blocks
        with torch.device("meta"):
            model = RunInfo(PRESETS["vae-mnist"].config.change(**words, **more), (1, 28, 28), 2, 0, (), ()).build()
        assert sum(p.numel() for p in model.parameters()) == count


# -- data --------------------------------------------------------------------------------------------------------


def test_a_pixel_is_one_with_its_grey_level_as_probability(tmp_path):
    ramp = np.repeat((17 * np.arange(16, dtype=np.uint8))[None], 4000, 0).reshape(4000, 4, 4)
    np.savez(tmp_path / "ramp.npz", images=ramp)
    options = {"duplicates": "keep", "download": False}
    drawn = load(tmp_path / "ramp.npz", binarize="once", **options)
    p, n = torch.arange(16) / 15, len(drawn.train)
    assert drawn.levels == 2 and drawn.train_levels is None
    z = (drawn.train.double().mean(0).flatten() - p) / (p * (1 - p) / n).sqrt().clamp_min(1e-9)
    assert z.abs().max() < 5 and float(drawn.train[..., 0, 0].max()) == 0 and float(drawn.train[..., 3, 3].min()) == 1
    again, other = (load(tmp_path / "ramp.npz", binarize="once", seed=seed, **options).train for seed in (0, 1))
    assert torch.equal(again, drawn.train) and not torch.equal(other, drawn.train)
    redrawn = load(tmp_path / "ramp.npz", binarize="redraw", **options)
    assert redrawn.train_levels == 256 and int(redrawn.train.max()) == 255 and torch.equal(redrawn.test, drawn.test)
    np.savez(tmp_path / "dark.npz", images=np.random.default_rng(0).integers(0, 2, (50, 4, 4)).astype(np.uint8))
    with pytest.raises(DataError, match=r"0 and 1 of 256 grey levels.*make white 255"):
        load(tmp_path / "dark.npz", binarize="once")
    with pytest.raises(ConfigError, match="holds vectors"):
        np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(50, 3)))
        load(tmp_path / "rows.npy", binarize="once")
    with pytest.raises(ConfigError, match="binarize must be one of"):
        load("digits", binarize="always")


def test_flows_do_not_take_redrawn_images():
    flow = cnf.build(cnf.FlowConfig.of(hidden=(4,)), cnf.SolverConfig(), (1, 8, 8), levels=2)
    with pytest.raises(DataError, match="levels=2"):
        cnf.fit(flow, load("digits", binarize="redraw"), steps=1, quiet=True)


def test_pixels_outside_the_levels_are_refused():
    model = FlowVAE(torch.nn.Flatten(), torch.nn.Linear(1, 4), 1, 4, levels=2)
    with pytest.raises(DataError, match="values from 0 to 2; expected grey levels 0 to 1"):
        model.evaluate(torch.tensor([[0, 1, 2, 0]]))
    with cnf.defer_checks():
        assert model.evaluate(torch.tensor([[0, 1, 2, 0]])).elbo.isnan().all()


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
    expected = torch.tensor(image)
    for name, binarize in (("mnist", "once"), ("omniglot", "redraw"), ("caltech", "no")):
        found = load(name, root=tmp_path, binarize=binarize)
        assert torch.equal(found.test[0, 0].double(), expected) and found.levels == 2 and found.event_shape == (1, 28, 28)
    omniglot = load("omniglot", root=tmp_path, binarize="redraw")
    assert len(omniglot.train) == 5 and len(omniglot.validation) == 1345 and torch.equal(omniglot.train[0, 0], (128 * expected).byte())
    assert omniglot.train_levels == 256 and 0.4 < float(omniglot.validation[:, 0, 3, 20].double().mean()) < 0.6  # drawn once
    frey = load("freyfaces", root=tmp_path)
    assert [len(part) for part in (frey.train, frey.validation, frey.test)] == [1565, 200, 200] and frey.levels == 256 and frey.event_shape == (1, 28, 20)
    assert sorted(torch.cat([frey.train, frey.validation, frey.test]).double().sum((1, 2, 3)).tolist()) == sorted(faces.sum(1).tolist())
    for wrong, said in (({"seed": 1}, "data_seed=1 does nothing"), ({"split_seed": 1}, "split_seed=1 does nothing")):
        with pytest.raises(ConfigError, match=said):
            load("mnist", root=tmp_path, binarize="once", **wrong)
    (tmp_path / "Freyfaces" / "freyfaces.pkl").write_bytes(pickle.dumps([print]))
    with pytest.raises(DataError, match="only arrays are read"):
        load("freyfaces", root=tmp_path)
    (tmp_path / "OMNIGLOT" / "chardata.mat").write_bytes(b"no matrix")
    with pytest.raises(DataError, match="cannot be read as a MATLAB file"):
        load("omniglot", root=tmp_path)
    with pytest.raises(DataError, match="was not found"):
        load("omniglot", root=tmp_path / "nowhere")
