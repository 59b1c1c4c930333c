"""The user's tables: read in any dialect, columns understood, conditions, dependence, and samples in the table's own types."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import re
import zipfile
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cnf
from cnf import data as datasets
from cnf.cli import sample_main, train_main
from cnf.config import FlowConfig, SolverConfig
from cnf.config.decoding import decode
from cnf.data import load
from cnf.data.cells import typed
from cnf.data.dependence import dependent_columns
from cnf.data.frames import read_frame
from cnf.data.schema import TableColumn, parse_given
from cnf.data.text import read_csv
from cnf.data.write import as_numbers_of, sampled_frame
from cnf.errors import CheckpointError, ConfigError, DataError
from cnf.evaluation import evaluate
from cnf.models import build
from cnf.runs import RunInfo, read_config, write_config, write_weights
from cnf.solvers import FixedGrid

SETTINGS = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}  # fmt: skip
RNG = np.random.default_rng(0)
X = np.random.default_rng(1).normal(size=(40, 2))


@pytest.fixture(scope="module", autouse=True)
def no_pictures() -> Iterator[None]:
    """Pictures take most of a short training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnf.training.report.pictures", lambda *args: None)
        yield


def frame(n: int = 200, seed: int = 0) -> pd.DataFrame:
    """Columns of every kind."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    return pd.DataFrame(
        {
            "id": [f"p{i:04}" for i in range(n)],
            "y": 2 * x + rng.normal(size=n),
            "k": rng.integers(0, 4, n),
            "x": x,
            "z": rng.choice(["low", "mid", "high"], n),
            "day": np.datetime64("2020-01-01") + rng.integers(0, 50, n),
            "half": rng.integers(0, 5, n) / 2,
            "on": rng.random(n) < 0.3,
        }
    )


def everything(data: datasets.DataSplits) -> np.ndarray:
    return np.concatenate([data.train, data.validation, data.test])


def kinds(data: datasets.DataSplits) -> dict[str, tuple[str, str, str]]:
    return {c.name: (c.role, c.kind, c.type) for c in data.table}


# --- reading --------------------------------------------------------------------------------------------------------------

ROWS = [[0.5, 1000.25], [-1.5, 2.0], [3.25, -0.125]]
DIALECTS = {
    "comma": ("a,b\n0.5,1000.25\n-1.5,2.0\n3.25,-0.125\n", "utf-8"),
    "quotes around everything": ('"a","b"\r\n"0.5","1000.25"\r\n"-1.5","2.0"\r\n"3.25","-0.125"\r\n', "utf-8"),
    "a separator and a line end inside quotes": ('"a, or\nso";"b; c"\n0.5;1000.25\n-1.5;2\n3.25;-0.125', "utf-8"),
    "single quotes": ("'a';'b'\n0.5;1000.25\n-1.5;2\n3.25;-0.125", "utf-8"),
    "Excel's first line": ("sep=;\na;b\n0,5;1000,25\n-1,5;2\n3,25;-0,125\n", "utf-8-sig"),
    "Excel's first line, quoted": ('"sep=|"\r\na|b\r\n0.5|1000.25\r\n-1.5|2\r\n3.25|-0.125\r\n', "utf-8"),
    "decimal comma in quotes": ('a,b\n"0,5","1000,25"\n"-1,5",2\n"3,25","-0,125"\n', "utf-8"),
    "decimal comma and tab": ("a\tb\n0,5\t1000,25\n-1,5\t2,0\n3,25\t-0,125", "utf-8"),
    "no header, decimal comma": ("0,5;1000,25\n-1,5;2,0\n3,25;-0,125", "utf-8"),
    "no header": ("0.5\t1000.25\n-1.5\t2\n3.25\t-0.125", "utf-8"),
    "bar": ("a|b\n0.5|1000.25\n-1.5|2.0\n3.25|-0.125\n", "utf-8"),
    "spaces": ("  0.5   1000.25\n -1.5  2\n  3.25 -0.125\n", "utf-8"),
    "spaces after the comma": ("a, b\n0.5, 1000.25\n-1.5, 2.0\n3.25, -0.125\n", "utf-8"),
    "comments": ("# written by hand\n#\na,b\n0.5,1000.25\n# a remark\n-1.5,2.0\n\n3.25,-0.125\n", "utf-8"),
    "NumPy's header": ("# a,b\n0.5,1000.25\n-1.5,2.0\n3.25,-0.125\n", "utf-8"),
    "byte order mark": ("a,b\n0.5,1000.25\n-1.5,2.0\n3.25,-0.125\n", "utf-8-sig"),
    "UTF-16": ("größe,b\n0.5,1000.25\n-1.5,2.0\n3.25,-0.125\n", "utf-16"),
    "UTF-16 without a mark": ("größe,b\n0.5,1000.25\n-1.5,2.0\n3.25,-0.125\n", "utf-16-le"),
    "latin-1": ("größe;b\n0,5;1000,25\n-1,5;2,0\n3,25;-0,125\n", "latin-1"),
    "old Macintosh": ("a,b\r0.5,1000.25\r-1.5,2.0\r3.25,-0.125\r", "utf-8"),
}


@pytest.mark.parametrize(("text", "encoding"), DIALECTS.values(), ids=list(DIALECTS))
@pytest.mark.parametrize("packed", [False, True])
def test_a_csv_of_any_dialect_is_the_same_numbers(tmp_path: Path, text: str, encoding: str, packed: bool) -> None:
    path = tmp_path / ("x.csv.gz" if packed else "x.csv")
    raw = text.encode(encoding)
    path.write_bytes(gzip.compress(raw) if packed else raw)
    table, columns = read_csv(path)
    assert table.tolist() == ROWS and len(columns) == 2
    if "größe" in text:
        assert columns == ("größe", "b")
    if "a, or" in text:
        assert columns == ("a, or\nso", "b; c")
    if "NumPy" in text or text.startswith(("# a,b", "'a'")):
        assert columns == ("a", "b")


@pytest.mark.parametrize("header", ['"mass; kg","height"', '"mass\tkg",height', "sep=;\nmass;height"])
def test_separators_in_the_header_of_case_9(tmp_path: Path, header: str) -> None:
    rows = "\n".join(f"{i + 0.25},{i * 2 + 0.5}" for i in range(20))
    (tmp_path / "x.csv").write_text(f"{header}\n{rows.replace(',', ';') if 'sep' in header else rows}\n")
    assert read_csv(tmp_path / "x.csv")[0].tolist() == [[i + 0.25, i * 2 + 0.5] for i in range(20)]


AMBIGUOUS = [
    ("a;b\n5,125;0.5\n4,250;0.25\n", "row 2, column 'a'.*'5,125', whose comma may be"),  # beside decimal points
    ("a;b\n5.125;0,5\n4.250;0,25\n", "has decimal commas, but column 'a' holds '5.125', whose point may be"),
    ("a;b\n1.007.808,72;1\n113.397,62;2\n", "row 2, column 'a'.*'1.007.808,72'; expected numbers without separators of thousands"),
    ("a;b\n51 257;1\n4 250;2\n", "row 2, column 'a'.*'51 257'; expected numbers without separators"),
    ('a,b\n"1,000.25",1\n"2,000.50",2\n', "row 2, column 'a'.*'1,000.25'; expected numbers without separators"),
    ("0,1\n" + "0.5,1.5\n0.25,2.5\n" * 3, "the first row of .* is 0, 1: it may be a header or data"),  # pandas, without an index
    ("2019;2020;2021\n" + "0.5;1.5;7\n0.25;2.5;8\n" * 3, "the first row of .* is 2019, 2020, 2021: it may be"),
    ("a,b\n1;2\n2;3\n", "row 2 .*has 2 cells; expected 1"),
    ("day,b\n01.02.2024,1\n02.02.2024,3\n31.02.2024,2\n", "row 4, column 'day'.* is '31.02.2024'; expected dates in one format, such as '01.02.2024'"),
    ("day,b\n2024-01-02,1\nunknown,3\n2024-01-03,2\n2024-01-04,2\n", "row 3, column 'day'.* is 'unknown'; expected a date"),
    ("a;b\n1,5;2\n2.5;3\n", "row 2, column 'a'.*'1,5', and other cells have a decimal point"),
    ('a,b\n"1,234",2\n"5,678",3\n', "row 2, column 'a'.*'1,234', whose comma may be"),
    ('a,b\n"1,234.5",2\n7,3\n8,3\n', "row 2, column 'a'.*separators of thousands"),
    ('a,b\n1,"2\n3,4\n', "unexpected end of data"),
    ("a,b\n1,2,3,4\n", "row 2 .*has 4 cells; expected 2"),
    ("a,b\n1,2,\n", "row 2 .*has 3 cells; expected 2"),
    ("a,b\n1,2\n1,2,3\n", "row 3 .*has 3 cells; expected 2"),
    ("day,b\n03/04/2020,1\n04/05/2020,2\n", "day and month are ambiguous"),
]


@pytest.mark.parametrize(("text", "message"), AMBIGUOUS)
def test_what_can_be_read_in_two_ways_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        datasets.load(tmp_path / "x.csv")


@given(
    table=st.lists(st.tuples(st.floats(allow_nan=False, allow_infinity=False, width=32), st.integers(-999, 999)), min_size=2, max_size=8),
    cut=st.sampled_from([",", ";", "\t", "|"]),
    comma=st.booleans(),
    quoted=st.booleans(),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252"]),
)
@settings(max_examples=60, **SETTINGS)
def test_numbers_survive_every_dialect(tmp_path: Path, table: list[tuple[float, int]], cut: str, comma: bool, quoted: bool, encoding: str) -> None:
    lines = [[repr(a), str(b), "é"] for a, b in table]
    if comma:
        lines = [[a.replace(".", ","), b, c] for a, b, c in lines]
    quote = quoted or (comma and cut == ",")
    text = "\n".join(cut.join(f'"{v}"' if quote else v for v in line) for line in [["a", "b", "c"], *lines])
    (tmp_path / "x.csv").write_text(text, encoding=encoding)
    found = read_frame(tmp_path / "x.csv")[0]
    assert list(found.columns) == ["a", "b", "c"] and set(found["c"]) == {"é"}
    try:
        values = [typed(found[c], "x")[0].tolist() for c in "ab"]
    except DataError as error:  # commas that may be those of thousands
        assert comma and "part thousands" in str(error)
        return
    assert values == [[a for a, _ in table], [b for _, b in table]]


def test_parquet_excel_and_tsv_hold_the_same_table(tmp_path: Path) -> None:
    table = frame()
    table.to_csv(tmp_path / "t.tsv", sep="\t", index=False)
    table.to_parquet(tmp_path / "t.parquet")
    table.to_excel(tmp_path / "t.xlsx", index=False)
    found = [datasets.load(tmp_path / f"t.{ending}", condition="z") for ending in ("tsv", "parquet", "xlsx")]
    for data in found:
        assert data.columns == ("y", "k", "x", "day", "half", "on")
        assert kinds(data) == kinds(found[0]) and torch.equal(data.train_context, found[0].train_context)
        assert np.allclose(everything(data), everything(found[0]), atol=1e-5)
    assert kinds(found[0])["id"] == ("left out", "identifier", "text") and kinds(found[0])["z"] == ("condition", "categorical", "text")
    # pandas stores an index of its own as a column without a name
    table.set_index(np.arange(7, 207)).drop(columns=["id", "z"]).to_parquet(tmp_path / "i.parquet", index=True)
    assert datasets.load(tmp_path / "i.parquet").columns == ("y", "k", "x", "day", "half", "on")


def test_a_reader_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = __import__("importlib").import_module

    def without(name: str, *args: Any) -> Any:
        if name.startswith(("pyarrow", "openpyxl")):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr("importlib.import_module", without)
    for ending, package in (("parquet", "pyarrow"), ("xlsx", "openpyxl")):
        (tmp_path / f"x.{ending}").write_bytes(b"PK\3\4")
        with pytest.raises(DataError, match=f"needs the package {package}: pip install {package}, or save the table as csv"):
            datasets.load(tmp_path / f"x.{ending}")


def test_tables_that_unpack_to_too_much_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("text.BOMB_BYTES", "frames.BOMB_BYTES", "frames.MANY_CELLS"):
        monkeypatch.setattr(f"cnf.data.{name}", 2**18)
    with gzip.open(tmp_path / "x.csv.gz", "wb") as file:
        file.write((b"1," * 999 + b"1\n") * 2**9)
    with pytest.raises(DataError, match="times its size: a bomb"):
        datasets.load(tmp_path / "x.csv.gz")
    import pyarrow as pa
    import pyarrow.parquet as pq

    zeros = pa.array(np.zeros(2**17))
    pq.write_table(pa.table({f"a{i}": zeros for i in range(40)}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="claims 131,072 rows of 40 columns"):
        datasets.load(tmp_path / "x.parquet")
    pd.DataFrame({"a": [1.0], "b": [2.0]}).to_excel(tmp_path / "far.xlsx", index=False)
    with zipfile.ZipFile(tmp_path / "far.xlsx") as whole, zipfile.ZipFile(tmp_path / "x.xlsx", "w") as out:
        for member in whole.namelist():
            content = whole.read(member)
            if member.endswith("sheet1.xml"):
                content = content.replace(b"<sheetData>", b"<sheetData>").replace(b'r="2"', b'r="1048576"').replace(b"A2", b"A1048576").replace(b"B2", b"XFD1048576")
                content = re.sub(rb'<dimension ref="[^"]*"', b'<dimension ref="A1:XFD1048576"', content)
            out.writestr(member, content)
    with pytest.raises(DataError, match="claims more than"):
        datasets.load(tmp_path / "x.xlsx")


# --- columns --------------------------------------------------------------------------------------------------------------


def test_columns_are_understood_and_reported_in_one_table(tmp_path: Path) -> None:
    table = frame()
    table.insert(0, "nr", np.arange(1, 201))
    table["tail"] = np.random.default_rng(3).standard_t(1.5, 200)
    table["wait"] = np.random.default_rng(4).exponential(size=200)
    table["at"] = pd.Timestamp("2021-05-01 06:00") + pd.to_timedelta(np.random.default_rng(5).uniform(0, 9e5, 200), unit="s").round("s")
    table.to_csv(tmp_path / "t.csv")
    data = datasets.load(tmp_path / "t.csv", condition="x,z")
    assert data.columns == ("y", "k", "day", "half", "on", "tail", "wait", "at")
    found = kinds(data)
    assert found["Unnamed: 0"][:2] == found["nr"][:2] == found["id"][:2] == ("left out", "identifier")
    assert found["k"] == ("data", "discrete", "int") and found["half"] == ("data", "discrete", "float") and found["on"] == ("data", "discrete", "bool")
    assert found["day"] == ("data", "date", "date") and found["at"] == ("data", "date", "datetime")
    assert found["x"] == ("condition", "continuous", "float")
    steps = {c.name: (c.step, c.dequantised) for c in data.table}
    assert steps["half"] == (0.5, True) and steps["k"] == steps["day"] == steps["on"] == (1.0, True) and steps["at"] == (0.0, False)
    for word in ("nr", "k", "day"):
        assert any(f"{word!r}" in line for line in data.notices), word
    assert any("days since 2020-01-01" in line for line in data.notices)
    report = {line.split()[0]: line for line in data.report.splitlines()}
    assert "heavy-tailed" in report["tail"] and "bounded at" in report["wait"] and "given, standardised" in report["x"]
    assert "3 categories: high, low, mid" in report["z"] and "2020-01-01 to 2020-02-19" in report["day"] and "0 to 2, step 0.5" in report["half"]
    assert "heavy" not in report["y"] and "bounded" not in report["y"]
    # days since the first, each spread over itself
    values = np.sort(everything(data)[:, 2] // 1)
    days = np.sort((table["day"].to_numpy() - np.datetime64("2020-01-01")) / np.timedelta64(1, "D"))
    assert np.array_equal(values, days)
    # conditions by the training rows
    context = data.train_context.numpy()
    assert context.shape[1] == 4 and np.allclose(context[:, 0].mean(), 0, atol=1e-5) and np.allclose(context[:, 0].std(), 1, atol=1e-5)
    assert (context[:, 1:].sum(1) == 1).all()


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    table = frame().drop(columns="day")
    table["a, b"] = np.arange(200)[::-1]
    table.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match=r"text in column 'z' \('high', 'low', 'mid'\).*--condition z.*--drop-columns z"):
        datasets.load(tmp_path / "t.csv")
    assert datasets.load(tmp_path / "t.csv", drop_columns="z, on").columns == ("y", "k", "x", "half")
    assert datasets.load(tmp_path / "t.csv", columns=["x", "y"]).columns == ("y", "x")
    assert datasets.load(tmp_path / "t.csv", columns='x,"a, b"').columns == ("x", "a, b")  # kept, since it was asked for
    assert datasets.load(tmp_path / "t.csv", columns="y", condition="z,x").columns == ("y",)
    for options, kind, message in (
        ({"columns": "x,q"}, DataError, "no column 'q'"),
        ({"drop_columns": "halff"}, DataError, "did you mean 'half'"),
        ({"condition": "w"}, DataError, "no column 'w'"),
        ({"columns": "x", "drop_columns": "x"}, ConfigError, "names 'x', which columns asks for"),
        ({"columns": "x,x"}, ConfigError, "columns must name each column once, got 'x' twice"),
        ({"columns": ""}, ConfigError, "empty name"),
        ({"columns": "x", "condition": "x"}, DataError, "no column to model"),
        ({"missing": "fill"}, ConfigError, "missing must be one of 'error', 'drop', got 'fill'"),
    ):
        with pytest.raises(kind, match=message):
            datasets.load(tmp_path / "t.csv", **options)
    for options in ({"columns": "x"}, {"dependent": "keep"}):
        with pytest.raises(ConfigError, match="does not apply to 'digits'"):
            datasets.load("digits", **options)


@pytest.mark.parametrize("pattern", ["%Y-%m-%d", "%d.%m.%Y", "%Y/%m/%d", "%Y-%m-%dT%H:%M:%S", "%d/%m/%Y %H:%M"])
@pytest.mark.parametrize("first", ["1512-03-04", "1999-12-20", "2600-01-01"])
def test_dates_of_any_century_and_format(tmp_path: Path, pattern: str, first: str) -> None:
    days = np.random.default_rng(0).permutation(90)[:40]
    text = [(date.fromisoformat(first) + timedelta(days=int(d))).strftime(pattern) for d in days]
    pd.DataFrame({"a": X[:, 0], "day": text}).to_csv(tmp_path / "t.csv", index=False)
    data = datasets.load(tmp_path / "t.csv")
    assert kinds(data)["day"][1:] == ("date", "date")
    assert np.array_equal(np.sort(np.floor(everything(data)[:, 1])), np.sort(days - days.min()))
    back = sampled_frame(everything(data), data.table, {})["day"]
    assert sorted(back.dt.strftime(pattern)) == sorted(text)


@pytest.mark.parametrize("form", ["${:,.2f}", "{:.2f} kg", "{:.1f}%", "{:.0f}:30:00", "{:.2f} # a remark"])
def test_quantities_with_units_are_no_identifiers(tmp_path: Path, form: str) -> None:
    text = [form.format(v) for v in 1000 + 100.25 * np.arange(40)]
    pd.DataFrame({"a": X[:, 0], "b": X[:, 1], "q": text}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match=r"text in column 'q'.*as numbers without units"):
        datasets.load(tmp_path / "t.csv")


def test_a_folder_of_tables_brings_its_split(tmp_path: Path) -> None:
    table = pd.DataFrame(X, columns=["a", "b"])
    table[:30].to_csv(tmp_path / "train.csv")
    table[30:][["b", "a"]].to_csv(tmp_path / "test.csv")
    data = datasets.load(tmp_path)
    assert data.columns == ("a", "b") and np.array_equal(data.test, X[30:].astype(np.float32))
    table[30:].rename(columns={"a": "c"}).to_csv(tmp_path / "test.csv")
    with pytest.raises(DataError, match="differ in their columns"):
        datasets.load(tmp_path)


def test_an_index_that_pandas_wrote_is_left_out_of_case_7(tmp_path: Path) -> None:
    pd.DataFrame(X, columns=["a", "b"]).to_csv(tmp_path / "t.csv")
    data = datasets.load(tmp_path / "t.csv")
    assert data.columns == ("a", "b") and any("row number" in line for line in data.notices)
    shuffled = np.column_stack([np.random.default_rng(0).permutation(40), X])
    np.save(tmp_path / "t.npy", shuffled)
    assert datasets.load(tmp_path / "t.npy").columns == ("column 1", "column 2")
    repeated = np.column_stack([np.arange(40) // 2, X])
    np.save(tmp_path / "t.npy", repeated)
    assert len(datasets.load(tmp_path / "t.npy").columns) == 3
    rows = "\n".join(f"r{i} {u!r} {v!r}" for i, (u, v) in enumerate(X.tolist()))
    (tmp_path / "r.csv").write_text(f"a,b\n{rows}\n".replace(" ", ","))  # as R writes row names
    assert datasets.load(tmp_path / "r.csv").columns == ("a", "b")


def test_later_rows_with_missing_values_are_dropped_as_in_training(tmp_path: Path) -> None:
    table = frame(60)
    table.to_csv(tmp_path / "t.csv", index=False)
    schema = datasets.load(tmp_path / "t.csv", condition="z", missing="drop").table
    table.loc[[1, 2], "z"] = None
    table.loc[[2, 5], "day"] = pd.NaT
    table.to_csv(tmp_path / "n.csv", index=False)
    data = datasets.load(tmp_path / "n.csv", missing="drop", table=schema)
    assert len(everything(data)) == 57 and any("3 of 60 rows dropped" in line for line in data.notices)
    with pytest.raises(DataError, match=r"has 4 values that are NaN or infinite, the first in row 1, column 6 \('z'\)"):
        datasets.load(tmp_path / "n.csv", table=schema)


def test_missing_values_are_counted_and_dropped_where_asked(tmp_path: Path) -> None:
    table = frame(60)[["y", "k", "x"]].astype({"k": "Int64"})
    table.loc[[3, 9], "y"] = np.nan
    table.loc[9, "k"] = pd.NA
    table.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match=r"3 values that are NaN.*first in line 5.*'y' 2, 'k' 1.*--missing drop"):
        datasets.load(tmp_path / "t.csv")
    table.assign(word=["low", "high", "mid"] * 20).to_csv(tmp_path / "w.csv", index=False)
    with pytest.raises(DataError, match=r"--missing drop.*text.*--condition word"):  # both at once
        datasets.load(tmp_path / "w.csv")
    data = datasets.load(tmp_path / "t.csv", missing="drop")
    assert len(everything(data)) == 58 and any("2 of 60 rows dropped" in line and "'y' 2, 'k' 1" in line for line in data.notices)
    assert kinds(data)["k"] == ("data", "discrete", "int")
    (tmp_path / "q.csv").write_text("a,b\n" + "\n".join(f"{a!r},{'?' if i == 4 else repr(b)}" for i, (a, b) in enumerate(X.tolist())))
    with pytest.raises(DataError, match="line 6"):
        datasets.load(tmp_path / "q.csv")
    np.save(tmp_path / "inf.npy", np.where(np.arange(80).reshape(40, 2) == 7, np.inf, X))
    with pytest.raises(DataError, match="NaN or infinite"):
        datasets.load(tmp_path / "inf.npy", missing="drop")


# --- dependence -----------------------------------------------------------------------------------------------------------


def shares(n: int) -> np.ndarray:
    return np.random.default_rng(0).dirichlet([2, 3, 4, 1], n)


@pytest.mark.parametrize(
    ("table", "involved"),
    [
        (lambda x: np.c_[x, x[:, 0]], {0, 3}),
        (lambda x: np.c_[x, 32 + 1.8 * x[:, 1]], {1, 3}),
        (lambda x: np.c_[x, x[:, 0] + x[:, 1] + x[:, 2]], {0, 1, 2, 3}),
        (lambda x: np.c_[x, x[:, 0] - 3 * x[:, 2]].round(2), {0, 2, 3}),
        (lambda x: np.c_[x, shares(len(x)).round(4)], {3, 4, 5, 6}),
        (lambda x: np.c_[x, (100 * shares(len(x))).round(0)], {3, 4, 5, 6}),
        (lambda x: np.c_[x, x[:, 0]].astype(np.float32).astype(float), {0, 3}),
        (lambda x: np.c_[np.exp(3 * x[:, 0]), x[:, 1], np.exp(3 * x[:, 0]) + x[:, 1]], {0, 1, 2}),
        (lambda x: np.c_[np.rint(9 * x), np.rint(9 * x[:, :2]).sum(1)], {0, 1, 3}),
    ],
)
@pytest.mark.parametrize("n", [100, 1000])
def test_dependent_columns_are_found(table: Any, involved: set[int], n: int) -> None:
    x = table(np.random.default_rng(n).normal(size=(n, 3)))
    found = dependent_columns(x, [str(j) for j in range(x.shape[1])])
    assert len(found) == 1 and {int(name) for name in found[0][0]} == involved


@pytest.mark.parametrize("digits", [1, 2, 3, 16])
@pytest.mark.parametrize("n", [60, 1000])
def test_high_correlation_with_noise_is_no_dependence(digits: int, n: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 2))
    y = x[:, 0] + math.sqrt(1 / 0.999**2 - 1) * rng.normal(size=n)
    names = list("abcd")
    assert dependent_columns(np.c_[x, y].round(digits), names) == []
    likert = np.clip(np.rint(3 + np.c_[x[:, 0], x[:, 0] + 0.3 * x[:, 1]]), 1, 5)
    assert dependent_columns(likert, names) == []
    counts = rng.poisson(3.0, (n, 2))
    assert dependent_columns(np.c_[counts, counts.sum(1) + rng.integers(0, 2, n)].astype(float), names) == []


def test_dependent_columns_are_refused_or_kept(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(200, 2))
    pd.DataFrame({"net": x[:, 0], "tax": x[:, 1], "gross": x.sum(1)}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match=r"'net', 'tax', 'gross' \(gross = net \+ tax\).*--drop-columns.*--dependent keep"):
        datasets.load(tmp_path / "t.csv")
    kept = datasets.load(tmp_path / "t.csv", dependent="keep")
    assert kept.event_shape == (3,) and any("gross = net + tax" in line for line in kept.notices)
    assert datasets.load(tmp_path / "t.csv", drop_columns="gross").event_shape == (2,)
    # a condition that settles a column is no better
    with pytest.raises(DataError, match="depend on each other"):
        datasets.load(tmp_path / "t.csv", condition="net,tax")
    assert datasets.load(tmp_path / "t.csv", condition="net", columns="gross").context_dim == 1


# --- samples, scores, conditions ------------------------------------------------------------------------------------------


@given(step=st.sampled_from([1.0, 0.5, 0.1, 7.0, 1e-3]), origin=st.sampled_from([0.0, 0.25, -3.0]), k=st.integers(-999, 999), u=st.floats(0.01, 0.98))
@settings(max_examples=100, **SETTINGS)
def test_dequantised_values_fall_back_to_their_lattice(step: float, origin: float, k: int, u: float) -> None:
    column = TableColumn("k", kind="discrete", step=step, origin=origin, dequantised=True)
    assert as_numbers_of(np.array([[origin + step * (k + u)]]), [column])[0, 0] == pytest.approx(origin + step * k, abs=1e-9 * step)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "t.csv"
    frame().to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, table: Path) -> Path:
    """A conditional run on columns of every kind."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = ["tabular", "--hidden", "4", "--blocks", "1", "--steps", "2", "--warmup", "1", "--condition", "x,z"]
    assert train_main([*words, "--data", str(table), "--out", str(folder)]) == 0
    return folder


def test_what_training_knew_of_the_columns_is_kept(run: Path, table: Path) -> None:
    info = read_config(run)
    assert info.table == datasets.load(table, condition="x,z").table and info.context_dim == 4 and info.classes == ()
    raw = json.loads((run / "config.json").read_text())
    del raw["table"]
    for name in ("columns", "drop_columns", "missing", "dependent"):
        del raw["config"]["data"][name]
    assert len(raw["config"]["data"]) > 10  # a run folder from before has none of these fields


@pytest.mark.parametrize("ending", ["csv", "parquet", "npz"])
def test_samples_have_the_table_s_columns_and_types(tmp_path: Path, capsys: pytest.CaptureFixture, run: Path, ending: str) -> None:
    out = tmp_path / f"s.{ending}"
    assert sample_main([str(run), "-n", "30", "--given", "z=mid, x=0.5", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "k, day, half, on: discrete in the data" in said
    if ending == "npz":
        with np.load(out) as file:
            assert file["columns"].tolist() == ["y", "k", "day", "half", "on"]
            x = file["samples"]
            assert np.array_equal(x[:, [1, 2, 4]], np.rint(x[:, [1, 2, 4]])) and np.array_equal(2 * x[:, 3], np.rint(2 * x[:, 3]))
            assert file["log_prob"].shape == (30,) and (np.abs(x[:, 2] - 18262) < 200).all() and "days since 1970" in said
        return
    got = pd.read_csv(out, parse_dates=["day"]) if ending == "csv" else pd.read_parquet(out)
    assert list(got.columns) == ["y", "k", "x", "z", "day", "half", "on"] and len(got) == 30
    assert got["k"].dtype == np.int64 and got["on"].dtype == bool and got["day"].dtype.kind == "M" and (got["day"] == got["day"].dt.normalize()).all()
    assert (got["x"] == 0.5).all() and (got["z"] == "mid").all() and (2 * got["half"] % 1 == 0).all()
    if ending == "csv":
        assert re.match(r"2020-0\d-\d\d,|20\d\d-\d\d-\d\d,", out.read_text().splitlines()[1].split(",mid,")[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "this run is p(others | x, z): give them by --given x=...,z=..."),
        ("--given x=1", "'z' is missing; expected x=...,z=..."),
        ("--given x=1,z=low,q=2", "not conditioned on 'q'"),
        ("--given x=1,z=big", "--given z=big: category must be one of high, low, mid"),
        ("--given x=one,z=low", "--given x=one: expected a finite number"),
        ("--given x=nan,z=low", "--given x=nan: expected a finite number"),
        ("--given x=1,x=2,z=low", "'x' occurs twice"),
        ("--given x,z=low", "'x' is no name=value"),
        ("--class low", "this run has no classes"),
    ],
)
def test_what_is_not_given_is_named(capsys: pytest.CaptureFixture, run: Path, words: str, message: str) -> None:
    assert sample_main([str(run), *words.split(), "--out", "x.csv"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_names_and_values_with_signs_in_them() -> None:
    columns = [TableColumn("a=b", "condition"), TableColumn("m, kg", "condition"), TableColumn("a", "condition")]
    assert parse_given('a=1,"a=b=2","m, kg=-3e1"', columns) == {"a": "1", "a=b": "2", "m, kg": "-3e1"}


def test_far_values_are_told(tmp_path: Path, capsys: pytest.CaptureFixture, run: Path) -> None:
    assert sample_main([str(run), "-n", "2", "--given", "x=100,z=low", "--out", str(tmp_path / "x.csv")]) == 0
    assert "standard deviations from the training rows' mean" in capsys.readouterr().out


def test_later_files_are_read_as_training_read_its_own(tmp_path: Path, capsys: pytest.CaptureFixture, run: Path, table: Path) -> None:
    new = frame(50, seed=7)[["z", "on", "day", "half", "k", "x", "y"]]
    new["z"] = "mid"  # one category, whose place among the three is what it was
    new["on"] = False
    new.to_csv(tmp_path / "new.csv")  # with an index, without the identifier, in another order
    scores = tmp_path / "s.csv"
    assert train_main(["--evaluate", str(run), "--score", str(tmp_path / "new.csv"), "--noise-samples", "3", "--per-item", str(scores)]) == 0
    out = capsys.readouterr().out
    assert "columns 'k', 'day', 'half', 'on' are dequantised like the training rows" in out
    info, flow = read_config(run), cnf.load(run)
    x = {c.name: c for c in info.table}["x"]
    context = np.c_[(new["x"] - x.mean) / x.std, np.tile([0, 0, 1.0], (50, 1))]
    days = (new["day"].to_numpy() - np.datetime64("2020-01-01")) / np.timedelta64(1, "D")
    exact = np.c_[new["y"], new["k"], days, new["half"], new["on"]]
    steps, rng, total = np.array([0, 1, 1, 0.5, 1]), np.random.default_rng(0), 0.0
    for _ in range(40):
        noised = torch.from_numpy(exact + steps * rng.random(exact.shape)).float()
        total = total - flow.log_prob(noised, torch.from_numpy(context).float()).detach().double().numpy() / 40
    found = pd.read_csv(scores)["nats"].to_numpy()
    assert abs(found.mean() - total.mean()) < 0.1 and np.corrcoef(found, total)[0, 1] > 0.9
    # and as a data set
    assert train_main(["--evaluate", str(run), "--data", str(tmp_path / "new.csv")]) == 0
    said = capsys.readouterr().out
    assert "dequantised by one step of uniform noise, as in training" in said
    for change, message in (
        ({"z": "huge"}, "must hold the categories of training, high, low, mid, got 'huge' in line 2: "),
        ({"x": "far"}, "must hold numbers, as in training, got 'far'"),
        ({"day": 3.5}, "must hold dates, as in training, got"),
        ({"x": np.nan}, "'x'"),
    ):
        new.assign(**change).to_csv(tmp_path / "bad.csv", index=False)
        for option in ("--score", "--data"):
            assert train_main(["--evaluate", str(run), option, str(tmp_path / "bad.csv")]) == 2
            assert message in capsys.readouterr().err
    new.drop(columns="half").to_csv(tmp_path / "bad.csv", index=False)
    assert train_main(["--evaluate", str(run), "--score", str(tmp_path / "bad.csv")]) == 2
    assert "lacks 'half'" in capsys.readouterr().err
    assert train_main(["--evaluate", str(run), "--data", str(tmp_path / "new.csv"), "--columns", "x"]) == 2
    assert "does not use --columns" in capsys.readouterr().err


def test_the_mean_over_a_step_is_the_integral() -> None:
    """Under N(0, I): E ln p(k + s u) has a closed form, and columns without a step add no noise."""
    flow = build(FlowConfig.of(hidden=(4,)), SolverConfig(), (2,)).eval()  # a field of zeros
    flow.blocks[0].eval_solver = FixedGrid("euler", 1)
    x = torch.tensor([[0.0, 0.3], [-2.0, 1.5], [1.0, 0.0]])
    steps = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.0]])
    found = evaluate(flow, x, draws=150, steps=steps, seed=3)
    k, s = x[:, 0].double(), steps[:, 0].double()
    exact = math.log(2 * math.pi) + 0.5 * ((k + s / 2) ** 2 + s**2 / 12) + 0.5 * x[:, 1].double() ** 2
    assert found.dequantisation == "uniform" and (found.per_item - exact).abs().max() < 0.1
    assert found.per_item.mean().item() == pytest.approx(exact.mean().item(), abs=4 * found.noise_standard_error)
    assert torch.equal(found.per_item, evaluate(flow, x, draws=150, steps=steps, seed=3).per_item)
    none = evaluate(flow, x, draws=150, steps=torch.zeros(3, 2))
    assert none.draws == 1 and none.dequantisation == "none"
    with pytest.raises(ConfigError, match="steps has shape"):
        evaluate(flow, x, steps=torch.ones(3))


def bernoulli_by_normal(n: int, seed: int, p: float = 0.25) -> tuple[np.ndarray, float]:
    """Rows (k, a), a ~ N(0, 1) independent of k ~ Bernoulli(p), and the entropy in nats."""
    rng = np.random.default_rng(seed)
    x = np.c_[rng.random(n) < p, rng.normal(size=n)]
    return x, -p * math.log(p) - (1 - p) * math.log(1 - p) + 0.5 * math.log(2 * math.pi * math.e)


def test_scores_of_discrete_columns_are_those_of_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Scored items and the test split agree, where values without noise would stand at the edges of their steps."""
    x, entropy = bernoulli_by_normal(600, 0)
    new, _ = bernoulli_by_normal(400, 1)
    for name, rows in (("t", x), ("new", new)):
        pd.DataFrame({"k": rows[:, 0].astype(int), "a": rows[:, 1]}).to_csv(tmp_path / f"{name}.csv", index=False)
    words = ["tabular", "--hidden", "24", "24", "--blocks", "1", "--steps", "150", "--batch-size", "128", "--lr", "2e-2", "--warmup", "10", "--validate-every", "75", "--grid-steps", "2"]
    assert train_main([*words, "--data", str(tmp_path / "t.csv"), "--out", str(tmp_path / "run")]) == 0
    test = json.loads((tmp_path / "run" / "result.json").read_text())["nats"]
    assert train_main(["--evaluate", str(tmp_path / "run"), "--score", str(tmp_path / "new.csv"), "--noise-samples", "4", "--per-item", str(tmp_path / "s.csv")]) == 0
    scored = pd.read_csv(tmp_path / "s.csv")["nats"].mean()
    print(test, scored, entropy)
    assert abs(scored - entropy) < 0.25 and abs(scored - test) < 0.25


@pytest.mark.slow
def test_the_conditional_density_is_the_true_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """y = 2 x + c_z + noise: mean and deviation of p(y | x, z), and its likelihood, against the known conditional."""
    rng = np.random.default_rng(0)
    shift = {"low": -3.0, "high": 3.0}
    n = 1500
    x, z = rng.normal(5, 3, n), rng.choice(list(shift), n)
    y = 2 * x + np.array([shift[v] for v in z]) + 0.5 * rng.normal(size=n)
    pd.DataFrame({"x": x, "y": y, "z": z}).to_csv(tmp_path / "t.csv", index=False)
    words = ["tabular", "--hidden", "24", "24", "--blocks", "1", "--steps", "200", "--batch-size", "128", "--lr", "2e-2", "--warmup", "10", "--validate-every", "100", "--grid-steps", "2", "--condition", "x,z"]
    assert train_main([*words, "--data", str(tmp_path / "t.csv"), "--out", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    truth = 0.5 * math.log(2 * math.pi * math.e * 0.25)
    print(result["nats"], truth)
    assert abs(result["nats"] - truth) < 0.25  # the unconditional density costs 3.4 nats
    for given_x, given_z in ((2.0, "low"), (8.0, "high")):
        out = tmp_path / "s.csv"
        assert sample_main([str(tmp_path / "run"), "-n", "400", "--given", f"x={given_x},z={given_z}", "--out", str(out)]) == 0
        found = pd.read_csv(out)["y"]
        print(found.mean(), 2 * given_x + shift[given_z], found.std())
        assert abs(found.mean() - 2 * given_x - shift[given_z]) < 0.4 and 0.3 < found.std() < 0.9


def test_a_column_called_label_is_a_class(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"a": rng.normal(size=60), "label": rng.integers(0, 3, 60), "b": rng.normal(size=60)})
    table.to_csv(tmp_path / "t.csv", index=False)
    data = datasets.load(tmp_path / "t.csv", condition="label")
    assert data.columns == ("a", "b") and data.classes == ("0", "1", "2") and data.context_dim == 3
    np.savez(tmp_path / "t.npz", x=table[["a", "b"]].to_numpy(), labels=table["label"].to_numpy())
    assert torch.equal(datasets.load(tmp_path / "t.npz", condition="label").train_context, data.train_context)
    words = ["tabular", "--hidden", "4", "--blocks", "1", "--steps", "1", "--warmup", "1", "--condition", "label"]
    assert train_main([*words, "--data", str(tmp_path / "t.csv"), "--out", str(tmp_path / "run")]) == 0
    assert sample_main([str(tmp_path / "run"), "-n", "6", "--out", str(tmp_path / "s.csv")]) == 0
    assert pd.read_csv(tmp_path / "s.csv")["label"].tolist() == [0, 1, 2, 0, 1, 2]
    for words in (["--class", "1"], ["--given", "label=1"]):
        assert sample_main([str(tmp_path / "run"), "-n", "3", *words, "--out", str(tmp_path / "s.csv")]) == 0
        got = pd.read_csv(tmp_path / "s.csv")
        assert list(got.columns) == ["a", "label", "b"] and got["label"].tolist() == [1, 1, 1]


def test_lattice_samples_of_case_6(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    x, _ = bernoulli_by_normal(200, 0)
    np.savetxt(tmp_path / "t.csv", x[:, ::-1], delimiter=",", header="a,k", comments="", fmt=["%.6f", "%d"])
    words = ["tabular", "--hidden", "4", "--blocks", "1", "--steps", "1", "--warmup", "1"]
    assert train_main([*words, "--data", str(tmp_path / "t.csv"), "--out", str(tmp_path / "run")]) == 0
    assert "dequantised" in capsys.readouterr().out
    assert sample_main([str(tmp_path / "run"), "-n", "50", "--out", str(tmp_path / "s.npz")]) == 0
    with np.load(tmp_path / "s.npz") as file:
        k = file["samples"][:, 1]
    assert np.array_equal(k, np.floor(k)) and "k: discrete in the data" in capsys.readouterr().out


# --- run folders ----------------------------------------------------------------------------------------------------------


def test_an_older_run_folder_still_loads(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from cnf.runs import config_digest

    x = np.c_[np.arange(60), np.random.default_rng(0).normal(size=(60, 2))]
    pd.DataFrame(x, columns=["nr", "a", "b"]).to_csv(tmp_path / "t.csv", index=False)
    words = ["tabular", "--hidden", "4", "--blocks", "1", "--steps", "1", "--warmup", "1", "--columns", "nr,a,b"]
    assert train_main([*words, "--data", str(tmp_path / "t.csv"), "--out", str(tmp_path / "run")]) == 0
    before = json.loads((tmp_path / "run" / "result.json").read_text())["nats"]
    raw = json.loads((tmp_path / "run" / "config.json").read_text())
    del raw["table"]
    for name in ("columns", "drop_columns", "missing", "dependent"):
        del raw["config"]["data"][name]
    raw["sha256"] = config_digest(raw)
    (tmp_path / "run" / "config.json").write_text(json.dumps(raw))
    info = read_config(tmp_path / "run")
    assert info.table == () and info.config.data.columns is None
    capsys.readouterr()
    assert train_main(["--evaluate", str(tmp_path / "run")]) == 0  # the row number, which it was trained on, is no surprise
    assert f"test: {before:.4f}" in capsys.readouterr().out
    assert train_main(["--resume", "--out", str(tmp_path / "run"), "--steps", "2"]) == 0
    assert train_main(["--evaluate", str(tmp_path / "run"), "--score", str(tmp_path / "t.csv")]) == 0
    assert sample_main([str(tmp_path / "run"), "-n", "3", "--out", str(tmp_path / "s.csv")]) == 0
    assert list(pd.read_csv(tmp_path / "s.csv").columns) == ["nr", "a", "b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1.0}, "its step must be 0 or a positive number, got -1.0"),
        ({"dequantised": True}, "has no step"),
        ({"std": 0.0}, "out of range"),
        ({"epoch": 10**9}, "its epoch must be within 2,700 years of 1970, got day"),
        ({"role": "condition", "kind": "categorical"}, "0 categories"),
        ({"categories": ("a", "b")}, "it is continuous with 2 categories"),
        ({"kind": "identifier"}, "must be a number since it is modelled, got identifier"),
        ({"name": "z"}, "models other columns"),
        ({"role": "condition"}, "context_dim is 0; expected 1"),
    ],
)
def test_a_run_folder_whose_columns_lie_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    from dataclasses import replace

    from cnf.config import DataConfig, RunConfig, TrainConfig

    config = RunConfig("own", DataConfig("x.csv"), FlowConfig.of(hidden=(4,)), SolverConfig(), TrainConfig())
    good = RunInfo(config, (2,), None, 0, (), ("a", "b"), (TableColumn("a"), TableColumn("b")))
    write_config(tmp_path, good)
    write_weights(tmp_path, good.build())
    assert read_config(tmp_path) == good
    write_config(tmp_path, replace(good, table=(TableColumn("a"), replace(TableColumn("b"), **change))))
    with pytest.raises(CheckpointError, match=f"config.json.*{message}"):
        read_config(tmp_path)


# --- written otherwise ----------------------------------------------------------------------------------------------------


def test_numbered_headers_of_pandas(tmp_path: Path) -> None:
    """The header of numbers above an index is no row of data; a trajectory that begins with whole numbers keeps its first row."""
    pd.DataFrame(X).to_csv(tmp_path / "t.csv")
    pd.DataFrame(X).to_excel(tmp_path / "t.xlsx")
    for ending in ("csv", "xlsx"):
        data = datasets.load(tmp_path / f"t.{ending}")
        assert data.columns == ("0", "1") and np.allclose(np.sort(everything(data), 0), np.sort(X, 0), atol=1e-6)
    (tmp_path / "counts.csv").write_text("3,1\n0,1\n2,5\n7,0\n1,1\n0,4\n")
    assert len(read_csv(tmp_path / "counts.csv")[0]) == 6
    (tmp_path / "minus.csv").write_text("a;b\n" + "\n".join(f"{u:.4f};{v:.4f}" for u, v in X).replace("-", "\u2212"))
    assert np.allclose(read_csv(tmp_path / "minus.csv")[0], X.round(4))


def test_leading_zeros_are_told(tmp_path: Path) -> None:
    pd.DataFrame({"a": X[:, 0], "zip": [f"{k:05}" for k in np.random.default_rng(0).choice([1067, 2345, 10115], 40)]}).to_csv(tmp_path / "t.csv", index=False)
    assert any("'zip' holds '0" in line and "leading zeros" in line for line in datasets.load(tmp_path / "t.csv").notices)


def test_empty_columns_and_formulas_are_named(tmp_path: Path) -> None:
    pd.DataFrame({"a": X[:, 0], "none": [None] * 40, "b": X[:, 1]}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match=r"'none' without any value: --drop-columns none"):
        datasets.load(tmp_path / "t.csv")
    pd.DataFrame({"a": X[:, 0], "b": X[:, 1], "twice": [f"=2*A{i + 2}" for i in range(40)]}).to_excel(tmp_path / "t.xlsx", index=False)
    with pytest.raises(DataError, match=r"row 2, column 2 \('twice'\).*formulas without stored values read as empty"):
        datasets.load(tmp_path / "t.xlsx")


@pytest.mark.parametrize("ending", ["csv", "parquet", "xlsx"])
def test_whole_numbers_stay_whole_where_some_are_missing(tmp_path: Path, ending: str) -> None:
    k = pd.array(np.random.default_rng(0).integers(0, 9, 40), dtype="Int64")
    k[3] = pd.NA
    table = pd.DataFrame({"k": k, "a": X[:, 0]})
    {"csv": table.to_csv, "parquet": table.to_parquet, "xlsx": table.to_excel}[ending](tmp_path / f"t.{ending}", index=False)
    data = datasets.load(tmp_path / f"t.{ending}", missing="drop")
    assert kinds(data)["k"] == ("data", "discrete", "int") and len(everything(data)) == 39
    again = datasets.load(tmp_path / f"t.{ending}", missing="drop", table=data.table)
    assert np.array_equal(np.sort(everything(again)[:, 0]), np.sort(everything(data)[:, 0]))
    # truth values of a later file, of which some are missing
    full = pd.DataFrame({"k": np.arange(40) % 3 == 0, "a": X[:, 0]})
    gaps = full.astype({"k": object})
    gaps.loc[2, "k"] = None
    for name, rows in (("full", full), ("gaps", gaps)):
        {"csv": rows.to_csv, "parquet": rows.to_parquet, "xlsx": rows.to_excel}[ending](tmp_path / f"{name}.{ending}", index=False)
    schema = datasets.load(tmp_path / f"full.{ending}").table
    assert schema[0].type == "bool" and len(everything(datasets.load(tmp_path / f"gaps.{ending}", missing="drop", table=schema))) == 39
    with pytest.raises(DataError, match=r"has 1 values that are NaN or infinite, .* column 0 \('k'\)"):
        datasets.load(tmp_path / f"gaps.{ending}", table=schema)


def test_time_zones_and_days_in_digits_are_told(tmp_path: Path) -> None:
    at = pd.Timestamp("2024-03-01", tz="Europe/Berlin") + pd.to_timedelta(np.random.default_rng(0).uniform(0, 1e6, 40).round(), unit="s")
    days = [int((pd.Timestamp("2021-01-01") + timedelta(days=100 * i)).strftime("%Y%m%d")) for i in range(40)]
    table = pd.DataFrame({"at": at, "a": X[:, 0], "day": days})
    table.to_parquet(tmp_path / "t.parquet")
    table.to_csv(tmp_path / "t.csv", index=False)
    for ending in ("parquet", "csv"):
        said = "\n".join(datasets.load(tmp_path / f"t.{ending}").notices)
        assert "time zone" in said and "converted to UTC" in said and "'day' holds numbers that read as dates (20210101)" in said


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1067, 2345, 10115], int),  # codes: no approximate step
        ([0, 100, 205], int),
        ([9.99, 19.99, 30.49], float),
        ([1.5, 2.5, 9.0], float),
        ([int(np.rint(25.4 * k)) for k in range(9)], int),  # inches in whole millimetres
    ],
)
def test_discrete_values_come_back_as_they_were(tmp_path: Path, values: list[float], kind: type) -> None:
    chosen = np.random.default_rng(0).choice(values, 300)
    pd.DataFrame({"v": chosen.astype(kind), "a": np.random.default_rng(1).normal(size=300)}).to_csv(tmp_path / "t.csv", index=False)
    data = datasets.load(tmp_path / "t.csv")
    assert kinds(data)["v"] == ("data", "discrete", kind.__name__)
    back = sampled_frame(everything(data), data.table, {})["v"]
    assert sorted(back.tolist()) == pytest.approx(sorted(chosen.tolist()), abs=1e-9)


def test_samples_of_discrete_columns_stay_within_the_table(tmp_path):
    """A flag is never 2, and a count never negative; folders that do not know the largest value have no limits."""
    x = np.c_[np.random.default_rng(0).poisson(1.0, 400), np.random.default_rng(1).normal(size=400)]
    np.savetxt(tmp_path / "t.csv", x, delimiter=",", header="n,a", comments="")
    column = load(str(tmp_path / "t.csv")).table[0]
    assert (column.origin, column.last) == (x[:, 0].min(), x[:, 0].max())
    values = np.array([[-2.7], [0.5], [99.0]])
    assert as_numbers_of(values, [column])[:, 0].tolist() == [0.0, 0.0, x[:, 0].max()]
    known = {k: v for k, v in dataclasses.asdict(column).items() if k != "last"}
    assert as_numbers_of(values, [decode(TableColumn, json.loads(json.dumps(known)), "column")])[:, 0].tolist() == [-3.0, 0.0, 99.0]


def test_rows_that_begin_with_an_error_of_a_spreadsheet_are_no_comments(tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 2))
    path = tmp_path / "t.csv"
    for cell, message in (("#N/A", "has 1 values that are NaN or missing, the first in line 5"), ("#DIV/0!", "row 5, column 'a' of .* is '#DIV/0!'; expected a number")):
        path.write_text("a,b\n" + "".join(f"{cell if i == 3 else a},{b}\n" for i, (a, b) in enumerate(x)))
        with pytest.raises(DataError, match=message):
            load(path)


def test_exponents_of_fortran_are_no_row_names(tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 2))
    (tmp_path / "t.csv").write_text("a,b\n" + "".join(f"{a:.6f}D+00,{b}\n" for a, b in x))
    with pytest.raises(DataError, match="has text in column 'a'"):
        load(tmp_path / "t.csv")
