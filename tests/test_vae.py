"""Autoencoders with a flow as posterior, against quadrature over z, explicit weights, and finite sums."""

import math

import numpy as np
import pytest
import torch
from conftest import F64, mostly_slow
from torch import nn

import cnf
from cnf.errors import ConfigError, DataError
from cnf.fields.autodiff import autodiff_jvp
from cnf.fields.low_rank import LowRankMLP
from cnf.losses.elbo import ELBO, estimate_elbo
from cnf.random import Noise
from cnf.solvers import FixedGrid
from cnf.vae import FlowVAE, vae_mlp

X = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], dtype=F64)


def made(posterior="cnf-rank", latent=1, blocks=1, seed=0):
    torch.manual_seed(seed)
    model = vae_mlp((3,), latent, 8, posterior=posterior, flow_hidden=(6,), rank=2, blocks=blocks, solver=FixedGrid("rk4", 4)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=F64))
    return model.train()


def evidence(model, x):
    """log p(x) by the trapezoidal rule over a one-dimensional z."""
    z = torch.linspace(-9, 9, 4001, dtype=F64)[:, None]
    logits = model.decoder(z)
    log_p = -nn.functional.binary_cross_entropy_with_logits(logits[:, None].expand(-1, len(x), -1), x.expand(4001, -1, -1), reduction="none").sum(2)
    prior = -0.5 * (z.square() + math.log(2 * math.pi))
    return torch.trapezoid((log_p + prior).exp(), z, dim=0).log()


@pytest.mark.parametrize("posterior", mostly_slow(["normal", "cnf", "cnf-rank"], "cnf-rank"))
def test_the_weights_of_the_posterior_average_to_the_evidence(posterior):
    model = made(posterior, blocks=2)
    with torch.no_grad():
        exact, n = evidence(model, X), 1500
        bounds = model.evaluate(X.repeat_interleave(n, 0), noise=Noise(0)).elbo.reshape(2, n)
        ratios = (bounds - exact[:, None]).exp()  # of mean 1, if log q is that of the samples
        assert ((ratios.mean(1) - 1).abs() < 5 * ratios.std(1) / math.sqrt(n)).all() and (ratios.std(1) > 1e-3).all()
        assert (bounds.mean(1) < exact).all()
        estimate = model.log_likelihood(X, 300, noise=Noise(1))
        assert ((estimate - exact).abs() < 5 * ratios.std(1) / math.sqrt(300)).all()


def test_grey_levels_have_a_probability_each():
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(2, 12), nn.Unflatten(1, (4, 3))).double()
    model = FlowVAE(nn.Linear(3, 5).double(), decoder, 2, 5, levels=4).double()
    x = torch.tensor([[0.0, 1 / 3, 1.0]], dtype=F64)
    z = model.posterior(x, noise=Noise(0))[0]
    p = decoder(z).softmax(1)[0]  # (level, pixel)
    found = model.evaluate(x, noise=Noise(0)).log_likelihood
    torch.testing.assert_close(found, (p[0, 0] * p[1, 1] * p[3, 2]).log()[None])
    torch.testing.assert_close(model.reconstruct(x, noise=Noise(0))[0], torch.arange(4, dtype=F64) / 3 @ p)


def test_low_rank_updates_are_those_of_explicit_weights():
    torch.manual_seed(0)
    field = LowRankMLP(3, (5, 4), rank=2).double()
    x, t, context = torch.randn(6, 3, dtype=F64), torch.tensor(0.4, dtype=F64), torch.randn(6, field.context_dim, dtype=F64)
    out = field(t, x, context)
    for n in range(6):
        place, h = 0, x[n]
        for i, layer in enumerate(field.layers):
            rows, columns = layer.weight.shape
            u = context[n, place : place + 2 * rows].reshape(rows, 2)
            v = context[n, place + 2 * rows : place + 2 * (rows + columns)].reshape(columns, 2)
            place += 2 * (rows + columns)
            s = context[n, place : place + rows]
            place += rows
            h = (layer.weight + u @ v.T) @ torch.cat([nn.functional.softplus(h) if i else h, t[None]]) + layer.bias + s
        torch.testing.assert_close(out[n], h)
    torch.testing.assert_close(field(t, x, context[:1].expand(6, -1)), field(t, x, context[0]))
    v = torch.randn(2, 6, 3, dtype=F64)
    for t_dot in (None, torch.ones_like(t)):
        found, expected = field.jvp(t, x, v, context, t_dot=t_dot), autodiff_jvp(lambda s, y: field(s, y, context), t, x, v, t_dot)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    with pytest.raises(ConfigError, match="expected \\(N, "):
        field(t, x, context[:, 1:])


def test_every_parameter_is_trained_and_the_terms_add_up():
    model = made(latent=2, blocks=2)
    objective = ELBO(model, warmup=10)
    terms = objective(X, noise=Noise(0, step=4))
    torch.testing.assert_close(terms["loss"], terms["reconstruction"] + 0.4 * terms["kl"])
    terms["loss"].mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
    assert objective.solver_error(X, noise=Noise(0)) < 1e-4 and len(objective.block_errors(X, noise=Noise(0))) == 2
    plain, again = (model.evaluate(X, noise=Noise(3)).elbo for _ in range(2))
    assert torch.equal(plain, again)


def test_standard_errors():
    model = made("normal")
    found = estimate_elbo(model, X.repeat(300, 1), draws=3)
    with torch.no_grad():
        bounds = torch.stack([model.evaluate(X.repeat(300, 1), noise=Noise(9, "own", k)).elbo for k in range(200)])
    assert abs(found.elbo - float(bounds.mean())) < 5 * found.noise_standard_error
    assert found.noise_standard_error == pytest.approx(float((bounds.var(0) / 3).mean() / 600) ** 0.5, rel=0.15)
    assert found.standard_error == pytest.approx(float(bounds[:3].mean(0).std()) / math.sqrt(600), rel=0.15)
    assert found.elbo == pytest.approx(found.log_likelihood - found.kl)


@pytest.mark.slow
def test_it_learns_and_goes_through_fit(tmp_path):
    data = (np.random.default_rng(0).random((400, 1)) < 0.5) * np.ones((1, 6))  # all ones or all zeros: ln 2 nats
    x = torch.from_numpy(data).float()
    torch.manual_seed(0)
    model = vae_mlp((6,), 1, 16, flow_hidden=(8,), rank=1)
    cnf.fit(model, x, validation=0.2, loss=ELBO(model, warmup=50), steps=600, batch_size=64, lr=1e-2, quiet=True, folder=tmp_path / "run")
    found = estimate_elbo(model, x, draws=4)
    assert -found.elbo < math.log(2) + 0.15 and (model.reconstruct(x[:5]) - x[:5]).abs().max() < 0.2
    assert model.sample(7, noise=Noise(0)).shape == (7, 6)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: vae_mlp((3,), posterior="planar"), ConfigError, "posterior='planar' is unknown"),
    (lambda: FlowVAE(nn.Identity(), nn.Identity(), 2, 3, levels=1), ConfigError, "levels"),
    (lambda: FlowVAE(nn.Identity(), nn.Identity(), 2, 3, None, 4), ConfigError, "leave it at 0"),
    (lambda: made("normal").evaluate(2 * X), DataError, "floats in"),
    (lambda: FlowVAE(nn.Identity(), nn.Identity(), 2, 3, levels=4).evaluate(torch.full((2, 3), 0.5)), DataError, "between its 4 grey levels; expected k / 3"),
    (lambda: FlowVAE(nn.Identity(), nn.Linear(2, 3), 2, 3, levels=4).evaluate(torch.zeros(2, 3)), ConfigError, r"\(2, 3\); expected \(N, levels, \*event\), \(2, 4, 3\)"),
])  # fmt: skip
def test_wrong_use(call, error, message):
    with pytest.raises(error, match=message):
        call()
