"""Solvers and the CNF block: orders, the matrix exponential, gradients of every mode, a learned end time."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import F64, TIGHT, LinearField, slow

from cnf.errors import ConfigError, SolverError
from cnf.fields import MLP
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Exact, Hutchinson
from cnf.ode.quadratures import Directional, JacobianFrobenius, Kinetic, RunningCost, TotalDerivative
from cnf.random import Noise
from cnf.solvers import TABLEAUS, Adaptive, FixedGrid
from cnf.transforms import Request


@pytest.mark.parametrize("method", list(TABLEAUS))
def test_order(method):
    def rhs(s, y):
        return (torch.cos(3 * s) * y[0] - 0.3 * y[0] ** 2,)

    y0 = torch.tensor([0.7], dtype=F64)
    truth = TIGHT.solve(rhs, (y0,)).state[0]
    steps = [8, 16, 32]
    errors = [float((FixedGrid(method, n).solve(rhs, (y0,)).state[0] - truth).abs()) for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    # at least the order; a method may do better on one problem (Dormand-Prince's leading error happens to be small here)
    assert slope > TABLEAUS[method].order - 0.3, (slope, errors)
    if method not in ("heun", "dopri5"):
        assert slope < TABLEAUS[method].order + 0.4, (slope, errors)


@pytest.mark.parametrize("solver", [TIGHT, FixedGrid("rk4", 256), FixedGrid("dopri5", 64, "checkpoint")])
def test_linear_field_is_the_matrix_exponential(solver):
    torch.manual_seed(0)
    a = torch.randn(4, 4, dtype=F64) / 2
    block = CNF(LinearField(a), Exact(), solver, solver, end_time=0.8)
    x = torch.randn(5, 4, dtype=F64)
    out = block(x)
    truth = torch.from_numpy(scipy.linalg.expm(0.8 * a.numpy()))
    assert torch.allclose(out.value, x @ truth.T, atol=1e-10 if solver is TIGHT else 1e-8, rtol=0)
    assert torch.allclose(out.log_det, 0.8 * a.trace() * torch.ones(5, dtype=F64), atol=1e-10)
    back = block.inverse(out.value)
    assert torch.allclose(back.value, x, atol=1e-8)
    assert torch.allclose(back.log_det, -out.log_det, atol=1e-8)


def perturbed(hidden=(6, 6), dim=3, layer="concatsquash"):
    torch.manual_seed(1)
    field = MLP(dim, hidden, layer).double()
    for p in field.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return field


class FieldCost(torch.nn.Module):
    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, t, x):
        return self.field(t, x).square().sum(1)


@pytest.mark.parametrize("solver", [FixedGrid("dopri5", 8, "checkpoint"), Adaptive("dopri5", 1e-10, 1e-10, "adjoint")])
def test_what_the_field_shares_is_counted_once(solver):
    """A learned cost that holds the field itself, and an end that is made of the beginning."""
    field = perturbed()
    x, found = torch.randn(3, 3, dtype=F64, generator=torch.Generator().manual_seed(0)), []
    for one in (FixedGrid("dopri5", 8), solver):
        block = CNF(field, solver=one, quadratures=[RunningCost("cost", FieldCost(field))])
        start = torch.tensor(0.2, dtype=F64, requires_grad=True)
        point, values, _ = block.integrate(x, (start, 2 * start + 0.3))
        found.append(torch.autograd.grad(point.square().sum() + values["cost"].sum(), [start, *field.parameters()]))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def test_log_det_is_slogdet_of_the_autodiff_jacobian_and_quadratures_are_integrals():
    torch.manual_seed(0)
    field = perturbed()
    cost = RunningCost("cost", lambda t, x: t * x.square().sum(1))
    names = [Kinetic(), JacobianFrobenius(), Directional(), TotalDerivative(), cost]
    block = CNF(field, Exact(closed_form=False), FixedGrid("dopri5", 24), TIGHT, names, end_time=0.7)
    x = torch.randn(3, 3, dtype=F64)
    out = block(x)
    for i in range(3):
        j = torch.autograd.functional.jacobian(lambda y: block(y[None], Request(log_det=False)).value[0], x[i])
        assert abs(float(torch.linalg.slogdet(j)[1] - out.log_det[i].detach())) < 1e-8
    # quadrature of each integrand along the same path, by Simpson's rule over independently formed Jacobians
    n = 20
    times = torch.linspace(0, 0.7, n + 1, dtype=F64)
    weights = torch.tensor([1.0, *([4.0, 2.0] * (n // 2))][:n] + [1.0], dtype=F64) * 0.7 / n / 3
    sums = dict.fromkeys(("kinetic", "jacobian", "directional", "total_derivative", "cost"), 0.0)
    for t, w in zip(times, weights, strict=True):
        y = block.integrate(x, (times[0], t), Request(log_det=False))[0].detach() if t > 0 else x
        f = field(t, y)
        j = torch.stack([torch.autograd.functional.jacobian(lambda p: field(t, p[None])[0], p) for p in y])
        jf = torch.einsum("nij,nj->ni", j, f)
        _, ft = torch.func.jvp(lambda s: field(s, y), (t,), (torch.ones((), dtype=F64),))
        values = (f.square().sum(1), j.square().sum((1, 2)), jf.square().sum(1), (jf + ft).square().sum(1), t * y.square().sum(1))
        for name, value in zip(sums, values, strict=True):
            sums[name] = sums[name] + w * value.detach()
    for name, value in sums.items():
        assert torch.allclose(out.integrals[name], value, rtol=1e-4), name
    back = block.inverse(out.value)
    for name, value in out.integrals.items():
        assert torch.allclose(back.integrals[name], value, rtol=1e-6), name


MODES = [FixedGrid("rk4", 8), FixedGrid("rk4", 8, "checkpoint"), TIGHT, Adaptive("dopri5", 1e-11, 1e-11, "adjoint")]


@pytest.mark.parametrize("learn", [slow(False), True])  # a learned end time is one more parameter
@pytest.mark.parametrize("solver", MODES, ids=repr)
def test_gradcheck_of_log_prob_in_x_and_parameters(solver, learn):
    field = perturbed((3,), 2)
    block = CNF(field, Exact(), solver, end_time=0.5, learn_end_time=learn).double()
    x = torch.randn(2, 2, dtype=F64, requires_grad=True)
    parameters = list(block.parameters())

    def log_prob(point, *_):
        out = block(point)
        return -0.5 * out.value.square().sum(1) + out.log_det

    assert torch.autograd.gradcheck(log_prob, (x, *parameters), eps=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", [Hutchinson(), Hutchinson(mode="reverse"), Exact(closed_form=False)], ids=repr)
def test_gradient_modes_agree_for_every_estimator_with_context(divergence):
    torch.manual_seed(0)
    field = MLP(3, (5,), context_dim=2).double()
    x, context = torch.randn(4, 3, dtype=F64), torch.randn(4, 2, dtype=F64, requires_grad=True)
    gradients = []
    for solver in (FixedGrid("rk4", 64), FixedGrid("rk4", 64, "checkpoint"), *MODES[2:]):
        block = CNF(field, divergence, solver)
        out = block(x, Request(context, Noise(0)))
        loss = (out.log_det + out.value.square().sum(1)).sum()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*field.parameters(), context])]))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-12)
    for other in gradients[2:]:
        assert torch.allclose(gradients[0], other, atol=1e-6)


def test_two_forwards_before_one_backward_do_not_disturb_each_other():
    field = perturbed()
    block = CNF(field, Hutchinson(), FixedGrid("rk4", 4, "checkpoint"))
    x = torch.randn(4, 3, dtype=F64)
    alone = torch.autograd.grad(block(x, Request(noise=Noise(0))).log_det.sum(), list(field.parameters()))
    first = block(x, Request(noise=Noise(0)))
    block(x, Request(noise=Noise(1)))
    for a, b in zip(alone, torch.autograd.grad(first.log_det.sum(), list(field.parameters())), strict=True):
        assert torch.equal(a, b)


def test_steer_moves_the_end_time_in_training_alone_and_the_mode_picks_the_solver():
    block = CNF(perturbed(), Exact(), FixedGrid("rk4", 4), FixedGrid("rk4", 2), steer=0.5)
    x = torch.randn(2, 3, dtype=F64)
    a, b = block(x, Request(noise=Noise(0, step=1))), block(x, Request(noise=Noise(0, step=2)))
    assert not torch.allclose(a.value, b.value)
    block.eval()
    c, d = block(x, Request(noise=Noise(0, step=1))), block(x, Request(noise=Noise(0, step=2)))
    assert torch.equal(c.value, d.value) and c.stats.nfe == 8


def test_failures_say_where():
    class Bad(torch.nn.Module):
        def forward(self, t, x, context=None):
            return torch.exp(50 * x.abs()) * x

    x = torch.ones(1, 2)
    with pytest.raises(SolverError, match=r"step \d+ of 4 .* evaluations"):
        CNF(Bad(), Exact(), FixedGrid("rk4", 4))(x)
    with pytest.raises(SolverError, match="max_steps"):
        CNF(Bad(), Exact(), Adaptive(max_steps=5))(x)
    for build in (
        lambda: FixedGrid("rk5"),
        lambda: FixedGrid(steps=0),
        lambda: Adaptive("dopri"),
        lambda: Adaptive(rtol=0),
        lambda: Adaptive(atol=math.nan),
        lambda: Adaptive(rtol=math.inf),
    ):
        with pytest.raises(ConfigError):
            build()
    for bad in ({"end_time": 0.0}, {"steer": 2.0}, {"quadratures": [Kinetic(), Kinetic()]}, {"end_time": math.nan}):
        with pytest.raises(ConfigError):
            CNF(MLP(2), **bad)
