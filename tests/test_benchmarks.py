"""The benchmarks' pieces at tiny sizes: the two sides of a comparison are one function, and bytes are counted right."""

import importlib.util
import itertools
import json
import math
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, mostly_slow
from test_datasets_large import faces

from cnf import CNF, Flow
from cnf.config import FlowConfig, SolverConfig, preset
from cnf.data import DataSplits
from cnf.fields import MLP
from cnf.losses import Likelihood
from cnf.models import build, build_predictor
from cnf.random import Noise
from cnf.solvers import Adaptive, FixedGrid

sys.path.insert(0, str(ROOT / "benchmarks"))

import affjord_toy
import anode
import automatic_steps
import costs
import data_share
import few_steps
import image_pair
import jax_cnf
import matching
import measure
import memory
import modes
import one_point
import published_formulation as published
import speed
import step_profile
import stopwatch
import survey
import time_to_loss
import torchdyn_cnf
import zuko_cnf
import zuko_pair

needs_torchdyn = pytest.mark.skipif(torchdyn_cnf.NeuralODE is None, reason="torchdyn is not installed")
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
@pytest.mark.slow
@pytest.mark.parametrize("mode", zuko_cnf.MODES)
def test_a_comparison_holds_both_to_the_tolerance(mode):
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    row = zuko_cnf.compare(bent(2), x, mode, "tanh", 1e-2, repeats=1)
    assert row["baseline_error"] <= 1e-2 and row["ours_error"] <= 1e-2
    assert row["baseline_default_error"] < 1e-4  # zuko's defaults are far tighter
    assert row["ours_gradient_error"] < 0.1 and row["baseline_gradient_error"] < 0.1
    assert min(row["baseline_s"], row["ours_s"], row["ratio"]) > 0
    assert measure.markdown([row], zuko_cnf.COLUMNS).count("\n") == 2


@pytest.mark.slow
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


def test_without_jax_a_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(jax_cnf, "jax", None)
    assert jax_cnf.main(["--quick"]) == 1
    assert "pip install" in capsys.readouterr().err


@pytest.mark.skipif(jax_cnf.jax is None, reason="jax, diffrax or equinox is not installed")
def test_jax_sides_are_the_same_function():
    flow, x = bent(3).eval(), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    parameters, rows = jax_cnf.weights(flow), x.numpy()
    truth = flow.log_prob(x, solver=FixedGrid("rk4", 20)).detach()
    for program in (jax_cnf.closed_form, jax_cnf.by_diffrax):
        found = torch.tensor(jax_cnf.jax.device_get(program(parameters, rows, 20)))
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dim", [2, 43])
def test_the_plain_program_is_the_same_arithmetic(dim):
    torch.manual_seed(0)
    flow, x = Flow(CNF(MLP(dim, (64, 64))), (dim,)).eval(), torch.randn(3, dim)
    with torch.no_grad():
        ours = flow.log_prob(x, solver=FixedGrid("rk4", 4))
        torch.testing.assert_close(one_point.plain_log_prob(flow.blocks[0].field, 4)(x), ours, rtol=0, atol=1e-4)


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
        FlowConfig.of(field="conv", hidden=(16, 16), time_conditioning="concat", nonlinearity="softplus"),
        SolverConfig.of(divergence="hutchinson", hutchinson_mode="reverse"),
        (1, 8, 8),
        levels=17,
    ).train()
    flow.blocks[0].solver = FixedGrid("rk4", steps, gradient)
    x = torch.randint(0, 17, (4, 1, 8, 8), dtype=torch.uint8)
    return memory.profile(Likelihood(flow, 0.01, 0.01), x, Noise(0))


@pytest.mark.slow
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
    measure.record(file, "b elu", [], [{"y": 2, "z": math.nan}], {"cpu": "any"})
    found = json.loads(file.read_text())
    assert found["a"]["rows"] == [{"x": 1}] and found["b elu"]["command"] == "python benchmarks/b.py"
    assert found["b elu"]["rows"] == [{"y": 2, "z": None}]
    assert found["a"]["command"] == "python benchmarks/a.py --quick"


def test_functions_are_timed_in_turn():
    order: list[str] = []
    found = measure.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, warmup=1)
    assert order == ["a", "b"] * 3
    assert set(found) == {"a", "b"} and found["a"]["wall"] >= found["a"]["fastest"] >= 0


def test_models_of_the_three_spheres_share_one_budget():
    """The survey's widths 15, 11 and 14 (2002.08071) with 4 and 7 terms and 5 pieces, and others of about 1,300 parameters."""
    models = [preset(name).config.model for name in survey.NETS]
    counts = [sum(p.numel() for p in build_predictor(model, SolverConfig(), (2,), outputs=3).parameters()) for model in models]
    assert all(getattr(model, "field", model).nonlinearity == "tanh" for model in models)
    assert counts[-3:] == [1277, 1332, 1419]
    assert len(counts) == 8 and all(1250 <= n <= 1420 for n in counts), counts


@pytest.mark.slow
def test_anode_rows_become_tables():
    rows = [survey.three("survey-node", seed, 1)[0] for seed in (0, 1)]
    assert rows[0]["nfe"] > 0 and 0 < rows[0]["test_accuracy"] < 1 and rows[0]["parameters"] == 1298
    accuracies = [100 * r["test_accuracy"] for r in rows]
    line = survey.table(rows).splitlines()[2]
    assert line.startswith("| survey-node | three-spheres | 1 | 1,298 | 2 |") and f"{sum(accuracies) / 2:.1f} ± " in line
    assert survey.three("survey-node", 0, 1, "disjoint-spheres")[0]["test_accuracy"] != rows[0]["test_accuracy"]
    fits = [anode.fit("anode-flip", "flip", 0, 1)]
    assert len(fits[0]["loss"]) == len(fits[0]["nfe"]) == 1 and f"{fits[0]['test']:.2g}" in anode.table(fits)


def test_affjord_toy_does_not_mix_lengths(tmp_path, capsys):
    results = tmp_path / "rows.json"
    results.write_text(json.dumps({"rows": [{"data": "checkerboard", "drive": "none", "seed": 0, "steps": 7}]}), encoding="utf-8")
    with pytest.raises(SystemExit):
        affjord_toy.main(["--results", str(results), "--sets", "checkerboard", "--densities", str(tmp_path)])
    assert "holds checkerboard after 7 steps, not 4000" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        affjord_toy.main(["--results", str(results), "--sets", "mnist", "--densities", str(tmp_path)])
    assert "give --minutes" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("data", ["mnist", "celeba"])
def test_affjord_on_images_stops_after_cpu_minutes(tmp_path, data):
    words = ["--sets", data, "--drives", "none", "--seeds", "0", "--minutes", "0.0001", "--test-items", "2"]
    if data == "mnist":
        x = torch.randint(0, 256, (60, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8).numpy()
        np.savez(tmp_path / "images.npz", x=x)
        words += ["--path", str(tmp_path / "images.npz")]
    else:
        faces(tmp_path, 60)
        words += ["--data-root", str(tmp_path)]
    affjord_toy.main([*words, "--results", str(tmp_path / "rows.json"), "--densities", str(tmp_path), "--pictures", str(tmp_path)])
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["steps"] <= 1 and row["cpu_minutes"] == 0.0001 and math.isfinite(row["test"])
    assert (tmp_path / f"affjord-{data}-curves.png").exists()


SMALL = {"hidden": (6, 6, 6), "blocks": 1}
IMAGE = (1, 8, 8)


def pair(case: str, steps: int = 4, mode: str = "fused") -> tuple[published.Published, modes.Ours, torch.Tensor, published.Draws]:
    """The published formulation and ours with the same bent weights in float64, images and noise."""
    config = modes.case_config(case, **SMALL)
    torch.manual_seed(0)
    # eᵀJ, whose square the published codes penalise
    one = modes.ours(replace(config, solver=config.solver.change(hutchinson_mode="reverse")), modes.MODES[mode], steps, shape=IMAGE)
    one.flow.double()
    with torch.no_grad():
        for p in one.flow.parameters():
            p.mul_(1.5 if p.ndim else 1)
    settings = replace(image_pair.CASES[case], hidden=6, blocks=1)
    model = published.Published(IMAGE, replace(settings, steps=steps if settings.steps else 0)).double()
    published.share_weights(one.flow, model)
    return model, one, modes.images(3, shape=IMAGE), published.draw(model, 3, torch.Generator().manual_seed(1))


def gradients(model: published.Published, one: modes.Ours, x: torch.Tensor, draws: published.Draws, term: str) -> list[torch.Tensor]:
    """Of both sides, the published one's first."""
    found = []
    for side, terms in ((model, model(x, draws)), (one.flow, one.objective(x, noise=published.replay(one.flow, draws)))):
        side.zero_grad()
        terms[term].mean().backward()
        found.append(published.gradient(side))
    return found


def test_the_published_model_has_the_published_size():
    for settings in image_pair.CASES.values():
        assert sum(p.numel() for p in published.Published((1, 28, 28), settings).parameters()) == 800_636
    one = replace(published.FFJORD, blocks=1)
    assert sum(p.numel() for p in published.Published((3, 32, 32), one).parameters()) == 679_434


@pytest.mark.slow
def test_the_published_formulation_is_our_function():
    model, one, x, draws = pair("rnode-mnist")  # both: rk4, four steps
    theirs, mine = model(x, draws), one.objective(x, noise=published.replay(one.flow, draws))
    for term in ("loss", "nll"):
        torch.testing.assert_close(theirs[term], mine[term], rtol=1e-10, atol=0)
    assert float((mine["loss"] - mine["nll"]).min()) > 0  # the regularisers are in it
    assert model.evaluations() == 3 * 16 and model.evaluations() == 0
    model, one, x, draws = pair("ffjord-mnist")  # dopri5 against a fine grid
    model.settings = replace(model.settings, tolerance=1e-9)
    modes.grid(one.flow, 32)
    mine = one.objective(x, noise=published.replay(one.flow, draws))
    torch.testing.assert_close(model(x, draws)["loss"], mine["loss"], rtol=1e-7, atol=0)
    a, b = gradients(model, one, x, draws, "loss")
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_adjoint_nears_our_gradient_at_the_order_of_the_method():
    errors = []
    for steps in (2, 4, 8):
        a, b = gradients(*pair("rnode-mnist", steps), "loss")  # of the regularisers too
        errors.append(float((a - b).norm() / b.norm()))
    assert errors[2] > 1e-13  # above rounding
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) > 3.5
    rows = costs.gradient_orders((2, 4))
    assert rows[0]["gradient_difference"] > 10 * rows[1]["gradient_difference"]
    assert max(row["loss_difference"] for row in rows) < 1e-13


@pytest.mark.parametrize("mode", mostly_slow([name for name, mode in modes.MODES.items() if not mode.compiled and not mode.low], "fused"))
def test_our_modes_have_one_gradient(mode):
    a, b = (gradients(*pair("rnode-mnist", mode=name), "nll")[1] for name in ("plain", mode))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_a_row_of_the_published_comparison():
    x = modes.images(3, shape=IMAGE)
    chosen = [modes.MODES[name] for name in ("plain", "fused")]
    rows = image_pair.compare("rnode-mnist", 3, chosen, x, 1, shrink=SMALL)
    rows += image_pair.compare("ffjord-mnist", 2, chosen[1:], x, 1, gradient="checkpoint", shrink=SMALL)
    assert [row["gradient"] for row in rows] == ["direct", "direct", "checkpoint"]
    assert [row["baseline_nfe"] for row in rows[:2]] == [row["ours_nfe"] for row in rows[:2]] == [48, 48]
    for row in rows:
        assert row["gradient_difference"] < 1e-3 and row["ours_error"] < 1e-3
        assert row["ratio"] == row["baseline_s"] / row["ours_s"] and row["floor_ratio"] > 0.05
    assert rows[1]["plain_difference"] < 1e-5
    assert measure.markdown(rows, image_pair.COLUMNS).count("\n") == 4


def test_evaluations_are_counted_block_by_block():
    _, one, x, _ = pair("rnode-mnist", steps=2)
    counts = modes.evaluations(one, x, Noise(0))
    assert counts == [((3, 1, 8, 8), 8), ((3, 4, 4, 4), 8), ((3, 2, 4, 4), 8)]
    assert "forward" not in vars(one.flow.blocks[0])  # the watch is gone
    assert modes.floor(one, counts, 1) > 0


def test_images_look_like_mnist():
    x = modes.images(5)
    assert x.shape == (5, 1, 28, 28) and x.dtype == torch.uint8 and x.max() > 200
    assert not x[:, :, :4].any() and not x[..., -4:].any()  # a black border


@pytest.mark.parametrize("case", costs.FIELDS)
def test_the_traces_of_a_cost_table_are_of_one_field(case):
    sizes = {"batch": 2, "dim": 2, "steps": 2, "width": 4}
    exact, tangents = (costs.block_of(case, modes.MODES["fused"], trace, **sizes)[1]() for trace in ("exact", "tangents"))
    torch.testing.assert_close(exact, tangents, rtol=1e-5, atol=1e-5)
    for varied, found in costs.settings(case):
        assert sum(found[k] != v for k, v in costs.FIELDS[case]["base"].items()) == (varied != "base")


def test_time_to_a_loss():
    cases = time_to_loss.cases()
    sizes = [time_to_loss.parameters(config.model) for config in cases.values()]
    assert max(sizes) < 1.01 * min(sizes) and [c.solver.divergence.kind for c in cases.values()] == ["exact"] + 2 * ["hutchinson"]
    config = replace(preset("digits").config, model=FlowConfig.of(hidden=(8,), preprocess="gaussianize", alpha=1e-4))
    config = replace(config, data=config.data.change(max_train_rows=64), train=config.train.change(batch_size=16, validation_items=8))
    row = time_to_loss.run("tiny", config, 100.0, max_steps=2)
    assert row["reached"] and row["steps"] == 2 and 0 < row["seconds"] < 20
    assert not time_to_loss.run("tiny", config, 0.0, max_steps=1)["reached"]


@pytest.mark.slow
def test_updates_are_timed_while_training():
    x = modes.images(20, shape=IMAGE)
    splits = DataSplits("tiny", "image", x[4:], x[:4], x[:4], levels=256)
    rows = automatic_steps.automatic_steps(modes.MODES["fused"], 3, 4, validation=4, repeats=1, change=SMALL, splits=splits)
    assert rows[0]["grid"] == "fixed" and rows[0]["last_steps"] == "4-4-4" and rows[0]["mean_steps"] == 4
    for row in rows:
        assert row["ratio"] == row["baseline_s"] / row["ours_s"] and row["compiling_updates"] == row["skipped"] == 0
        assert math.isfinite(row["validation"]) and row["difference"] == row["validation"] - rows[0]["validation"]
    assert measure.markdown(rows, automatic_steps.AUTOMATIC_COLUMNS).count("\n") == 1 + len(rows)


def test_compilation_is_what_compiling_updates_take_beyond_the_others():
    watch = object.__new__(stopwatch.Stopwatch)
    watch.updates, watch.compiling = [9.0, 1.0, 2.0, 6.0, 3.0], [True, False, False, True, False]
    assert watch.compilation == pytest.approx((9 - 2) + (6 - 2))


def test_no_turn_is_begun_that_would_pass_the_deadline():
    found = measure.alternate({"a": lambda: time.sleep(0.02)}, 50, warmup=0, deadline=time.perf_counter() + 0.1)
    assert 1 <= found["a"]["repeats"] <= 5
    assert measure.alternate({"a": lambda: None}, 3, deadline=time.perf_counter())["a"]["repeats"] == 1


def test_the_machine_tells_its_flags():
    assert "flags" in measure.machine()


def test_a_profile_tells_convolutions_from_the_rest():
    groups = [step_profile.group(name) for name in ("aten::mkldnn_convolution", "aten::softplus", "aten::addmm", "graph_0_cpp_fused_mul", "aten::mul")]
    assert groups == ["convolutions", "activations", "matrix products", "fused by torch.compile", "rest"]
    text = step_profile.step_profile(lambda: torch.nn.functional.conv2d(torch.ones(1, 1, 9, 9), torch.ones(1, 1, 3, 3)))
    assert "| convolutions |" in text and "conv" in text


@pytest.mark.slow
def test_speed_writes_its_rows(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert speed.main(["--quick", "--parts", "orders", "--threads", "1", "--json", str(file)]) == 0
    found = json.loads(file.read_text())["speed orders"]
    assert found["threads"] == 1 and [row["steps"] for row in found["rows"]] == [2, 4, 8]
    assert "| rnode, 8x8 | 4 |" in capsys.readouterr().out


def test_without_torchdyn_a_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(torchdyn_cnf, "NeuralODE", None)
    assert torchdyn_cnf.main(["--quick"]) == 1
    assert "pip install" in capsys.readouterr().err


@needs_torchdyn
def test_torchdyn_has_our_function():
    flow = bent(3).double().eval()
    flow.blocks[0].eval_solver = Adaptive("dopri5", 1e-11, 1e-11, quadratures_in_norm=True)
    other = torchdyn_cnf.Torchdyn(flow, "tanh").double()
    other.transform.atol = other.transform.rtol = 1e-10
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(flow.log_prob(x), other.log_prob(x), rtol=0, atol=1e-7)


@needs_torchdyn
@pytest.mark.parametrize("sensitivity", torchdyn_cnf.SENSITIVITIES)
def test_torchdyn_is_held_to_the_tolerance(sensitivity):
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    row = torchdyn_cnf.compare(bent(2), x, "both hutchinson", "tanh", 1e-4, repeats=1, sensitivity=sensitivity)
    assert row["baseline_error"] <= 1e-4 and row["ours_error"] <= 1e-4
    assert row["ours_gradient_error"] < 0.1 and row["baseline_gradient_error"] < 0.1
    assert measure.markdown([row], torchdyn_cnf.COLUMNS).count("\n") == 2


def gaussian_splits(n=4000):
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 3.0]) + 5
    return DataSplits("points", "table", x[: n // 2], x[n // 2 : 3 * n // 4], x[3 * n // 4 :])


def test_the_sides_beside_matching_know_a_gaussian(monkeypatch):
    monkeypatch.setattr(matching, "MIXTURES", (1, 2))
    truth = math.log(2 * math.pi * math.e) + math.log(3)  # its entropy in nats
    found = matching.mixture(gaussian_splits())
    assert found["components"] in (1, 2) and found["test"] == pytest.approx(truth, abs=0.1)


@pytest.mark.slow
@needs_zuko
def test_the_spline_flow_learns_a_gaussian():
    truth = math.log(2 * math.pi * math.e) + math.log(3)
    spline = matching.spline(gaussian_splits(), 3.0)
    assert spline["test"] == pytest.approx(truth, abs=0.3) and spline["steps"] > 0


@pytest.mark.parametrize("side", mostly_slow(matching.SIDES, "matching"))
def test_a_side_of_the_matching_comparison_trains_and_is_tested(tmp_path, monkeypatch, side):
    monkeypatch.setattr(matching, "TIMED", {False: 2, True: 2})
    found = matching.ours(gaussian_splits(), "points", side, 1.0, tmp_path)
    assert found["steps"] >= 1 and math.isfinite(found["test"]) and 0 < float(found["straight"]) <= 1
    assert measure.markdown([{"data": "points", "side": side, "above": "", **found}], matching.COLUMNS).count("\n") == 2


def test_energy_distance_is_zero_for_one_distribution_and_known_for_two_points():
    x, y = torch.randn(2, 600, 3, generator=torch.Generator().manual_seed(0))
    assert abs(few_steps.energy_distance(x, y)) < 0.05 < few_steps.energy_distance(x, y + 1)
    a, b = torch.zeros(4, 1), torch.full((4, 1), 3.0)
    assert few_steps.energy_distance(a, b) == pytest.approx(6.0)
