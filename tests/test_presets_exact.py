"""The presets of the exact trace: their sizes, that the trace is the closed form and right, and what it does to the gradient."""

import dataclasses
import json
import math
import sys

import pytest
import torch
from conftest import ROOT, mostly_slow
from trainers import training

from cnf.config import PRESETS, RNODE, FlowConfig, SolverConfig, preset
from cnf.data import DataSplits
from cnf.losses import Likelihood
from cnf.models import build, count_parameters
from cnf.ode.divergence import Exact, Hutchinson, closed
from cnf.random import Noise
from cnf.runs import RunInfo
from cnf.solvers import FixedGrid

sys.path.insert(0, str(ROOT / "benchmarks"))

import exact
import precision

from cnf.transforms import Request

NAMES = ("exact-digits", "exact-mnist", "exact-tabular")
# the same models where they are large: narrower, on smaller images
SMALL = {"exact-digits": ((12, 12), (1, 8, 8)), "exact-mnist": ((5, 5), (1, 8, 8)), "exact-tabular": ((83, 83), (6,))}


def parameters(model: FlowConfig, shape: tuple[int, ...], levels: int | None = None) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(model, SolverConfig(), shape, levels=levels).parameters())


def items(name: str, n: int, seed: int = 0) -> torch.Tensor:
    entry, shape = preset(name), SMALL[name][1]
    generator = torch.Generator().manual_seed(seed)
    if entry.levels is None:
        return torch.randn(n, *shape, dtype=torch.float64, generator=generator)
    return torch.randint(0, entry.levels, (n, *shape), dtype=torch.uint8, generator=generator)


def flow(name: str, *, gain: float = 2.0, **solver):
    """The preset's flow, small, in float64, with a field that bends."""
    config = preset(name).config
    model = config.model.change(hidden=SMALL[name][0], zero_init=False)
    settings = config.solver.change(grid_steps=2, **solver)
    torch.manual_seed(0)
    made = build(model, settings, SMALL[name][1], levels=preset(name).levels).double()
    made.fit_statistics(items(name, 64, seed=1))
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(gain if p.ndim > 1 else 1)
    return made.train()


def objective(name: str, made) -> Likelihood:
    settings = preset(name).config.train.objective
    return Likelihood(made, settings.kinetic, settings.jacobian, settings.regularisers)


def gradient(goal: Likelihood, x: torch.Tensor, noise: Noise, term: str = "nll") -> torch.Tensor:
    goal.zero_grad()
    goal(x, noise=noise)[term].mean().backward()
    return torch.cat([p.grad.flatten() for p in goal.parameters() if p.grad is not None])


def test_as_many_parameters_as_the_published_fields():
    """The widest two hidden layers with no more than the three published ones."""
    mnist, table = (preset(f"exact-{name}").config.model for name in ("mnist", "tabular"))
    for model, published, shape, levels in (
        (mnist, count_parameters(RNODE, (1, 28, 28)), (1, 28, 28), 256),
        (table, parameters(FlowConfig.of(hidden=(60,) * 3, blocks=5, learn_end_time=True), (6,)), (6,), None),
    ):
        width = model.field.hidden[0]
        assert model.field.hidden == (width, width)
        wider = model.change(hidden=(width + 1,) * 2)
        assert parameters(model, shape, levels) <= published < parameters(wider, shape, levels)
        assert parameters(model, shape, levels) > 0.98 * published
    assert count_parameters(RNODE, (1, 28, 28)) == 800_636
    assert mnist.change(hidden=(64,) * 3) == RNODE.change(alpha=1e-5)
    rnode, ours = preset("rnode-mnist").config.train, preset("exact-mnist").config.train
    assert (ours.objective.kinetic, ours.objective.jacobian) == (0.01, 0.01)
    assert ours == rnode


@pytest.mark.parametrize("name", NAMES)
def test_every_block_takes_the_closed_form(name):
    entry = preset(name)
    with torch.device("meta"):
        made = build(entry.config.model, entry.config.solver, entry.shape, levels=entry.levels)
    for block in made.blocks:
        assert isinstance(block.divergence, Exact) and block.field.closed_form and closed(block.divergence, block.field)
        assert isinstance(block.solver, FixedGrid) and (block.solver.method, block.solver.steps) == ("rk4", 1)
    assert entry.config.solver.train_solver.automatic_steps and len(entry.config.model.field.hidden) == 2


@pytest.mark.parametrize("name", NAMES)
def test_the_likelihood_and_its_gradient_are_those_of_all_tangents(name):
    made, x = flow(name), items(name, 3)
    goal = objective(name, made)
    mine, value = gradient(goal, x, Noise(0)), goal(x, noise=Noise(0))["nll"]
    for block in made.blocks:
        block.divergence = Exact(closed_form=False)
    torch.testing.assert_close(goal(x, noise=Noise(0))["nll"], value, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradient(goal, x, Noise(0)), mine, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", mostly_slow(NAMES, "exact-digits", "exact-tabular"))
def test_a_training_step_at_full_size(name, tmp_path):
    """The loss before any step is that of a field that is zero, for which log p is the base's behind the first transforms."""
    entry = preset(name)
    settings = entry.config.train.change(steps=1, batch_size=4, warmup=0, validate_every=1, solver_check_every=10**6)
    config = dataclasses.replace(entry.config, train=settings)
    if entry.levels is None:
        x = torch.randn(24, *entry.shape, generator=torch.Generator().manual_seed(0))
    else:
        x = torch.randint(0, entry.levels, (24, *entry.shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = DataSplits("tiny", "table" if entry.levels is None else "image", x[8:], x[:4], x[4:8], levels=entry.levels)
    trainer = training(RunInfo(config, entry.shape, entry.levels, 0, (), ()), data, tmp_path, quiet=True)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    batch, _, noise = trainer.batches(0)
    with torch.no_grad():
        trainer.model.train()
        out = trainer.model.evaluate(batch, Request(noise=noise))
        loss = float(trainer.objective(batch, noise=noise)["loss"].mean())
    zero = -(trainer.model.base_log_prob(out.value) + out.log_det).mean()
    scale = 1.0 if entry.levels is None else math.log(2) * trainer.model.dim
    assert loss == pytest.approx(float(zero) / scale, rel=1e-5)
    assert {float(v.abs().max()) for v in out.integrals.values()} == {0.0}  # nothing moves yet
    trainer.update()
    values = trainer.read_metrics()
    assert values is not None and values["loss"] == pytest.approx(loss, rel=1e-5)
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)]
    assert any(moved) and all(bool(p.isfinite().all()) for p in trainer.model.parameters())


@pytest.mark.parametrize("name", mostly_slow(NAMES, "exact-digits", "exact-tabular"))
def test_the_gradient_varies_less_than_with_an_estimate(name):
    """The same field: with Hutchinson's trace the probe adds a variance of its own to that of the pixels' noise."""
    x = items(name, 4)
    probe = ("probe", "stage")
    exactly = objective(name, flow(name))
    estimate = objective(name, flow(name, divergence="hutchinson"))
    assert torch.equal(*(gradient(exactly, x, exact.Redrawn(i, frozenset(probe))) for i in range(2)))
    draws = 12
    added, _ = exact.spread(gradient(estimate, x, exact.Redrawn(i, frozenset(probe))) for i in range(draws))
    everything = frozenset({*probe, "dequantize"})
    mine, theirs = (exact.spread(gradient(g, x, exact.Redrawn(i, everything)) for i in range(draws))[0] for g in (exactly, estimate))
    assert added > 0 and theirs > mine + 0.3 * added
    assert (mine == 0) == (preset(name).levels is None)


def test_spread_is_that_of_known_draws():
    generator = torch.Generator().manual_seed(0)
    mean = torch.linspace(-1, 1, 50, dtype=torch.float64)
    drawn = [mean + 0.5 * torch.randn(50, dtype=torch.float64, generator=generator) for _ in range(2000)]
    variance, square = exact.spread(iter(drawn))
    assert variance == pytest.approx(50 * 0.25, rel=0.03)
    assert square == pytest.approx(float(mean.square().sum()), rel=0.02)
    few = [exact.spread(iter(drawn[i : i + 4]))[1] for i in range(0, 2000, 4)]  # unbiased for few draws too
    assert sum(few) / len(few) == pytest.approx(float(mean.square().sum()), rel=0.03)


def test_redrawn_moves_what_is_named_alone():
    a, b = (exact.Redrawn(i, exact.PROBE).child(3) for i in (1, 2))
    assert torch.equal(a.draw("dequantize", "uniform", (4,)), b.draw("dequantize", "uniform", (4,)))
    assert not torch.equal(a.draw("probe", "normal", (4,)), b.draw("probe", "normal", (4,)))
    assert torch.equal(a.draw("probe", "normal", (4,)), exact.Redrawn(1, exact.PROBE).child(3).draw("probe", "normal", (4,)))


@pytest.mark.parametrize(("case", "width"), [("mnist", 64), ("tabular", 60), ("digits", 46)])
def test_the_published_side_has_as_many_parameters(case, width):
    entry = preset(f"exact-{case}")
    found = exact.sides(case, RunInfo(entry.config, entry.shape, entry.levels, 0, (), ()))
    assert [config.model.field.hidden for config in found.values()] == [entry.config.model.field.hidden, (width,) * 3, entry.config.model.field.hidden]
    mine, theirs, _ = (parameters(config.model, entry.shape, entry.levels) for config in found.values())
    assert abs(mine - theirs) < 0.012 * mine
    divergences = [build(c.model, c.solver, entry.shape, levels=entry.levels).blocks[0].divergence for c in list(found.values())[1:]]
    assert all(isinstance(d, Hutchinson) and d.mode == "forward" and d.probes == 1 for d in divergences)


@pytest.mark.slow
def test_the_comparison_writes_its_rows(tmp_path, capsys, monkeypatch):
    for name in ("exact-tabular", "exact-digits"):
        entry = preset(name)
        model = entry.config.model.change(hidden=(8, 8), blocks=1)
        monkeypatch.setitem(
            PRESETS, name, dataclasses.replace(entry, config=dataclasses.replace(entry.config, model=model))
        )
    file = tmp_path / "rows.json"
    words = ["--seconds", "0.2", "--points", "1", "--items", "16", "--noise", "1", "--batch", "16", "--draws", "3", "--turns", "1", "--threads", "1", "--seeds", "0", "1"]
    assert exact.main(["--cases", "digits", "tabular", *words, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    rows = found["exact"]["rows"]
    assert [(r["case"], r["seed"]) for r in rows] == [(c, s) for c in ("digits", "tabular") for s in (0, 0, 1, 1)]
    for row in rows:
        assert row["seconds"] >= 0.2 and row["steps"] >= 1 and math.isfinite(row["validation"]) and not row["skipped"]
        assert (row["difference"] == 0) == (row["side"] == exact.SIDES[0])
    for row in found["exact variance"]["rows"]:
        # the Jacobian's penalty, a part of the loss alone, takes a probe beside the exact trace too
        free = (row["side"], row["term"]) == (exact.SIDES[0], "nll")
        assert (row["probe"] == 0) == free and row["total"] > 0
    assert [row["ratio"] == row["baseline_s"] / row["ours_s"] for row in found["exact steps"]["rows"]] == 6 * [True]
    assert "| tabular | three hidden layers, Hutchinson |" in capsys.readouterr().out


@pytest.mark.slow
def test_precision_is_compared_and_evaluation_is_in_float32(tmp_path, capsys):
    digits = precision.load_splits(preset("exact-digits").config)
    row = precision.compare("digits", [0, 1], 4, dataclasses.replace(digits, validation=digits.validation[:8]), 1)
    assert row["seeds"] == 2 and 0 < row["rounding"] < 0.1 and 0 < row["to_noise"] < 0.1 and 0 < row["largest"] < 0.1
    assert row["bf16"] - row["fp32"] == pytest.approx(row["difference"], abs=1e-12)
    precision.draw([row], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000
