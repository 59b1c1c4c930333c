"""Models that come with the package: found by name, small, usable by both programs, and never written to."""

import sys

import pytest
import torch
from conftest import ROOT

import cnf
from cnf.cli import sample_main, train_main
from cnf.config import DataConfig, FlowConfig, RunConfig, SolverConfig, TrainConfig
from cnf.errors import ConfigError
from cnf.runs import RunInfo, read_config, shelf, write_config, write_weights

sys.path.insert(0, str(ROOT / "benchmarks"))

import pretrained as publish


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A shelf of its own, with a tiny model of digits, and the folder of the run that it comes from."""
    run, own = tmp_path / "run", tmp_path / "shelf"
    run.mkdir()
    torch.manual_seed(0)
    train = TrainConfig(noise_samples=1, test_items=5, threads=1)
    config = RunConfig("tiny", DataConfig(data_root="/elsewhere"), FlowConfig.of(hidden=(4,), zero_init=False), SolverConfig(), train)
    info = RunInfo(config, (1, 8, 8), 17, 0, (), ())
    write_config(run, info)
    write_weights(run, info.build())
    monkeypatch.setattr(shelf, "SHELF", own)
    monkeypatch.chdir(tmp_path)
    assert publish.main([str(run)]) == 0
    return own / "tiny"


def test_what_comes_with_the_package_is_small_and_works():
    assert shelf.pretrained() == ["fm-mnist"]
    folder = shelf.located("pretrained:fm-mnist")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4e6
    flow = cnf.load("pretrained:fm-mnist")
    assert {p.dtype for p in flow.parameters()} == {torch.float32} and not flow.training
    x = flow.sample(4, noise=cnf.Noise(0, "sample"), solver=cnf.FixedGrid("rk4", 6))
    assert x.shape == (4, 1, 28, 28) and 0 <= float(x.min()) < float(x.max()) <= 1
    assert 0.08 < float(x.mean()) < 0.20  # as much ink as in digits, 0.13


def test_parameters_are_rounded_to_half_precision_and_nothing_else_is(tiny):
    ours, theirs = cnf.load("run"), cnf.load("pretrained:tiny")
    parameters = {name for name, _ in ours.named_parameters()}
    assert ours.state_dict().keys() - parameters
    for name, value in ours.state_dict().items():
        expected = value.half().float() if name in parameters else value
        assert torch.equal(theirs.state_dict()[name], expected), name
    config = read_config(tiny).config
    assert config.data == DataConfig() and config.train.threads is None


def test_both_programs_take_its_name_and_leave_its_folder_alone(tiny, tmp_path, capsys):
    before = sorted(path.name for path in tiny.iterdir())
    assert sample_main(["pretrained:tiny", "-n", "2", "--grid-steps", "2"]) == 0
    assert "2 samples of pretrained:tiny in runs/tiny-pretrained/samples/sample-0.png" in capsys.readouterr().out
    assert train_main(["--evaluate", "pretrained:tiny", "--test-items", "3"]) == 0
    assert "written to runs/tiny-pretrained/evaluation-1.json" in capsys.readouterr().out
    assert (tmp_path / "runs/tiny-pretrained/evaluation-1.json").is_file()
    assert sorted(path.name for path in tiny.iterdir()) == before


def test_a_name_that_is_not_there(tiny, capsys):
    with pytest.raises(ConfigError, match="pretrained:large is not a pretrained model: expected pretrained:tiny"):
        cnf.load("pretrained:large")
    assert sample_main(["pretrained:large"]) == 2
    assert "pretrained:large is not a pretrained model" in capsys.readouterr().err
    assert train_main(["--evaluate", "pretrained:../run"]) == 2
    assert train_main(["--out", "pretrained:mine", "--steps", "1"]) == 2
    assert "--out pretrained:mine: a name with pretrained: is a model of the package's" in capsys.readouterr().err
    assert sample_main(["nowhere"]) == 2
    assert "such as runs/digits-0, or pretrained:tiny" in capsys.readouterr().err
