"""The loss of vectors and of images against hand computation, its gradients, and what it does to a flow."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import torch
from conftest import F64, LinearField
from torch.distributions import Normal
from trainers import stop_at, training

from cnf.config import DataConfig, FlowConfig, RunConfig, SolverConfig, TrainConfig
from cnf.data import DataSplits
from cnf.errors import ConfigError
from cnf.fields import MLP
from cnf.flow import Flow
from cnf.losses import Likelihood
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Exact, Hutchinson
from cnf.ode.quadratures import Directional, Kinetic, RunningCost
from cnf.random import Noise
from cnf.runs import RunInfo, save_trainer
from cnf.solvers import FixedGrid
from cnf.transforms import Dequantize, Logit, Request, Sequential

GRID = FixedGrid("dopri5", 12)
END = 0.7


def linear(dim, images, quadratures=()):
    a = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0), dtype=F64) / 2
    block = CNF(LinearField(a), Exact(), GRID, GRID, quadratures, end_time=END)
    if not images:
        return Flow(block, (dim,)), a.numpy()
    return Flow(Sequential([Dequantize(17), Logit(0.1), block]), (1, 1, dim)).double(), a.numpy()


def by_hand(y, a):
    """z, log-det, kinetic energy and ‖J‖² of y through dx/dt = A x, by scipy."""
    y = y.flatten(1).numpy()

    def speed(t):
        return ((y @ scipy.linalg.expm(t * a).T @ a.T) ** 2).sum(1)

    kinetic = scipy.integrate.quad_vec(speed, 0, END, epsabs=1e-12)[0]
    z = torch.from_numpy(y @ scipy.linalg.expm(END * a).T)
    log_prob = Normal(torch.zeros((), dtype=F64), 1.0).log_prob(z).sum(1) + END * a.trace()
    return log_prob, torch.from_numpy(kinetic), END * (a**2).sum()


def test_loss_of_vectors():
    flow, a = linear(3, images=False)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    objective = Likelihood(flow, kinetic=0.3, jacobian=0.2)
    terms = objective(x)
    log_prob, kinetic, jacobian = by_hand(x, a)
    assert objective.unit == "nats" and sorted(terms) == ["jacobian", "kinetic", "loss", "nll"]
    assert torch.allclose(terms["nll"], -log_prob, rtol=0, atol=1e-8)
    assert torch.allclose(terms["kinetic"], kinetic, rtol=0, atol=1e-8)
    assert torch.allclose(terms["jacobian"], torch.tensor(jacobian, dtype=F64), rtol=0, atol=1e-8)
    assert torch.allclose(terms["loss"], -log_prob + 0.3 * kinetic + 0.2 * jacobian, rtol=0, atol=1e-8)
    assert objective.per_dim(6.0) == 2.0


def test_loss_of_images():
    flow, a = linear(4, images=True)
    k = torch.randint(0, 17, (5, 1, 1, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    u = torch.rand(k.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    objective = Likelihood(flow, kinetic=0.3, jacobian=0.2)
    assert objective.unit == "bits/dim" and objective.per_dim(6.0) == 6.0
    s = 0.1 + 0.8 * (k + u) / 17
    log_prob, kinetic, jacobian = by_hand(torch.log(s / (1 - s)), a)
    log_prob = log_prob + (math.log(0.8 / 17) - torch.log(s * (1 - s))).flatten(1).sum(1)
    bits = -log_prob / (4 * math.log(2))
    terms = objective(k, noise=Noise.replay({"0/dequantize": u}))
    assert torch.allclose(terms["nll"], bits, rtol=0, atol=1e-8)
    assert torch.allclose(terms["loss"], bits + (0.3 * kinetic + 0.2 * jacobian) / (4 * math.log(2)), rtol=0, atol=1e-8)
    floats = objective((k + u) / 17)  # the same bits: the density there counts with the levels
    for name, value in terms.items():
        assert torch.allclose(floats[name], value, rtol=0, atol=1e-9), name


def test_images_are_trained_on_eq_17_and_its_gradient():
    """RNODE's eq. 17 in nats per dimension, by scipy: the loss in bits/dim is that over ln 2, and so is its gradient."""
    flow, a = linear(4, images=True)
    k = torch.randint(0, 17, (6, 1, 1, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    u = torch.rand(k.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    s = 0.1 + 0.8 * (k + u) / 17
    constant = (math.log(0.8 / 17) - torch.log(s * (1 - s))).flatten(1).sum(1)

    def eq_17(a):
        log_prob, kinetic, jacobian = by_hand(torch.log(s / (1 - s)), a)
        return float((-log_prob - constant + 0.01 * kinetic + 0.03 * jacobian).mean()) / 4

    loss = Likelihood(flow, kinetic=0.01, jacobian=0.03)(k, noise=Noise.replay({"0/dequantize": u}))["loss"].mean()
    (gradient,) = torch.autograd.grad(loss, flow.blocks[0].field.a)
    nats = math.log(2)
    assert abs(float(loss.detach()) * nats - eq_17(a)) < 1e-8
    step = 1e-5
    for i, j in np.ndindex(4, 4):
        move = np.zeros((4, 4))
        move[i, j] = step
        slope = (eq_17(a + move) - eq_17(a - move)) / (2 * step)
        assert abs(float(gradient[i, j]) * nats - slope) < 1e-7, (i, j)


def test_a_run_of_an_earlier_version_keeps_its_penalties(tmp_path, capsys):
    """Its checkpoint does not say what they are divided by: it was D, and stays so to the end; those of the released code stay too."""
    pixels = torch.randint(0, 17, (60, 1, 2, 2), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    data = DataSplits("images", "image", pixels[:40], pixels[40:50], pixels[50:], levels=17)

    def trainer(folder, resume=False, **train):
        (tmp_path / folder).mkdir(exist_ok=True)
        settings = TrainConfig.of(**{"steps": 6, "batch_size": 8, "lr": 0.01, "validate_every": 6, "warmup": 0, "kinetic": 5.0} | train)
        config = RunConfig("run", DataConfig(), FlowConfig.of(hidden=(4,), zero_init=False), SolverConfig.of(grid_steps=2), settings)
        info = RunInfo(config, (1, 2, 2), 17, 0, (), ())
        return training(info, data, tmp_path / folder, resume=resume, quiet=not resume)

    def stopped(run, at):
        stop_at(run, at)
        run.run()
        return torch.load(run.folder / "trainer.pt", weights_only=True)

    def weights(run):
        return torch.cat([p.detach().flatten() for p in run.model.parameters()])

    whole, new = trainer("whole"), trainer("new")
    whole.objective.scale = 4.0
    whole.run()
    new.run()
    assert (weights(whole) - weights(new)).abs().max() > 1e-4
    old = trainer("old")
    old.objective.scale = 4.0
    state = stopped(old, 2)
    del state["penalty_scale"]
    save_trainer(old.folder, state)
    sentence = "step 2: an earlier version began this run, with penalties of 0.693 times RNODE's eq. 17; it keeps them to its end"
    again = trainer("old", resume=True)
    assert sentence in capsys.readouterr().err
    stopped(again, 4)  # a second time: now the checkpoint says it
    last = trainer("old", resume=True)
    assert "penalties of 0.693 times" in capsys.readouterr().err
    last.run()
    assert torch.equal(weights(last), weights(whole))
    for train in ({"regularisers": "code"}, {"kinetic": 0.0}):
        state = stopped(trainer("other", **train), 2)
        del state["penalty_scale"]
        save_trainer(tmp_path / "other", state)
        scale = trainer("other", resume=True, **train).objective.scale
        assert "earlier version" not in capsys.readouterr().err
        assert scale == (1 if "regularisers" in train else 4 * math.log(2))


def test_integrals_add_up_over_blocks():
    torch.manual_seed(0)
    fields = [MLP(2, (5,)).double(), MLP(2, (4,)).double()]
    blocks = [CNF(f, Exact(), GRID, GRID) for f in fields]
    objective = Likelihood(Flow(Sequential(blocks), (2,)), kinetic=1.0)
    x = torch.randn(4, 2, dtype=F64)
    terms = objective(x)
    alone = [CNF(f, Exact(), GRID, GRID, [Kinetic()]) for f in fields]
    first = alone[0](x)
    second = alone[1](first.value)
    total = first.integrals["kinetic"] + second.integrals["kinetic"]
    assert torch.allclose(terms["kinetic"], total, atol=1e-12)
    assert torch.allclose(terms["loss"] - terms["nll"], total, atol=1e-12)


@pytest.mark.parametrize("divergence", [Exact(), Exact(closed_form=False), Hutchinson(), Hutchinson("gaussian", "reverse", 2)])
def test_gradients(divergence):
    torch.manual_seed(0)
    blocks = [CNF(MLP(2, (4,), context_dim=2), divergence, FixedGrid("rk4", 2), learn_end_time=True) for _ in range(2)]
    objective = Likelihood(Flow(Sequential(blocks), (2,)).double(), kinetic=0.5, jacobian=0.3)
    x, c = torch.randn(3, 2, dtype=F64), torch.rand(3, 2, dtype=F64)

    def loss():
        return objective(x, c, Noise(0))["loss"].mean()

    parameters = list(objective.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    assert all(bool((g != 0).any()) for g in gradients)
    direction = [torch.randn(p.shape, dtype=F64) for p in parameters]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    values = []
    with torch.no_grad():
        for h in (1e-5, -2e-5):  # up, then down past the start
            for p, d in zip(parameters, direction, strict=True):
                p.add_(h * d)
            values.append(float(loss()))
    assert abs(slope - (values[0] - values[1]) / 2e-5) < 1e-6 * max(1, abs(slope))


def test_only_what_is_weighted_is_integrated():
    mine = RunningCost("distance", lambda t, x: x.square().flatten(1).sum(1))
    flow, _ = linear(3, images=False, quadratures=[mine, Directional()])
    Likelihood(flow, jacobian=0.1)
    objective = Likelihood(flow)  # a second objective on the flow: the first one's regulariser goes
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    terms = objective(x)
    assert sorted(terms) == ["directional", "distance", "kinetic", "loss", "nll"]
    assert torch.equal(terms["loss"], terms["nll"])
    assert [q.name for q in flow.blocks[0].quadratures] == ["distance", "directional", "kinetic"]
    assert torch.allclose(flow.log_prob(x), -terms["nll"], atol=1e-12)
    values, stats = objective.evaluate(x)
    assert all(torch.equal(values[name], terms[name]) for name in terms) and stats.nfe == 72
    assert flow.evaluate(x, Request(integrals=False)).integrals == {}


def test_refusals():
    flow, _ = linear(2, images=False)
    for kinetic, jacobian in ((-0.1, 0.0), (0.0, -1.0), (math.nan, 0.0), (0.0, math.inf)):
        with pytest.raises(ConfigError, match=f"kinetic={kinetic}, jacobian={jacobian}"):
            Likelihood(flow, kinetic, jacobian)
    for name in ("loss", "nll"):
        flow, _ = linear(2, images=False, quadratures=[RunningCost(name, lambda t, x: x.sum(1))])
        with pytest.raises(ConfigError, match=f"'{name}' is taken by the objective"):
            Likelihood(flow)
    with pytest.raises(ConfigError, match=r"must be unique.*'kinetic'"):
        linear(2, images=False, quadratures=[Kinetic(), Kinetic()])
    with pytest.raises(ConfigError, match="must be unique and not 'log_det'"):
        linear(2, images=False, quadratures=[RunningCost("log_det", lambda t, x: x.sum(1))])
    flow, _ = linear(2, images=False, quadratures=[RunningCost("bad", lambda t, x: x)])
    with pytest.raises(ConfigError, match=r"'bad' must return shape \(3,\), one value per row, got \(3, 2\)"):
        Likelihood(flow)(torch.zeros(3, 2, dtype=F64))
