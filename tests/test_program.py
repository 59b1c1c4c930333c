"""The program cnf: parsing and lists without torch, files of settings, comparison and sweeps."""

import csv
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import cnf
from cnf.cli import main, train_main
from cnf.cli.changes import EVALUATE, SCORE
from cnf.cli.sample_options import ENDINGS, METHODS
from cnf.cli.spelling import option
from cnf.config.results import COMPARABLE, read_result
from cnf.data import write
from cnf.solvers import TABLEAUS

TINY = ["--hidden", "4", "--steps", "2", "--warmup", "0", "--batch-size", "20", "--ema-decay", "0"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of two columns."""
    path = tmp_path_factory.mktemp("data") / "table.csv"
    np.savetxt(path, np.random.default_rng(0).normal(size=(80, 2)), delimiter=",", header="a,b", comments="")
    return path


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("cnf.training.report.pictures", lambda *args: None)


@pytest.fixture(scope="module")
def run(tmp_path_factory, table):
    """A finished run on the table."""
    folder = tmp_path_factory.mktemp("runs") / "table-0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnf.training.report.pictures", lambda *args: None)
        assert main(["train", "tabular", *TINY, "--data", str(table), "--out", str(folder)]) == 0
    return folder


# -- without torch -----------------------------------------------------------------------------------------------


LIGHT = [
    "--help", "--version", "list", "list --published", "train --help", "train digits --help-all", "train digits --lr 1e-3 --bogus", "evaluate --help",
    "rank --help", "sample --help", "sweep --help", "compare --help",
]  # fmt: skip


def test_parsing_and_lists_need_no_torch():
    """One after another in one process, which shows the first that imports anything heavy."""
    code = (
        "import sys, io, contextlib; from cnf.cli import main\n"
        "for words in sys.argv[1:]:\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()): code = main(words.split())\n"
        "    print(words, code, [m for m in ('torch', 'numpy', 'pandas', 'sklearn', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *LIGHT], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == [f"{words} {2 if '--bogus' in words else 0} []" for words in LIGHT], done.stderr


def test_import_is_lazy_and_complete():
    code = "import sys, cnf; assert 'torch' not in sys.modules; cnf.FlowConfig; assert 'torch' not in sys.modules; print(dir(cnf))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and all(f"'{name}'" in done.stdout for name in cnf.__all__), done.stderr
    with pytest.raises(AttributeError, match="has no attribute 'Floww'"):
        _ = cnf.Floww
    assert cnf.errors.CNFError  # modules too


def test_tables_that_stand_in_for_imports_agree():
    assert sorted(TABLEAUS) == list(METHODS) and write.ENDINGS == ENDINGS


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trian", "did you mean 'train'"),
        ("fm-digits", "did you mean cnf train fm-digits?"),
        ("bogus", "expected one of train, evaluate"),
        ("train --evaluate runs/x", "use cnf evaluate RUN"),
        ("train --list", "use cnf list"),
        ("list presets", "expected nothing, or --published"),
        ("rank runs/x", "then files or folders"),
        ("sweep digits", "needs --sweep NAME=VALUE"),
        ("sweep digits --sweep lr", "expected NAME=VALUE"),
        ("sweep digits --sweep lr=1,1", "has a value twice"),
        ("sweep digits --sweep lr=1e-3,fast", "could not convert string to float"),
        ("sweep digits --sweep lr=1e-3 lr=1e-4", "names lr twice"),
        ("sweep digits --sweep lr=1e-3,-1", "expected a positive number"),
        ("sweep digits --sweep lr=1e-3 --lr 1", "both in the grid and an option of all runs"),
        ("sweep digits --sweep lr=1e-3 --resume", "is not for a sweep"),
        ("compare nowhere", "is missing"),
    ],
)
def test_wrong_use(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    shown = capsys.readouterr()
    assert said in " ".join((shown.err + shown.out).split()) and not any(tmp_path.iterdir())


def test_help_is_short_and_has_examples(capsys):
    for words in (["train", "--help"], ["train", "digits", "--help"]):
        assert main(words) == 0
        said = capsys.readouterr().out
        options = [line for line in said.splitlines() if line.startswith("  --")]
        assert "examples:" in said and "--help-all" in said and 12 <= len(options) <= 18
    assert "270 270" in said
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"cnf {cnf.__version__}\n"


# -- files of settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_settings_from_a_file_and_options_over_them(tmp_path, table, form):
    settings = {"preset": "tabular", "data": {"data": str(table)}, "train": {"lr": 1e-2, "steps": 3}, "model": {"hidden": [5]}}
    path = tmp_path / f"settings.{form}"
    if form == "json":
        path.write_text(json.dumps(settings))
    else:
        pytest.importorskip("yaml")
        path.write_text(f"preset: tabular\ndata: {{data: {table}}}\ntrain:\n  lr: 1e-2\n  steps: 3\nmodel:\n  hidden: [5]\n")
    words = ["train", "--config", str(path), "--steps", "2", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    config = cnf.runs.read_config(tmp_path / "run").config
    assert (config.name, config.train.lr, config.train.steps, config.model.field.hidden) == ("tabular", 0.01, 2, (5,))
    again = ["train", "--config", str(tmp_path / "run" / "config.json"), "--out", str(tmp_path / "again")]
    assert main(again) == 0  # a run's own config.json
    assert cnf.runs.read_config(tmp_path / "again").config == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"train": {"lr": "fast"}}', "train: lr is 'fast'; expected float"),
        ('{"train": {"lrr": 1}}', "train: unknown field 'lrr'"),
        ('{"bogus": 1}', "unknown field 'bogus'"),
        ('{"train": 1}', "train is 1; expected an object"),
        ('{"train": {"lr": 1, "lr": 2}}', "field 'lr' is there twice"),
        ('{"train": {"lr": NaN}}', "expected a finite number"),
        ('{"train": {"lr": -1.0}}', "--lr -1.0: expected a positive number"),
        ('{"solver": {"rtol": 1e-3}}', "--rtol 0.001 is for --train-solver adaptive"),
        ('{"preset": "dgits"}', "did you mean 'digits'"),
        ("[1]", "expected an object of settings"),
        ("{", "cannot be read"),
    ],
)
def test_files_of_settings_that_cannot_be(tmp_path, capsys, text, said):
    path = tmp_path / "settings.json"
    path.write_text(text)
    assert main(["train", "--config", str(path), "--out", str(tmp_path / "run")]) == 2
    assert said in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "run").exists()


def test_yaml_is_as_strict(tmp_path, capsys):
    pytest.importorskip("yaml")
    path = tmp_path / "settings.yaml"
    for text, said in (("a: 1\na: 2", "field 'a' is there twice"), ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor")):
        path.write_text(text)
        assert main(["train", "--config", str(path)]) == 2
        assert said in capsys.readouterr().err


# -- results -----------------------------------------------------------------------------------------------------


def test_results_state_metric_value_and_unit(tmp_path, run):
    result = read_result(run / "result.json")
    assert result["metric"] == "nats" == result["unit"] and result["value"] == result["nats"]
    assert all(name in result for name in COMPARABLE)
    older = {k: v for k, v in result.items() if k not in ("metric", "value", "unit")}
    (tmp_path / "result.json").write_text(json.dumps(older))
    assert {k: v for k, v in read_result(tmp_path / "result.json").items()} == result


def test_compare_writes_every_format(tmp_path, capsys, run):
    assert main(["evaluate", str(run), "--split", "validation"]) == 0
    capsys.readouterr()
    runs = [str(run), str(run / "evaluation-1.json")]
    for form, mark in (("csv", "run,preset,data"), ("md", "|---|"), ("tex", r"\begin{tabular}{lr"), ("txt", "run ")):
        out = tmp_path / f"table.{form}"
        assert main(["compare", *runs, "--out", str(out)]) == 0
        said = capsys.readouterr().out
        assert mark in out.read_text() and "not comparable as they stand: split is test, validation" in said
    assert (tmp_path / "table.png").stat().st_size > 5000 and "also differ" not in said
    other = json.loads((run / "result.json").read_text())
    other["config"]["train"] |= {"lr": 0.5, "seed": 9}
    other["config"]["train"]["objective"]["kinetic"] = 0.25
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert main(["compare", str(run), str(tmp_path / "other.json")]) == 0
    assert re.search(r"also differ in: kinetic [\d.]+, 0.25; lr [\d.e-]+, 0.5$", capsys.readouterr().out, re.M)  # the seed has a column
    cnf.save(cnf.Flow(cnf.CNF(cnf.fields.MLP(2)), (2,)), tmp_path / "model")
    assert main(["compare", str(run), str(tmp_path / "model")]) == 2 and "a model without a figure: cnf.fit writes one for a flow" in capsys.readouterr().err
    assert main(["compare", *runs, "--out", str(tmp_path / "table.doc")]) == 2
    assert main(["compare", str(run), "--format", "markdown"]) == 0 and "|---|" in capsys.readouterr().out


def test_sweep_goes_on_after_a_failure_and_repeats_nothing(tmp_path, monkeypatch, capsys, table):
    out = tmp_path / "sweep"
    words = ["sweep", "tabular", "--sweep", "lr=1e-3,1e-2", "seed=0,1", *TINY, "--data", str(table), "--out", str(out)]

    def failing(arguments):
        return 1 if "1e-2" in arguments and "--seed 1" in " ".join(arguments) else train_main(arguments)

    with monkeypatch.context() as patch:
        patch.setattr("cnf.cli.program.train_main", failing)
        assert main(words) == 1
    assert "1 of 4 runs failed" in capsys.readouterr().err
    before = {p: p.stat().st_mtime_ns for p in out.rglob("result.json")}
    assert len(before) == 3
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.count("has finished already") == 3
    assert {p: p.stat().st_mtime_ns for p in before} == before
    with (out / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["lr"], r["seed"], r["status"]) for r in rows] == [(lr, s, "finished") for lr in ("1e-3", "1e-2") for s in "01"]
    assert all(float(r["value"]) == read_result(out / f"lr={r['lr']},seed={r['seed']}" / "result.json")["value"] for r in rows)
    assert main([*words, "--weight-decay", "0.1"]) == 1  # other settings than those of the runs there
    assert "--resume cannot change --weight-decay" in capsys.readouterr().err


def test_interrupted_sweep_stops(tmp_path, monkeypatch, capsys, table):
    monkeypatch.setattr("cnf.cli.program.train_main", lambda words: 130)
    assert main(["sweep", "tabular", "--sweep", "seed=0,1", "--data", str(table), "--out", str(tmp_path / "s")]) == 130
    assert "the same command continues it" in capsys.readouterr().out


def test_rank_and_sample_are_commands(tmp_path, capsys, run, table):
    assert main(["rank", str(run), str(table), "--per-item", str(tmp_path / "x.csv")]) == 0
    assert "least likely" in capsys.readouterr().out
    assert main(["sample", str(run), "-n", "3", "--out", str(tmp_path / "x.npz")]) == 0
    assert np.load(tmp_path / "x.npz")["samples"].shape == (3, 2)


def test_former_names_of_options_still_work(tmp_path, capsys, table):
    words = ["tabular", *TINY, "--data", str(table), "--limit", "40", "--watch-every=9", "--layer", "concat", "--out", str(tmp_path / "run")]
    assert train_main(words) == 0
    config = cnf.runs.read_config(tmp_path / "run").config
    assert (config.data.max_train_rows, config.train.solver_check_every, config.model.field.time_conditioning) == (40, 9, "concat")
    said = capsys.readouterr().err
    assert "--limit is now called --max-train-rows" in said and "--layer is now called --time-conditioning" in said
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"preset": "tabular", "data": {"max_train_rows": 30, "data": str(table)}, "train": {"solver_check_every": 7}}))
    assert main(["train", "--config", str(path), *TINY, "--out", str(tmp_path / "file")]) == 0
    config = cnf.runs.read_config(tmp_path / "file").config
    assert (config.data.max_train_rows, config.train.solver_check_every) == (30, 7)


def test_advice_on_memory_is_of_the_command(monkeypatch, capsys, run, table):
    def full(*args, **kwargs):
        raise MemoryError

    for name in ("sample.load", "evaluate.load", "train.load_splits"):
        monkeypatch.setattr(f"cnf.cli.{name}", full)
    for words, advice in ((["sample", str(run)], "fewer samples"), (["rank", str(run), str(table)], "--device cpu"), (["train", "digits"], "--accumulate 4")):
        assert main(words) == 1
        assert f"out of memory (MemoryError): try {advice}" in capsys.readouterr().err


def test_help_all_of_every_command_lists_what_the_command_accepts(capsys):
    for command in ("train", "evaluate", "rank", "sample", "compare", "sweep", "list"):
        assert main([command, "--help-all"]) == 0
        said = capsys.readouterr().out
        assert f"usage: cnf {command}" in said
        allowed = {"evaluate": EVALUATE, "rank": SCORE}.get(command, ())
        assert [name for name in allowed if option(name) not in said] == []
