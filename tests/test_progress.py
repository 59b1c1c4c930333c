"""Progress on stderr: lines where there is no terminal, a bar where there is one, silence for short work."""

import io
import re
import sys

import numpy as np
import pytest
import torch

from cnf import progress as module
from cnf.cli import classify_main, train_main
from cnf.distributed import Group
from cnf.likelihood import check, evaluate, rank
from cnf.models import ModelConfig, SolverConfig, build
from cnf.objectives import assess
from cnf.progress import Progress, progress


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


@pytest.fixture
def at_once(monkeypatch):
    """Lines without waiting."""
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)


def test_a_line_every_half_minute(clock, capsys):
    with Progress("test likelihood", 100) as work:
        for _ in range(100):
            clock.now += 10.0
            work.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "test likelihood: 3 of 100 batches in 30 seconds, about 16 minutes left"
    assert [int(re.search(r": (\d+) of", line)[1]) for line in lines] == list(range(3, 100, 3))
    assert lines[-1] == "test likelihood: 99 of 100 batches in 16 minutes, about 10 seconds left"


def test_slow_units_get_a_line_each_and_quick_work_none(clock, capsys):
    for seconds, lines in ((200.0, 3), (7.0, 0)):
        for i in progress(range(4), "decoding", 4):
            clock.now += seconds
            assert i < 4
        assert len(capsys.readouterr().err.splitlines()) == lines
    with Progress("quiet", 9, quiet=True) as work:
        clock.now += 1000.0
        work.advance()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_that_is_taken_away(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("short", 2) as work:
        work.advance(2)
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr(module, "BAR_DELAY", 0.0)
    with pytest.raises(ValueError, match="stop"), Progress("scoring", 3) as work:
        raise ValueError("stop")
    said = sys.stderr.getvalue()
    assert "scoring:   0%" in said and "0/3" in said and said.split("\r")[-2].strip() == ""


class Second(Group):
    """Rank 1 of 2, alone."""

    def __init__(self):
        super().__init__(1, 2)

    def sum(self, value):
        return value

    def largest(self, values):
        return list(values)


def test_evaluations_report_on_rank_0_and_give_the_same_figures(at_once, capsys):
    flow = build(ModelConfig(hidden=(8,), zero_init=False), SolverConfig(divergence="hutchinson"), (2,)).eval()
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    plain = evaluate(flow, x, draws=2, batch_size=4)
    told = evaluate(flow, x, draws=2, batch_size=4, progress="likelihood")
    assert torch.equal(plain.per_item, told.per_item)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" in ")[0] for line in lines] == [f"likelihood: {i} of 6 solves" for i in range(1, 6)]
    assert check(flow, x, batch_size=4) == check(flow, x, batch_size=4, progress="check")
    names = ["check, as evaluated", "check, refined", "check, there and back"]
    units = ["solves", "solves", "batches"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" in ")[0] for line in lines] == [f"{name}: {i} of 3 {unit}" for name, unit in zip(names, units, strict=True) for i in (1, 2)]
    rank(flow, x, batch_size=4, progress="scoring")
    assert capsys.readouterr().err.count("scoring: ") == 2
    evaluate(flow, x, batch_size=4, progress="likelihood", group=Second())
    check(flow, x, batch_size=4, progress="check", group=Second())
    assert capsys.readouterr().err == ""
    assert [Group(r, 3).owned(7) for r in range(3)] == [3, 2, 2] and Group(2, 3).owned(1) == 0


def test_the_programs_report_their_evaluations(tmp_path, at_once, capsys, monkeypatch):
    monkeypatch.setattr("cnf.training.report.pictures", lambda *args: None)
    monkeypatch.setattr("cnf.training.predictions.predictor_pictures", lambda *args: None)
    short = ["--hidden", "4", "--steps", "2", "--batch-size", "20", "--warmup", "1", "--validation-items", "12"]
    run = tmp_path / "run"
    assert train_main(["digits", *short, "--limit", "60", "--test-items", "12", "--draws", "3", "--out", str(run)]) == 0
    said = capsys.readouterr().err
    assert "test likelihood: 2 of 3 solves in" in said and "validation likelihood" not in said
    assert train_main(["--evaluate", str(run), "--split", "validation", "--importance", "2", "--check"]) == 0
    assert "validation likelihood: 5 of 6 solves in" in capsys.readouterr().err
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 8, 8), dtype=np.uint8))
    assert train_main(["--evaluate", str(run), "--score", str(tmp_path / "x.npz")]) == 0
    assert "scoring: 2 of 3 solves in" in capsys.readouterr().err
    monkeypatch.setattr("cnf.objectives.supervised.BATCH_NUMBERS", 4)
    points = ["--data", "spheres2", "--toy-sizes", "60", "30", "8", *short[:6], "--warmup", "1"]
    assert classify_main([*points, "--out", str(tmp_path / "predicts")]) == 0
    said = capsys.readouterr().err
    assert "test predictions: 3 of 4 batches in" in said and "solver check: " in said


def test_predictions_report_too(at_once, capsys):
    from cnf.models import anode_mlp

    model, x = anode_mlp(2, 8, 1).eval(), torch.randn(9, 2)
    plain = assess(model, x, torch.zeros(9, 1), "regression", batch_size=3)
    told = assess(model, x, torch.zeros(9, 1), "regression", batch_size=3, progress="predictions")
    assert torch.equal(plain.outputs, told.outputs)
    assert capsys.readouterr().err.count("predictions: ") == 2
