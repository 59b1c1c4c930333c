"""Flows in Pyro programs: sample sites, guides of SVI with one solve a step, NUTS on the density, predictions."""

import pickle

import pytest
import torch
from torch import nn

import cnf
from cnf.fields import MLP

pyro = pytest.importorskip("pyro", reason="pyro-ppl is not installed")

import pyro.distributions as dist  # noqa: E402
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO  # noqa: E402

GRID = cnf.FixedGrid("rk4", 3)
MEAN, COVARIANCE = torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 0.6], [0.6, 0.8]])


class Counting(nn.Module):
    context_dim = 0

    def __init__(self):
        super().__init__()
        self.net, self.calls = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)), 0

    def forward(self, t, x):
        self.calls += 1
        return self.net(x)


def flow_of(field=None):
    torch.manual_seed(0)
    pyro.clear_param_store()
    return cnf.Flow(cnf.CNF(field or MLP(2, (16,), context_dim=0), None, GRID, GRID), (2,))


def model():
    pyro.sample("z", dist.MultivariateNormal(MEAN, COVARIANCE))


def test_sites_and_plates():
    torch.manual_seed(0)
    flow = cnf.Flow(cnf.CNF(MLP(2, (16,), context_dim=1), None, GRID, GRID), (2,))
    c = torch.randn(5, 1)

    def program():
        with pyro.plate("rows", 5):
            return pyro.sample("x", flow(c).to_pyro())

    trace = pyro.poutine.trace(program).get_trace()
    trace.compute_log_prob()
    x = trace.nodes["x"]["value"]
    assert x.shape == (5, 2) and trace.nodes["x"]["log_prob"].shape == (5,)
    assert torch.allclose(trace.nodes["x"]["log_prob"], flow.log_prob(x, c), atol=1e-2)
    one = flow(c[0]).to_pyro()
    assert one.to_event(0).sample().shape == (2,) and one.expand_by([3]).sample().shape == (3, 2) and one().shape == (2,)
    assert one.mask(False).log_prob(x).sum() == 0
    y = one.rsample((4,))
    fresh = torch.equal(one.log_prob(y), one.log_prob(y)) and torch.allclose(one.log_prob(y.clone()), one.log_prob(y), atol=1e-2)
    assert fresh and pickle.loads(pickle.dumps(one)).log_prob(y.detach()).shape == (4,)


def test_a_guide_takes_one_solve_a_step():
    field = Counting()
    flow = flow_of(field)

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", flow().to_pyro())

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step()  # checks the field
    field.calls = 0
    flow().rsample_and_log_prob()
    one, field.calls = field.calls, 0
    before = [p.detach().clone() for p in flow.parameters()]
    svi.step()
    assert field.calls == one > 0
    assert all(not torch.equal(p, q) for p, q in zip(before, flow.parameters(), strict=True))


@pytest.mark.slow
def test_a_guide_is_fitted_and_predicts():
    flow = flow_of()

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", flow().to_pyro())

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(num_particles=32, vectorize_particles=True))
    losses = [svi.step() for _ in range(200)]
    assert sum(losses[-20:]) / 20 < 0.1  # the divergence from the normalised target
    z = Predictive(model, guide=guide, num_samples=2000, parallel=True)()["z"]
    assert torch.allclose(z.mean(0), MEAN, atol=0.15) and torch.allclose(z.T.cov(), COVARIANCE, atol=0.2)


@pytest.mark.slow
def test_nuts_samples_the_density():
    flow = flow_of()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    chain = MCMC(NUTS(lambda: pyro.sample("x", flow().to_pyro())), num_samples=200, warmup_steps=60, disable_progbar=True)
    chain.run()
    found, truth = chain.get_samples()["x"], flow.sample(20_000)
    assert found.shape == (200, 2) and bool(((found.mean(0) - truth.mean(0)).abs() < 0.4 * truth.std(0)).all())
    assert torch.allclose(found.std(0), truth.std(0), rtol=0.25)
