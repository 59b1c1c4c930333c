"""train_density.py --evaluate: its figures against the library called directly, and everything that it refuses."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, contents
from PIL import Image

import cnf
from cnf.cli import train_main
from cnf.cli.evaluate import _keep
from cnf.cli.exits import guard
from cnf.data import load
from cnf.evaluation import check, column_report, evaluate
from cnf.ode.divergence import Hutchinson
from cnf.solvers import Adaptive

SEED = 30_000  # of the noise of every test
TINY = ["--hidden", "4", "--steps", "2", "--batch-size", "20", "--warmup", "1", "--validation-items", "12", "--lr", "0.1",
        "--ema-decay", "0"]  # fmt: skip


def train(folder, *options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnf.training.report.pictures", lambda *args: None)
        assert train_main([*map(str, options), *TINY, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run on digits, tested on 20 images."""
    return train(tmp_path_factory.mktemp("runs") / "digits", "digits", "--max-train-rows", 60, "--test-items", 20, "--noise-samples", 2)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Columns a and b, and c on a lattice."""
    path = tmp_path_factory.mktemp("data") / "table.csv"
    x = np.random.default_rng(0).normal(size=(200, 3)) * [1.0, 1e4, 3.0]
    x[:, 2] = x[:, 2].round()
    np.savetxt(path, x, delimiter=",", header="a,b,c", comments="")
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory, table):
    """A run on that table."""
    return train(tmp_path_factory.mktemp("runs") / "rows", "tabular", "--data", table)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of two classes of small colour pictures."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    draw = np.random.default_rng(0)
    for label, low in (("dark", 0), ("light", 120)):
        (folder / label).mkdir(parents=True)
        for i in range(20):
            pixels = draw.integers(low, low + 136, (2, 2, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def classes(tmp_path_factory, pictures):
    """A conditional run on those pictures, 16 levels a channel."""
    options = ("digits", "--data", pictures, "--condition", "label", "--nbits", 4, "--noise-samples", 1, "--kinetic", 0)
    return train(tmp_path_factory.mktemp("runs") / "classes", *options, "--preprocess", "standardize")


def run(capsys, folder, *options):
    """What --evaluate prints, warnings last, and the newest evaluation-N.json."""
    capsys.readouterr()
    assert train_main(["--evaluate", str(folder), *map(str, options)]) == 0
    found = sorted(folder.glob("evaluation-*.json"), key=lambda p: int(re.sub(r"\D", "", p.stem)))
    said = capsys.readouterr()
    return said.out + said.err, json.loads(found[-1].read_text()) if found else None


def refusal(capsys, folder, *options):
    capsys.readouterr()
    assert train_main(["--evaluate", str(folder), *map(str, options)]) == 2
    return capsys.readouterr().err


def test_what_was_computed_is_kept_though_nobody_reads_it(tmp_path, monkeypatch, digits):
    def closed(*args, **options):
        raise BrokenPipeError

    before = len(list(digits.glob("evaluation-*.json")))
    monkeypatch.setattr("cnf.cli.evaluate.summary", closed)
    monkeypatch.setattr("cnf.evaluation.ranking.Ranking.text", closed)
    monkeypatch.setattr("cnf.cli.exits._hang_up", lambda: None)
    assert train_main(["--evaluate", str(digits), "--per-item", str(tmp_path / "split.csv")]) == 141
    assert len(list(digits.glob("evaluation-*.json"))) == before + 1 and (tmp_path / "split.csv").is_file()
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 8, 8), dtype=np.uint8))
    assert train_main(["--evaluate", str(digits), "--score", str(tmp_path / "x.npz"), "--per-item", str(tmp_path / "own.csv")]) == 141
    assert (tmp_path / "own.csv").is_file()


# -- a split -----------------------------------------------------------------------------------------------------


def test_k_samples_and_the_scores_of_each_item_are_the_library_s(tmp_path, capsys, digits):
    out, result = run(capsys, digits, "--importance", 3, "--per-item", tmp_path / "new" / "s.csv", "--split", "validation")
    run(capsys, digits, "--importance", 3, "--per-item", tmp_path / "s.npz", "--split", "validation")
    flow, data = cnf.load(digits), load("digits", limit=60)
    with np.load(tmp_path / "s.npz") as file:
        scores = dict(file)
    index = torch.from_numpy(scores["index"])
    assert len(index) == 20 == result["items"] and result["items_of"] == len(data.validation) == 180
    direct = evaluate(flow, data.validation[index], draws=2, importance=3, seed=SEED, index=index)
    assert np.array_equal(scores["nll"], direct.per_item.numpy()) and np.array_equal(scores["log_prob"], direct.log_prob.numpy())
    assert result["bits_per_dim"] == direct.mean and result["standard_error"] == direct.standard_error
    assert result["importance_samples"] == 3 and result["noise_draws"] == 2 and result["bound"] is True
    assert f"validation: {direct.mean:.4f}" in out and "K = 3, 2 draws" in out and f"is in {tmp_path / 'new' / 's.csv'}" in out
    with (tmp_path / "new" / "s.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["index", "bits_per_dim", "log_prob"]
    for name, key, kind in (("index", "index", int), ("bits_per_dim", "nll", float), ("log_prob", "log_prob", float)):
        assert [kind(line[name]) for line in lines] == scores[key].tolist()
    plain = evaluate(flow, data.validation[index], draws=2, seed=SEED, index=index)
    assert direct.mean < plain.mean  # a tighter bound


def test_the_middle_of_each_level_and_finer_checks(capsys, digits):
    flow, data = cnf.load(digits), load("digits")
    out, result = run(capsys, digits, "--mid-bin", "--check", "--test-items", 540)
    x = data.test
    direct = flow.bits_per_dim((x + 0.5) / 17).detach().double().mean()
    assert result["bits_per_dim"] == pytest.approx(float(direct), abs=1e-5) and result["bound"] is False
    assert "not a bound: the density at the middle" in out
    found = check(flow, x, dequantisation="mid-bin", seed=SEED)
    assert result["checked_items"] == 540 == found.items
    assert (result["solver_error"], result["solver_error_largest"]) == (found.difference, found.largest)
    assert result["round_trip_error"] == found.round_trip and f"round trip {found.round_trip:.1e} on 540 items" in out
    _, quick = run(capsys, digits, "--mid-bin")
    assert quick["checked_items"] == 16 and quick["items"] == 20


def test_solver_and_trace_are_those_asked_for(capsys, digits):
    options = "--eval-method bosh3 --eval-rtol 1e-3 --eval-atol 1e-4 --divergence hutchinson --hutchinson-noise gaussian --probes 2 --noise-samples 1"
    options += " --eval-tolerance 2e-3"
    _, result = run(capsys, digits, *options.split(), "--importance", 2, "--test-items", 5)
    flow, data = cnf.load(digits), load("digits")
    solver = Adaptive("bosh3", 1e-3, 1e-4, max_steps=10_000, quadrature_tolerance=2e-3 * math.log(2))
    for block in flow.blocks:
        block.eval_solver, block.divergence = solver, Hutchinson("gaussian", probes=2)
    index = torch.randperm(540, generator=torch.Generator().manual_seed(SEED))[:5].sort().values
    assert result["bits_per_dim"] == evaluate(flow, data.test[index], importance=2, seed=SEED, index=index).mean
    assert result["bound"] is False and "use the exact trace" in result["note"]


def test_a_table_again_with_its_columns(capsys, rows, table):
    out, result = run(capsys, rows, "--split", "train")
    data, flow = load(table), cnf.load(rows)
    assert result["nats"] == pytest.approx(-float(flow.log_prob(data.train).detach().double().mean()), abs=1e-5)
    report = column_report(flow, data.train, names=data.columns)
    assert result["columns"] == [vars(column) for column in report] and "what each column costs" in out
    assert any("'c'" in line and "dequantised by one step" in line for line in result["notices"])
    assert f"data: {next(line for line in result['notices'] if 'dequantised' in line)}" in out


def test_data_that_have_changed_since_training_are_named(tmp_path, capsys, table):
    own = tmp_path / "own.csv"
    own.write_bytes(table.read_bytes())
    run = train(tmp_path / "run", "tabular", "--data", own)
    assert train_main(["--evaluate", str(run)]) == 0 and "has changed" not in capsys.readouterr().err
    own.write_text("".join(own.read_text().splitlines(keepends=True)[:150]))
    assert train_main(["--evaluate", str(run)]) == 0
    assert f"{own} has changed since {run} was trained: rows of its training may be among those of its test" in capsys.readouterr().err
    assert train_main(["--evaluate", str(run), "--data", str(table)]) == 0 and "has changed" not in capsys.readouterr().err


def test_other_data_are_read_with_options_of_their_own(tmp_path, capsys, rows, table):
    x = np.random.default_rng(1).normal(size=(50, 3))
    np.savetxt(tmp_path / "other.csv", x, delimiter=",", header="a,b,c", comments="")
    np.savetxt(tmp_path / "named.csv", x, delimiter=",", header="a,b,d", comments="")
    options = ("--data", tmp_path / "other.csv", "--test-fraction", 0.4)
    _, result = run(capsys, rows, *options)
    other = load(tmp_path / "other.csv", test_fraction=0.4)
    assert result["items"] == 20 and result["data"] == str(tmp_path / "other.csv")
    assert result["nats"] == pytest.approx(-float(cnf.load(rows).log_prob(other.test).detach().double().mean()), abs=1e-4)
    assert "does not use --test-fraction" in refusal(capsys, rows, "--test-fraction", 0.4)
    assert "models the columns a, b, c, but" in refusal(capsys, rows, "--data", tmp_path / "named.csv")
    # five rows in the validation split, where a column may be constant: the figure stands without the report
    x[:, 2] = 0.0
    x[0, 2] = 7.0
    np.savetxt(tmp_path / "flat.csv", x, delimiter=",", header="a,b,c", comments="")
    assert train_main(["--evaluate", str(rows), "--data", str(tmp_path / "flat.csv"), "--split", "validation", "--discrete", "keep"]) == 0
    said = capsys.readouterr()
    assert "no report on the columns: column 2 is constant" in said.err and "what each column costs" not in said.out


# -- items of one's own ------------------------------------------------------------------------------------------


def ranked(out):
    """Names, scores and shares as they were printed."""
    lines = re.findall(r"^  (\S+) +(-?\d+\.\d{4})(?:   +([\d.]+) % of the reference is less likely)?$", out, re.M)
    return [line[0] for line in lines], [float(line[1]) for line in lines], [line[2] for line in lines]


def test_ranking_is_the_order_of_the_log_density(tmp_path, capsys, rows):
    x = np.random.default_rng(5).normal(size=(12, 3)) * [1.0, 1e4, 3.0]
    path = tmp_path / "new.csv"
    np.savetxt(path, x[:, [2, 0, 1]], delimiter=",", header="c,a,b", comments="")  # read by name
    before = contents(rows)
    out, _ = run(capsys, rows, "--score", path, "--per-item", tmp_path / "s.csv")
    assert contents(rows) == before
    nll = -cnf.load(rows).log_prob(torch.from_numpy(x).float()).detach().double().numpy()
    order = np.argsort(-nll)
    names, scores, shares = ranked(out)
    assert names == [f"{path}:{i}" for i in order] and np.allclose(scores, nll[order], atol=1e-3)
    with np.load(rows / "test_nll.npz") as file:
        known = file["nll"]
    assert shares == [f"{100 * np.mean(known > v):.1f}" for v in nll[order]] and len(known) == 20
    assert "run's own test: 20 items" in out and "Likelihood alone is not an anomaly score" in out
    assert "column 'c' of" in out and "between the steps of training: scored as they are" in out
    with (tmp_path / "s.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))  # in the order given
    assert [line["name"] for line in lines] == [f"{path}:{i}" for i in range(12)]
    assert np.allclose([float(line["nats"]) for line in lines], nll, atol=1e-3)
    assert "as a whole" not in out
    far = np.random.default_rng(6).normal(size=(25, 3)) * [1.0, 1e4, 3.0] + [9.0, 0.0, 0.0]
    np.savetxt(path, far[:, [2, 0, 1]], delimiter=",", header="c,a,b", comments="")
    assert "(25 of 25 items are in the least likely 5 % of the reference" in run(capsys, rows, "--score", path)[0]


def test_the_test_split_scored_as_items_gives_the_test_s_own_figures(tmp_path, capsys, classes, pictures):
    data = load(pictures, condition="label", nbits=4)
    labels = [data.classes[int(c.argmax())] for c in data.test_context]
    np.savez(tmp_path / "x.npz", x=data.test.numpy() << 4, labels=np.array(labels))  # 8-bit again
    out, _ = run(capsys, classes, "--score", tmp_path / "x.npz", "--per-item", tmp_path / "s.npz")
    with np.load(classes / "test_nll.npz") as known, np.load(tmp_path / "s.npz") as found:
        assert np.array_equal(known["nll"], found["nll"]) and len(known["nll"]) == 4
    assert "run's own test: 4 items" in out and "bits/dim" in out
    # every picture stands under its class
    run(capsys, classes, "--score", pictures, "--per-item", tmp_path / "p.npz", "--mid-bin")
    with np.load(tmp_path / "p.npz") as found:
        flow = cnf.load(classes)
        for i in (0, 7, 25):
            path = Path(str(found["name"][i]))
            x = torch.from_numpy(np.asarray(Image.open(path)).transpose(2, 0, 1) >> 4)[None]
            context = torch.eye(2)[[data.classes.index(path.parent.name)]]
            bits = float(flow.bits_per_dim((x + 0.5) / 16, context).detach())
            other = float(flow.bits_per_dim((x + 0.5) / 16, 1 - context).detach())
            assert abs(bits - other) > 1e-3
            assert found["nll"][i] == pytest.approx(bits, abs=1e-4)


def test_other_noise_has_no_reference_and_says_what_it_is(tmp_path, capsys, digits):
    np.save(tmp_path / "x.npy", load("digits").test[:6, 0].numpy())
    path = tmp_path / "x.npy"
    out, _ = run(capsys, digits, "--score", path)
    assert all(ranked(out)[2]) and len(ranked(out)[0]) == 6 and "almost black" not in out
    tolerances = ("--eval-rtol", "1e-6")
    assert all(ranked(run(capsys, digits, "--score", path, *tolerances)[0])[2])
    others = (("--noise-samples", 1), ("--importance", 2), ("--divergence", "hutchinson"))
    for options in others:
        assert not any(ranked(run(capsys, digits, "--score", path, *options)[0])[2]), options
    out, _ = run(capsys, digits, "--score", path, "--mid-bin")
    assert not any(ranked(out)[2]) and "(not a bound: the density at the middle" in out
    bits = cnf.load(digits).bits_per_dim((load("digits").test[:6] + 0.5) / 17).tolist()
    assert ranked(out)[0] == [f"{path}:{i}" for i in np.argsort(np.negative(bits))]


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--importance 0", "--importance 0: expected at least 1"),
        ("--importance 4 --mid-bin", "--mid-bin has none: leave one out"),
        ("--mid-bin --noise-samples 4", "--noise-samples is for likelihoods with noise, and the exact trace of vectors (or of the middle of each grey level) has none"),
        ("--per-item x.txt", "--per-item x.txt: expected a file ending in .npz or .csv"),
        ("--max-train-rows 30", "--evaluate does not use --max-train-rows"),
        ("--nbits 5", "--evaluate does not use --nbits"),
        ("--score", "--score names no file"),
        ("--score x.npy --split train", "--split is for a split of the data"),
        ("--score x.npy --check", "--check is for a split of the data"),
        ("--score x.npy --test-items 3", "--score does not use --test-items: leave it out"),
        ("--score x.npy --max-train-rows 30", "--score does not use --max-train-rows"),
        ("--score x.npy --data 8gaussians --data-root y", "--score does not use --data, --data-root: leave them out"),
        ("--score x.npy --probes 2", "--probes 2 is for --divergence hutchinson"),
        ("--score x.npy --mid-bin --noise-samples 4", "--noise-samples is for likelihoods with noise"),
        ("--score nowhere.npy", "'nowhere.npy' does not exist"),
        ("--score eight.npy", "has grey levels up to 255, but the model has 17, from 0 to 16"),
        ("--score x.png", "is an image file, of 256 grey levels, but the model has 17"),
        ("--score colour.png", "holds colour images of 8x8, but the model has grey images of 8x8"),
        ("--score rows.csv", "holds rows of 2 numbers, but the model has grey images of 8x8"),
        ("--data 8gaussians", "models events (1, 8, 8) of 17 levels, but 8gaussians has events (2,)"),
    ],
)
def test_what_does_nothing_or_does_not_fit_digits(tmp_path, monkeypatch, capsys, digits, options, message):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.zeros((2, 8, 8)))
    np.save("eight.npy", np.full((2, 8, 8), 255, dtype=np.uint8))
    Image.new("L", (8, 8)).save("x.png")
    Image.new("RGB", (8, 8)).save("colour.png")
    Path("rows.csv").write_text("1,2\n3,4\n")
    before = contents(digits)
    said = refusal(capsys, digits, *options.split())
    assert message in said and said.count("\n") == 1
    assert contents(digits) == before and len(list(tmp_path.iterdir())) == 5


def test_what_does_not_fit_vectors_or_classes(tmp_path, capsys, rows, table, classes, pictures):
    np.save(tmp_path / "x.npy", np.zeros((2, 3)))
    (tmp_path / "nan.csv").write_text("a,b,c\n1,nan,3\n4,nan,6\n")
    for options, message in (
        (["--mid-bin"], f"--mid-bin is for images, and {rows} models vectors"),
        (["--importance", 5], f"--importance is for images, and {rows} models vectors"),
        (["--noise-samples", 5], "--noise-samples is for likelihoods with noise, and the exact trace of vectors"),
        (["--score", tmp_path / "x.npy", "--mid-bin"], "--mid-bin is for images"),
        (["--score", tmp_path / "nan.csv"], "no row can be ranked: no value of 'b'"),
        (["--score", tmp_path / "x.npy", tmp_path / "y.npy"], "y.npy' does not exist"),
        (["--score", pictures / "dark" / "00.png"], "holds images, but the model has rows of 3 numbers"),
    ):
        assert message in refusal(capsys, rows, *options)
    said = refusal(capsys, classes, "--score", pictures / "dark" / "00.png")
    assert "is conditional, and" in said and "00.png has no class: give an .npz with 'labels'" in said and "known are dark, light" in said
    np.savez(tmp_path / "z.npz", x=np.zeros((2, 3, 2, 2), dtype=np.uint8), labels=np.array(["dark", "cat"]))
    said = refusal(capsys, classes, "--score", tmp_path / "z.npz")
    assert f"{tmp_path / 'z.npz'}:1 has the class 'cat'; known are dark, light" in said
    said = refusal(capsys, classes, "--data", "8gaussians", "--nbits", 8, "--condition", "none")
    assert "models events (3, 2, 2) of 16 levels with 2 classes, but 8gaussians has events (2,)" in said


def test_scores_that_cannot_be_written_are_known_before_the_work(tmp_path, monkeypatch, capsys, rows):
    def work(*args, **options):
        raise AssertionError("worked first")

    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.csv").mkdir()
    np.save(tmp_path / "x.npy", np.zeros((2, 3)))
    monkeypatch.setattr("cnf.cli.evaluate.score", work)
    monkeypatch.setattr("cnf.cli.evaluate.rank", work)
    for options in ((), ("--score", tmp_path / "x.npy")):
        for path, message in (
            (tmp_path / "file" / "s.csv", "its folder cannot be made"),
            (tmp_path / "folder.csv", "it is a folder"),
            (rows / "test_nll.npz", "holds the scores of the run's own test"),
        ):
            assert message in refusal(capsys, rows, "--per-item", path, *options)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "its folder cannot be written" in refusal(capsys, rows, "--per-item", tmp_path / "s.csv")
    assert "the evaluation is kept there" in refusal(capsys, rows)


def test_a_damaged_reference_is_named(tmp_path, capsys, rows):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((rows / name).read_bytes())
    np.save(tmp_path / "x.npy", np.zeros((2, 3)))
    out, _ = run(capsys, tmp_path, "--score", tmp_path / "x.npy")  # a run without a test, so far
    assert "of the reference" not in out and "in training" not in out
    (tmp_path / "test_nll.npz").write_bytes((rows / "test_nll.npz").read_bytes()[:-30])
    assert "test_nll.npz' cannot be read" in refusal(capsys, tmp_path, "--score", tmp_path / "x.npy")
    np.savez(tmp_path / "test_nll.npz", other=np.zeros(3))
    assert "holds no scores" in refusal(capsys, tmp_path, "--score", tmp_path / "x.npy")


# -- a pipe that nobody reads ------------------------------------------------------------------------------------


def test_a_closed_pipe_ends_quietly(capsys):
    said = "import sys\nfrom cnf.cli import train_main\nsys.exit(train_main(['--help']))"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:  # noticed when the buffer is emptied, which would be at the interpreter's exit
        found = subprocess.run([sys.executable, "-c", said], stdout=pipe, stderr=subprocess.PIPE, cwd=ROOT, env=env)
    assert found.stderr == b"" and found.returncode == 141

    def closed():
        raise BrokenPipeError(32, "Broken pipe")

    assert guard(closed) == 141 and capsys.readouterr().err == ""


def test_other_files_that_fail_still_say_so(capsys):
    def full():
        raise OSError(28, "No space left on device")

    assert guard(full) == 1 and "failed: [Errno 28] No space" in capsys.readouterr().err
    assert guard(lambda: 3) == 3


def test_evaluations_at_one_time_keep_a_file_each(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda i: _keep(tmp_path, {"i": i}), range(40)))
    assert sorted(p.name for p in paths) == sorted(f"evaluation-{n}.json" for n in range(1, 41))
    assert [json.loads(p.read_text())["i"] for p in paths] == list(range(40))
    (tmp_path / "gone").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnf.cli.evaluate.write_json", lambda path, result: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _keep(tmp_path / "gone", {})
    assert not any((tmp_path / "gone").iterdir())


def test_items_far_out_are_scored_and_those_that_cannot_be_solved_come_last(tmp_path, capsys, rows, monkeypatch):
    x = np.random.default_rng(1).normal(size=(12, 3)) * [1.0, 1e4, 3.0]
    path, plain, figures = tmp_path / "x.npy", tmp_path / "plain.npz", tmp_path / "far.npz"
    np.save(path, x)
    run(capsys, rows, "--score", path, "--per-item", plain)
    x[4, 1], x[9, 0] = 1e17, 1e25
    np.save(path, x)
    out, _ = run(capsys, rows, "--score", path, "--per-item", figures)
    assert ranked(out)[0][:2] == [f"{path}:9", f"{path}:4"]
    with np.load(plain) as before, np.load(figures) as after:
        others = ~np.isin(np.arange(12), [4, 9])
        assert np.allclose(before["log_prob"][others], after["log_prob"][others], atol=1e-3)
        assert -1e52 < after["log_prob"][9] < -1e48 and np.isfinite(after["log_prob"]).all()

    own = cnf.fields.precomputed.PrecomputedField.__call__
    monkeypatch.setattr(
        cnf.fields.precomputed.PrecomputedField, "__call__", lambda self, t, y, *more: own(self, t, y, *more) / (y.abs().amax(1, keepdim=True) < 1e3)
    )
    with pytest.warns(UserWarning, match=r"2 of 12 rows cannot be solved .*rows 4, 9"):
        out, _ = run(capsys, rows, "--score", path)
    assert re.findall(r"^  (\S+) +nan$", out, re.M) == [f"{path}:4", f"{path}:9"]
    assert f"without a likelihood, ranked last: {path}:4, {path}:9, whose ODE cannot be solved: block 1" in out
