"""train_density.py and sample.py from end to end, with tiny settings; every wrong use and its message."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, contents, slow
from PIL import Image

import cnf
from cnf.cli import classify_main, main, sample_main, train_main
from cnf.cli.spelling import option as option_of
from cnf.config import PRESETS, RunConfig
from cnf.config.presets.counts import PARAMETERS
from cnf.config.rules import outside
from cnf.config.tagged import schema, values
from cnf.errors import TrainingError
from cnf.random import Noise
from cnf.runs import read_config, write_config
from cnf.training import Trainer
from cnf.training.cost import Cost

TINY = ["--hidden", "8", "--max-train-rows", "60", "--steps", "6", "--batch-size", "20", "--warmup", "2", "--validate-every", "3",
        "--validation-items", "12", "--test-items", "16", "--noise-samples", "2", "--ema-decay", "0.5"]  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of three columns with a header."""
    path = tmp_path_factory.mktemp("data") / "table.csv"
    x = np.random.default_rng(0).normal(size=(120, 3)) @ np.array([[1, 0.5, 0], [0, 1, 0], [0, 0, 3.0]])
    np.savetxt(path, x, delimiter=",", header="a,b,c", comments="")
    return path


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A finished run on the digits."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert train_main(["digits", *TINY, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory, table):
    """A finished run on the table."""
    folder = tmp_path_factory.mktemp("runs") / "rows"
    tiny = [word for i, word in enumerate(TINY) if "--noise-samples" not in TINY[max(0, i - 1) : i + 1]]
    assert train_main(["tabular", *tiny, "--data", str(table), "--out", str(folder)]) == 0
    return folder


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


# -- training ----------------------------------------------------------------------------------------------------


def test_run_folder(digits):
    names = {str(p.relative_to(digits)) for p in digits.rglob("*") if p.is_file() and "tensorboard" not in str(p)}
    assert names == {
        "config.json", "metrics.jsonl", "model.safetensors", "trainer.pt", "trainer.previous.pt", "report.html", "result.json", "test_nll.npz",
        "samples/samples.png", "plots/learning_curves.png",
    }  # fmt: skip
    assert len(list((digits / "tensorboard").iterdir())) == 2  # of the training and of the test


def test_result_says_what_the_number_is(digits):
    result = json.loads((digits / "result.json").read_text())
    needed = {
        "bits_per_dim", "standard_error", "items", "items_of", "levels", "dequantisation", "importance_samples", "alpha", "solver", "rtol",
        "atol", "divergence", "nfe", "round_trip_error", "parameters", "seconds", "seed", "versions", "validation", "best_step", "config",
    }  # fmt: skip
    assert needed <= result.keys()
    config = read_config(digits).config
    expected = {
        "levels": 17, "alpha": config.model.preprocess.alpha, "solver": config.solver.eval_method, "rtol": config.solver.eval_rtol,
        "divergence": config.solver.divergence.kind, "items": 16, "items_of": 540, "split": "test", "seed": 0, "steps": 6, "stopped": "steps",
        "skipped": 0, "noise_draws": 2, "importance_samples": 1,
    }  # fmt: skip
    assert {name: result[name] for name in expected} == expected
    assert result["parameters"] == sum(p.numel() for p in cnf.load(digits).parameters())
    assert result["config"]["train"]["steps"] == 6 and result["seconds"] > 0
    nll = np.load(digits / "test_nll.npz")["nll"]
    assert result["bits_per_dim"] == pytest.approx(nll.mean()) and len(nll) == 16


def test_interrupted_run_resumes_to_the_same_weights(tmp_path, monkeypatch, capsys, digits):
    real = Trainer.update

    def update(self):
        if self.state.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", update)
        assert train_main(["digits", *TINY, "--out", str(folder)]) == 130
    assert "interrupted; everything up to step 4 is saved" in capsys.readouterr().err
    assert not (folder / "result.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr("cnf.training.report.pictures", lambda *args: None)
        assert train_main(["--resume", "--out", str(folder)]) == 0
    assert f"{folder}: from step 4 on" in capsys.readouterr().out
    for name in ("model.safetensors", "test_nll.npz", "config.json"):
        assert (folder / name).read_bytes() == (digits / name).read_bytes()
    assert metrics(folder) == metrics(digits)
    figures = [{k: v for k, v in json.loads((f / "result.json").read_text()).items() if "seconds" not in k and k != "command"} for f in (folder, digits)]
    assert figures[0] == figures[1]


def test_terminated_run_says_143(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "update", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    assert train_main(["digits", *TINY, "--out", str(tmp_path / "run")]) == 143


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (TrainingError("10 batches in a row"), 1, "failed: 10 batches in a row"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 1, "failed: out of memory (CUDA out of memory. Tried): try --accumulate 4 (with --resume too), or in a new run"),
        (OSError(28, "No space left on device"), 1, "failed: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_training_that_fails(tmp_path, monkeypatch, capsys, error, code, message):
    def fail(self):
        raise error

    monkeypatch.setattr(Trainer, "update", fail)
    assert train_main(["digits", *TINY, "--out", str(tmp_path / "run")]) == code
    assert message in capsys.readouterr().err


def test_interrupted_final_test_is_repeated_by_resume(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    monkeypatch.setattr("cnf.training.report.pictures", lambda *args: None)
    with monkeypatch.context() as patch:
        patch.setattr("cnf.cli.train.finish", interrupted)
        assert train_main(["digits", *TINY, "--out", str(folder)]) == 130
    assert "everything up to step 6 is saved" in capsys.readouterr().err
    before = metrics(folder)
    assert train_main(["--resume", "--out", str(folder)]) == 0
    assert (folder / "result.json").exists() and metrics(folder) == before


def test_resume_of_a_finished_run_changes_nothing_and_more_steps_train_on(tmp_path, monkeypatch, capsys, rows):
    monkeypatch.setattr("cnf.training.report.pictures", lambda *args: None)
    before = contents(rows)
    assert train_main(["--resume", "--out", str(rows)]) == 0
    assert "has finished already (steps, step 6)" in capsys.readouterr().out
    assert contents(rows) == before
    folder = tmp_path / "longer"
    for path, data in before.items():
        (folder / path.relative_to(rows)).parent.mkdir(parents=True, exist_ok=True)
        (folder / path.relative_to(rows)).write_bytes(data)
    assert train_main(["--resume", "--out", str(folder), "--steps", "9"]) == 0
    assert json.loads((folder / "result.json").read_text())["steps"] == 9
    assert read_config(folder).config.train.steps == 9  # so that a resume of the resumed run goes on to 9 too
    assert metrics(folder)[: len(metrics(rows))] == metrics(rows)


def test_a_longer_run_that_was_killed_in_its_test_is_tested_on_resume(tmp_path, monkeypatch, capsys, rows):
    monkeypatch.setattr("cnf.training.report.pictures", lambda *args: None)
    folder = shutil.copytree(rows, tmp_path / "longer")
    with monkeypatch.context() as patch:
        patch.setattr("cnf.cli.train.finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train_main(["--resume", "--out", str(folder), "--steps", "9"]) == 130
    assert json.loads((folder / "result.json").read_text())["steps"] == 6  # of the shorter run
    assert train_main(["--resume", "--out", str(folder)]) == 0
    assert json.loads((folder / "result.json").read_text())["steps"] == 9
    capsys.readouterr()
    assert train_main(["--resume", "--out", str(folder)]) == 0
    assert "has finished already (steps, step 9)" in capsys.readouterr().out


def test_who_runs_out_of_memory_is_told_of_options_that_there_are(monkeypatch, capsys, digits):
    def full(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr("cnf.cli.sample.load", full)
    monkeypatch.setattr("cnf.cli.evaluate.load", full)
    assert sample_main([str(digits)]) == 1
    assert "out of memory (MemoryError): try fewer samples (-n), --device cpu" in capsys.readouterr().err
    assert train_main(["--evaluate", str(digits)]) == 1
    said = capsys.readouterr().err
    assert "try --device cpu, or a machine with more memory" in said and "--accumulate" not in said


def test_dry_run_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cnf.training.cost.CostMeter.enough_seconds", 0.0)
    monkeypatch.setattr("cnf.training.cost.SECONDS", math.inf)
    monkeypatch.chdir(tmp_path)
    assert train_main(["digits", *TINY, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"1,\d\d\d parameters; batch 20\n", said)
    assert re.search(r"memory: \d+ MiB kept for the backward pass, [\d,]+ MiB at the peak \(process\)\n", said)
    assert re.search(r"time: [\d.e-]+ s a step; 6 steps take about 0 seconds without validations\n", said)
    assert not any(tmp_path.iterdir())


def test_a_dry_run_does_not_measure_what_would_take_long(monkeypatch, capsys):
    """The step of a whole batch is then extrapolated from fewer rows."""
    monkeypatch.setattr("cnf.training.cost.SECONDS", 0.0)
    assert train_main(["digits", *TINY, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "batch 20\n" in said and "at the peak (process; by arithmetic from 1 of 20 rows, an upper estimate)" in said


def test_a_dry_run_does_not_count_the_import_of_libraries(monkeypatch, capsys):
    """A slow first step: the steps of more rows are measured nevertheless, and rows are not charged for what does not depend on them."""
    clock, sizes = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now), []

    def run(model, phase, info, group, size, again):
        clock.now += 0.2 if sizes else 60.0
        sizes.append((size, again))
        return Cost(1, size, size, 100.0, "process", 0.1 + 0.001 * size)

    monkeypatch.setattr("cnf.training.cost.time", clock)
    monkeypatch.setattr("cnf.training.cost._run", run)
    assert train_main(["digits", *TINY, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert sizes == [(1, True), (4, False), (16, False), (20, False)] and "time: 0.12 s a step" in said and "arithmetic" not in said


def test_a_dry_run_measures_a_part_of_large_images(monkeypatch, tmp_path, capsys):
    """Of a grid's steps the cost is proportional to the pixels, up to what does not depend on them."""
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    words = ["exact-digits", *TINY, "--data", str(tmp_path / "images.npy"), "--json", "--dry-run"]
    found = []
    for side in (16, 4):
        monkeypatch.setattr("cnf.training.cost.SIDE", side)
        assert train_main(words) == 0
        (result,) = (each for each in map(json.loads, capsys.readouterr().out.splitlines()) if each["event"] == "result")
        found.append(result["phases"][0])
    whole, part = found
    assert part["parameters"] == whole["parameters"] and part["batch"] == whole["batch"] == 20
    assert "4x4 of 16x16 pixels" in part["where"] and "pixels" not in whole["where"]
    assert 0.8 * whole["kept"] < part["kept"] < 1.5 * whole["kept"]


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "side"), [("rnode-celebahq256", 256), ("rnode-imagenet64", 64), ("ffjord-cifar10", 32), ("fm-cifar10", 32)])
def test_a_dry_run_answers_soon(monkeypatch, tmp_path, capsys, preset, side):
    """Within ten seconds of CPU time on a quiet processor with AVX-512, twice that on others, with the presets that take the longest."""
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (60, 3, side, side), dtype=np.uint8))
    started = time.process_time()
    assert train_main([preset, "--data", str(tmp_path / "images.npy"), "--threads", "1", "--dry-run"]) == 0
    assert time.process_time() - started < 60
    assert ("an upper estimate from" in capsys.readouterr().out) == (side > 32)


def test_a_dry_run_of_both_objectives_measures_both(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cnf.training.cost.CostMeter.enough_seconds", 0.0)
    monkeypatch.chdir(tmp_path)
    both = ["--objective", "both", "--finetune-steps", "2", "--finetune-batch-size", "10"]
    assert train_main(["digits", *TINY, *both, "--dry-run"]) == 0
    said = capsys.readouterr().out
    found = re.findall(r"(\w[\w-]+): batch (\d+)\nmemory: .*\ntime: .* s a step; (\d+) steps", said)
    assert found == [("matching", "20", "4"), ("fine-tuning", "10", "2")]
    assert not any(tmp_path.iterdir())


def test_run_folders_are_named_by_preset_data_and_seed(tmp_path, monkeypatch, table):
    monkeypatch.setattr("cnf.cli.train.finish", lambda *args: {})
    monkeypatch.setattr("cnf.cli.train.summary", lambda result: "")
    monkeypatch.chdir(tmp_path)
    quick = ["--hidden", "4", "--steps", "1", "--validation-items", "4"]
    own = ["--data", str(table)]
    for arguments in (["digits"], ["digits"], ["tabular", *own, "--seed", "3"], [*own, "--seed", "4"]):
        assert train_main([*arguments, *quick]) == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "digits-0", "digits-0-2", "tabular-table-3", "tabular-table-4",
    ]  # fmt: skip


@pytest.mark.slow
def test_preset_may_stand_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cnf.training.cost.CostMeter.enough_seconds", 0.0)
    small = ["--batch-size", "8", "--max-train-rows", "50"]
    for arguments in (["ffjord-toy", *small, "--dry-run"], [*small, "--dry-run", "ffjord-toy"], ["--dry-run", *small, "ffjord-toy", "--lr", "1"]):
        assert train_main(arguments) == 0
        assert "9,224 parameters" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "size"), [("table", 0), slow("demo", 0), ("tabular", 0), slow("ffjord-toy", 0), ("digits", 5), ("fm-digits", 6), slow("fm-digits", 18), slow("fm-mnist", 16)])
def test_preset_fits_the_data_where_none_is_named(tmp_path, monkeypatch, capsys, table, name, size):
    monkeypatch.setattr("cnf.training.cost.CostMeter.enough_seconds", 0.0)
    np.savez(tmp_path / "x.npz", images=np.random.default_rng(0).integers(256, size=(40, size, size), dtype=np.uint8))
    data = {"tabular": table, "table": table, "ffjord-toy": "moons", "demo": "moons"}.get(name, tmp_path / "x.npz")
    words = ["--data", str(data), "--max-train-rows", "30", "--dry-run"]
    words += ["--lr", "1e-3"] if name in ("tabular", "ffjord-toy") else []  # which the search would choose
    assert train_main(words) == 0
    said = capsys.readouterr().out
    assert (f"preset {name}, since {data} is a" in said) == (name != "fm-digits")
    assert train_main([name, *words]) == 0
    named = capsys.readouterr().out
    assert "since" not in named
    count = [re.search(r"[\d,]+ parameters; batch \d+|the search .*", text)[0] for text in (said, named)]
    assert count[0] == count[1]
    # what means nothing for the preset that was taken is refused as if it had been named
    assert train_main([*words, "--alpha", "0.1"]) == (0 if name == "digits" else 2)


@pytest.mark.parametrize("more", [[], ["--no-automatic-steps"]])
def test_adaptive_puts_a_preset_s_automatic_steps_aside(tmp_path, more):
    assert PRESETS["digits"].config.solver.train_solver.automatic_steps
    words = ["digits", *TINY, "--adaptive", "--method", "dopri5", *more, "--out", str(tmp_path / "run")]
    assert train_main(words) == 0
    assert metrics(tmp_path / "run")[-1]["step"] == 6


def test_double_precision_with_classes_from_training_to_samples(tmp_path):
    run = tmp_path / "run"
    assert train_main(["digits", *TINY, "--condition", "label", "--precision", "fp64", "--out", str(run)]) == 0
    assert json.loads((run / "result.json").read_text())["dtype"] == "float64" and (run / "samples" / "samples.png").exists()
    for words in (["-n", "4", "--trajectory"], ["-n", "2", "--class", "3"]):
        assert sample_main([str(run), *words, "--out", str(tmp_path / "x.npz")]) == 0
        with np.load(tmp_path / "x.npz") as arrays:
            assert arrays["samples"].dtype == arrays["log_prob"].dtype == np.float64 and np.isfinite(arrays["log_prob"]).all()


def test_a_run_trained_in_tf32_is_scored_anywhere_and_trained_on_a_gpu(tmp_path, capsys, digits):
    run = tmp_path / "run"
    shutil.copytree(digits, run)
    info = read_config(run)
    config, solver = info.config, info.config.solver.change(precision="tf32")
    train = config.train.change(device="cuda")
    write_config(run, dataclasses.replace(info, config=dataclasses.replace(config, solver=solver, train=train)))
    assert train_main(["--evaluate", str(run), "--device", "cpu"]) == 0
    assert train_main(["--resume", "--out", str(run), "--device", "cpu"]) == 2
    assert "--precision tf32 is for GPUs, not for --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "width"), [(["list"], 80), (["list"], 120), (["list"], 60), (["--list"], None)])
def test_list_has_a_line_for_each_preset_and_fits_the_terminal(capsys, monkeypatch, words, width):
    monkeypatch.delenv("COLUMNS", raising=False)
    if width:
        monkeypatch.setenv("COLUMNS", str(width))
    assert (main if words == ["list"] else train_main)(words) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= (width or 80)
    parts = re.split(r"^  (?=\S)", out, flags=re.M)[1:]
    entries = {part.split()[0]: " ".join(part.split()) for part in parts}
    for name, entry in PRESETS.items():
        expected = f"{name} {entry.config.data.data} {PARAMETERS[name]:,} {entry.summary}. Cost: {entry.cost}"
        assert entries[name].startswith(" ".join(expected.split()))


@pytest.mark.parametrize("name", ["digits", "tabular", "vae-digits"])
def test_help_shows_every_option_that_applies_and_its_default(capsys, name):
    assert train_main([name, "--help-all"]) == 0
    shown = capsys.readouterr().out
    said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", shown).split())
    config: RunConfig = PRESETS[name].config
    tags = config.tags(events="vectors" if name == "tabular" else "images")
    found = {each.name: each for each in values(config) if each.name != "name" and not outside(each.given, tags)}
    for setting in schema((RunConfig,)):
        option = option_of(setting)
        if setting not in found:
            assert f"│ {option} " not in shown
            continue
        value = found[setting].value
        default = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        ending = re.compile(rf".{{,400}}?\(default: {re.escape(default)}\)")
        assert any(ending.match(said, m.end()) for m in re.finditer(rf"{option}[ ,]", said)), f"{option} {default}"


# -- wrong use ---------------------------------------------------------------------------------------------------

WRONG = {
    "--stesp 5": r"--stesp.*--steps INT",
    "--lr fast": r"--lr: could not convert string to float",
    "--steps 1.5": r"--steps",
    "--schedule linear": r"linear.*cosine",
    "dgits": r"preset 'dgits' is unknown: did you mean 'digits'",
    "checkerboard": r"'checkerboard' is data, not a preset: write --data checkerboard",
    "people.csv": r"'people.csv' is neither a preset nor a file: there is none at /",
    "--data fm-digits": r"'fm-digits' is a preset, not data: write cnf train fm-digits",
    "checkerbord": r"preset 'checkerbord' is unknown: did you mean --data checkerboard",
    "--steps 5 dgits": r"preset 'dgits' is unknown: did you mean 'digits'",
    "digits tabular": r"tabular",
    "--data digts": r"'digts'.*did you mean 'digits'",
    "--data nowhere/file.npy": r"nowhere/file\.npy.*does not exist",
    "--device gpu": r"--device gpu cannot be used here",
    "--device meta": r"--device meta cannot be used here: expected cpu, cuda or cuda:1",
    "--device cuda:99": r"--device cuda:99 cannot be used here",
    "--threads 0": r"--threads 0: expected a positive number",
    "--steps 0": r"--steps 0: expected a positive number",
    "--steps -3": r"--steps -3: expected a positive number",
    "--batch-size 0": r"--batch-size 0: expected a positive number",
    "--lr 0": r"--lr 0\.0: expected a positive number",
    "--lr nan": r"--lr nan: expected a finite number",
    "--max-time inf": r"--max-time inf: expected a finite number",
    "--weight-decay -1": r"--weight-decay -1\.0: expected zero or more",
    "--max-grad-norm -1": r"--max-grad-norm -1\.0: expected zero or more",
    "--ema-decay 1": r"--ema-decay 1\.0: expected 0 \(no averaging\) or more, below 1",
    "--validate-every 0": r"--validate-every 0: expected a positive number",
    "digits --solver-check-every 0": r"--solver-check-every 0: expected a positive number",
    "--validation-items 0": r"--validation-items 0: expected a positive number",
    "--test-items -1": r"--test-items -1: expected a positive number",
    "--noise-samples 0": r"--noise-samples 0: expected a positive number",
    "--seed -1": r"--seed -1: expected zero or more",
    "--seed 99999999999999999999": r"--seed 9+: expected zero or more, at most",
    "--max-train-rows 0": r"limit must be at least 1, got 0",
    "digits --kinetic -1": r"--kinetic -1\.0: expected zero or more",
    "digits --alpha 0.7": r"alpha must be inside \(0, 0\.5\), got 0\.7",
    "--blocks 0": r"--blocks 0: expected a positive number",
    "--hidden 0": r"hidden=\(0,\)",
    "digits --time-conditioning concatsqash": r"concatsqash.*did you mean 'concatsquash'",
    "digits --nonlinearity tahn": r"tahn.*did you mean 'tanh'",
    "digits --method rk45": r"rk45.*--method.*euler.*rk4",
    "--eval-method rk4": r"rk4.*--eval-method.*dopri5",
    "--eval-rtol 0": r"--eval-rtol 0\.0: expected a positive number",
    "digits --grid-steps 0": r"--grid-steps 0: expected 1 to 100,000",
    "digits --gradient adjoint": r"gradient='adjoint' is unknown for FixedGrid",
    "digits --adaptive --method dopri5 --gradient checkpoint": r"gradient='checkpoint' is unknown for Adaptive",
    "digits --end-time -1": r"--end-time -1\.0: expected a positive number",
    "digits --steer 2": r"steer must be .*got 2\.0",
    "--resume": r"--resume needs --out DIR",
    "--resume --out nowhere": r"nowhere is no run folder: there is no such folder",
    "--evaluate nowhere": r"nowhere is no run folder: there is no such folder",
    "--split train": r"--split is for --evaluate: a training is always tested once",
    # what would do nothing is refused
    "digits --probes 4": r"--probes 4 is for --divergence hutchinson, not for --divergence exact: leave it at 1",
    "digits --hutchinson-mode reverse": r"--hutchinson-mode reverse is for --divergence hutchinson",
    "digits --rtol 1e-3": r"--rtol 0.001 is for --train-solver adaptive",
    "digits --adaptive --method dopri5 --grid-steps 9": r"--grid-steps 9 is for --train-solver grid, not for --train-solver adaptive: leave it at 4",
    "--discrete keep": r"discrete='keep' does not apply to 'digits'",
    "digits --compile-unit solve": r"--compile-unit is for training with --compile: leave it at step",
    "digits --compile --compile-unit solve --gradient checkpoint": r"--compile-unit is for --gradient direct",
    "ffjord-toy --alpha 0.1": r"--alpha is for images: leave it at 0.01",
    "ffjord-toy --preprocess logit": r"--preprocess is for images",
    "ffjord-toy --noise-samples 3": r"--noise-samples is for likelihoods with noise, and the exact trace of vectors .* has none",
    "ffjord-toy --nbits 5": r"nbits=5",
    "ffjord-toy --split-seed 3": r"--split-seed is for random splits, and that of these data is fixed",
    "--split-seed 3": r"--split-seed is for random splits, and that of these data is fixed",
    "--data-seed 3": r"--data-seed is for toy points",
    "ffjord-toy --field conv": r"field='conv' needs images",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_use_says_what_is_wrong_and_exits_with_2(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert train_main(words.split()) == 2
    said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    assert re.search(WRONG[words], said), said
    assert not any(tmp_path.iterdir())  # nothing is left behind that would stand in the way of the next try


def test_out_that_is_taken(tmp_path, capsys, digits):
    assert train_main(["digits", *TINY, "--out", str(digits)]) == 2
    assert f"is not empty: expected a new or an empty folder; --resume --out {digits} continues" in capsys.readouterr().err
    file = tmp_path / "file"
    file.write_text("mine")
    for out, message in ((file, "is a file"), (tmp_path, "is not empty"), (file / "below", "cannot be made")):
        assert train_main(["digits", *TINY, "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_resume_names_what_it_cannot_change(digits, capsys):
    before = contents(digits)
    assert train_main(["--resume", "--out", str(digits), "--lr", "0.5", "--hidden", "9", "--steps", "7"]) == 2
    assert "--resume cannot change --hidden, --lr: leave them out" in capsys.readouterr().err
    assert train_main(["tabular", "--resume", "--out", str(digits)]) == 2
    assert "is a run of preset digits, not tabular" in capsys.readouterr().err
    assert contents(digits) == before


def test_resume_with_data_that_have_changed(tmp_path, monkeypatch, capsys, table):
    monkeypatch.setattr("cnf.training.report.pictures", lambda *args: None)
    path = tmp_path / "mine.csv"
    path.write_bytes(table.read_bytes())
    run = ["tabular", "--hidden", "4", "--steps", "2", "--data", str(path), "--out", str(tmp_path / "run")]
    assert train_main(run) == 0
    path.write_text(path.read_text().replace("a,b,c", "a,b,d"))
    assert train_main(["--resume", "--out", str(tmp_path / "run"), "--steps", "3"]) == 2
    assert "the data are not those" in capsys.readouterr().err
    lines = path.read_text().replace("a,b,d", "a,b,c").splitlines()
    path.write_text("\n".join([lines[0], "0.5,0.5,0.5", *lines[2:]]))
    assert train_main(["--resume", "--out", str(tmp_path / "run"), "--steps", "3"]) == 1
    assert "the data are not those" in capsys.readouterr().err


def test_damage_fails_with_1(tmp_path, capsys, digits):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((digits / name).read_bytes()[:-9])
        assert sample_main([str(tmp_path)]) == 1
        assert f"failed: {tmp_path / name}" in capsys.readouterr().err
        (tmp_path / name).write_bytes((digits / name).read_bytes())


# -- evaluation --------------------------------------------------------------------------------------------------


def test_evaluate_scores_again_and_overwrites_nothing(tmp_path, capsys, digits):
    before = contents(digits)
    assert train_main(["--evaluate", str(digits)]) == 0
    assert "written to" in capsys.readouterr().out
    first = json.loads((digits / "evaluation-1.json").read_text())
    result = json.loads((digits / "result.json").read_text())
    assert first["bits_per_dim"] == result["bits_per_dim"] and first["items"] == 16
    other = "--eval-method bosh3 --eval-rtol 1e-4 --divergence hutchinson --probes 3 --hutchinson-mode reverse --split validation --test-items 9"
    assert train_main(["--evaluate", str(digits), *other.split(), "--noise-samples", "1"]) == 0
    second = json.loads((digits / "evaluation-2.json").read_text())
    expected = {"solver": "bosh3", "rtol": 1e-4, "divergence": "hutchinson", "probes": 3, "split": "validation", "items": 9}
    assert {name: second[name] for name in expected} == expected
    assert abs(second["bits_per_dim"] - first["bits_per_dim"]) < 0.5
    assert {p: v for p, v in contents(digits).items() if "evaluation-" not in p.name} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--lr 0.1 --steps 9", "--evaluate does not use --steps, --lr: leave them out"),
        ("--split-seed 4", "--evaluate does not use --split-seed"),
        ("--validation-items 3", "--evaluate does not use --validation-items"),
        ("--probes 2", "--probes 2 is for --divergence hutchinson"),
        ("--data 8gaussians", "models events (1, 8, 8) of 17 levels"),
        ("--resume --out x", "--resume does not apply to --evaluate"),
        ("--out x", "--out does not apply to --evaluate"),
        ("--dry-run", "--dry-run does not apply to --evaluate"),
        ("tabular", "is a run of preset digits, not tabular"),
    ],
)
def test_evaluate_refuses_what_it_would_not_use(digits, capsys, options, message):
    before = contents(digits)
    assert train_main(["--evaluate", str(digits), *options.split()]) == 2
    assert message in capsys.readouterr().err
    assert contents(digits) == before


# -- sampling ----------------------------------------------------------------------------------------------------


def run(program, *arguments):
    return subprocess.run([sys.executable, str(ROOT / program), *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)


def test_sample_in_a_fresh_process_is_the_same_bit_for_bit(tmp_path, digits):
    torch.manual_seed(123)
    done = run("sample.py", digits, "-n", 5, "--seed", 7, "--temperature", 0.8, "--out", tmp_path / "x.npz")
    assert done.returncode == 0, done.stderr
    flow, noise = cnf.load(digits), Noise(7, "sample")
    x = flow.sample(5, noise=noise, temperature=0.8)
    with np.load(tmp_path / "x.npz") as file:
        assert sorted(file.files) == ["log_prob", "samples"]
        assert np.array_equal(file["samples"], x.numpy())
        assert np.array_equal(file["log_prob"], flow.log_prob(x, noise=noise).detach().numpy())
    assert sample_main([str(digits), "-n", "5", "--seed", "8", "--out", str(tmp_path / "y.npz")]) == 0
    assert not np.array_equal(np.load(tmp_path / "y.npz")["samples"], x.numpy())


def test_train_density_in_a_fresh_process():
    done = run("train_density.py", "--list")
    assert done.returncode == 0 and "\n  digits" in done.stdout


def test_pictures(tmp_path, capsys, digits, rows):
    assert sample_main([str(digits), "-n", "9"]) == 0
    assert f"9 samples of {digits} in {digits / 'samples' / 'sample-0.png'}" in capsys.readouterr().out
    with Image.open(digits / "samples" / "sample-0.png") as picture:
        assert picture.size[0] == picture.size[1] > 3 * 8  # three by three
    assert sample_main([str(digits), "-n", "4", "--out", str(tmp_path / "new" / "x.gif")]) == 0
    with Image.open(tmp_path / "new" / "x.gif") as picture:
        assert picture.n_frames > 10 and picture.size[0] == picture.size[1] > 2 * 8
    assert sample_main([str(rows), "--out", str(tmp_path / "rows.png")]) == 0
    assert "1,000 samples" in capsys.readouterr().out


def test_a_run_whose_data_are_gone_still_samples(tmp_path, capsys, rows):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((rows / "model.safetensors").read_bytes())
    info = read_config(rows)
    write_config(folder, dataclasses.replace(info, config=info.config.change(data="gone/table.csv")))
    for out in ("x.png", "x.npz"):
        assert sample_main([str(folder), "-n", "50", "--out", str(tmp_path / out)]) == 0
        said = capsys.readouterr().out
        assert ("samples only, since the data are not available: data 'gone/table.csv' does not exist" in said) == (out == "x.png")
        assert (tmp_path / out).stat().st_size > 500


def test_trajectory_leads_from_noise_to_the_samples(tmp_path, rows):
    assert sample_main([str(rows), "-n", "20", "--trajectory", "--out", str(tmp_path / "x.npz")]) == 0
    with np.load(tmp_path / "x.npz") as file:
        way, times, x = file["trajectory"], file["times"], torch.from_numpy(file["samples"])
    assert way.shape == (21, 20, 3) and times[0] == 1 and times[-1] == 0 and (np.diff(times) < 0).all()
    flow = cnf.load(rows)
    with torch.no_grad():
        assert np.abs(way[0] - flow.encode(x).numpy()).max() < 1e-3
        standardised = flow.transform.transforms[0](x).value.numpy()
    assert np.abs(way[-1] - standardised).max() < 1e-5


def test_many_samples_are_drawn_in_batches_of_one_joint_noise(tmp_path, monkeypatch, rows):
    arguments = [str(rows), "-n", "50", "--out", str(tmp_path / "x.npz")]
    assert sample_main(arguments) == 0
    whole = dict(np.load(tmp_path / "x.npz"))
    monkeypatch.setattr("cnf.cli.sample.BATCH_NUMBERS", 3 * 20)
    assert sample_main(arguments) == 0
    parts = dict(np.load(tmp_path / "x.npz"))
    assert parts.pop("columns").tolist() == whole.pop("columns").tolist() == ["a", "b", "c"]
    for name, value in whole.items():  # the adaptive steps depend on the batch
        assert parts[name].shape == value.shape and np.abs(parts[name] - value).max() < 2e-3, name


def test_temperature_scales_the_latent_noise(tmp_path, rows):
    flow = cnf.load(rows)
    latent = []
    for temperature in ("1", "0.25"):
        assert sample_main([str(rows), "-n", "30", "--temperature", temperature, "--out", str(tmp_path / "x.npz")]) == 0
        latent.append(flow.encode(torch.from_numpy(np.load(tmp_path / "x.npz")["samples"])))
    assert torch.allclose(latent[1], 0.25 * latent[0], atol=2e-3)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A finished run with classes, in which the class decides everything."""
    folder = tmp_path_factory.mktemp("runs") / "classes"
    data = tmp_path_factory.mktemp("data") / "two.npz"
    labels = np.arange(200) % 2
    x = np.random.default_rng(0).normal(size=(200, 2)) * 0.3 + 6.0 * labels[:, None]
    np.savez(data, x=x, labels=np.array(["low", "high"])[labels])
    options = f"--data {data} --condition label --hidden 16 --blocks 1 --steps 60 --lr 0.03 --warmup 5 --batch-size 100 --ema-decay 0 --out {folder}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnf.cli.train.finish", lambda *args: {})  # the test is not what this is about
        patch.setattr("cnf.cli.train.summary", lambda result: "")
        assert train_main(["tabular", *options.split()]) == 0
    return folder


def test_class_draws_from_one(tmp_path, classes):
    out = str(tmp_path / "x.npz")
    found = {}
    for label in ("low", "high"):
        assert sample_main([str(classes), "-n", "40", "--class", label, "--out", out]) == 0
        with np.load(out) as file:
            assert set(file["classes"]) == {label}
            found[label] = file["samples"]
    assert found["low"].mean() < 2 < 4 < found["high"].mean()
    assert sample_main([str(classes), "-n", "7", "--out", out]) == 0
    with np.load(out) as file:  # every class in turn
        assert file["classes"].tolist() == ["high", "low", "high", "low", "high", "low", "high"]
        x = torch.from_numpy(file["samples"])
        context = torch.eye(2)[torch.arange(7) % 2]
        with torch.no_grad():  # as it is solved without gradients: with them to the solver's error
            expected = cnf.load(classes).log_prob(x, context).numpy()
        assert np.abs(file["log_prob"] - expected).max() < 1e-5
    assert sample_main([str(classes), "-n", "7", "--temperature", "0.5", "--out", out]) == 0
    flow = cnf.load(classes)
    cold = flow.encode(torch.from_numpy(np.load(out)["samples"]), context)
    assert torch.allclose(cold, 0.5 * flow.encode(x, context), atol=2e-3)
    for picture in ("x.png", "x.gif"):
        assert sample_main([str(classes), "-n", "30", "--class", "low", "--out", str(tmp_path / picture)]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("-n 0", "-n 0: expected at least 1 sample"),
        ("-n x", "invalid int value: 'x'"),
        ("--temperature 0", "--temperature 0: expected a positive number"),
        ("--temperature -1", "--temperature -1: expected a positive number"),
        ("--temperature nan", "--temperature nan: expected a positive number"),
        ("--seed -1", "--seed -1: expected zero or more"),
        ("--out x.jpg", "--out x.jpg: expected a file ending in .png, .npz, .gif"),
        ("--trajectory", "--trajectory is for --out FILE.npz"),
        ("--trajectory --out x.png", "--trajectory is for --out FILE.npz"),
        ("--class 3", "--class 3: this run was trained without classes"),
        ("--device gpu", "--device gpu cannot be used here"),
        ("--sed 3", "unrecognized arguments: --sed 3"),
    ],
)
def test_sample_refuses_nonsense(digits, capsys, options, message):
    assert sample_main([str(digits), *options.split()]) == 2
    assert message in capsys.readouterr().err


def test_sample_refuses_what_does_not_fit_the_run(tmp_path, capsys, rows, classes):
    for arguments, message in (
        ([classes, "--class", "middle"], "--class middle is unknown: this run has high, low"),
        ([rows, "--out", tmp_path / "x.gif"], "these samples have 3 columns"),
        ([tmp_path / "none"], "is no run folder: there is no such folder"),
        ([tmp_path], "is no run folder: it has no config.json"),
        ([rows, "--out", rows / "config.json" / "x.npz"], "its folder cannot be made"),
    ):
        assert sample_main([str(word) for word in arguments]) == 2
        assert message in capsys.readouterr().err


def test_each_program_calls_itself_by_its_name(capsys):
    for program, name in ((train_main, "train_density.py"), (classify_main, "train_classifier.py"), (sample_main, "sample.py")):
        for word in ("--help", "--help-all"):
            assert program([word]) == 0
            assert f"usage: {name}" in capsys.readouterr().out


def test_sample_help_shows_the_defaults(capsys):
    assert sample_main(["--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for default in ("64 images, 1000 points or rows", "RUN/samples/sample-SEED.png", "(default: 0)", "(default: 1.0)", "(default: cpu)"):
        assert default in said


def test_bf16_says_where_it_is_no_faster(tmp_path, capsys, monkeypatch):
    for fast in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert train_main(["digits", *TINY, "--precision", "bf16", "--out", str(tmp_path / str(fast))]) == 0
        assert ("bf16 is no faster here" in capsys.readouterr().err) == (not fast)
