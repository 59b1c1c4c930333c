"""Training what predicts: the same loop, resumed bit for bit, loaded in a fresh process, scored as scikit-learn does."""

import json
import math
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import trainers
from conftest import ROOT, logged_rows
from sklearn.metrics import accuracy_score, log_loss
from trainers import monitor, training

import cnf
from cnf import data as datasets
from cnf.cli import classify_main, sample_main, train_main
from cnf.cli.common import load_splits
from cnf.cli.options import CLASSIFIER, parse
from cnf.config import DataConfig, NeuralODEConfig, ResNetConfig, RunConfig, SolverConfig, TrainConfig, preset
from cnf.data.supervised import sample_supervised, shell
from cnf.errors import ConfigError, DataError
from cnf.losses import Supervised, assess
from cnf.neural_ode import NeuralODE, ResidualNet, anode_mlp
from cnf.runs import RunInfo, read_config
from cnf.solvers import FixedGrid
from cnf.training import Interrupted, Trainer

NODE = NeuralODEConfig.of(hidden=(8,), time_conditioning="ignore", nonlinearity="softplus", zero_init=False, augment=1)
RESNET = ResNetConfig.of(hidden=(8,), blocks=2, nonlinearity="relu", zero_init=False)
DATA = {
    "classification": datasets.load("three-spheres", condition="label", sizes=(90, 30, 60)),
    "regression": datasets.load("spheres2", condition="target", sizes=(90, 30, 60)),
}


def trainer(folder, *, kind="classification", model=NODE, solver=None, resume=False, **train):
    folder.mkdir(exist_ok=True)
    train = {"objective": kind, "steps": 12, "batch_size": 16, "warmup": 2, "lr": 0.01, "validate_every": 4, "solver_check_every": 3,
             "ema_decay": 0.9} | train  # fmt: skip
    data = DATA[kind]
    config = RunConfig("test", DataConfig(), model, solver or SolverConfig.of(grid_steps=2), TrainConfig.of(**train))
    info = RunInfo(config, data.event_shape, None, data.context_dim, data.classes, data.columns)
    return training(info, data, folder, resume=resume, quiet=True)


# -- the loop ----------------------------------------------------------------------------------------------------

ADJOINT = SolverConfig.of(train_solver="adaptive", rtol=1e-3, atol=1e-3, gradient="adjoint")
VARIANT = NODE.change(input_layer=True, data_control=True, adaptive_depth=True)


@pytest.mark.parametrize(("kind", "model", "solver"), [
    ("classification", NODE, None), ("regression", VARIANT, ADJOINT), ("classification", RESNET, None),
])  # fmt: skip
def test_interrupted_and_resumed_equals_never_stopped(tmp_path, monkeypatch, kind, model, solver):
    monkeypatch.setitem(trainers.RUN, "log_every", 1)
    options = {"kind": kind, "model": model, "solver": solver, "solver_check_tolerance": 1e-9}
    whole = trainer(tmp_path / "whole", **options)
    assert whole.run() == "steps"
    real = Trainer.update

    def update(self):
        if self.state.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", update)
        with pytest.raises(Interrupted):
            trainer(tmp_path / "parts", **options).run()
    parts = trainer(tmp_path / "parts", resume=True, **options)
    assert parts.state.step == 7 and parts.run() == "steps"
    for name in ("model", "average"):
        one, other = (run.snapshot()[name] for run in (whole, parts))
        assert all(torch.equal(one[k], other[k]) for k in one)
    assert all(torch.equal(whole.state.best_weights[k], v) for k, v in parts.state.best_weights.items())
    assert logged_rows(whole.folder) == logged_rows(parts.folder)
    last = logged_rows(whole.folder)[-1]
    assert {"loss", "nfe", "nfe_backward", "validation", "validation_nfe"} <= set(last)
    assert ("accuracy" in last) == ("validation_accuracy" in last) == (kind == "classification")
    if model is RESNET:
        assert last["nfe"] == 0 and not any("solver_error" in row for row in logged_rows(whole.folder))
    else:
        assert monitor(whole).refinements > 0 and last["nfe"] > 0
        assert (last["nfe_backward"] > 0) == (solver is ADJOINT)


def test_the_watch_measures_the_loss(tmp_path):
    run = trainer(tmp_path / "run")
    with torch.no_grad():
        for p in run.model.parameters():
            p.mul_(3)
    x, y, _ = run.batches(0)
    found = []
    for steps in (2, 4):
        run.model.solver = FixedGrid("rk4", steps)
        found.append(torch.nn.functional.cross_entropy(run.model.train()(x), y.argmax(1)).item())
    monitor(run).apply()
    assert run.objective.solver_error(x, y) == pytest.approx(abs(found[0] - found[1]), rel=1e-3, abs=1e-7)
    assert run.model.solver.steps == 2


# -- losses ------------------------------------------------------------------------------------------------------


def test_losses_are_scikit_learns():
    torch.manual_seed(0)
    data, model = DATA["classification"], anode_mlp(2, 8, 3, 1).eval()
    found = assess(model, data.test, data.test_context, "classification", batch_size=7)
    truth, probability = data.test_context.argmax(1).numpy(), found.outputs.softmax(1).numpy()
    accuracy = accuracy_score(truth, probability.argmax(1))
    assert found.accuracy == pytest.approx(accuracy) and 0 < accuracy < 1
    assert found.accuracy_standard_error == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 60))
    assert found.mean == pytest.approx(log_loss(truth, probability), rel=1e-9)
    assert found.standard_error == pytest.approx(float(found.loss.std()) / math.sqrt(60))
    terms, _ = Supervised(model, "classification").evaluate(data.test, data.test_context)
    # the adaptive solver's steps are the batch's
    assert terms["loss"].mean().item() == pytest.approx(found.mean, rel=1e-4)
    assert terms["accuracy"].mean().item() == pytest.approx(accuracy, abs=0.02)


def test_the_regressions_loss_is_the_squared_error():
    data, model = DATA["regression"], anode_mlp(2, 8, 1).eval()
    found = assess(model, data.test, data.test_context, "regression")
    assert found.mean == pytest.approx((model(data.test) - data.test_context).square().mean().item(), rel=1e-5)
    assert found.correct is None and found.accuracy is None
    with pytest.raises(DataError, match=r"targets have shape \(60, 3\)"):
        assess(model, data.test, DATA["classification"].test_context, "regression")
    with pytest.raises(DataError, match="no targets"):
        Supervised(model, "regression").evaluate(data.test)
    with pytest.raises(ConfigError, match="kind='ranking' is unknown"):
        Supervised(model, "ranking")


# -- from the command line ---------------------------------------------------------------------------------------

TINY = ["--steps", "6", "--batch-size", "20", "--validate-every", "3", "--toy-sizes", "60", "30", "45"]


@pytest.fixture(scope="module")
def flip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "flip"
    assert classify_main(["--data", "flip", *TINY, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "three"
    assert train_main(["anode-three-spheres", *TINY, "--hidden", "8", "--out", str(folder)]) == 0
    return folder


def test_a_run_and_what_it_leaves(flip, three, capsys):
    assert read_config(flip).config.name == "anode-flip"  # the preset that suits the data
    plots = {p.name for p in (flip / "plots").iterdir()}
    assert plots == {"boundary.png", "features.png", "features_training.png", "learning_curves.png", "trajectories.png"}
    assert {p.name for p in (three / "plots").iterdir()} == plots - {"trajectories.png"}
    result = json.loads((three / "result.json").read_text())
    with np.load(three / "test_predictions.npz", allow_pickle=False) as file:
        truth = load_splits(read_config(three).config).test_context.argmax(1).numpy()[file["index"]]
        assert result["accuracy"] == pytest.approx(accuracy_score(truth, file["outputs"].argmax(1)))
        assert (file["predicted"][file["correct"]] == np.array(["inner", "middle", "outer"])[truth[file["correct"]]]).all()
        assert result["loss"] == pytest.approx(float(file["loss"].mean()))
    assert result["nfe"] > 0 and result["nfe_training"] > 0 and result["solver"] == "dopri5" and result["checked_items"] > 0
    assert json.loads((flip / "result.json").read_text())["accuracy"] is None


def test_evaluation_repeats_the_result(three, capsys):
    scores = three.parent / "scores.csv"
    assert classify_main(["--evaluate", str(three), "--check", "--per-item", str(scores)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"test: accuracy \d+\.\d+ ± .* over 45 of 45 items of three-spheres", said)
    result, again = (json.loads((three / f"{n}.json").read_text()) for n in ("result", "evaluation-1"))
    assert (again["loss"], again["accuracy"], again["checked_items"]) == (result["loss"], result["accuracy"], 45)
    assert len(scores.read_text().splitlines()) == 46
    assert train_main(["--evaluate", str(three), "--split", "validation", "--eval-rtol", "1e-7", "--eval-atol", "1e-7"]) == 0
    finer = json.loads((three / "evaluation-2.json").read_text())
    assert finer["items"] == 30 and finer["rtol"] == 1e-7


@pytest.mark.slow
def test_a_fresh_process_predicts_the_same(flip, three, tmp_path):
    expected = []
    for folder in (flip, three):
        model, x = cnf.load(folder), load_splits(read_config(folder).config).test
        assert isinstance(model, NeuralODE) and not model.training
        torch.save(x, tmp_path / f"{folder.name}.pt")
        expected.append(model(x))
    code = (
        "import sys, torch, cnf; torch.set_num_threads(1); "
        "found = [cnf.load(run)(torch.load(x)).detach() for run, x in (sys.argv[1:3], sys.argv[3:5])]; "
        "torch.save(found, sys.argv[5])"
    )
    runs = [str(path) for folder in (flip, three) for path in (folder, tmp_path / f"{folder.name}.pt")]
    subprocess.run([sys.executable, "-c", code, *runs, str(tmp_path / "y.pt")], check=True, cwd=ROOT, timeout=120)
    for mine, other in zip(expected, torch.load(tmp_path / "y.pt"), strict=True):
        assert torch.equal(mine, other)


def test_sampling_is_refused(three, capsys):
    assert sample_main([str(three)]) == 2
    assert "it predicts, and has no density to draw from" in capsys.readouterr().err


def test_resume_from_the_command_line(three, capsys):
    assert classify_main(["--resume", "--out", str(three)]) == 0
    assert "has finished already" in capsys.readouterr().out


def test_a_residual_net_and_a_dry_run(tmp_path, capsys):
    words = ["anode-three-spheres", *TINY, "--architecture", "resnet", "--hidden", "8", "--blocks", "2", "--augment", "0"]
    assert classify_main([*words, "--out", str(tmp_path / "run")]) == 0
    assert isinstance(cnf.load(tmp_path / "run"), ResidualNet)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["nfe"] == 0 and result["solver"] is None
    assert classify_main(["--evaluate", str(tmp_path / "run"), "--check"]) == 2
    assert "--check solves again" in capsys.readouterr().err
    assert classify_main([*words, "--dry-run"]) == 0
    assert "parameters; batch 20" in capsys.readouterr().out


@pytest.mark.slow
def test_a_residual_net_flips_the_line(tmp_path):
    words = ["node-flip", "--architecture", "resnet", "--steps", "250", "--validate-every", "50", "--lr", "0.003"]
    assert classify_main([*words, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["loss"] < 1e-2


@pytest.mark.parametrize(("words", "layer"), [
    ("node-flip --adaptive-depth", "concat"),
    ("node-flip --adaptive-depth --time-conditioning ignore", "ignore"),
    ("anode-digits --adaptive-depth --depth stacked --depth-terms 2", "concat"),
    ("node-flip", "ignore"),
])  # fmt: skip
def test_time_enters_with_adaptive_depth_unless_told_otherwise(words, layer):
    assert parse(words.split(), CLASSIFIER)[0].config.model.field.time_conditioning == layer


def test_the_learned_depth_is_drawn(tmp_path):
    words = ["--data", "disjoint-spheres", *TINY, "--hidden", "8", "--adaptive-depth", "--out", str(tmp_path / "run")]
    assert classify_main(words) == 0
    config = read_config(tmp_path / "run").config
    assert (config.name, config.model.field.time_conditioning) == ("anode-three-spheres", "concat")
    assert {p.name for p in (tmp_path / "run" / "plots").iterdir()} >= {"depth.png", "features.png", "boundary.png"}


@pytest.mark.parametrize(("words", "message"), [
    ("node-flip --objective likelihood", "--objective likelihood with --architecture node: expected stack"),
    ("digits --objective classification", "--objective classification with --architecture stack: expected node or resnet"),
    ("node-flip --step-error 0.1", "--step-error 0.1 is for --objective likelihood or both, not for --objective regression"),
    ("node-flip --penalty kinetic", "penalty 'kinetic': expected NAME=WEIGHT, such as total-derivative=0.01"),
    ("node-flip --penalty bend=1", "penalty='bend' is unknown: expected 'kinetic', 'jacobian', 'directional', 'total-derivative', "),
    ("node-flip --measure bend", "penalty='bend' is unknown"),
    ("node-flip --kinetic 0.1 --penalty kinetic=1", "kinetic has a weight already"),
    ("anode-three-spheres --architecture resnet --hidden 8 --augment 0 --kinetic 0.1", "--kinetic is for models that solve an ODE"),
    ("node-flip --divergence hutchinson", "--divergence is for densities"),
    ("anode-digits --condition label", "--condition is for densities"),
    ("anode-digits --noise-samples 3", "--noise-samples is for densities"),
    ("node-flip --augment -1", "--augment -1: expected zero or more"),
    ("node-flip --blocks 2", "--blocks 2 is for --architecture stack, multiscale, parallel, resnet or vae"),
    ("node-flip --architecture resnet --adaptive-depth", "--adaptive-depth is for --architecture node"),
    ("node-flip --adaptive-depth --depth fourier --depth-terms 3", "depth='fourier' has one set of weights per time"),
    ("anode-digits --alpha 0.1", "--alpha 0.1 is for --architecture stack, multiscale or parallel"),
    ("anode-digits --objective regression", "--objective regression needs targets, and 'digits' has none"),
    ("node-flip --objective classification", "'flip' has regression targets"),
    ("anode-three-spheres --architecture resnet --hidden 8 --augment 0 --rtol 0.1", "--rtol is for training that solves an ODE"),
    ("ffjord-toy --data spheres2", "'spheres2' has regression targets: set condition='target' (--objective regression, as the preset anode-spheres"),
    ("ffjord-toy --augment 2", "--augment 2 is for --architecture node, not for --architecture stack"),
])  # fmt: skip
def test_wrong_use(tmp_path, capsys, words, message):
    assert train_main([*words.split(), "--out", str(tmp_path / "run")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert not (tmp_path / "run").exists()


def test_evaluation_refuses_what_is_for_densities(three, tmp_path, capsys):
    for words in (["--mid-bin"], ["--importance", "4"], ["--score", str(tmp_path)], ["--noise-samples", "3"]):
        assert classify_main(["--evaluate", str(three), *words]) == 2
        assert re.search("densities|density|likelihood|for images", capsys.readouterr().err)


# -- data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "inner", "outer"), [(1, 0.0, 0.5), (1, 1.0, 1.5), (2, 1.0, 1.5), (3, 0.0, 1.0), (3, 1.0, 1.5)])
def test_shells_are_uniform(dim, inner, outer):
    x = shell(20_000, dim, inner, outer, np.random.default_rng(0))
    radius = np.linalg.norm(x, axis=1)
    volume = (radius**dim - inner**dim) / (outer**dim - inner**dim)  # uniform in [0, 1]
    assert volume.min() >= 0 and volume.max() <= 1
    gap = np.abs(np.sort(volume) - (np.arange(20_000) + 0.5) / 20_000).max()
    assert gap < 1.95 / math.sqrt(20_000)  # Kolmogorov-Smirnov at 0.1 %
    assert np.abs(x.mean(0)).max() < 5 * outer / math.sqrt(dim * 20_000)


def test_supervised_sets():
    x, y = sample_supervised("spheres1", 3000)
    assert (y < 0).sum() == 1000 and (np.abs(x[y < 0]) <= 0.5).all() and (np.abs(x[y > 0]) >= 1).all()
    assert 0.4 < (x[y > 0] > 0).mean() < 0.6
    x, y = sample_supervised("flip", 1000)
    assert (np.sign(x) == -y).all() and abs(float(x[y < 0].std()) - 0.1) < 0.01
    x, y = sample_supervised("three-spheres", 1024)
    radius = np.linalg.norm(x, axis=1)
    assert np.bincount(y).tolist() == [342, 341, 341] and ((radius >= y) & (radius <= y + 0.5)).all()
    data = datasets.load("three-spheres", condition="label", sizes=(90, 30, 60), limit=50)
    assert data.classes == ("inner", "middle", "outer") and data.train_context.shape == (50, 3)
    radius = data.train.norm(dim=1)
    assert torch.equal(data.train_context.argmax(1), radius.floor().long())
    x, y = sample_supervised("disjoint-spheres", 1024)
    centres = np.array([[-1, 0], [1, 0], [0, 0]])
    distance = np.linalg.norm(x - centres[y], axis=1)
    assert np.bincount(y).tolist() == [342, 341, 341] and (distance[y < 2] <= 0.5).all()
    assert ((distance[y == 2] >= 2) & (distance[y == 2] <= 2.5)).all() and (distance[y < 2] > 0.3).mean() > 0.5
    disjoint = datasets.load("disjoint-spheres", condition="label", sizes=(90, 30, 60))
    assert disjoint.classes == ("left", "right", "outer")
    assert torch.equal(disjoint.train_context[:, 1] == 1, (disjoint.train[:, 0] > 0) & (disjoint.train.norm(dim=1) < 1.75))
    again = datasets.load("spheres2", condition="target", sizes=(90, 30, 60))
    assert torch.equal(again.train, DATA["regression"].train) and again.context_dim == 1
    assert len({tuple(r) for r in torch.cat([again.train, again.validation, again.test]).tolist()}) == 180
    limited = datasets.load("spheres2", condition="target", sizes=(90, 30, 60), limit=20)
    assert torch.equal(limited.train_context[:, 0] > 0, limited.train.norm(dim=1) > 0.75)
    with pytest.raises(ConfigError, match="'flip' has regression targets"):
        datasets.load("flip")
    with pytest.raises(ConfigError, match="condition must be None, 'label' or 'target'"):
        datasets.load("flip", condition="targets")
    with pytest.raises(ConfigError, match="n must be at least 3, got 2"):
        sample_supervised("flip", 2)
    with pytest.raises(DataError, match="must be one of identity, flip"):
        sample_supervised("spheres0", 9)


def test_the_sets_of_anode():
    x, y = sample_supervised("identity", 100)
    assert (np.sign(x) == y).all()
    x, y = sample_supervised("spheres7", 300)
    radius = np.linalg.norm(x, axis=1)[:, None]
    assert x.shape == (300, 7) and (radius[y < 0] <= 0.5).all() and (radius[y > 0] >= 1).all()
    x, y = sample_supervised("separable2", 300)
    assert (np.sign(x[:, :1]) == y).all() and (np.linalg.norm(x - y * [1, 0], axis=1) <= 0.5).all()
    x, y = sample_supervised("shifted-sines", 20_000)
    rest = x[:, 1:] - np.sin(np.pi * x[:, :1]) - y / 2
    assert abs(rest.mean()) < 5 * 0.1 / math.sqrt(20_000) and abs(rest.std() - 0.1) < 0.003 and np.abs(x[:, 0]).max() <= 1
    assert datasets.load("spheres12", condition="target", sizes=(9, 3, 3)).columns[-1] == "x12"
    with pytest.raises(DataError, match="neither a known name"):
        datasets.load("spheres1001")


def test_a_slice_is_held_out():
    options = {"condition": "target", "sizes": (300, 100, 300)}
    data = datasets.load("spheres2", **options, hold_out_angle=60)
    angles = [torch.rad2deg(torch.atan2(x[:, 1], x[:, 0])).abs() for x in (data.train, data.validation, data.test)]
    assert [len(a) for a in angles] == [300, 100, 300]
    assert angles[0].min() >= 30 and angles[1].max() < 30 and angles[2].min() < 30 < angles[2].max()
    for x, y in ((data.train, data.train_context), (data.validation, data.validation_context)):
        assert torch.equal(y[:, 0] > 0, x.norm(dim=1) > 0.75) and 0.2 < float((y < 0).double().mean()) < 0.45
    assert torch.equal(data.test, datasets.load("spheres2", **options).test)  # of all angles
    for name, angle, message in [
        ("flip", 60, "hold_out_angle=60 is for points in the plane"), ("spheres2", 360, "above 0 and below 360 degrees, got 360"),
        ("spheres2", 1e-6, "choose another angle"),
    ]:  # fmt: skip
        with pytest.raises((ConfigError, DataError), match=message):
            datasets.load(name, **options, hold_out_angle=angle)
    with pytest.raises(ConfigError, match="does not apply to 'moons'; it is for supervised toy sets"):
        datasets.load("moons", hold_out_angle=60)


def test_three_spheres_are_densities_given_a_class_too(tmp_path):
    words = ["ffjord-toy", "--data", "three-spheres", "--hidden", "8", "--warmup", "1", "--condition", "label", *TINY]
    assert train_main([*words, "--out", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert math.isfinite(result["nats"]) and "integral" not in result  # each class has an integral of its own


def test_presets_are_the_papers():
    for name, count in (("node-mnist", 84_395), ("anode-mnist", 84_816), ("node-spheres", 1221), ("anode-spheres", 1551)):
        entry = preset(name)
        info = RunInfo(entry.config, entry.shape, entry.levels, entry.outputs, (), ())
        model, train = info.build(), entry.config.train
        assert sum(p.numel() for p in model.parameters()) == count
        assert (train.lr, train.warmup, train.schedule, train.ema_decay) == (1e-3, 0, "constant", 0.0)
        assert train.batch_size == (256 if "mnist" in name else 64)
        assert (model.solver.method, model.solver.rtol, model.solver.atol) == ("dopri5", 1e-3, 1e-3)
    assert preset("anode-flip").config.train.steps == 50 * (3000 // 64)
