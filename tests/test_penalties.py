"""Integrals along the path in the losses of flows and predictors, against closed forms and against separate solves."""

import json

import pytest
import torch
from conftest import F64
from torch import nn

import cnf.compat
from cnf import CNF, Flow, Hutchinson
from cnf.cli import classify_main
from cnf.errors import ConfigError
from cnf.fields import MLP, VectorField
from cnf.losses import Likelihood, Supervised
from cnf.losses.penalties import QUADRATURES
from cnf.neural_ode import NeuralODE, anode_mlp, residual_net
from cnf.ode.quadratures import Kinetic, RunningCost, TotalDerivative
from cnf.random import Noise
from cnf.solvers import Adaptive, FixedGrid
from cnf.transforms import Dequantize, Sequential

A = torch.tensor([[0.3, -0.8], [0.5, 0.2]], dtype=F64)


class Linear(VectorField):
    """f = A x, with closed-form integrals over [0, 1]."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(A.clone())

    def forward(self, t, x, context=None):
        return x @ self.matrix.T


def integral(weight, x):
    """∫ x(t)ᵀ W x(t) dt for x(t) = exp(At) x: the block matrix exponential of Van Loan."""
    block = torch.zeros(4, 4, dtype=F64)
    block[:2, :2], block[:2, 2:], block[2:, 2:] = -A.T, weight, A
    big = torch.linalg.matrix_exp(block)
    gram = big[2:, 2:].T @ big[:2, 2:]
    return torch.einsum("ni,ij,nj->n", x, gram, x)


@pytest.mark.parametrize("pieces", [1, 2])
def test_integrals_of_a_linear_field(pieces):
    fields = [Linear() for _ in range(pieces)]
    model = NeuralODE(fields, (2,), 1, solver=FixedGrid("rk4", 64)).double()
    x = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    costs = ["kinetic", "jacobian", "directional", "total-derivative"]
    size = RunningCost("size", lambda t, y: y.square().sum(1))
    terms = Supervised(model, "regression", {size: 0.5}, costs)(x, torch.zeros(5, 1, dtype=F64), Noise(0))
    expected = {
        "kinetic": integral(A.T @ A, x), "directional": integral((A @ A).T @ (A @ A), x), "size": integral(torch.eye(2, dtype=F64), x),
    }  # fmt: skip
    expected["total_derivative"] = expected["directional"]  # the field does not depend on t
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(terms["loss"], terms["data_loss"] + 0.5 * terms["size"])
    with torch.no_grad():  # a Rademacher probe: unbiased, and its mean over all four sign patterns exact
        norms = torch.stack([(A @ torch.tensor(e, dtype=F64)).square().sum() for e in [(1.0, 1.0), (1.0, -1.0)]])
        assert all(bool((norms - value).abs().min() < 1e-9) for value in terms["jacobian"].detach()) or pieces == 2
        assert norms.mean() == pytest.approx(float(A.square().sum()))


@pytest.mark.parametrize("solver", [FixedGrid("rk4", 8), Adaptive("dopri5", 1e-6, 1e-6), Adaptive("dopri5", 1e-6, 1e-6, gradient="adjoint")])
@pytest.mark.parametrize("options", [{}, {"adaptive_depth": True}])
def test_the_prediction_and_its_gradient_stay_the_same(solver, options):
    torch.manual_seed(0)
    model = anode_mlp(2, 8, augment=1, nonlinearity="softplus", solver=solver, **options).double()
    x, y = torch.randn(6, 2, dtype=F64), torch.randn(6, 1, dtype=F64)
    plain = Supervised(model, "regression")(x, y)["loss"]
    objective = Supervised(model, "regression", {}, QUADRATURES)
    terms, stats = objective.evaluate(x, y, Noise(0))
    torch.testing.assert_close(terms["loss"], plain, rtol=0, atol=1e-12)
    assert set(terms) == {"loss", *(quadrature.name for quadrature in QUADRATURES.values())}
    assert stats.nfe == model.predict(x).stats.nfe  # the integrals take no evaluation of their own, and no step

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) if g is not None])

    torch.testing.assert_close(gradient(terms["loss"].sum()), gradient(plain.sum()), rtol=1e-9, atol=1e-9)


def test_the_penalty_has_its_gradient():
    torch.manual_seed(0)
    model = anode_mlp(2, 8, augment=1, nonlinearity="softplus", solver=FixedGrid("rk4", 4)).double()
    x, y = torch.randn(6, 2, dtype=F64), torch.randn(6, 1, dtype=F64)
    scale = nn.Linear(3, 1, dtype=F64)  # a learned running cost
    cost = RunningCost("learned", nn.Sequential())
    cost.cost = type("Cost", (nn.Module,), {"forward": lambda self, t, z: self.net(z)[:, 0].square()})()
    cost.cost.net = scale
    objective = Supervised(model, "regression", {Kinetic(): 0.3, cost: 0.1, TotalDerivative(): 0.2})
    assert {id(p) for p in scale.parameters()} <= {id(p) for p in objective.parameters()}
    loss = objective(x, y)["loss"].mean()
    loss.backward()
    for p in (scale.weight, next(model.fields.parameters())):
        step, values = 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                p.view(-1)[0] += sign * step
                values.append(float(objective(x, y)["loss"].mean()))
                p.view(-1)[0] -= sign * step
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(p.grad.view(-1)[0]), rel=1e-6, abs=1e-9)


def test_flows_take_any_integral_by_name():
    torch.manual_seed(0)
    flow = Flow(CNF(MLP(2, (8,))), (2,)).double()
    for p in flow.parameters():
        p.data += 0.3 * torch.randn_like(p)
    x = torch.randn(5, 2, dtype=F64)
    plain = Likelihood(flow)(x)
    objective = Likelihood(flow, kinetic=0.1, penalties={"total-derivative": 0.2}, measure=["jacobian"])
    terms = objective(x, noise=Noise(0))
    assert set(terms) == {"loss", "nll", "kinetic", "total_derivative", "jacobian"}
    torch.testing.assert_close(terms["loss"], plain["nll"] + 0.1 * terms["kinetic"] + 0.2 * terms["total_derivative"])
    block = flow.blocks[0]
    block.quadratures = (TotalDerivative(),)  # the same integral, computed without the objective
    torch.testing.assert_close(flow.transform(x).integrals["total_derivative"], terms["total_derivative"])
    released = Likelihood(flow, penalties={"total-derivative": 0.2}, regularisers="code", measure=["total-derivative"])(x)
    torch.testing.assert_close(released["total_derivative_mean"], released["total_derivative"] / 4)  # half of the mean over 2
    torch.testing.assert_close(released["loss"], released["nll"] + 0.2 * released["total_derivative_mean"])
    assert set(Likelihood(flow)(x)) == {"loss", "nll", "kinetic", "total_derivative"}  # the block's own stays


@pytest.mark.parametrize("regularisers", ["paper", "code"])
def test_released_regularisers_are_added_to_bits_per_dim_as_they_are(regularisers):
    torch.manual_seed(0)
    flow = Flow(Sequential([Dequantize(4), CNF(MLP(2, (8,)))]), (2,)).double()
    for p in flow.parameters():
        p.data += 0.3 * torch.randn_like(p)
    x = torch.tensor([[0, 3], [1, 1], [2, 0]], dtype=torch.uint8)
    terms = Likelihood(flow, penalties={"l1int": 0.3, "dl2int": 0.2}, regularisers=regularisers)(x, noise=Noise(0))
    torch.testing.assert_close(terms["loss"], terms["nll"] + 0.3 * terms["l1int"] + 0.2 * terms["dl2int"])


@pytest.mark.parametrize("name", cnf.compat.RELEASED)
def test_fields_that_start_at_zero_have_a_gradient(name):
    flow = Flow(CNF(MLP(2, (8,)), Hutchinson()), (2,))
    for p in flow.blocks[0].field.parameters():
        p.data.zero_()
    loss = Likelihood(flow, penalties={name: 0.1})(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), noise=Noise(0))["loss"]
    loss.sum().backward()
    assert all(p.grad.isfinite().all() for p in flow.parameters() if p.grad is not None)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Supervised(residual_net(2), "regression", {"kinetic": 1.0}), "ResidualNet solves none"),
    (lambda: Supervised(anode_mlp(2), "regression", {"kinetic": -1.0}), "must be finite and not negative"),
    (lambda: Supervised(anode_mlp(2), "regression", {"bend": 1.0}), "penalty='bend' is unknown"),
    (lambda: Supervised(anode_mlp(2), "regression", {RunningCost("loss", lambda t, x: x[:, 0]): 1.0}), "'loss' is taken"),
    (lambda: Likelihood(Flow(CNF(MLP(2)), (2,)), kinetic=1.0, penalties={"kinetic": 2.0}), "give it once"),
])  # fmt: skip
def test_wrong_penalties(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.slow
def test_a_run_reports_and_resumes_them(tmp_path):
    words = ["anode-flip", "--steps", "6", "--validate-every", "3", "--batch-size", "16", "--toy-sizes", "32", "16", "16", "--hidden", "8"]
    words += ["--kinetic", "0.01", "--penalty", "total-derivative=0.1", "--measure", "jacobian", "--out", str(tmp_path / "run")]
    assert classify_main(words) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if "loss" in row)
    assert row["loss"] == pytest.approx(row["data_loss"] + 0.01 * row["kinetic"] + 0.1 * row["total_derivative"], rel=1e-5)
    assert row["jacobian"] >= 0
    assert classify_main(["--resume", "--steps", "9", "--out", str(tmp_path / "run")]) == 0
