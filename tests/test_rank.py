"""cnf rank of a table: unseen cells, gaps, and the columns that make a row odd."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

import cnf
from cnf.cli import main
from cnf.cli.odd_rows import odd_rows
from cnf.data.items import read_items
from cnf.data.schema import TableColumn
from cnf.errors import DataError
from cnf.evaluation import evaluate, likeliest_values, rank
from cnf.solvers import Stats
from cnf.transforms import MarginalTransform, Sequential, Transform, TransformOutput

COVARIANCE = torch.tensor([[1.0, 1.8, 0.0], [1.8, 4.0, 0.2], [0.0, 0.2, 0.25]], dtype=torch.float64)
MEAN = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)


class Whiten(Transform):
    """The map of N(MEAN, COVARIANCE) to N(0, I)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("root", torch.linalg.cholesky(COVARIANCE))
        self.register_buffer("mean", MEAN.clone())

    def forward(self, x, request=None):
        z = torch.linalg.solve_triangular(self.root, (x - self.mean).T, upper=False).T
        return TransformOutput(z, -self.root.diagonal().log().sum().expand(len(x)), {}, Stats())

    def inverse(self, z, request=None):
        return TransformOutput(z @ self.root.T + self.mean, self.root.diagonal().log().sum().expand(len(z)), {}, Stats())


def normal_flow(first=None):
    """A flow with the density N(MEAN, COVARIANCE), of the latents of ``first`` if there is one."""
    return cnf.Flow(Whiten() if first is None else Sequential([first, Whiten()]), (3,)).double().eval()


def test_likeliest_values_are_the_conditional_means_of_a_normal_density():
    """The gain is half the squared standardised deviation from the conditional mean."""
    flow, precision = normal_flow(), torch.linalg.inv(COVARIANCE)
    x = MEAN + torch.tensor([[0.0, 0.0, 0.0], [0.0, 9.0, 0.0], [40.0, 0.0, 0.0], [1.0, 1.8, 0.0]], dtype=torch.float64)
    values, gains = likeliest_values(flow, x)
    for j in range(3):
        others = [k for k in range(3) if k != j]
        means = MEAN[j] - (x - MEAN)[:, others] @ precision[j, others] / precision[j, j]
        deviation = (x[:, j] - means) * precision[j, j].sqrt()
        near = (means - MEAN[j]).abs() < 2 * COVARIANCE[j, j].sqrt()  # a likeliest value that samples may have
        assert near.sum() >= 2 and (values[:, j] - means)[near].abs().max() * precision[j, j].sqrt() < 0.01
        torch.testing.assert_close(gains[near, j], deviation[near].square() / 2, rtol=1e-4, atol=1e-4)
        assert (gains[:, j] <= deviation.square() / 2 + 1e-6).all()
    assert (gains[0] < 0.01).all() and int(gains[1].argmax()) == 1 and int(gains[2].argmax()) == 0
    with pytest.raises(DataError, match="rows \\(N, D\\)"):
        likeliest_values(flow, torch.zeros(3))
    assert [part.shape for part in likeliest_values(flow, x[:0], torch.zeros(0, 1))] == [(0, 3)] * 2


def test_an_unseen_row_with_a_gap_is_described(tmp_path):
    """Columns of nullable integers have another missing value, NA."""
    new = pd.DataFrame({"a": ["3.0", "n/a?", "2.5"], "b": [-1.0, -1.0, 8.0], "c": pd.array([1, None, 0], dtype="Int64")})
    new.to_parquet(tmp_path / "new.parquet")
    table = tuple(TableColumn(name) for name in "abc")
    items, flow = read_items([tmp_path / "new.parquet"], (3,), table=table), normal_flow()
    found = odd_rows(flow, items, table, rank(flow, items.x, unseen=items.unseen, incomplete=items.incomplete))
    assert found[1].cells == {"a": "n/a?", "b": -1.0, "c": None} and found[0].cells == {"a": 3.0, "b": -1.0, "c": 1}
    assert {"b"} <= {each["column"] for each in found[2].odd} and not found[0].odd


def test_likeliest_values_of_lognormal_columns_are_found_in_their_logarithms():
    logs = MarginalTransform(3, kinds=("log",))
    rows = torch.distributions.MultivariateNormal(MEAN, COVARIANCE).sample((4000,)).exp()
    logs.fit(rows)
    flow = normal_flow(logs)
    z = torch.zeros(1, 3, dtype=torch.float64) + MEAN
    x = logs.inverse(z + torch.tensor([[0.0, 6.0, 0.0]])).value
    _, gains = likeliest_values(flow, x)
    precision = torch.linalg.inv(COVARIANCE)
    assert float(gains[0, 1]) == pytest.approx(18 * float(precision[1, 1]), rel=0.03) and int(gains[0].argmax()) == 1


def test_unseen_rows_come_first_and_rows_with_gaps_are_not_ranked():
    flow = normal_flow()
    x = MEAN + torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).double()
    whole = evaluate(flow, x)
    found = rank(flow, x, list("abcdefgh"), reference=whole.per_item, unseen={5: "city = 'Bern'", 2: "k = 'x'"}, incomplete={6: "no value of 'k'"})
    scored = [i for i in whole.per_item.argsort(descending=True).tolist() if i not in (2, 5, 6)]
    assert found.order.tolist() == [2, 5, *scored, 6] and found.below[:2].isnan().all() and bool(found.below[-1].isnan())
    assert torch.equal(found.evaluation.per_item[scored], whole.per_item[scored]) and found.evaluation.per_item[[2, 5]].isinf().all()
    text = found.text(4, notes={5: ["a note"]})
    lines = text.splitlines()
    assert lines[0].startswith("7 items") and lines[1].split(maxsplit=2) == ["c", "unseen", "k = 'x'"] and lines[3] == "      a note"
    assert "... and 3 more" in text and "not ranked, 1 with missing values: g (no value of 'k')" in text
    rows = found.rows()
    assert [row["reason"] for row in rows] == ["k = 'x'", "city = 'Bern'", None, None, None, None, None, "no value of 'k'"]
    with pytest.raises(DataError, match="no row can be ranked: no value of 'k'"):
        rank(flow, x[:1], incomplete={0: "no value of 'k'"})
    logs = MarginalTransform(2, kinds=("log",))
    logs.fit(torch.randn(200, 2).exp())
    found = rank(cnf.Flow(logs, (2,)), torch.tensor([[1.0, 1.0], [1.0, -2.0], [9.0, 1.0]]), columns=("a", "b"))
    assert found.unseen == {1: "b = -2, outside the support of its logarithm or logit, where the density is 0"}


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A run of rent given city and age: rent is near income, with one row of each kind to rank."""
    folder = tmp_path_factory.mktemp("people")
    generator = np.random.default_rng(0)
    n = 600
    age, income = generator.integers(18, 80, n), generator.normal(30.0, 5.0, n)
    table = pd.DataFrame({"city": generator.choice(["Lima", "Rome"], n), "age": age + 0.5, "income": income, "rent": income / 3 + generator.normal(0, 0.2, n)})
    table.to_csv(folder / "people.csv", index=False)
    words = ["train", "--data", str(folder / "people.csv"), "--condition", "city,age", "--minutes", "0.03", "--hidden", "8", "--out", str(folder / "run")]
    assert main(words) == 0
    return folder


def test_rank_names_the_cells_and_columns_of_odd_rows(people, tmp_path, capsys):
    new = pd.read_csv(people / "people.csv").head(40).astype(object)
    for row, column, value in ((3, "city", "Bern"), (7, "income", "n/a?"), (9, "rent", None), (13, "age", 150.5), (21, "rent", 16.0)):
        new.loc[row, column] = value
    new.to_csv(tmp_path / "new.csv", index=False)
    capsys.readouterr()
    assert main(["rank", str(people / "run"), str(tmp_path / "new.csv"), "--per-item", str(tmp_path / "s.csv"), "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    result = next(event for event in events if event["event"] == "result")
    items = {row["index"]: row for row in result["items"]}
    assert [row["index"] for row in result["items"]][:3] == [3, 7, 21] and result["items"][-1]["index"] == 9
    assert items[3]["reason"] == "city = 'Bern', which is no category of training" and items[3]["cells"]["city"] == "Bern" and items[3]["score"] is None
    assert items[7]["reason"] == "income = 'n/a?', which is no number" and items[9]["reason"] == "no value of 'rent'"
    odd = {each["column"]: each for each in items[21]["odd"]}
    assert odd["rent"]["cell"] == 16.0 and odd["rent"]["likeliest"] == pytest.approx(items[21]["cells"]["income"] / 3, abs=0.5) and odd["rent"]["nats"] > 50
    seen = pd.read_csv(people / "people.csv")["rent"]
    assert items[21]["outside"] == ({} if seen.max() > 16 else {"rent": f"{seen.min():.6g} to {seen.max():.6g}"})
    text = result["text"]
    assert "unseen   city = 'Bern'" in text and "not ranked, 1 with missing values" in text and "odd given the others: " in text
    limits = pd.read_csv(people / "people.csv")["age"]
    assert f"(1 items have the condition age outside {limits.min():g} to {limits.max():g}, the range of training" in text and f"{tmp_path / 'new.csv'}:13)" in text
    scores = pd.read_csv(tmp_path / "s.csv")["nats"].to_numpy()
    assert np.isposinf(scores[[3, 7]]).all() and math.isnan(scores[9]) and np.isfinite(np.delete(scores, [3, 7, 9])).all()
    plain = pd.read_csv(people / "people.csv").head(40)
    plain.to_csv(tmp_path / "plain.csv", index=False)
    assert main(["rank", str(people / "run"), str(tmp_path / "plain.csv"), "--per-item", str(tmp_path / "p.csv")]) == 0
    same = [i for i in range(40) if i not in (3, 7, 9, 13, 21)]  # a row's score does not depend on its neighbours
    np.testing.assert_allclose(pd.read_csv(tmp_path / "p.csv")["nats"].to_numpy()[same], scores[same], atol=1e-3)


@pytest.mark.slow
def test_a_run_without_the_range_of_its_columns_ranks_and_resumes(people, tmp_path, capsys):
    """As older run folders are."""
    from shutil import copytree

    from cnf.runs.config import config_digest

    run = tmp_path / "run"
    copytree(people / "run", run)
    raw = json.loads((run / "config.json").read_text())
    for column in raw["table"]:
        del column["extent"], column["last"]
    raw["sha256"] = config_digest(raw)
    (run / "config.json").write_text(json.dumps(raw))
    new = pd.read_csv(people / "people.csv").head(5)
    new.loc[2, "age"] = 150.5
    new.to_csv(tmp_path / "new.csv", index=False)
    assert main(["rank", str(run), str(tmp_path / "new.csv")]) == 0
    assert "the range of training" not in capsys.readouterr().out
    steps = raw["config"]["train"]["steps"]
    assert main(["train", "--resume", "--out", str(run), "--steps", str(steps + 2)]) == 0
    assert all(column["extent"] for column in json.loads((run / "config.json").read_text())["table"] if column["name"] == "rent")
