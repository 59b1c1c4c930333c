"""The benchmarks' pieces at tiny sizes: the two sides of a comparison are one function, and bytes are counted right."""

import importlib.util
import json
import math
import sys

import pytest
import torch
from conftest import ROOT

from cnf.datasets import DataSplits
from cnf.models import ModelConfig, SolverConfig, build, build_predictor
from cnf.noise import Noise
from cnf.objectives import Likelihood
from cnf.presets import preset
from cnf.solvers import Adaptive, FixedGrid

sys.path.insert(0, str(ROOT / "benchmarks"))

import affjord_toy
import anode
import data_share
import measure
import memory
import zuko_cnf
import zuko_pair

needs_zuko = pytest.mark.skipif(importlib.util.find_spec("zuko") is None, reason="zuko is not installed")


def bent(dim: int) -> zuko_pair.Flow:
    """A flow whose field bends."""
    torch.manual_seed(3)
    flow = zuko_pair.our_flow(dim, "tanh")
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(2)
    return flow


@needs_zuko
def test_both_sides_are_one_function():
    flow = bent(3)
    other = zuko_pair.zuko_flow(flow, "tanh").double()
    other.transform.atol = other.transform.rtol = 1e-11
    other.transform.freqs = torch.arange(1, 4, dtype=torch.float64) * math.pi  # made in float32
    flow = flow.double().eval()
    flow.blocks[0].eval_solver = Adaptive("dopri5", 1e-11, 1e-11, quadratures_in_norm=True)
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(flow.log_prob(x), other().log_prob(x), rtol=0, atol=1e-9)


@needs_zuko
@pytest.mark.parametrize("mode", zuko_cnf.MODES)
def test_a_comparison_holds_both_to_the_tolerance(mode):
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    row = zuko_cnf.compare(bent(2), x, mode, "tanh", 1e-2, repeats=1)
    assert row["baseline_error"] <= 1e-2 and row["ours_error"] <= 1e-2
    assert row["baseline_default_error"] < 1e-4  # zuko's defaults are far tighter
    assert row["ours_gradient_error"] < 0.1 and row["baseline_gradient_error"] < 0.1
    assert min(row["baseline_s"], row["ours_s"], row["ratio"]) > 0
    assert measure.markdown([row], zuko_cnf.COLUMNS).count("\n") == 2


@needs_zuko
def test_the_fewest_steps_are_taken():
    flow, x = bent(2), torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    exact = zuko_pair.truth(flow, x, None)
    assert zuko_cnf.fit_steps(flow, x, exact, 1e-4) <= 1e-4
    steps = flow.blocks[0].solver.steps
    assert steps > 1
    flow.blocks[0].solver = FixedGrid("rk4", steps - 1)
    assert zuko_pair.error(flow.log_prob(x), exact, 2) > 1e-4


@needs_zuko
def test_the_real_data_are_standardised():
    for dim in (2, 6, 64):
        x = zuko_pair.data(dim, 500)
        assert x.shape[1] == dim
        torch.testing.assert_close(x.mean(0), torch.zeros(dim), rtol=0, atol=1e-5)
        torch.testing.assert_close(x.std(0), torch.ones(dim), rtol=0, atol=1e-4)


def test_without_zuko_a_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(zuko_cnf, "zuko", None)
    assert zuko_cnf.main(["--quick"]) == 1
    assert "pip install" in capsys.readouterr().err


def test_saved_and_living_bytes_of_a_known_graph():
    x = torch.ones(1000, requires_grad=True)
    known = {memory._key(x)}
    saved, alive = memory.Saved(known), memory.Alive(known)
    with alive:
        with saved.hooks:
            x.sigmoid().tanh()  # dropped: holds nothing
            y = x.exp()  # keeps y
            z = y.sin().cos()  # keeps y again, the same storage, and sin(y)
        assert saved.bytes() == 2 * 4000
        assert alive.now == alive.peak == 3 * 4000  # y, sin(y), z
        z.sum().backward()
        del y, z
    assert saved.bytes() == 0
    assert alive.now == 4000  # the gradient of x
    torch.testing.assert_close(x.grad, torch.full((1000,), -math.sin(math.sin(math.e)) * math.cos(math.e) * math.e))
    assert alive.peak > 3 * 4000


def conv_profile(gradient: str, steps: int) -> dict[str, int]:
    """Bytes of a step of a small convolutional flow."""
    torch.manual_seed(0)
    flow = build(
        ModelConfig(field="conv", hidden=(16, 16), layer="concat", nonlinearity="softplus"),
        SolverConfig(divergence="hutchinson", mode="reverse"),
        (1, 8, 8),
        levels=17,
    ).train()
    flow.blocks[0].solver = FixedGrid("rk4", steps, gradient)
    x = torch.randint(0, 17, (4, 1, 8, 8), dtype=torch.uint8)
    return memory.profile(Likelihood(flow, 0.01, 0.01), x, Noise(0))


def test_checkpointing_does_not_grow_with_the_steps():
    few, many = conv_profile("checkpoint", 4), conv_profile("checkpoint", 16)
    assert many["peak"] <= 1.15 * few["peak"] and many["saved"] <= 1.15 * few["saved"]
    plain, longer = conv_profile("direct", 4), conv_profile("direct", 16)
    assert longer["saved"] > 3.5 * plain["saved"]  # direct keeps every stage
    assert few["peak"] < 0.5 * plain["peak"]


def test_growth_is_read_off_the_rows():
    rows = [
        {"gradient": "checkpoint", "steps": 4, "saved_mib": 2.0, "peak_mib": 100.0, "rss_mib": 200.0},
        {"gradient": "checkpoint", "steps": 16, "saved_mib": 2.0, "peak_mib": 110.0, "rss_mib": 210.0},
        {"gradient": "direct", "steps": 4, "saved_mib": 90.0, "peak_mib": 100.0, "rss_mib": 200.0},
    ]
    found = memory.growth(rows, 4, 16)
    assert found == {"checkpoint": {"saved_mib": 0.0, "peak_mib": pytest.approx(0.1), "rss_mib": pytest.approx(0.05)}}
    assert memory.growth(rows, 4, 4) == {}


def test_the_share_of_getting_a_batch():
    x = torch.randint(0, 17, (64, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    row = data_share.share("tiny", preset("digits").config, DataSplits("tiny", "image", x, x, x, levels=17), 16, 2)
    parts = sum(row[f"{k}_ms"] for k in ("index", "dequantise", "probe", "shuffle"))
    assert row["share"] == pytest.approx(parts / row["step_ms"])
    assert 0 < row["share"] < 1


def test_rows_are_added_beside_those_of_others(tmp_path):
    file = tmp_path / "results.json"
    measure.record(file, "a", ["--quick"], [{"x": 1}], {"cpu": "any"})
    measure.record(file, "b elu", [], [{"y": 2}], {"cpu": "any"})
    found = json.loads(file.read_text())
    assert found["a"]["rows"] == [{"x": 1}] and found["b elu"]["command"] == "python benchmarks/b.py"
    assert found["a"]["command"] == "python benchmarks/a.py --quick"


def test_functions_are_timed_in_turn():
    order: list[str] = []
    found = measure.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, warmup=1)
    assert order == ["a", "b"] * 3
    assert set(found) == {"a", "b"} and found["a"]["wall"] >= found["a"]["fastest"] >= 0


def test_models_of_the_three_spheres_share_one_budget():
    counts = {n: sum(p.numel() for p in build_predictor(c, SolverConfig(), (2,), outputs=3).parameters()) for n, c in anode.THREE.items()}
    assert len(counts) == 8 and all(1250 <= n <= 1320 for n in counts.values()), counts


def test_anode_rows_become_tables(tmp_path, capsys):
    rows = [anode.three("vanilla NODE", seed, 1) for seed in (0, 1)]
    assert rows[0]["nfe"] > 0 and 0 < rows[0]["test_accuracy"] < 1 and rows[0]["parameters"] == 1298
    accuracies = [100 * r["test_accuracy"] for r in rows]
    line = anode.table(rows).splitlines()[2]
    assert line.startswith("| 1 | vanilla NODE | 1,298 | 2 |") and f"{sum(accuracies) / 2:.1f} ± " in line
    anode.draw_three(rows, tmp_path / "three.png")
    fits = [anode.fit("anode-flip", "flip", 0, 1)]
    assert len(fits[0]["loss"]) == len(fits[0]["nfe"]) == 1 and f"{fits[0]['test']:.2g}" in anode.table(fits)


def test_affjord_toy_does_not_mix_lengths(tmp_path, capsys):
    results = tmp_path / "rows.json"
    results.write_text(json.dumps({"rows": [{"data": "checkerboard", "drive": "none", "seed": 0, "steps": 7}]}), encoding="utf-8")
    with pytest.raises(SystemExit):
        affjord_toy.main(["--results", str(results), "--sets", "checkerboard", "--densities", str(tmp_path)])
    assert "holds checkerboard after 7 steps, not 4000" in capsys.readouterr().err
