"""Progress on stderr: lines where there is no terminal, one that changes where there is, silence for short work."""

import io
import re
import sys
import time

import numpy as np
import pytest
import torch

from cnf._utils import progress as module
from cnf._utils.progress import Progress, progress
from cnf.cli import classify_main, train_main
from cnf.config import FlowConfig, SolverConfig
from cnf.distributed import Group
from cnf.evaluation import check, evaluate, rank
from cnf.losses import assess
from cnf.models import build
from cnf.neural_ode import anode_mlp


def test_what_a_line_says(monkeypatch):
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with Progress("test likelihood", "solves", quiet=True) as work:
        for seconds, done, expected in (
            (30, 0, "test likelihood: 0 of 1,200 solves in 30 seconds"),
            (0, 3, "test likelihood: 3 of 1,200 solves in 30 seconds, about 3.3 hours left"),
            (570, 900, "test likelihood: 900 of 1,200 solves in 10 minutes, about 3 minutes left"),
        ):
            now += seconds
            work.update(done, 1200)
            assert work.text() == expected


def wait_for(pattern, capsys):
    """What stderr has got once it matches, within ten seconds."""
    said, until = "", time.monotonic() + 10
    while not re.search(pattern, said):
        assert time.monotonic() < until, said
        time.sleep(0.01)
        said += capsys.readouterr().err
    return said


def test_lines_come_while_one_unit_lasts_and_short_work_is_silent(monkeypatch, capsys):
    with Progress("short", "solves") as work:
        work.update(1, 1)
    assert list(progress(range(3), "decoding", 3)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "LINE_SECONDS", 0.02)
    with Progress("quiet", "solves", quiet=True), Progress("long", "solves") as work:
        work.update(0, 1)
        first, second = (wait_for(r"long: 0 of 1 solves in \d seconds?\n", capsys) for _ in range(2))
    assert "quiet" not in first + second
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().err == ""  # over
    for i in progress(range(2), "decoding", 2):
        wait_for(rf"decoding: {i} of 2 images in \d seconds?" + (r", about \d seconds? left\n" if i else r"\n"), capsys)


def test_a_terminal_s_line_is_kept_up_to_date_and_taken_away(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("short", "solves"):
        pass
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr(module, "TERMINAL_SECONDS", 0.02)
    monkeypatch.setenv("COLUMNS", "20")
    with pytest.raises(ValueError, match="stop"), Progress("scoring a long name", "solves") as work:
        work.update(1, 3)
        for _ in range(1000):
            time.sleep(0.01)
            if sys.stderr.getvalue():
                raise ValueError("stop")
    first, *_, last = sys.stderr.getvalue().split("\r")[1:]
    assert first == "scoring a long name"[:19] + "\x1b[K" and last == "\x1b[K"


class Second(Group):
    """Rank 1 of 2, alone."""

    def __init__(self):
        super().__init__(1, 2)

    def sum(self, value):
        return value

    def all_max(self, values):
        return list(values)


def test_evaluations_count_their_solves_and_give_the_same_figures():
    flow = build(FlowConfig.of(hidden=(8,), zero_init=False), SolverConfig.of(divergence="hutchinson"), (2,)).eval()
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    seen = []

    def note(done, total):
        seen.append((done, total))

    def noted():
        found = list(seen)
        seen.clear()
        return found

    plain = evaluate(flow, x, draws=2, batch_size=4)
    assert torch.equal(plain.per_item, evaluate(flow, x, draws=2, batch_size=4, progress=note).per_item)
    assert noted() == [(i, 6) for i in range(7)]
    assert check(flow, x, batch_size=4) == check(flow, x, batch_size=4, progress=note)
    assert list(dict.fromkeys(noted())) == [(i, 9) for i in range(10)]
    rank(flow, x, batch_size=4, progress=note)
    assert noted() == [(i, 3) for i in range(4)]
    evaluate(flow, x, batch_size=4, progress=note, group=Second())
    assert noted() == [(0, 1), (1, 1)]  # of three
    model = anode_mlp(2, 8, 1).eval()
    plain = assess(model, x, torch.zeros(10, 1), "regression", batch_size=3)
    assert torch.equal(plain.outputs, assess(model, x, torch.zeros(10, 1), "regression", batch_size=3, progress=note).outputs)
    assert noted() == [(i, 4) for i in range(5)]
    assert [Group(r, 3).owned(7) for r in range(3)] == [3, 2, 2] and Group(2, 3).owned(1) == 0


def test_the_programs_report_their_evaluations(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "LINE_SECONDS", 0.001)
    monkeypatch.setattr("cnf.training.report.pictures", lambda *args: None)
    monkeypatch.setattr("cnf.training.predictions.predictor_pictures", lambda *args: None)
    short = ["--hidden", "4", "--steps", "2", "--batch-size", "20", "--warmup", "1", "--validation-items", "12"]
    run = tmp_path / "run"
    assert train_main(["digits", *short, "--max-train-rows", "60", "--test-items", "12", "--noise-samples", "3", "--out", str(run)]) == 0
    said = capsys.readouterr().err
    assert re.search("test likelihood: [0-3] of 3 solves in", said) and "validation likelihood" not in said
    assert train_main(["--evaluate", str(run), "--split", "validation", "--importance", "2", "--check"]) == 0
    said = capsys.readouterr().err
    assert re.search("validation likelihood: [0-6] of 6 solves in", said) and re.search("solver check: [0-3] of 3 solves in", said)
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 8, 8), dtype=np.uint8))
    assert train_main(["--evaluate", str(run), "--score", str(tmp_path / "x.npz")]) == 0
    assert re.search("scoring: [0-3] of 3 solves in", capsys.readouterr().err)
    monkeypatch.setattr("cnf.losses.supervised.BATCH_NUMBERS", 4)
    points = ["--data", "spheres2", "--toy-sizes", "60", "30", "8", *short[:6], "--warmup", "1"]
    assert classify_main([*points, "--out", str(tmp_path / "predicts")]) == 0
    said = capsys.readouterr().err
    assert re.search("test predictions: [0-4] of 4 batches in", said) and "solver check: " in said
