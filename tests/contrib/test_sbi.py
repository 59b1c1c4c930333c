"""sbi with our flows: its estimators' interface, a linear Gaussian against its posterior, two moons, boxes, calibration."""

import math
import pickle

import pytest
import torch

from cnf.errors import ConfigError
from cnf.solvers import FixedGrid

sbi = pytest.importorskip("sbi", reason="sbi is not installed")

from sbi.inference import NLE, NPE  # noqa: E402
from sbi.utils import BoxUniform  # noqa: E402
from torch.distributions import MultivariateNormal  # noqa: E402

from cnf.contrib.sbi import FlowEstimator, build_cnf  # noqa: E402

D, NOISE = 3, 0.5
MAP = torch.eye(D) + 0.5


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """sbi writes its logs into the working directory."""
    monkeypatch.chdir(tmp_path)


def simulations(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(rows, D, generator=generator)
    return theta, theta @ MAP.T + NOISE * torch.randn(rows, D, generator=generator)


def posterior(x):
    covariance = torch.linalg.inv(torch.eye(D) + MAP.T @ MAP / NOISE**2)
    return MultivariateNormal(x @ MAP / NOISE**2 @ covariance, covariance)


def prior():
    return MultivariateNormal(torch.zeros(D), torch.eye(D))


def estimator_of(builder, rows=200, condition=None):
    torch.manual_seed(0)
    theta, x = simulations(rows)
    return builder(theta, x if condition is None else condition(x)).eval()


@pytest.mark.parametrize("loss", ["likelihood", "matching"])
@pytest.mark.parametrize("shape", [(D,), (1, D)])
def test_the_interface_of_estimators(loss, shape):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(D, 4)) if len(shape) == 2 else None
    estimator = estimator_of(build_cnf(loss=loss, hidden=(8,), embedding=network), condition=lambda x: x.reshape(-1, *shape))
    assert estimator.input_shape == (D,) and estimator.condition_shape == shape and estimator.embedding_net is not None
    theta, x = simulations(6, seed=1)
    x = x.reshape(-1, *shape)
    with torch.no_grad():
        for samples in (1, 4):
            log_p = estimator.log_prob(theta.expand(samples, 6, D), x)
            assert log_p.shape == (samples, 6) and torch.allclose(log_p[0], estimator.log_prob(theta, x)[0], atol=1e-4)
        assert estimator.log_prob(theta[:, None], x[:1]).shape == (6, 1) and estimator.log_prob(theta[None], x[:1]).shape == (1, 6)
        drawn = estimator.sample(torch.Size((5,)), x)
        assert drawn.shape == (5, 6, D) and estimator.sample(torch.Size(()), x).shape == (6, D)
        drawn, log_p = estimator.sample_and_log_prob(torch.Size((2, 5)), x)
        assert drawn.shape == (2, 5, 6, D) and log_p.shape == (2, 5, 6)
        assert torch.allclose(estimator.log_prob(drawn.reshape(10, 6, D), x), log_p.reshape(10, 6), atol=1e-2)
        found = estimator.loss(theta, x)
        assert found.shape == (6,) and torch.equal(found, estimator.loss(theta, x)) and torch.allclose(found[2:], estimator.loss(theta[2:], x[2:]), atol=1e-4)
    estimator.train().loss(theta, x).mean().backward()
    with pytest.raises(ValueError, match="condition"):
        estimator.log_prob(theta, theta[:, :2])
    twin = pickle.loads(pickle.dumps(estimator.eval()))
    with torch.no_grad():
        assert torch.equal(twin.log_prob(theta, x), estimator.log_prob(theta, x))


def test_training_starts_at_the_linear_posterior():
    """Which is the exact one here, however narrow: the untrained estimator is near to it."""
    theta, x = simulations(10, seed=1)
    truth = posterior(x)
    plain, started = (estimator_of(build_cnf(linear_start=linear), 2000) for linear in (False, True))
    with torch.no_grad():
        gap, wide = (float((truth.log_prob(theta) - e.log_prob(theta, x)[0]).mean()) for e in (started, plain))
        ratio = started.sample(torch.Size((500,)), x).std(0) / truth.stddev
    assert abs(gap) < 0.1 and wide > 1 and bool(((ratio > 0.85) & (ratio < 1.15)).all())


def test_no_mass_outside_of_a_box():
    torch.manual_seed(0)
    box = BoxUniform(-torch.ones(2), torch.tensor([1.0, 3.0]))
    theta = box.sample((500,))
    estimator = build_cnf(prior=box, hidden=(8,))(theta, theta + 0.3 * torch.randn(500, 2)).eval()
    corner = torch.tensor([[1.0, 3.0]])
    with torch.no_grad():
        assert bool(box.support.check(estimator.sample(torch.Size((2000,)), corner)).all())
        assert bool((estimator.log_prob(corner + 0.01, corner) == -math.inf).all())
        n = 300
        ticks = torch.linspace(0, 1, n + 1)[:-1] + 0.5 / n
        grid = -1 + torch.cartesian_prod(ticks, ticks) * torch.tensor([2.0, 4.0])
        estimator.net.transform.transforms[2].eval_solver = FixedGrid("rk4", 4)
        assert abs(float(estimator.log_prob(grid[:, None], 0.3 * corner).exp().sum()) * 8 / n**2 - 1) < 2e-2
    with pytest.raises(ConfigError, match="expected a box with finite borders"):
        build_cnf(prior=prior())
    with pytest.raises(ConfigError, match="loss='exact' is unknown"):
        build_cnf(loss="exact")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["likelihood", "matching"])
def test_linear_gaussian(loss):
    """NPE with 2,000 simulations: width and centre of the posterior, and its density, against the truth; batches of conditions."""
    torch.manual_seed(0)
    trainer = NPE(prior(), density_estimator=build_cnf(loss=loss, hidden=(32, 32)), show_progress_bars=False)
    estimator = trainer.append_simulations(*simulations(2000)).train(max_num_epochs=60)
    found = trainer.build_posterior(estimator)
    _, x = simulations(20, seed=9)
    truth = posterior(x)
    sample = found.sample_batched((1000,), x=x, show_progress_bars=False)
    ratio = sample.std(0) / truth.stddev
    assert 0.95 < float(ratio.mean()) < (1.06 if loss == "likelihood" else 1.12) and float(((sample.mean(0) - truth.mean) / truth.stddev).abs().mean()) < 0.15
    theta = truth.sample((200,))
    log_p = found.log_prob_batched(theta, x=x)
    assert log_p.shape == (200, 20) and float((truth.log_prob(theta) - log_p).mean()) < (0.05 if loss == "likelihood" else 0.15)
    twin = pickle.loads(pickle.dumps(found))
    assert torch.equal(twin.log_prob(theta[:, 0], x=x[:1]), found.log_prob(theta[:, 0], x=x[:1]))
    assert isinstance(estimator, FlowEstimator)
    from sbi.diagnostics import run_sbc

    theta, x = simulations(100, seed=5)
    ranks, _ = run_sbc(theta, x, found, num_posterior_samples=200, use_batched_sampling=True, show_progress_bar=False)
    assert abs(float(ranks.mean() / 200) - 0.5) < 5 * math.sqrt(1 / 12 / 300)
    assert abs(float((ranks / 200).var()) - 1 / 12) < 0.03  # wide posteriors put the ranks into the middle


@pytest.mark.slow
def test_likelihood_estimation():
    torch.manual_seed(0)
    trainer = NLE(prior(), density_estimator=build_cnf(target="likelihood", hidden=(16,)), show_progress_bars=False)
    estimator = trainer.append_simulations(*simulations(1000)).train(max_num_epochs=15)
    theta, x = simulations(50, seed=9)
    truth = torch.distributions.Normal(theta @ MAP.T, NOISE).log_prob(x).sum(1)
    assert float((truth - estimator.log_prob(x, theta)[0]).mean().detach()) < 0.1


def two_moons(theta, generator):
    a = math.pi * (torch.rand(len(theta), generator=generator) - 0.5)
    r = 0.1 + 0.01 * torch.randn(len(theta), generator=generator)
    p = torch.stack([r * a.cos() + 0.25, r * a.sin()], 1)
    return p + torch.stack([-theta.sum(1).abs(), theta[:, 1] - theta[:, 0]], 1) / math.sqrt(2)


@pytest.mark.slow
def test_two_moons():
    """Both crescents, near to the simulator's: posterior predictive data lie where they were observed."""
    torch.manual_seed(0)
    generator, box = torch.Generator().manual_seed(0), BoxUniform(-torch.ones(2), torch.ones(2))
    theta = box.sample((3000,))
    builder = build_cnf(prior=box, loss="matching", hidden=(64, 64), linear_start=False)
    trainer = NPE(box, density_estimator=builder, show_progress_bars=False)
    estimator = trainer.append_simulations(theta, two_moons(theta, generator)).train(max_num_epochs=250, training_batch_size=100)
    found = trainer.build_posterior(estimator).sample((1000,), x=torch.zeros(1, 2), show_progress_bars=False)
    side = float((found.sum(1) > 0).float().mean())
    assert 0.35 < side < 0.65
    again = two_moons(found, generator)
    assert float(again.norm(dim=1).median()) < 0.2 and len(trainer._summary["validation_loss"]) > 60
