"""Run folders: what is written is read back, damage is named, and nothing in a file is ever executed."""

import dataclasses
import json
import os

import pytest
import torch

from cnf import runs as checkpoint
from cnf.config import PRESETS, DataConfig, FlowConfig, RunConfig, SolverConfig, TrainConfig
from cnf.errors import CheckpointError
from cnf.runs import (
    RunInfo,
    config_digest,
    load,
    load_trainer,
    read_config,
    save_trainer,
    write_atomic,
    write_config,
    write_weights,
)

CONFIG = RunConfig(
    "own",
    DataConfig("picture.png", max_train_rows=7, image_size=None),
    FlowConfig.of(hidden=(5,), zero_init=False),
    SolverConfig(eval_rtol=1e-6),
    TrainConfig(max_time=2.5, lr=1.0),
)
INFO = RunInfo(CONFIG, (2,), None, 3, ("a", "b", "ç"), ("x", "y"))


@pytest.fixture
def run(tmp_path):
    """A run folder as a training leaves it."""
    torch.manual_seed(0)
    write_config(tmp_path, INFO)
    write_weights(tmp_path, INFO.build())
    for step in (1, 2):
        save_trainer(tmp_path, {"step": step})
    return tmp_path


def change(run, edit):
    path = run / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    edit(raw)
    raw["sha256"] = config_digest(raw)
    path.write_text(json.dumps(raw), encoding="utf-8")


def test_what_is_written_is_read(run):
    assert read_config(run) == INFO
    assert json.loads((run / "config.json").read_text(encoding="utf-8"))["format"] == checkpoint.FORMAT
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "model.safetensors", "trainer.previous.pt", "trainer.pt"]


def test_an_older_folder_has_the_defaults_of_settings_that_joined_later(run):
    def older(raw):
        for part in ("data", "model", "solver", "train"):
            for field in dataclasses.fields(getattr(INFO.config, part)):
                if field.metadata.get("optional"):
                    del raw["config"][part][field.name]

    change(run, older)
    assert read_config(run) == INFO
    change(run, lambda raw: raw["config"]["model"].pop("blocks"))  # no such one
    with pytest.raises(CheckpointError, match="'blocks' is missing"):
        read_config(run)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_its_config(tmp_path, name):
    info = RunInfo(PRESETS[name].config, PRESETS[name].shape, PRESETS[name].levels, 0, (), ())
    write_config(tmp_path, info)
    assert read_config(tmp_path) == info


def test_loaded_flow_is_the_saved_one(run):
    torch.manual_seed(0)
    flow, loaded = INFO.build().eval(), load(run)
    x, context = torch.randn(4, 2), torch.eye(3)[[0, 1, 2, 0]]
    assert torch.equal(flow.log_prob(x, context), loaded.log_prob(x, context))
    assert not loaded.training and loaded.blocks[0].eval_solver.rtol == 1e-6


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: raw.update(extra=1), r"config\.json: unknown field 'extra'"),
        (lambda raw: raw["config"]["train"].update(learning=1), r"config: train: unknown field 'learning'"),
        (lambda raw: raw["config"]["model"]["preprocess"].pop("alpha"), r"config: model: preprocess: field 'alpha' is missing"),
        (lambda raw: raw.pop("levels"), r"field 'levels' is missing"),
        (lambda raw: raw["config"]["train"].update(steps="10"), r"config: train: steps is '10'; expected int"),
        (lambda raw: raw["config"]["train"].update(steps=True), r"train: steps is True; expected int"),
        (lambda raw: raw["config"]["train"].update(lr=None), r"train: lr is None; expected float"),
        (lambda raw: raw["config"]["data"].update(max_train_rows=1.5), r"data: max_train_rows is 1\.5; expected int"),
        (lambda raw: raw["config"]["model"]["field"].update(hidden=5), r"model: field: hidden is 5; expected a list"),
        (lambda raw: raw["config"]["model"]["field"].update(hidden=["5"]), r"model: field: hidden is '5'; expected int"),
        (lambda raw: raw["config"]["model"]["field"].update(kind="mlpp"), r"model: field: kind is 'mlpp'; expected one of 'mlp'"),
        (lambda raw: raw["config"].update(train=[]), r"config: train is \[\]; expected an object"),
        (lambda raw: raw.update(format=99), r"reads format 5"),
        (lambda raw: raw.pop("format"), r"reads format 5"),
    ],
)
def test_damaged_config_is_named(run, edit, message):
    change(run, edit)
    with pytest.raises(CheckpointError, match=message):
        load(run)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\x00\x01", "[" * 100_000])
def test_config_that_is_no_config(run, text):
    (run / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(run)


def test_no_run_folder(tmp_path):
    with pytest.raises(CheckpointError, match="is no run folder: it has no config"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="is no run folder"):
        load(tmp_path / "nowhere")


def test_settings_that_cannot_be_built(run):
    change(run, lambda raw: raw["config"]["model"]["field"].update(time_conditioning="concatsqash"))
    with pytest.raises(CheckpointError, match=r"config\.json: .*concatsqash.*did you mean"):
        load(run)


def test_weights_missing_truncated_or_of_another_model(run):
    path = run / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 5, 200, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors does not hold this model's weights"):
            load(run)
    path.write_bytes(whole)
    change(run, lambda raw: raw["config"]["model"]["field"].update(hidden=[6]))
    with pytest.raises(CheckpointError, match=r"does not hold this model's weights.*size mismatch"):
        load(run)
    change(run, lambda raw: raw["config"]["model"]["field"].update(hidden=[5, 5]))
    with pytest.raises(CheckpointError, match=r"does not hold this model's weights.*Missing key"):
        load(run)
    path.unlink()
    with pytest.raises(CheckpointError, match="has not been validated yet"):
        load(run)


def test_truncated_trainer_falls_back_and_the_previous_takes_its_place(run):
    path = run / "trainer.pt"
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        for step in (1, 2):
            save_trainer(run, {"step": step})
        path.write_bytes(whole[:length])
        state, notice = load_trainer(run)
        assert state == {"step": 1} and "using the previous checkpoint" in notice and "trainer.pt: " in notice
        assert load_trainer(run) == ({"step": 1}, "")
        assert not (run / "trainer.previous.pt").exists()


def test_whole_trainer_is_read_without_a_word(run):
    assert load_trainer(run) == ({"step": 2}, "")
    (run / "trainer.pt").unlink()
    assert load_trainer(run)[0] == {"step": 1}


def test_no_trainer_that_can_be_read(run):
    save_trainer(run, [1, 2])
    (run / "trainer.pt").rename(run / "trainer.previous.pt")
    (run / "trainer.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint that can be read \(trainer\.pt: .*; trainer\.previous\.pt: .*it holds a list"):
        load_trainer(run)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(CheckpointError, match="cannot be written: No space left"):
        write_atomic(path, fail)

    def stop(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, stop)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_previous_checkpoint_without_hard_links(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2, 3):
        save_trainer(tmp_path, {"step": step})
    assert torch.load(tmp_path / "trainer.previous.pt", weights_only=True) == {"step": 2}
    assert load_trainer(tmp_path)[0] == {"step": 3}
