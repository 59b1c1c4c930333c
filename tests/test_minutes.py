"""cnf train --minutes: from a table to a run folder with a density that is not worse than the best mixture."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

import cnf
from cnf.bases import ConditionalMixture
from cnf.cli import main
from cnf.config import ConditionalMixtureBaseConfig, MixtureBaseConfig
from cnf.runs import read_config


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Rows with a skewed, a discrete and a bent column."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=700)
    rows = np.stack([np.exp(a), rng.poisson(3, 700), a**2 + 0.1 * rng.normal(size=700)], 1)
    path = tmp_path_factory.mktemp("data") / "table.csv"
    np.savetxt(path, rows, delimiter=",", header="income,count,bend", comments="")
    return path


@pytest.mark.slow
def test_a_table_becomes_a_run(tmp_path, table, capsys):
    folder = tmp_path / "run"
    assert main(["train", "table", "--data", str(table), "--minutes", "0.04", "--hidden", "8", "8", "--out", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "mixture: " in said and "validation, nats per row" in said and "standard normal" in said
    info, result = read_config(folder), json.loads((folder / "result.json").read_text())
    assert isinstance(info.config.model.base, MixtureBaseConfig)
    parts = result["parts"]
    assert parts["flow"] <= parts["mixture"] < parts["standard normal"] and result["metric"] == "nats"
    flow = cnf.load(folder)
    rows = torch.from_numpy(np.loadtxt(table, delimiter=",", skiprows=1)).float()
    # a discrete column is dequantised: its density is that of the step's interval
    assert torch.isfinite(flow.log_prob(rows + torch.tensor([0.0, 0.5, 0.0]))).all()
    assert (folder / "plots" / "corner.png").is_file() and main(["sample", str(folder), "-n", "50", "--out", str(tmp_path / "s.csv")]) == 0
    assert main(["rank", str(folder), str(table)]) == 0
    steps = info.config.train.steps
    assert main(["train", "--resume", "--out", str(folder), "--steps", str(steps + 2)]) == 0  # trains on
    assert json.loads((folder / "result.json").read_text())["steps"] == steps + 2


def test_a_table_with_a_category_and_missing_cells(tmp_path, capsys):
    rng = np.random.default_rng(0)
    kind = rng.choice(["a", "b"], 500)
    x = np.where(kind == "a", -2.0, 2.0) + 0.5 * rng.normal(size=500)
    frame = pd.DataFrame({"id": np.arange(500), "kind": kind, "x": x, "y": np.exp(x + 0.1 * rng.normal(size=500))})
    frame.loc[[3, 7], "x"] = np.nan
    frame.loc[11, "kind"] = np.nan
    file, folder = tmp_path / "table.csv", tmp_path / "run"
    frame.to_csv(file, index=False)
    words = ["--data", str(file), "--missing", "drop", "--condition", "kind", "--minutes", "0.05", "--hidden", "8", "8"]
    assert main(["train", *words, "--out", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "calibrated" in said and "±" in said.split("validation, nats per row")[1]
    result, info = json.loads((folder / "result.json").read_text()), read_config(folder)
    assert isinstance(info.config.model.base, ConditionalMixtureBaseConfig) and result["parts"]["calibrated"] <= result["parts"]["linear"]
    assert result["gains"]["mixture"][0] == pytest.approx(result["parts"]["linear"] - result["parts"]["mixture"])
    assert (folder / "plots" / "calibration.png").is_file() and (folder / "plots" / "corner.png").is_file()
    # the run folder holds the density that was found
    flow, context = cnf.load(folder), torch.tensor([[1.0, 0.0]])
    draws = torch.cat([flow.sample(1, context)[0] for _ in range(5)])
    assert abs(draws[:, 0].mean() + 2) < 1
    assert main(["rank", str(folder), str(file)]) == 0
    said = capsys.readouterr().out
    assert "not ranked, 3 with missing values" in said and "497 items" in said
    assert main(["sample", str(folder), "-n", "20", "--given", "kind=b", "--out", str(tmp_path / "s.csv")]) == 0
    drawn = pd.read_csv(tmp_path / "s.csv")
    assert list(drawn.columns) == ["kind", "x", "y"] and set(drawn["kind"]) == {"b"} and abs(drawn["x"].mean() - 2) < 1
    assert main(["train", "--resume", "--out", str(folder), "--steps", str(info.config.train.steps + 2)]) == 0  # trains on


def test_a_conditional_mixture_as_base(tmp_path, table, capsys):
    words = ["tabular", "--data", str(table), "--base", "conditional-mixture", "--components", "2", "--base-hidden", "8", "--hidden", "8", "--steps", "3"]
    assert main(["train", *words, "--out", str(tmp_path / "none")]) == 2
    assert "give --condition" in capsys.readouterr().err
    assert main(["train", *words, "--condition", "count", "--out", str(tmp_path / "run")]) == 0
    base = cnf.load(tmp_path / "run").base
    assert isinstance(base, ConditionalMixture) and base.components == 2 and base.linear.weight.abs().sum() > 0  # fitted


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("table --lr 0.1", "--lr is chosen by --minutes 1"),
        ("table --minutes 0", "--minutes 0.0: expected a positive number"),
        ("digits --minutes 1", "--minutes is for tables and points"),
        ("node-flip --minutes 1", "--minutes is for densities"),
        ("table --field conv", "--field is chosen by --minutes"),
    ],
)
def test_what_the_search_chooses_is_refused(tmp_path, table, capsys, words, said):
    data = ["--data", str(table)] if words.startswith("table") else []
    assert main(["train", *words.split(), *data, "--out", str(tmp_path / "run")]) == 2
    assert said in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "run").exists()


def test_a_custom_field_is_trained_without_the_search(tmp_path, table, capsys):
    own = tmp_path / "own.py"
    own.write_text("import cnf\n\n\nclass Own(cnf.fields.MLP):\n    def __init__(self, dim, context_dim=0):\n        super().__init__(dim, (4,), context_dim=context_dim)\n")
    words = ["--data", str(table), "--field", f"{own}:Own", "--dry-run"]
    assert main(["train", *words]) == 0  # by the preset for tables that trains by steps
    assert "preset tabular, since" in capsys.readouterr().out
    assert main(["train", "table", *words]) == 2
    assert "--field is chosen by --minutes" in capsys.readouterr().err
