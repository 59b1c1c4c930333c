"""Models from settings: published sizes, published starts, presets as their sources say, and what cannot be built."""

import math
from functools import partial

import pytest
import torch
from conftest import F64

from cnf.cli import main
from cnf.cli.options import parse, renamed
from cnf.config import FFJORD, PRESETS, PUBLISHED, RNODE, FlowConfig, SolverConfig, preset
from cnf.config.presets.counts import PARAMETERS
from cnf.errors import ConfigError, DataError
from cnf.fields import ConvField, SqueezeSum
from cnf.losses import Likelihood
from cnf.models import build, build_predictor, count_parameters
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Hutchinson
from cnf.ode.quadratures import JacobianFrobenius, Kinetic
from cnf.random import Noise
from cnf.runs import RunInfo
from cnf.solvers import Adaptive, FixedGrid


@pytest.mark.parametrize("model", PUBLISHED, ids=lambda m: m.name)
def test_published_counts(model):
    if model.outputs:
        with torch.device("meta"):
            net = build_predictor(model.model, SolverConfig(), model.shape, outputs=model.outputs, levels=256)
        assert sum(p.numel() for p in net.parameters()) == model.count == model.parameters
        return
    own = count_parameters(model.model, model.shape)
    assert own == model.count
    if model.name.startswith("AFFJORD"):  # the difference, term by term
        terms = [int(term.split()[0].replace(",", "")) for term in model.reason.split("; ")]
        assert own == model.parameters + sum(terms)
        return
    if "squash" not in model.name or "concatsquash" in model.name:
        assert own == model.parameters and not model.reason
        return
    # the released squash convolution is built with an input channel more than it is given, which every layer pays for
    channels = {(1, 28, 28): (19, 5), (3, 32, 32): (129, 7)}[model.shape]
    surplus = channels[1] * 3 * 9 * 64 + 9 * channels[0]
    assert own == model.parameters - surplus and "cannot run" in model.reason


@pytest.mark.parametrize("name", PRESETS)
def test_counts_of_the_presets(name):
    entry = preset(name)
    with torch.device("meta"):
        model = RunInfo(entry.config, entry.shape, entry.levels, entry.outputs, (), ()).build()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_the_table_holds_every_count_that_is_known():
    found = {m.parameters for m in PUBLISHED}
    for number in (
        400_323, 679_441, 783_019, 1_332_361, 800_646, 1_358_882, 800_636, 1_358_868, 1_996_116, 4_609_236, 400_318,
        679_434, 998_058, 2_304_618, 518_960, 1_286_352, 391_512, 666_184, 394_449, 670_603, 402_281, 682_387,
        417_945, 705_955, 84_395, 84_816, 172_358, 171_799, 366_269, 365_714,
    ):  # fmt: skip
        assert number in found
    assert {m.model.blocks for m in PUBLISHED if not m.outputs} == {1, 2}


def test_counts_of_the_released_scripts_for_vectors():
    """FFJORD's README: 8gaussians 64-64-64, and MINIBOONE with two layers' width of 20 D."""
    toy = FlowConfig.of(hidden=(64, 64, 64), learn_end_time=True)
    table = FlowConfig.of(hidden=(860, 860), nonlinearity="softplus", learn_end_time=True)
    for model, dim, parameters in ((toy, 2, 9_225), (table, 43, 820_613)):
        flow = build(model, SolverConfig(), (dim,))
        assert sum(p.numel() for p in flow.parameters()) == parameters


def test_counting_makes_the_same_as_building():
    for model, shape in (
        (FFJORD.change(blocks=1), (1, 28, 28)),
        (RNODE.change(squeeze_first=True), (3, 32, 32)),
    ):
        built = build(model, SolverConfig(), shape, levels=256)
        assert sum(p.numel() for p in built.parameters()) == count_parameters(model, shape)
    # one more for every block whose end time is learned
    assert count_parameters(FFJORD, (1, 28, 28)) - count_parameters(FFJORD.change(learn_end_time=False), (1, 28, 28)) == 10
    with torch.device("meta"):
        assert len(build(RNODE, SolverConfig(), (3, 256, 256), levels=32).blocks) == 26


def test_list_prints_the_counts(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["list", "--published"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80  # without a terminal
    for model in PUBLISHED:
        assert f"{model.parameters:,}" in said
    assert "393,470" in said and "669,130" in said and "cannot run" in said


@pytest.mark.parametrize(("name", "shape", "levels", "blocks"), [
    ("ffjord-mnist", (1, 28, 28), 256, 10),
    ("ffjord-cifar10", (3, 32, 32), 256, 14),
    ("rnode-mnist", (1, 28, 28), 256, 10),
    ("rnode-cifar10", (3, 32, 32), 256, 14),
    ("rnode-imagenet64", (3, 64, 64), 256, 18),
    ("rnode-celebahq256", (3, 256, 256), 32, 26),
])  # fmt: skip
def test_presets_are_the_published_settings(name, shape, levels, blocks):
    entry = preset(name)
    model, solver, train = entry.config.model, entry.config.solver, entry.config.train
    assert (entry.shape, entry.levels, 2**entry.config.data.nbits) == (shape, levels, levels)
    assert entry.config.data.data == name.split("-")[1] and entry.config.name == name
    with torch.device("meta"):
        flow = build(model, solver, shape, levels=levels)
    assert len(flow.blocks) == blocks
    rnode = name.startswith("rnode")
    # both: Adam at 1e-3 after 1000 steps of linear warm-up, no decay, averaging or clipping
    assert (train.lr, train.warmup, train.schedule, train.weight_decay) == (1e-3, 1000, "constant", 0.0)
    assert (train.ema_decay, train.max_grad_norm, train.objective.regularisers) == (0.0, 0.0, "paper")
    assert train.batch_size == (12 if "celeba" in name else 200)
    assert (model.field.hidden, model.field.time_conditioning, model.field.nonlinearity, model.preprocess.kind) == (
        (64, 64, 64),
        "concat",
        "softplus",
        "logit",
    )
    assert (model.field.zero_init, model.learn_end_time, model.end_time) == (rnode, not rnode, 1.0)
    assert model.preprocess.alpha == (1e-6 if not rnode else 1e-5 if "mnist" in name else 0.05)
    assert (train.objective.kinetic, train.objective.jacobian) == ((0.0, 0.0) if not rnode else (0.01, 0.03 if "cifar" in name else 0.01))
    grid = name in ("rnode-mnist", "rnode-cifar10")
    assert getattr(solver.train_solver, "automatic_steps", False) == grid
    for block in flow.blocks:
        assert isinstance(block.divergence, Hutchinson) and block.divergence.probes == 1
        assert block.divergence.distribution == ("gaussian" if rnode else "rademacher")
        if grid:
            assert isinstance(block.solver, FixedGrid) and (block.solver.method, block.solver.steps) == ("rk4", 1)
        else:
            assert isinstance(block.solver, Adaptive)
            assert (block.solver.method, block.solver.rtol, block.solver.atol) == ("dopri5", 1e-5, 1e-5)
        assert isinstance(block.eval_solver, Adaptive)
        assert (block.eval_solver.method, block.eval_solver.rtol, block.eval_solver.atol) == ("dopri5", 1e-5, 1e-5)


def test_epochs_of_the_presets():
    steps = {name: preset(name).config.train.steps for name in PRESETS if "-" in name}
    assert steps["ffjord-mnist"] == 1000 * 60_000 // 200 and steps["ffjord-cifar10"] == 1000 * 50_000 // 200
    assert steps["rnode-mnist"] == 100 * 60_000 // 200 and steps["rnode-cifar10"] == 100 * 50_000 // 200
    assert abs(steps["rnode-imagenet64"] * 200 / 1_281_149 - 4) < 0.01
    assert steps["rnode-celebahq256"] * 12 == 16 * 27_000


def test_num_blocks_is_another_name_for_blocks():
    for words in (["--num-blocks", "1"], ["--blocks", "1"]):
        config = parse(renamed(["ffjord-mnist", *words]))[0].config
        assert config.model == FFJORD.change(blocks=1)


def test_the_codes_way_of_rnode_cifar10():
    solver = ["--train-solver", "adaptive", "--method", "dopri5", "--gradient", "adjoint"]
    config = parse(["rnode-cifar10", "--regularisers", "code", "--jacobian", "0.01", *solver])[0].config
    with torch.device("meta"):
        flow = build(config.model, config.solver, (3, 32, 32), levels=256)
    objective = Likelihood(flow, config.train.objective.kinetic, config.train.objective.jacobian, config.train.objective.regularisers)
    assert objective.weights == {"kinetic_mean": 0.01, "jacobian_mean": 0.01} and objective.scale == 1
    assert all(isinstance(b.solver, Adaptive) and b.solver.gradient == "adjoint" for b in flow.blocks)


def small(**changes):
    config = {
        "architecture": "multiscale",
        "field": "conv",
        "hidden": (4,),
        "time_conditioning": "concat",
        "nonlinearity": "softplus",
    }
    return FlowConfig.of(**config | {"preprocess": "logit", "alpha": 0.05} | changes)


def test_rnode_starts_as_nothing_but_the_logit():
    """f = 0 for every t and x: log p is the base's behind the logit, the regularisers are zero; and all learns."""
    torch.manual_seed(0)
    flow = build(
        small(blocks=2), SolverConfig.of(divergence="hutchinson", hutchinson_noise="gaussian"), (1, 8, 8), levels=256
    ).double()
    objective = Likelihood(flow, kinetic=0.01, jacobian=0.01)
    x = 0.1 + 0.8 * torch.rand(3, 1, 8, 8, dtype=F64)
    terms = objective(x, noise=Noise(0))
    s = 0.05 + 0.9 * x
    y = torch.log(s) - torch.log1p(-s)
    expected = (
        (torch.distributions.Normal(0, 1).log_prob(y) + math.log(0.9) - torch.log(s) - torch.log1p(-s))
        .flatten(1)
        .sum(1)
    )
    assert torch.allclose(terms["nll"], -expected / (64 * math.log(2)) + 8, atol=1e-10)
    assert torch.equal(terms["kinetic"], torch.zeros(3, dtype=F64)) and torch.equal(
        terms["jacobian"], torch.zeros(3, dtype=F64)
    )
    assert torch.equal(terms["loss"], terms["nll"])
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    moved = {name: 0.0 for name, _ in flow.named_parameters()}
    for step in range(3):
        optimizer.zero_grad()
        objective(x, noise=Noise(0, step=step))["loss"].mean().backward()
        for name, p in flow.named_parameters():
            moved[name] += float(p.grad.abs().sum())
        optimizer.step()
    assert all(moved.values()), [name for name, g in moved.items() if not g]
    # as it is released only the last weight is zero: a small constant stays
    released = ConvField(1, (4,))
    torch.nn.init.zeros_(released.layers[-1].core.weight)
    assert released(torch.tensor(0.0), torch.randn(1, 1, 8, 8)).abs().max() > 0


def test_the_codes_regularisers_are_means_over_each_block():
    """Against every block's raw integrals: half the kinetic energy's mean, the Jacobian's mean, summed over blocks."""
    torch.manual_seed(0)
    flow = build(
        small(zero_init=False), SolverConfig.of(divergence="hutchinson", hutchinson_mode="reverse"), (1, 8, 8), levels=256
    ).double()
    x = 0.1 + 0.8 * torch.rand(3, 1, 8, 8, dtype=F64)
    objective = Likelihood(flow, kinetic=0.3, jacobian=0.7, regularisers="code")
    terms = objective(x, noise=Noise(0))
    raw = Likelihood(
        build(
            small(zero_init=False), SolverConfig.of(divergence="hutchinson", hutchinson_mode="reverse"), (1, 8, 8), levels=256
        ).double()
    )
    raw.flow.load_state_dict(flow.state_dict())
    seen = []

    def watched(forward, x, *rest, **options):
        out = forward(x, *rest, **options)
        seen.append((x[0].numel(), out.integrals))
        return out

    for block in raw.flow.blocks:
        block.quadratures = (Kinetic(), JacobianFrobenius())
        block.forward = partial(watched, block.forward)
    plain = raw(x, noise=Noise(0))
    assert [n for n, _ in seen] == [64, 64, 32]
    kinetic = sum(0.5 * parts["kinetic"] / n for n, parts in seen)
    jacobian = sum(parts["jacobian"] / n for n, parts in seen)
    assert torch.allclose(terms["kinetic_mean"], kinetic, atol=1e-12)
    assert torch.allclose(terms["jacobian_mean"], jacobian, atol=1e-12)
    assert torch.allclose(terms["kinetic"], plain["kinetic"], atol=1e-12)  # always reported, raw
    assert torch.allclose(terms["loss"], plain["nll"] + 0.3 * kinetic + 0.7 * jacobian, atol=1e-12)
    paper = Likelihood(flow, kinetic=0.3, jacobian=0.7)(x, noise=Noise(0))
    assert "kinetic_mean" not in paper
    assert torch.allclose(
        paper["loss"], plain["nll"] + (0.3 * plain["kinetic"] + 0.7 * plain["jacobian"]) / (64 * math.log(2)), atol=1e-12
    )
    with pytest.raises(ConfigError, match="regularisers='both'"):
        Likelihood(flow, regularisers="both")


def test_fields_by_architecture():
    for shape, nets in (((3, 32, 32), 4), ((1, 28, 28), 3), ((1, 8, 4), 3), ((1, 2, 2), 2)):
        flow = build(small(architecture="parallel", blocks=2), SolverConfig(), shape, levels=256)
        assert len(flow.blocks) == 2 and flow.latent_shape == shape
        assert all(isinstance(b.field, SqueezeSum) and len(b.field.nets) == nets for b in flow.blocks)
    stack = build(small(architecture="stack", blocks=3, squeeze_first=True), SolverConfig(), (1, 8, 8), levels=256)
    assert len(stack.blocks) == 3 and stack.latent_shape == (4, 4, 4)
    assert all(isinstance(b, CNF) and b.field.layers[0].map.inputs == 4 for b in stack.blocks)
    strided = build(
        small(architecture="stack", hidden=(8, 32, 32, 8), strides=(2, 2, 1, -2, -2)),
        SolverConfig(),
        (1, 28, 28),
        levels=256,
    )
    maps = [(m.map.kernel, m.map.stride, m.map.transposed) for m in strided.blocks[0].field.layers]
    assert maps == [(4, 2, False), (4, 2, False), (3, 1, False), (4, 2, True), (4, 2, True)]
    x = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    assert strided.encode(x).shape == (2, 1, 28, 28)


@pytest.mark.parametrize(("changes", "shape", "match"), [
    ({}, (1, 30, 28), "to be squeezed 2 times, got 30x28"),
    ({}, (1, 3, 3), "must be at least 4x4, got 3x3"),
    ({}, (64,), "field='conv' needs images|takes images"),
    ({"squeeze_first": True}, (1, 9, 8), "even height and width"),
    ({"squeeze_first": True}, (1, 6, 6), "must be at least 4x4, got 3x3"),
    ({"architecture": "parallel"}, (1, 7, 7), "is odd"),
    ({"strides": (2, -2)}, (1, 28, 28), "halves 7x7"),
    ({"strides": (1, 1, 1)}, (1, 28, 28), "strides must have 2 entries"),
    ({"strides": (2, 1)}, (1, 28, 28), "must restore"),
    ({"strides": (5, 1)}, (1, 28, 28), "strides must contain only .*got 5"),
    ({"field": "mlp"}, (1, 28, 28), "architecture='multiscale' is for convolutions"),
    ({"field": "mlp", "architecture": "stack", "strides": (1, 1)}, (1, 8, 8), "strides=.* is for field='conv'"),
    ({"field": "mlp", "architecture": "stack", "squeeze_first": True}, (1, 8, 8), "squeeze_first=True is for field='conv' or 'unet'"),
    ({"alpha": 0.5}, (1, 8, 8), "alpha must be inside"),
    ({"alpha": 0.0}, (1, 8, 8), "alpha must be inside"),
    ({"alpha": -1e-6}, (1, 8, 8), "alpha must be inside"),
    ({"blocks": 0}, (1, 8, 8), "blocks=0"),
])  # fmt: skip
def test_what_cannot_be_built(changes, shape, match):
    with pytest.raises(ConfigError, match=match):
        build(small(**changes), SolverConfig(), shape, levels=256)


def test_images_that_do_not_fit():
    flow = build(small(), SolverConfig.of(grid_steps=1), (1, 8, 8), levels=17)
    with pytest.raises(DataError, match=r"expected \(N, 1, 8, 8\)"):
        flow.log_prob(torch.zeros(2, 1, 8, 9, dtype=torch.uint8))
    with pytest.raises(DataError, match="x in \\[0, 1\\], but x spans"):
        flow.log_prob(torch.full((2, 1, 8, 8), 1.2))
    with pytest.raises(DataError, match="levels=17"):
        flow.log_prob(torch.full((2, 1, 8, 8), 17, dtype=torch.uint8))
