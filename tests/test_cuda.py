"""The same on a GPU as on the CPU: skipped where there is no GPU."""

import dataclasses

import pytest
import torch
import trainers
from trainers import stop_at

import cnf
from cnf import CNF, Adaptive, Exact, FixedGrid, Flow, Hutchinson
from cnf._utils.async_checks import defer_checks
from cnf.config import FlowConfig, SolverConfig
from cnf.fields import MLP, AugmentedTimeConditioning, ConvField, TimePath
from cnf.losses import FlowMatching
from cnf.models import build
from cnf.neural_ode import anode_conv
from cnf.ode.multiscale import multiscale
from cnf.ode.quadratures import JacobianFrobenius, Kinetic
from cnf.training.step import gradient, tensor_cores
from cnf.transforms import Request

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
TIGHT = Adaptive("dopri5", 1e-9, 1e-9, gradient="adjoint")
SOLVERS = {"direct": FixedGrid("rk4", 4), "checkpoint": FixedGrid("rk4", 6, "checkpoint"), "adjoint": TIGHT}


def flows():
    drive = AugmentedTimeConditioning("hyper", k=5, m=3)
    yield "mlp", Flow(CNF(MLP(3, (8, 8))), (3,))
    yield "affjord", Flow(CNF(MLP(3, (8,), drive), path=TimePath(5, learn_start=True)), (3,))
    yield "conv", Flow(CNF(ConvField(2, (6, 6), "concatsquash")), (2, 4, 4))
    chain = multiscale((1, 8, 8), lambda s: CNF(ConvField(s[0], (4,), drive), path=TimePath(5)), 1)
    yield "multiscale", Flow(chain, (1, 8, 8))


@pytest.mark.parametrize("gradient", SOLVERS)
@pytest.mark.parametrize("name", [name for name, _ in flows()])
def test_likelihood_regularisers_and_gradients(name, gradient):
    torch.manual_seed(0)
    flow = dict(flows())[name].double().train()
    probes = Hutchinson(probes=1)
    for block in flow.blocks:
        block.solver, block.quadratures = SOLVERS[gradient], (Kinetic(), JacobianFrobenius())
        block.divergence = probes if name == "multiscale" else Exact()
    x = torch.rand(3, *flow.event_shape, dtype=torch.float64)
    probe_free = all(isinstance(block.divergence, Exact) for block in flow.blocks)

    def run(device):
        moved = flow.to(device)
        moved.zero_grad()
        out = moved.evaluate(x.to(device), Request(noise=None if probe_free else cnf.Noise(0, "test"), integrals=probe_free))
        value = moved.base_log_prob(out.value) + out.log_det
        kinetic = out.integrals.get("kinetic", torch.zeros(3, device=device, dtype=torch.float64))
        (value.sum() + kinetic.sum()).backward()
        # copies: a module that moves takes its gradients along
        grads = [p.grad.cpu().clone() for p in moved.parameters() if p.grad is not None]
        return [out.value.cpu().detach(), value.cpu().detach(), *grads]

    here, there = run("cpu"), run("cuda")
    # probes are drawn on the device they live on: the latent is the same, the estimate is another draw
    count = len(here) if probe_free else 1
    for mine, other in zip(here[:count], there[:count], strict=True):
        assert torch.allclose(mine, other, rtol=1e-7, atol=1e-8)


def test_sampling_is_the_inverse():
    flow = dict(flows())["multiscale"].double().cuda().eval()
    for block in flow.blocks:
        block.eval_solver = Adaptive("dopri5", 1e-10, 1e-10)
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64, device="cuda")
    assert (flow.decode(flow.encode(x)) - x).abs().max() < 1e-7
    assert flow.sample(3).device.type == "cuda"


def test_images_from_uint8():
    model = FlowConfig.of(architecture="multiscale", field="conv", hidden=(8,), blocks=1, time_conditioning="concat", preprocess="logit")
    flow = build(model, SolverConfig.of(divergence="hutchinson"), (1, 8, 8), levels=256).cuda().train()
    x = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8, device="cuda")
    value = flow.bits_per_dim(x, noise=cnf.Noise(0, "test"))
    value.mean().backward()
    assert value.isfinite().all() and all(p.grad.isfinite().all() for p in flow.parameters())


def test_a_neural_ode_that_predicts():
    torch.manual_seed(0)
    model = anode_conv((1, 8, 8), filters=4, augment=2, outputs=3).double().eval()
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    here = model(x)
    assert torch.allclose(model.cuda()(x.cuda()).cpu(), here, atol=1e-9)


def test_twenty_steps_resumed_are_twenty_steps(tmp_path):
    from conftest import logged_rows
    from test_training import trainer

    options = {"steps": 20, "device": "cuda"}
    whole = trainer(tmp_path / "whole", **options)
    whole.run()
    run = trainer(tmp_path / "run", **options)
    stop_at(run, 9)
    run.run()
    run = trainer(tmp_path / "run", resume=True, **options)
    assert run.state.step == 9
    run.run()
    for mine, other in zip(logged_rows(run.folder), logged_rows(whole.folder), strict=True):
        assert mine["step"] == other["step"]
        if "loss" in other:
            assert abs(mine["loss"] - other["loss"]) < 1e-5
    for p, q in zip(run.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-5)


@pytest.fixture
def no_waiting(monkeypatch):
    """Steps that make the CPU wait for the GPU are errors, and so are lines between log lines."""
    from cnf.training import Trainer

    update = Trainer.update

    def watched(self):
        if self.state.step < 2:  # the first steps load libraries, and a new epoch's order is made
            return update(self)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return update(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "update", watched)


@pytest.mark.parametrize("name", ["digits", "conv", "affjord", "tangents", "matching", "predictor", "regression"])
def test_a_step_waits_for_nothing(tmp_path, monkeypatch, no_waiting, name):
    from conftest import logged_rows
    from test_hostfree import run_of


    monkeypatch.setitem(trainers.RUN, "log_every", 6)
    run = run_of(tmp_path / "run", name, device="cuda", steps=12)
    assert run.run() == "steps"
    watched = {"digits": [5, 10], "matching": [10]}.get(name, [])  # where the solver's error, or the loss over time, is measured
    assert [row["step"] for row in logged_rows(run.folder)] == sorted([6, 12, *watched])
    assert all(row["loss"] is not None for row in logged_rows(run.folder))


def test_images_that_do_not_fit_are_fetched_without_waiting(tmp_path, monkeypatch, no_waiting):
    from test_hostfree import run_of

    monkeypatch.setattr("cnf.training.batches._fits", lambda x, device: False)
    run = run_of(tmp_path / "run", "conv", device="cuda", steps=12)
    assert run.batches.x.device.type == "cpu" and run.run() == "steps"


@pytest.mark.parametrize("fault", ["loss", "gradient", "state"])
def test_bad_batches_are_left_out_on_the_gpu(tmp_path, monkeypatch, no_waiting, fault):
    from test_hostfree import everything
    from test_recovery import injected, trainer

    from cnf.training import Trainer

    bad, options = {4, 5, 9}, {"steps": 12, "validate_every": 6, "device": "cuda"}
    plain, update = trainer(tmp_path / "plain", **options), Trainer.update
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", lambda self: None if self.state.step in bad else update(self))
        plain.run()
    injected(monkeypatch, fault, bad)
    run = trainer(tmp_path / "run", **options)
    run.run()
    assert run.state.skipped == 3
    mine, other = everything(run), everything(plain)
    assert all(torch.allclose(mine[k].double(), other[k].double(), rtol=0, atol=1e-5) for k in other)


@pytest.mark.parametrize("count", [1, 2])
def test_matching_launched_as_one_graph_has_the_plain_gradients(count):
    """Step after step: the first ones warm up and record what the later ones replay."""
    model = FlowConfig.of(field="unet", hidden=(8, 8), unet_depth=1, squeeze_first=True, dequantize="truncated-normal", preprocess="center")
    x = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8, device="cuda")
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        flow = build(dataclasses.replace(model, zero_init=False), SolverConfig.of(divergence="hutchinson", compile=compile), (1, 8, 8), levels=256)
        objective, steps = FlowMatching(flow.cuda().train()), []
        for step in range(5):
            flow.zero_grad()
            with tensor_cores(False), defer_checks():
                assert not gradient(objective, x, None, cnf.Noise(0, "graphs", step), count=count).failure
            steps.append(torch.cat([p.grad.flatten() for p in flow.parameters()]).clone())
        found.append(torch.stack(steps))
    plain, fast = found
    assert ((fast - plain).norm(dim=1) / plain.norm(dim=1)).max() < 1e-5


@pytest.mark.parametrize("case", ["closed form", "estimate"])
def test_a_whole_solve_launched_as_one_graph_has_the_plain_gradients(case):
    """Step after step: the first ones warm up and record what the later ones replay."""
    x, found = torch.randn(16, 3, generator=torch.Generator().manual_seed(0)).cuda(), []
    for compile in (False, "solve"):
        torch.manual_seed(0)
        block = CNF(MLP(3, (8, 8)), Exact() if case == "closed form" else Hutchinson(), FixedGrid("rk4", 3), compile=compile)
        flow, steps = Flow(block, (3,)).cuda().train(), []
        for step in range(5):
            flow.zero_grad()
            with tensor_cores(False):
                (-flow.log_prob(x, noise=cnf.Noise(0, "graphs", step)).mean()).backward()
            steps.append(torch.cat([p.grad.flatten() for p in flow.parameters()]).clone())
        found.append(torch.stack(steps))
    plain, fast = found
    assert ((fast - plain).norm(dim=1) / plain.norm(dim=1)).max() < 1e-5
