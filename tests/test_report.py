"""report.html of a run: what it says, read back by a parser, and that it needs nothing else."""

import base64
import json
import os
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import slow
from PIL import Image

import cnf
from cnf.cli import main
from cnf.runs import write_text
from cnf.training import write_report
from cnf.training.interpretation import interpret, warnings


class Page(HTMLParser):
    """Text, pictures and table cells of a page, and every address that it would load."""

    def __init__(self, path):
        super().__init__()
        self.texts, self.pictures, self.cells, self.addresses, self.tags = [], [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data", "poster", "action"):
                self.addresses.append(value)
        if tag == "img":
            kind, _, data = dict(attributes)["src"].partition(";base64,")
            self.pictures.append((kind, base64.b64decode(data, validate=True)))

    def handle_data(self, text):
        if text.strip():
            self.texts.append(text.strip())
            if self.tags and self.tags[-1] == "td":
                self.cells.append(text.strip())


def check_alone(page):
    """Everything is inside the file, and nothing runs."""
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not {"script", "link", "iframe", "object"} & set(page.tags) and "@import" not in "".join(page.texts)


def test_a_report_holds_what_the_folder_holds(tmp_path):
    folder = tmp_path / "a <b> & c"
    (folder / "plots").mkdir(parents=True)
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(folder / "plots" / "density.png")
    rows = [{"step": s, "nll": 3.0, "validation": 2.0 + (s - 60) ** 2 / 1e4, "validation_nfe": 50, "seconds": s / 10} for s in range(1, 101)]
    write_text(folder / "metrics.jsonl", "\n".join(map(json.dumps, rows)))
    result = {
        "parts": {"mixture": 2.5, "flow": 2.25}, "gains": {"flow": [0.25, 0.01]}, "notices": ["2 rows <dropped>"], "parameters": 1234,
        "command": "cnf train --data 'a<b>.csv'", "versions": {"cnf": "1.2.3"},
    }  # fmt: skip
    write_text(folder / "result.json", json.dumps(result))
    page = Page(write_report(folder, "test: 2.25 nats", meaning=["near <the> entropy"], settings=["exact trace"], warnings=["beware & check"]))
    check_alone(page)
    text = " ".join(page.texts)
    for words in ("a <b> & c", "test: 2.25 nats", "near <the> entropy", "exact trace", "beware & check", "2 rows <dropped>", "'a<b>.csv'"):
        assert words in text, words
    assert [data for _, data in page.pictures] == [(folder / "plots" / "density.png").read_bytes()]
    assert "60 (best)" in page.cells and "+0.2500 ± 0.0100" in page.cells and {"1,234", "1.2.3", "100"} <= set(page.cells)
    assert len([cell for cell in page.cells if cell == "50"]) <= 14  # a hundred validations are thinned


def test_an_empty_folder_has_a_report(tmp_path):
    page = Page(write_report(tmp_path, "no validation"))
    check_alone(page)
    assert "no validation" in page.texts and not page.pictures


def test_fit_leaves_a_report(tmp_path):
    flow = cnf.Flow(cnf.CNF(cnf.fields.MLP(2, (4,))), (2,))
    result = cnf.fit(flow, np.random.default_rng(0).normal(size=(60, 2)).astype("float32"), validation=0.5, steps=2, folder=tmp_path / "run", quiet=True)
    page = Page(tmp_path / "run" / "report.html")
    check_alone(page)
    assert any(text.startswith(f"validation: {result.best:.4f} ± ") and "over 30 items" in text for text in page.texts) and f"{result.best:.4f}" in page.cells
    cnf.fit(flow, np.random.default_rng(0).normal(size=(60, 2)), steps=1, folder=tmp_path / "bare", quiet=True)
    assert "no validation" in Page(tmp_path / "bare" / "report.html").texts and not (tmp_path / "bare" / "result.json").exists()


@pytest.mark.parametrize(
    ("words", "pictures"),
    [
        slow("train demo --data 8gaussians --minutes 0.02", {"samples", "density", "flow"}),
        slow("train anode-flip --steps 3 --validation-items 50 --test-items 50", {"features", "trajectories"}),
        slow("train ffjord-toy --steps 2 --batch-size 8 --validation-items 50 --test-items 50", {"samples", "density"}),
    ],
)
def test_every_run_leaves_a_report(tmp_path, words, pictures, capsys):
    folder = tmp_path / "run"
    assert main([*words.split(), "--out", str(folder)]) == 0
    said = capsys.readouterr().out
    page = Page(folder / "report.html")
    check_alone(page)
    found = json.loads((folder / "result.json").read_text())
    text = " ".join(page.texts)
    assert f"cnf {words}" in text and any(f"{found['value']:{form}}" in text for form in (".4f", ".4g"))  # densities, predictions
    assert all(line in text and line in said for line in interpret(found))
    files = {p.stem: p.read_bytes() for p in folder.glob("*/*") if p.suffix in (".png", ".gif")}
    assert pictures <= set(files) and sorted(data for _, data in page.pictures) == sorted(files.values())


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"value": 2.83, "unit": "nats", "true_entropy": 2.8319, "standard_error": 0.01}, "0.0019 below it, as good as the test items can tell"),
        ({"value": 3.0, "unit": "nats", "true_entropy": 2.0, "standard_error": 0.01}, "the least that any model can have: 1.0000 above it"),
        ({"value": 5.0, "unit": "bits/dim", "levels": 17}, "uniform density has 4.087 bits/dim: 0.913 above it"),
        ({"value": 0.1, "unit": "nats", "accuracy": 0.875, "classes": ["a", "b", "c", "d"]}, "4 classes gives 25 %: 87.5 % here"),
        ({"value": 1.0, "unit": "nats", "steps": 500, "best_step": 500, "stopped": "steps"}, "more than 500 steps would probably improve it"),
    ],
)
def test_a_figure_is_interpreted(result, words):
    (line,) = interpret(result)
    assert words in line


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"unit": "nats", "solver_error": -0.2, "standard_error": 0.1}, "-2.0e-01 nats, is larger than the standard error"),
        ({"unit": "nats", "items": 5, "items_of": 50, "split": "test"}, "only 5 of 50 test items"),
        ({"unit": "bits/dim", "value": -0.5, "levels": 256}, "below 0 bits/dim"),
        ({"unit": "nats", "note": "mid-bin"}, "not a bound: mid-bin"),
        ({"unit": "nats", "unsolved_note": "row 3 left out"}, "row 3 left out"),
    ],
)
def test_doubts_are_named(result, words):
    (line,) = warnings(result)
    assert words in line
    assert warnings({"unit": "nats", "solver_error": 1e-6, "standard_error": 0.1, "items": 5, "items_of": 5, "skipped": 0}) == []


# -- in a browser ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    """A function that opens a page in headless Chromium and returns its pixels (height, width, 3)."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    browser = next(filter(None, map(shutil.which, (os.environ.get("CHROMIUM", ""), *names))), None)
    if browser is None:
        pytest.skip("no Chromium here: install one, or name it by the environment variable CHROMIUM")

    def take(page, *, dark=False, width=1100, height=1600):
        place = tmp_path_factory.mktemp("chromium")
        shot = place / "page.png"
        words = [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={place / 'profile'}",
            f"--blink-settings=preferredColorScheme={int(not dark)}", f"--window-size={width},{height}", f"--screenshot={shot}", page.as_uri(),
        ]  # fmt: skip
        subprocess.run(words, capture_output=True, timeout=120, check=True)
        return np.asarray(Image.open(shot).convert("RGB")).astype(int)

    return take


def coloured(pixels, colour):
    """Rows and columns (first, last) of the pixels of one colour."""
    rows, columns = np.nonzero(np.abs(pixels - np.array(colour)).max(2) <= 2)
    return (rows.min(), rows.max()), (columns.min(), columns.max())


@pytest.mark.slow
def test_a_browser_shows_the_report_light_and_dark(tmp_path, photograph):
    (tmp_path / "plots").mkdir()
    for name, size, colour in (("density", (300, 200), (250, 10, 200)), ("vector_field", (3000, 600), (10, 200, 250))):
        Image.new("RGB", size, colour).save(tmp_path / "plots" / f"{name}.png")
    page = write_report(tmp_path, "test: 2.25 nats", warnings=["x" * 3000], details="y" * 3000)  # broken into lines
    for dark in (False, True):
        pixels = photograph(page, dark=dark)
        ground = pixels[:5].reshape(-1, 3)
        assert (ground.max() < 50) if dark else (ground.min() == 255)  # the reader's own choice of colours
        text = np.abs(pixels[20:150] - ground[0]).max()
        assert text > 180  # legible
        (top, bottom), (left, right) = coloured(pixels, (250, 10, 200))
        assert abs(bottom - top - 199) <= 2 and abs(right - left - 299) <= 2  # from inside the page, unscaled
        assert (pixels[top - 5, left : right + 1] == 255).all()  # on white, whatever the page
        _, (left, right) = coloured(pixels, (10, 200, 250))
        assert 0.85 * 1100 < right - left < 1100 and abs(left - (1099 - right)) <= 2  # in the middle, within the window
        assert (pixels[:, -8:] == ground[0]).all()  # nothing sticks out
    narrow = photograph(page, width=500, height=1200)
    assert (narrow[:, -3:] == narrow[0, 0]).all()
