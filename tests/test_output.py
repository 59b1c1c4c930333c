"""What the programs print: lines and a bar, warnings and results alone, or JSON."""

import io
import json
import re
import shlex
import sys

import numpy as np
import pytest
import torch
from conftest import mostly_slow

import cnf
from cnf._utils.output import emit, output
from cnf.cli import main
from cnf.training.interpretation import place
from cnf.training.loggers import ProgressBar

TINY = ["--hidden", "4", "--steps", "4", "--warmup", "0", "--batch-size", "20", "--ema-decay", "0", "--validate-every", "2", "--validation-items", "20", "--test-items", "20"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("cnf.training.report.pictures", lambda *args: None)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "table.csv"
    rows = np.random.default_rng(0).normal(size=(80, 2))
    np.savetxt(path, np.vstack([rows, rows[:2]]), delimiter=",", header="a,b", comments="")  # two duplicates, which are dropped
    return path


def objects(text):
    return [json.loads(line) for line in text.splitlines()]


def test_json_is_one_object_a_line_for_every_command(tmp_path, table, capsys):
    run = tmp_path / "run"
    assert main(["train", "tabular", *TINY, "--data", str(table), "--out", str(run), "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    found = objects(said.out)
    assert [each["event"] for each in found if each["event"] != "data"] == ["message", "start", "validation", "validation", "result", "message"]
    assert any("duplicate" in each["text"] for each in found if each["event"] == "data")
    start, first, second, result = (each for each in found if each["event"] in ("start", "validation", "result"))
    assert start["folder"] == str(run) and start["steps"] == 4
    rows = [row for row in objects((run / "metrics.jsonl").read_text()) if "validation" in row]
    assert [{name: each[name] for name in row} for each, row in zip((first, second), rows, strict=True)] == rows
    assert first["unit"] == "nats"
    kept = json.loads((run / "result.json").read_text())
    assert {name: result[name] for name in kept} == kept and result["text"].startswith("test: ")

    np.savetxt(tmp_path / "new.csv", [[0.0, 0.0], [9.0, 9.0]], delimiter=",", header="a,b", comments="")
    for words, key in (
        (f"evaluate {run} --test-items 5", "value"), (f"rank {run} {tmp_path / 'new.csv'}", "items"),
        (f"sample {run} -n 3 --out {tmp_path / 'new.npz'}", "samples"), (f"compare {run}", "runs"), ("list", "presets"),
    ):  # fmt: skip
        assert main([*words.split(), "--json"]) == 0
        said = capsys.readouterr()
        (result,) = (each for each in objects(said.out) if each["event"] == "result")
        assert key in result and said.err == "", words
        if key == "items":
            assert [(each["name"][-9:], each["index"]) for each in result["items"]] == [("new.csv:1", 1), ("new.csv:0", 0)]
            assert result["items"][0]["score"] > result["items"][1]["score"] and 0 <= result["items"][0]["below"] <= 1


def test_quiet_prints_warnings_and_the_result_alone(tmp_path, table, capsys):
    run = tmp_path / "run"
    assert main(["train", "tabular", *TINY, "--data", str(table), "--out", str(run), "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.err == "" and json.loads((run / "result.json").read_text())["command"] == shlex.join(["cnf", "train", "tabular", *TINY, "--data", str(table), "--out", str(run)])
    first, *others = (line for line in said.out.splitlines() if not line.startswith("data: "))
    assert first.startswith("test: ") and "report in" not in said.out and "step" not in first
    assert "duplicate" in said.out and all(line.startswith("  ") for line in others)
    assert main(["sample", str(run), "-n", "2", "--quiet", "--json", "--out", str(tmp_path / "a.csv")]) == 0
    (result,) = objects(capsys.readouterr().out)
    assert result["event"] == "result" and result["samples"] == 2


def test_errors_are_objects_and_sentences(capsys):
    for words, code, text in (("train dgits", 2, "did you mean 'digits'"), ("train digits --bogus 1", 2, "wrong usage"), ("rank", 0, None)):
        assert main([*words.split(), "--json"]) == code
        said = capsys.readouterr()
        if text is not None:
            (error,) = objects(said.out)
            assert error["event"] == "error" and error["code"] == code and text in error["text"] and said.err


def test_modes_end_with_their_command(capsys):
    with output(quiet=True), output(json=True):
        emit("message", "no")
        emit("warning", "yes", value=float("nan"), nested={"a": (float("inf"), 1)})
    emit("message", "plain")
    first, second = capsys.readouterr().out.splitlines()
    assert json.loads(first) == {"event": "warning", "text": "yes", "value": None, "nested": {"a": [None, 1]}} and second == "plain"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_validations_are_lines_above_the_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    words = ["train", "ffjord-toy", "--data", "checkerboard", "--toy-sizes", "40", "20", "20", *TINY]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    pieces = sys.stderr.getvalue().split("\r")
    lines = [piece.strip("\n") for piece in pieces if piece.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 2/4", "step 4/4"]
    assert re.search(r"validation \d\.\d{4} nats \(\d\.\d{3} above the entropy\), NFE \d+, [\d,]+ samples/s, about \d+ seconds? left", lines[0])
    assert re.search(r"above the entropy, (still improving|best \d\.\d{4} at 2)\), NFE \d+$", lines[1])
    assert any("4/4 [" in piece and "samples/s" in piece for piece in pieces)


def test_a_line_every_thirty_seconds_in_a_pipe(tmp_path, monkeypatch, capsys):
    words = ["train", "ffjord-toy", "--toy-sizes", "40", "20", "20", *TINY]
    monkeypatch.setattr("cnf.training.loggers.LINE_SECONDS", -1.0)
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "validation" not in line]
    assert lines and all(re.match(r"step [1-4]/4: .*samples/s, (best .*, )?about \d+ seconds? left$", line) for line in lines)
    assert main([*words, "--json", "--max-time", "1000", "--out", str(tmp_path / "b")]) == 0
    found = [each for each in objects(capsys.readouterr().out) if each["event"] == "progress" and "step" in each]
    assert found and found[-1]["step"] == found[-1]["steps"] == 4 and found[-1]["seconds_left"] == 0


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"value": 3.4, "unit": "nats", "true_entropy": 2.64}, "0.760 above the entropy"),
        ({"value": 2.0, "unit": "bits/dim", "levels": 256}, "6.000 below a uniform density"),
        ({"value": 0.3, "unit": "nats", "accuracy": 0.9, "outputs": 10}, "accuracy 90.0 %, by guessing 10 %"),
        ({"value": 3.4, "unit": "nats", "true_entropy": None, "levels": None}, ""),
        ({"value": float("inf"), "unit": "nats", "true_entropy": 2.64}, ""),
    ],
)
def test_a_validation_is_interpreted(result, words):
    assert place(result) == words


def test_the_time_left_ends_at_the_limit():
    class Run:
        class state:
            step = 10

        steps, elapsed = 100, 5.0

        def callback(self, kind):
            return kind(20.0)

    bar = ProgressBar()
    bar._first = 0
    assert bar._seconds_left(Run()) == 15.0  # 45 by the steps


@pytest.mark.parametrize("preset", mostly_slow(["ffjord-toy", "anode-three-spheres"], "anode-three-spheres"))
def test_tensorboard_holds_groups_pictures_and_settings(tmp_path, monkeypatch, preset):
    """The event files, read back."""
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)

    def draw(model, *args):
        folder = next(each for each in args if hasattr(each, "glob"))
        (folder / "samples").mkdir()
        Image.fromarray(pixels).save(folder / "samples" / "samples.png")

    monkeypatch.setattr("cnf.training.report.pictures", draw)
    monkeypatch.setattr("cnf.training.predictions.predictor_pictures", draw)
    run = tmp_path / "run"
    assert main(["train", preset, "--toy-sizes", "40", "20", "20", *TINY, "--lr", "0.0125", "--out", str(run), "--quiet"]) == 0
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    result, tags = json.loads((run / "result.json").read_text()), events.Tags()
    metric = "nll" if preset == "ffjord-toy" else "loss"
    assert {tag.partition("/")[0] for tag in tags["scalars"]} == {"train", "validation", "solver", "test"}
    assert events.Scalars(f"test/{metric}")[-1].value == pytest.approx(result["value"], rel=1e-6)
    assert events.Scalars("validation/best")[-1].value == pytest.approx(result["validation"], rel=1e-6)
    assert ("test/accuracy" in tags["scalars"]) == (metric == "loss") and "solver/nfe" in tags["scalars"]
    (picture,) = events.Images("samples/samples")
    assert picture.step == 4 and np.array_equal(np.asarray(Image.open(io.BytesIO(picture.encoded_image_string))), pixels)
    # samples of the plane: a histogram with a mark in it
    drawn = events.Images("validation/samples") if preset == "ffjord-toy" else []
    assert [each.step for each in drawn] == ([2, 4] if drawn else []) and ("validation/samples" in tags["images"]) == bool(drawn)
    assert all(np.asarray(Image.open(io.BytesIO(each.encoded_image_string))).max() == 255 for each in drawn)
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text) == json.loads((run / "config.json").read_text())
    known = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content).session_start_info.hparams
    assert known["train.lr"].number_value == 0.0125 and known["name"].string_value == preset and known["data.toy_sizes"].string_value == "[40, 20, 20]"
    experiment = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/experiment").plugin_data.content).experiment
    assert {each.name.tag for each in experiment.metric_infos} == {f"validation/{metric}", f"test/{metric}"}


def test_tensorboard_shows_samples_while_it_trains(tmp_path):
    """Those of the weights that are validated: tiles of images, and where points of the plane lie."""
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from cnf.training import WeightAverage

    def logged(folder):
        events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
        return {each.step: np.asarray(Image.open(io.BytesIO(each.encoded_image_string))) for each in events.Images("validation/samples")}

    options = {"batch_size": 16, "quiet": True, "callbacks": [WeightAverage]}
    torch.manual_seed(0)
    flow = cnf.build(cnf.FlowConfig.of(field="conv", hidden=(4,), strides=(1, 1)), cnf.SolverConfig.of(grid_steps=2), (1, 4, 4), levels=16)
    x = torch.randint(0, 16, (40, 1, 4, 4), dtype=torch.uint8)
    flow = cnf.fit(flow, x, steps=3, validate_every=1, folder=tmp_path / "images", **options).flow
    images = logged(tmp_path / "images")
    assert list(images) == [1, 2, 3]
    samples = flow.sample(16, noise=cnf.Noise(0, "sample"), solver=lambda block: block.solver)
    tile = images[3][65:129, 130:194, 0]  # the second row's third, of 64 pixels and one between tiles
    np.testing.assert_allclose(tile[::16, ::16] / 255, samples[6, 0].numpy(), atol=0.01)
    assert (tile.reshape(4, 16, 4, 16) == tile[::16, None, ::16, None]).all() and not np.array_equal(images[1], images[3])
    points = torch.randn(4000, 2) * torch.tensor([1.0, 0.1]) + torch.tensor([5.0, -3.0])
    flow = cnf.build(cnf.FlowConfig.of(hidden=(4,)), cnf.SolverConfig.of(grid_steps=2), (2,))
    cnf.fit(flow, points, steps=24, validate_every=1, folder=tmp_path / "points", **options)
    drawn = logged(tmp_path / "points")
    assert 15 <= len(drawn) <= 21 and max(drawn) == 24
    weight = drawn[24][..., 0].astype(float) if drawn[24].ndim == 3 else drawn[24].astype(float)
    across, up = (np.average(np.arange(256), weights=weight.sum(axis)) for axis in (0, 1))
    assert abs(across - 127.5) < 16 and abs(up - 127.5) < 16 and weight[:26].sum() < 0.05 * weight.sum()
    cnf.fit(cnf.neural_ode.anode_mlp(2, outputs=1, hidden=4, augment=1), (points[:64], points[:64, :1]), steps=2, folder=tmp_path / "none", **options)
    assert not EventAccumulator(str(tmp_path / "none" / "tensorboard")).Reload().Tags()["images"]
