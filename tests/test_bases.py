"""Base densities: each against scikit-learn, torch.distributions, quadrature and its own samples."""

import copy
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import F64, ROOT, contents, jacobian, mostly_slow, normal, perturbed
from sklearn.mixture import GaussianMixture as Mixture
from torch.distributions import (
    AffineTransform,
    Bernoulli,
    Beta,
    Categorical,
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    StudentT,
    TransformedDistribution,
    Uniform,
)
from torch.utils._python_dispatch import TorchDispatchMode

import cnf
from cnf.bases import Base, ConditionalMixture, DistributionBase, GaussianMixture, MixtureEnsemble, StandardNormal
from cnf.distribution import FlowDistribution
from cnf.errors import CheckpointError, ConfigError, DataError
from cnf.evaluation import evaluate
from cnf.fields import MLP, ConvField, Interpolant, MixtureVelocity
from cnf.losses import FlowMatching, Likelihood
from cnf.random import Noise, draw
from cnf.solvers import Adaptive, FixedGrid
from cnf.training.callbacks import WeightAverage
from cnf.training.step import gradient
from cnf.transforms import Dequantize, Gaussianize, Sequential, Standardize

GRID = FixedGrid("dopri5", 16)


class Shifted(Base):
    """Normal whose mean is linear in a context."""

    context_dim = 3

    def __init__(self):
        super().__init__(2)
        self.weight = torch.nn.Parameter(normal(3, 2, seed=8))

    def log_prob(self, z, context=None):
        return Normal(context @ self.weight.to(z), 1.0).log_prob(z).sum(-1)

    def _draw(self, n, context, noise, temperature, like):
        z = draw(noise, "latent", "normal", (n, 2), dtype=like.dtype, device=like.device)
        return context @ self.weight.to(like) + temperature * z


def mixture(shape=2, components=3, covariance="full", trainable=True):
    torch.manual_seed(5)
    return perturbed(GaussianMixture(shape, components, covariance, trainable), 0.5)


def factors(base):
    """The covariances of a mixture, entry by entry."""
    found = []
    dim = base.means.shape[1]
    for k in range(base.components):
        j = 0 if base.covariance == "tied" else k
        a = torch.zeros(dim, dim, dtype=F64)
        numbers = iter([] if base.lower is None else base.lower[j].tolist())
        for row in range(dim):
            for column in range(row):
                a[row, column] = next(numbers, 0.0)
            a[row, row] = base.log_diagonal[j, row].detach().exp()
        found.append(torch.linalg.inv(a.T @ a))
    return torch.stack(found)


def as_torch(base):
    """The same mixture, by torch; z flattened."""
    return MixtureSameFamily(Categorical(logits=base.logits.detach()), MultivariateNormal(base.means.detach(), factors(base)))


def student():
    return Independent(StudentT(torch.tensor([9.0, 12.0], dtype=F64), normal(2, seed=1), torch.tensor([0.5, 1.2], dtype=F64)), 1)


def of_torch():
    return MixtureSameFamily(
        Categorical(torch.tensor([0.2, 0.8], dtype=F64)), MultivariateNormal(normal(2, 2, seed=6), torch.eye(2, dtype=F64).expand(2, 2, 2) / 2)
    )


def moved():
    return TransformedDistribution(MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)), [AffineTransform(normal(2), 0.5)])


def normal_truth(base):
    return Independent(Normal(torch.zeros(2, dtype=F64), base.std), 1)


# a new base in double precision, and its density by torch: a new kind of base is one line
BASES = {
    "normal": lambda: (base := StandardNormal(2, 0.7), normal_truth(base)),
    "full": lambda: (base := mixture(), as_torch(base)),
    "tied": lambda: (base := mixture(covariance="tied"), as_torch(base)),
    "diag": lambda: (base := mixture(covariance="diag"), as_torch(base)),
    "one component": lambda: (base := mixture(components=1), as_torch(base)),
    "frozen": lambda: (base := mixture(trainable=False), as_torch(base)),
    "student": lambda: (DistributionBase(student()), student()),
    "torch's mixture": lambda: (DistributionBase(of_torch()), of_torch()),
    "transformed": lambda: (DistributionBase(moved()), moved()),
}  # fmt: skip
TORCHS = ("student", "torch's mixture", "transformed")


def flow_on(base, *first, **field):
    torch.manual_seed(0)
    block = cnf.CNF(MLP(2, hidden=(6,), **field), solver=GRID, eval_solver=GRID)
    return cnf.Flow(Sequential([*first, perturbed(block)]), (2,), base=base)


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# -- densities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_density_is_that_of_torch(name):
    base, truth = BASES[name]()
    z = 2 * normal(50, 2)
    assert torch.allclose(base.log_prob(z), truth.log_prob(z), rtol=0, atol=1e-10)
    single = base.log_prob(z.float())  # in the dtype of z, whatever that of the parameters
    assert single.dtype == torch.float32 and torch.allclose(single.double(), truth.log_prob(z), rtol=1e-5, atol=1e-5)
    assert torch.allclose(copy.deepcopy(base).float().log_prob(z.float()).double(), truth.log_prob(z), rtol=1e-5, atol=1e-5)
    assert base.log_prob(z[:0]).shape == (0,)
    assert base.event_shape == (2,) and "(2,)" in repr(base)


@pytest.mark.parametrize("name", BASES)
def test_density_integrates_to_one(name):
    base, _ = BASES[name]()
    ticks = torch.linspace(-30, 30, 601, dtype=F64)
    total = float(base.log_prob(torch.cartesian_prod(ticks, ticks)).detach().exp().sum()) * 0.1**2
    assert abs(total - 1) < 1e-4  # the tails of StudentT


@pytest.mark.parametrize("name", mostly_slow(BASES, "normal", "full", "tied", "student", "transformed"))
def test_flow_identities(name):
    base, truth = BASES[name]()
    flow = flow_on(base)
    x = normal(4, 2, seed=9).requires_grad_()
    z = flow.encode(x)
    expected = truth.log_prob(z) + torch.linalg.slogdet(jacobian(z, x))[1]
    found = flow.log_prob(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-8)
    (slope,) = torch.autograd.grad(expected.sum(), x, retain_graph=True)
    assert torch.allclose(flow.score(x), slope, rtol=1e-6, atol=1e-7)
    found.sum().backward()
    for label, p in flow.named_parameters():
        if p.requires_grad and not (name == "one component" and label == "base.logits"):
            assert p.grad is not None and bool((p.grad != 0).any()), label
    assert torch.allclose(evaluate(flow.eval(), x.detach()).log_prob, expected, rtol=0, atol=1e-8)
    assert flow.blocks and flow.levels is None and flow.context_dim == 0
    assert flow.trajectory(x, torch.linspace(0, 1, 3)).shape == (3, 4, 2)


@pytest.mark.parametrize("covariance", ["full", "tied", "diag"])
def test_mixture_gradient_by_finite_differences(covariance):
    base, z = mixture(covariance=covariance), normal(5, 2)
    names = [name for name, _ in base.named_parameters()]

    class Density(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base = base

        def forward(self, z):
            return self.base.log_prob(z)

    wrapped = Density()

    def density(z, *parameters):
        return torch.func.functional_call(wrapped, {f"base.{name}": p for name, p in zip(names, parameters, strict=True)}, (z,))

    assert torch.autograd.gradcheck(density, (z.requires_grad_(), *base.parameters()))
    slopes = torch.func.vmap(torch.func.grad(lambda row: base.log_prob(row[None])[0]))(z.detach())
    (truth,) = torch.autograd.grad(base.log_prob(z).sum(), z)
    assert torch.allclose(slopes, truth, rtol=0, atol=1e-12)


class Waits(TorchDispatchMode):
    """Notes the operations that make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.__name__.partition(".")[0]
        self.found += [name] if name in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh") else []
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("covariance", ["full", "tied", "diag"])
def test_a_mixture_does_not_synchronise(covariance):
    base = mixture(covariance=covariance)
    with Waits() as waits:
        z = base.sample(5, noise=Noise(0))
        base.log_prob(z).sum().backward()
    assert waits.found == []


@pytest.mark.slow
def test_compiled():
    torch.compiler.reset()
    flow, x = flow_on(mixture()).eval(), normal(5, 2)
    found = torch.compile(flow.log_prob, backend="eager", fullgraph=True)(x)
    assert torch.allclose(found, flow.log_prob(x), rtol=0, atol=1e-12)


def test_far_from_all_components():
    base = mixture().float()
    z = torch.full((1, 2), 1e6, requires_grad=True)
    base.log_prob(z).sum().backward()
    assert bool(base.log_prob(z).isfinite().all()) and bool(z.grad.isfinite().all())


# -- samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_moments_of_samples(name):
    base, _ = BASES[name]()
    z = base.sample(20_000, noise=Noise(3))
    if name == "student":
        df, loc, scale = (getattr(student().base_dist, each) for each in ("df", "loc", "scale"))
        mean, covariance = loc, torch.diag(scale**2 * df / (df - 2))
    elif name == "transformed":
        mean, covariance = normal(2), 0.25 * torch.eye(2, dtype=F64)
    elif name == "normal":
        mean, covariance = torch.zeros(2, dtype=F64), 0.49 * torch.eye(2, dtype=F64)
    else:
        d = of_torch() if name in TORCHS else as_torch(base)
        share, means = d.mixture_distribution.probs, d.component_distribution.loc
        mean = share @ means
        apart = means - mean
        covariance = torch.einsum("k,kij->ij", share, d.component_distribution.covariance_matrix + apart[:, :, None] * apart[:, None])
    for values, expected in ((z, mean), ((z - mean)[:, :, None] * (z - mean)[:, None], covariance)):
        score = (values.mean(0) - expected) / (values.std(0) / math.sqrt(len(z)))
        assert float(score.abs().max()) < 5
    assert not z.requires_grad
    density = base.log_prob(z).detach()  # its mean is minus the entropy, for samples of the same density
    again = base.log_prob(base.sample(20_000, noise=Noise(4))).detach()
    assert abs(float(density.mean() - again.mean())) < 5 * math.sqrt(2) * float(density.std()) / math.sqrt(len(z))


@pytest.mark.parametrize("name", BASES)
def test_samples_are_a_function_of_the_noise(name):
    base, _ = BASES[name]()
    state = torch.get_rng_state()
    z = base.sample(7, noise=Noise(3))
    assert torch.equal(z, base.sample(7, noise=Noise(3))) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(z, base.sample(7, noise=Noise(4)))
    parts = [base.sample(n, noise=Noise(3, start=start, total=7)) for start, n in ((0, 3), (3, 4))]
    assert torch.allclose(torch.cat(parts), z, rtol=0, atol=1e-12)
    torch.manual_seed(1)
    first = base.sample(4)
    assert not torch.equal(first, base.sample(4))
    torch.manual_seed(1)
    assert torch.equal(first, base.sample(4))
    like = torch.zeros((), dtype=torch.float32)
    assert base.sample(4, like=like).dtype == torch.float32 and base.sample(0, noise=Noise(3)).shape == (0, 2)


@pytest.mark.parametrize("name", mostly_slow(BASES, "normal", "full", "student", "transformed"))
def test_samples_of_flows(name):
    base, _ = BASES[name]()
    flow = flow_on(base).eval()
    with torch.no_grad():
        z = base.sample(5, noise=Noise(2), like=flow.like)
        x, log_prob = flow.sample_and_log_prob(5, noise=Noise(2))
        for found in (flow.sample(5, noise=Noise(2)), flow.rsample(5, noise=Noise(2)), flow.decode(z), x):
            assert torch.allclose(found, x, rtol=0, atol=1e-12)
        assert torch.allclose(flow.encode(x), z, rtol=0, atol=1e-7) and torch.allclose(flow.log_prob(x), log_prob, rtol=0, atol=1e-7)
    distribution = flow.distribution()
    assert distribution.has_rsample is base.has_rsample is (name not in ("full", "tied", "diag"))
    assert distribution.expand((4,)).sample((3,)).shape == (3, 4, 2)
    assert torch.equal(pickle.loads(pickle.dumps(distribution)).log_prob(x), distribution.log_prob(x))
    if base.has_rsample:
        x, log_prob = flow.sample_and_log_prob(5, noise=Noise(2))
        (x.sum() + log_prob.sum() + distribution.rsample((2,)).sum() + flow.rsample(3).sum()).backward()
        assert all(p.grad is not None for p in flow.transform.parameters())
        return
    for call in (flow.rsample, flow.sample_and_log_prob, distribution.rsample, base.rsample):
        with pytest.raises(ConfigError, match=r"trained GaussianMixture are not differentiable: .*requires_grad_\(False\)"):
            call(*([3] if call == base.rsample else []))
    base.requires_grad_(False)
    assert distribution.has_rsample and flow.rsample(3).requires_grad


def test_derivative_of_one_component():
    base = mixture(components=1)
    base.rsample(6, noise=Noise(0)).square().sum().backward()
    assert all(bool((p.grad != 0).any()) for p in (base.means, base.log_diagonal, base.lower))


def test_temperature_scales_every_component():
    for covariance in ("full", "tied", "diag"):
        base = mixture(covariance=covariance)
        one, half = (base.sample(200, noise=Noise(0), temperature=t) for t in (1.0, 0.5))
        centre = 2 * half - one  # mean of the sample's component
        assert float((centre[:, None] - base.means.detach()).abs().amax(2).amin(1).max()) < 1e-12
    assert torch.equal(StandardNormal(2, 3.0).sample(9, noise=Noise(1)), 3 * Noise(1).draw("latent", "normal", (9, 2)))
    flow = flow_on(mixture())
    assert flow.sample(3, temperature=0.5).shape == (3, 2)
    with pytest.raises(ConfigError, match="temperature must be positive"):
        flow.sample(3, temperature=-1.0)
    with pytest.raises(ConfigError, match=r"temperature=0\.5 is for a normal or mixture base, expected 1 for Independent"):
        flow_on(student()).sample(3, temperature=0.5)


def test_a_context_reaches_field_and_base():
    context = normal(4, 3, seed=7)
    for base in (mixture(), Shifted()):
        flow = flow_on(base, context_dim=3)
        with torch.no_grad():
            x, log_prob = flow.sample_and_log_prob(5, context, noise=Noise(0))
            assert x.shape == (5, 4, 2) and log_prob.shape == (5, 4)
            assert torch.allclose(flow.log_prob(x, context), log_prob, rtol=0, atol=1e-7)
            assert torch.allclose(evaluate(flow.eval(), x[0], context).log_prob, log_prob[0], rtol=0, atol=1e-7)
        assert Likelihood(flow)(x[0], context)["nll"].shape == FlowMatching(flow, weights="even")(x[0], context).shape == (4,)
    flow = flow_on(Shifted())
    assert flow.context_dim == 3 and not torch.equal(flow.log_prob(x[0], context), flow.log_prob(x[0], -context))
    with pytest.raises(ConfigError, match="context is missing"):
        flow.distribution()


# -- fitting -----------------------------------------------------------------------------------------------------


def blobs(n=600, dtype=F64):
    centres = torch.tensor([[-4.0, 0.0], [4.0, 1.0], [0.0, 5.0]], dtype=F64)
    which = torch.arange(n) % 3
    return (centres[which] + normal(n, 2, seed=11) @ torch.tensor([[1.0, 0.6], [0.0, 0.5]], dtype=F64)).to(dtype)


@pytest.mark.parametrize("covariance", ["full", "tied", "diag"])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_fit_is_that_of_scikit_learn(covariance, dtype):
    z = blobs(dtype=dtype)
    base = GaussianMixture.fit(z, 4, covariance, seed=3)
    theirs = Mixture(4, covariance_type=covariance, random_state=3, max_iter=200).fit(z.double().numpy())
    truth = torch.from_numpy(theirs.score_samples(z.double().numpy()))
    found = base.log_prob(z)
    assert found.dtype == base.means.dtype == dtype and base.fitted
    assert torch.allclose(found.double(), truth, rtol=0, atol=1e-10 if dtype == F64 else 1e-5)
    assert torch.allclose(base.log_prob(z.double()), truth, rtol=0, atol=1e-10 if dtype == F64 else 1e-5)


def test_a_flow_without_an_ode_is_trained():
    x = blobs(300).float()
    flow = cnf.Flow(Standardize(torch.zeros(2), torch.ones(2)), (2,), base=GaussianMixture(2, 3))
    before = flow.log_prob(x).mean()
    cnf.fit(flow, x, validation=0.2, steps=200, lr=1e-2, quiet=True)
    assert flow.log_prob(x).mean() > before + 0.2


@pytest.mark.parametrize("ensemble", [False, True], ids=["one", "ensemble"])
def test_a_conditional_mixture_is_fitted_evaluated_and_trained(ensemble):
    context = normal(400, 3, seed=1).float()
    x = 3 * context[:, :2] + 0.5 * normal(400, 2, seed=2).float()
    members = [ConditionalMixture.fit(x, context, k, hidden=(8,), seed=k) for k in (1, 2)]
    base = MixtureEnsemble(members) if ensemble else members[1]
    flow = cnf.Flow(cnf.CNF(MLP(2, (8,), context_dim=3, zero_init=True), solver=FixedGrid("rk4", 2)), (2,), base=base).eval()
    truth = Normal(3 * context[:, :2], 0.5).log_prob(x).sum(1)
    found = evaluate(flow, x, context).require_solved()  # log q in double precision, weights in single
    exact = copy.deepcopy(flow).double().log_prob(x.double(), context.double())
    torch.testing.assert_close(found.log_prob, exact, atol=1e-4, rtol=1e-5)
    assert abs(found.log_prob.mean() - truth.mean()) < 0.05
    cnf.fit(flow, x, context=context, validation=0.2, steps=20, quiet=True)
    assert flow.log_prob(x, context).mean() > found.log_prob.mean() - 0.05


@pytest.mark.parametrize("covariance", ["full", "tied", "diag"])
def test_iterations_are_those_of_scikit_learn(covariance):
    z = blobs()
    theirs = Mixture(4, covariance_type=covariance, random_state=3, max_iter=1, tol=0, warm_start=True).fit(z.numpy())
    base = GaussianMixture.fit(z, 4, covariance, seed=3, max_iter=1)
    for _ in range(4):
        theirs.fit(z.numpy())
    course = base.improve(z, 4, tolerance=-1.0)
    torch.testing.assert_close(base.log_prob(z), torch.from_numpy(theirs.score_samples(z.numpy())), atol=3e-6, rtol=0)
    assert course == sorted(course) and base.log_prob(z).mean() > course[-1]
    z[:, 1] = 1e3 + 1e-2 * z[:, 1]  # an offset and another scale change nothing
    moved = GaussianMixture.fit(z, 4, covariance, seed=3, max_iter=1, min_variance=1e-12)
    course = moved.improve(z, 5, min_variance=1e-12)
    assert course == sorted(course)


def test_a_component_without_rows_is_kept():
    z = blobs()
    base = GaussianMixture.fit(z, 2)
    far = GaussianMixture(2, 1).double()
    with torch.no_grad():
        far.means.fill_(1e6)
    both = GaussianMixture.mean_of([base, far])
    both.improve(z, 3)
    torch.testing.assert_close(both.log_prob(z), base.log_prob(z), atol=2e-3, rtol=0)


@pytest.mark.parametrize("kinds", [("full", "tied"), ("diag", "diag")])
def test_the_mean_of_mixtures(kinds):
    z = blobs()
    members = [GaussianMixture.fit(z, k, kind, seed=k) for k, kind in zip((2, 3), kinds, strict=True)]
    mean = GaussianMixture.mean_of(members)
    expected = torch.stack([m.log_prob(z) for m in members]).exp().mean(0).log()
    torch.testing.assert_close(mean.log_prob(z), expected, atol=1e-12, rtol=1e-12)
    assert mean.components == 5 and mean.covariance == ("diag" if kinds == ("diag", "diag") else "full") and mean.fitted
    with pytest.raises(ConfigError, match="members"):
        GaussianMixture.mean_of([])
    with pytest.raises(ConfigError, match="one event shape"):
        GaussianMixture.mean_of([members[0], GaussianMixture(3, 2)])


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_the_flow_to_a_mixture_in_closed_form_has_its_density(covariance):
    base = GaussianMixture(2, 3, covariance).double()
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.5 * torch.randn_like(p))
    z = base.sample(20)
    field = MixtureVelocity(base.logits, base.means, base.covariances)
    flow = cnf.Flow(cnf.CNF(field, eval_solver=Adaptive("dopri5", rtol=1e-8, atol=1e-8)), (2,)).double().eval()
    assert torch.allclose(flow.log_prob(z), base.log_prob(z), atol=1e-5)


def test_fit_of_other_shapes():
    for shape in ((1,), (1, 2, 2), (2, 3)):
        z = normal(90, *shape)
        base = GaussianMixture.fit(z, 2)
        theirs = Mixture(2, random_state=0, max_iter=200).fit(z.flatten(1).numpy())
        assert torch.allclose(base.log_prob(z), torch.from_numpy(theirs.score_samples(z.flatten(1).numpy())), rtol=0, atol=1e-10)
        assert base.sample(4, noise=Noise(0)).shape == (4, *shape)


def test_fit_leaves_the_global_generator_alone():
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again = (GaussianMixture.fit(blobs(), 3, seed=1) for _ in range(2))
    assert same_weights(first, again) and torch.equal(torch.get_rng_state(), state[0]) and bool((np.random.get_state()[1] == state[1]).all())


def test_choice_of_components_by_validation():
    z = blobs(1200)
    base, scores = GaussianMixture.choose(z[:600], z[600:], (1, 3, 40), trainable=False)
    assert base.components == 3 and list(scores) == [1, 3, 40] and not any(p.requires_grad for p in base.parameters())
    assert scores[3] == pytest.approx(float(base.log_prob(z[600:]).mean()), abs=1e-12) and scores[3] == max(scores.values())


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_flow_starts_at_the_likelihood_of_the_mixture(dtype):
    x = 10 + 3 * blobs(dtype=dtype)
    block = cnf.CNF(MLP(2, hidden=(6,), zero_init=True)).to(dtype)
    transform = Sequential([Standardize(torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype)), block])
    plain = cnf.Flow(transform, (2,)).eval()
    plain.fit_statistics(x)
    z = plain.encode(x).detach()
    flow = cnf.Flow(transform, (2,), base=GaussianMixture.fit(z, 3)).eval()
    theirs = Mixture(3, random_state=0, max_iter=200).fit(z.double().numpy())
    truth = torch.from_numpy(theirs.score_samples(z.double().numpy())) - transform.transforms[0].std.double().log().sum()
    assert torch.allclose(flow.log_prob(x).double(), truth, rtol=0, atol=1e-10 if dtype == F64 else 2e-5)
    assert evaluate(flow, x).mean == pytest.approx(-float(truth.mean()), abs=1e-10 if dtype == F64 else 1e-5)
    flow = cnf.Flow(transform, (2,), base=GaussianMixture.fit(z, 2)).eval()
    before = evaluate(flow, x).mean
    result = cnf.fit(flow, x, validation=x, steps=40, batch_size=200, validate_every=20, lr=0.03, quiet=True, callbacks=WeightAverage)
    assert result.best < before and torch.equal(transform.transforms[0].std, plain.transform.transforms[0].std)


@pytest.mark.parametrize("name", mostly_slow(BASES, "full", "frozen", "transformed"))
def test_cnf_fit_trains_the_base(name):
    base, _ = BASES[name]()
    flow = flow_on(base, Standardize(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)))
    before = copy.deepcopy(flow)
    x = blobs(100)
    cnf.fit(flow, x, validation=0.2, steps=4, batch_size=20, validate_every=2, quiet=True)
    assert bool((flow.transform.transforms[0].std != 1).all())
    for (label, new), old in zip(base.named_parameters(), before.base.parameters(), strict=True):
        moved = not torch.equal(new, old)
        assert moved is (new.requires_grad and not (name == "one component" and label == "logits")), label
    assert bool(flow.log_prob(x).isfinite().all())


def test_statistics_of_a_fitted_base_are_kept():
    """The mixture was fitted to latents of these very transforms."""
    whiten = Standardize(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64))
    x = blobs(100)
    flow = flow_on(GaussianMixture.fit(x, 2), whiten)
    cnf.fit(flow, x, steps=1, quiet=True)
    assert torch.equal(whiten.std, torch.ones(2, dtype=F64)) and torch.equal(whiten.mean, torch.zeros(2, dtype=F64))


def test_micro_batches_give_the_gradient_of_the_batch():
    x = blobs(12)
    for name in BASES:
        gradients = []
        for objective, count in ((kind, count) for kind in (Likelihood, FlowMatching) for count in (1, 3)):
            flow = flow_on(BASES[name]()[0])
            gradient(objective(flow), x, None, Noise(0), count=count)
            gradients.append(torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None]))
        for whole, parts in (gradients[:2], gradients[2:]):
            assert torch.allclose(whole, parts, rtol=0, atol=1e-12), name


TRAINING = """
import sys, torch, cnf
from cnf.bases import GaussianMixture
from cnf.distributed import join
from cnf.fields import MLP
from cnf.losses import FlowMatching, Likelihood
from cnf.solvers import Adaptive, FixedGrid

torch.manual_seed(0)
x = torch.randn(24, 2, dtype=torch.float64)
with join("cpu") as group:
    found = []
    for loss in (Likelihood, FlowMatching):
        flow = cnf.Flow(cnf.CNF(MLP(2, hidden=(6,)).double(), solver=FixedGrid("rk4", 2)), (2,), base=GaussianMixture.fit(x, 3))
        cnf.fit(flow, x, loss=loss(flow), steps=3, batch_size=8, quiet=True, group=group)
        found += [p.detach() for p in flow.parameters()]
    if group.main and len(sys.argv) > 1:
        torch.save(found, sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path, monkeypatch):
    (tmp_path / "ranks.py").write_text(TRAINING)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [sys.executable, *torchrun, str(tmp_path / "ranks.py"), str(tmp_path / "ranks.pt")]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", ["ranks.py"])
    exec(TRAINING, alone := {})
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(torch.load(tmp_path / "ranks.pt"), alone["found"], strict=True))


# -- flow matching -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_matching_draws_its_noise_from_the_base(name):
    base, _ = BASES[name]()
    flow = cnf.Flow(cnf.CNF(MLP(2, zero_init=True).double()), (2,), base=base)
    x, noise = blobs(30), Noise(0, step=2)
    loss = FlowMatching(flow, times="even")(x, None, noise).detach()
    z = base.sample(30, noise=noise, like=flow.like)
    assert torch.allclose(loss, (z - x).square().mean(1), rtol=0, atol=1e-12)  # the field is zero
    transported = FlowMatching(flow, "optimal-transport", times="even")(x, None, noise).detach()
    assert float(transported.mean()) < float(loss.mean())


def test_matching_refuses_what_needs_a_normal_base():
    field = MLP(2)
    field.interpolant = Interpolant(0.1)
    for base, weights, why in ((mixture(), "likelihood", "likelihood weights"), (student(), "default", "the noise of the data")):
        flow = cnf.Flow(cnf.CNF(field if weights == "default" else MLP(2)), (2,), base=base)
        with pytest.raises(ConfigError, match=f"base is a (GaussianMixture|DistributionBase), but {why}"):
            FlowMatching(flow, weights=weights)
    FlowMatching(cnf.Flow(cnf.CNF(field), (2,), base_std=0.5))


# -- files, dtypes, distributions of torch -----------------------------------------------------------------------


@pytest.mark.parametrize("name", mostly_slow(BASES, "full", "tied", "diag", "frozen", "torch's mixture"))
def test_save_and_load(name, tmp_path):
    base, _ = BASES[name]()
    flow, x = flow_on(base).eval(), normal(5, 2)
    cnf.save(flow, tmp_path / "flow")
    other, _ = BASES[name]()
    again = flow_on(other)
    for value in again.state_dict().values():
        value.zero_()
    again = cnf.load(tmp_path / "flow", flow=again)
    assert torch.equal(again.log_prob(x), flow.log_prob(x)) and same_weights(again, flow)
    assert torch.equal(again.sample(3, noise=Noise(0)), flow.sample(3, noise=Noise(0)))
    copied = copy.deepcopy(flow)
    assert torch.equal(copied.log_prob(x), flow.log_prob(x)) and copied.base is not flow.base
    if name == "normal":
        assert not [key for key in flow.state_dict() if key.startswith("base")]
    else:
        assert [key for key in flow.state_dict() if key.startswith("base.")]
        with pytest.raises(CheckpointError, match="base"):
            cnf.load(tmp_path / "flow", flow=flow_on(None))
    assert contents(tmp_path)


def test_resume_to_the_same_bits(tmp_path):
    results = []
    for steps in ((6,), (3, 6)):
        flow = None
        for last in steps:
            flow = flow_on(GaussianMixture.fit(blobs(60), 2))
            options = {"batch_size": 16, "validate_every": 3, "quiet": True, "schedule": "constant", "validation": 0.2, "seed": 1}
            cnf.fit(flow, blobs(60), steps=last, folder=tmp_path / str(len(steps)), resume=last != steps[0], **options)
        results.append(flow)
    assert same_weights(*results)


def test_dtype_follows_the_flow():
    for name in BASES:
        flow = flow_on(BASES[name]()[0]).float()
        assert flow.log_prob(torch.zeros(3, 2)).dtype == flow.sample(3).dtype == torch.float32
        assert all(v.dtype == torch.float32 for v in flow.state_dict().values()), name
        assert flow.double().log_prob(torch.zeros(3, 2, dtype=F64)).dtype == flow.sample(3).dtype == F64
    mixed = cnf.Flow(cnf.CNF(MLP(2)), (2,), base=mixture())  # float32 weights, float64 base
    assert mixed.log_prob(torch.zeros(3, 2)).dtype == mixed.sample(3).dtype == torch.float32
    before = copy.deepcopy(mixed)
    cnf.fit(mixed, torch.randn(40, 2), steps=2, batch_size=20, quiet=True)
    assert not any(torch.equal(a, b) for a, b in zip(mixed.base.parameters(), before.base.parameters(), strict=True))
    meta = flow_on(student()).to("meta")
    assert all(v.is_meta for v in meta.state_dict().values())


@pytest.mark.parametrize("make", [student, of_torch, moved, lambda: LowRankMultivariateNormal(normal(2), normal(2, 1), torch.ones(2, dtype=F64))])
def test_parameters_of_a_distribution_do_not_depend_on_its_use(make):
    fresh, used = make(), make()
    used.log_prob(used.sample((3,)))
    inner = used.base_dist if isinstance(used, TransformedDistribution) else getattr(used, "component_distribution", used)
    for name in ("precision_matrix", "covariance_matrix", "scale_tril"):
        getattr(inner, name, None)
    a, b = DistributionBase(fresh), DistributionBase(used)
    assert list(a.state_dict()) == list(b.state_dict()) and same_weights(a, b)
    z = normal(4, 2)
    assert torch.allclose(b.log_prob(z), make().log_prob(z), rtol=0, atol=1e-12)
    with torch.no_grad():
        for value in a.state_dict().values():
            value.copy_(value + 0.0)
    assert torch.equal(a.log_prob(z), b.log_prob(z))


def test_changed_buffers_are_used():
    base = DistributionBase(Independent(Normal(torch.zeros(2), torch.ones(2)), 1))
    base.load_state_dict({name: value + (3.0 if name.endswith("loc") else 1.0) for name, value in base.state_dict().items()})
    z = torch.randn(5, 2)
    assert torch.equal(base.log_prob(z), Independent(Normal(torch.full((2,), 3.0), 2.0), 1).log_prob(z))


def test_no_density_outside_of_the_support():
    for distribution in (Uniform(torch.zeros(2), torch.ones(2)), Beta(torch.full((2,), 2.0), torch.full((2,), 3.0))):
        base = DistributionBase(Independent(distribution, 1))
        value = base.log_prob(torch.tensor([[0.5, 0.5], [0.5, 1.5], [math.nan, 0.5]]))
        assert bool(value[0].isfinite()) and float(value[1]) == -math.inf and bool(value[2].isnan())


def test_short_form_of_a_normal_base():
    flow = cnf.Flow(cnf.CNF(MLP(2)), (2,), base_std=0.5)
    same = cnf.Flow(flow.transform, (2,), base=StandardNormal(2, 0.5))
    x = torch.randn(5, 2)
    assert torch.equal(flow.log_prob(x), same.log_prob(x)) and flow.base_std == same.base_std == 0.5
    assert torch.equal(flow.sample(3, noise=Noise(0)), same.sample(3, noise=Noise(0)))
    assert "std=0.5" in repr(flow)
    wrapped = cnf.from_velocity(lambda t, x: -x, (2,), time="noise-to-data", base=student())
    assert isinstance(wrapped.base, DistributionBase)
    with pytest.raises(ConfigError, match=r"base_std is the standard deviation of a normal base, but this flow has a DistributionBase"):
        _ = wrapped.base_std


def test_a_replaced_base_is_saved_as_a_custom_flow(tmp_path):
    flow = cnf.build(cnf.FlowConfig.of(hidden=(4,)), cnf.SolverConfig(), (2,))
    for number, base in enumerate((StandardNormal(2, 2.0), mixture().float())):
        flow.base = base
        cnf.save(flow, tmp_path / str(number))
        with pytest.raises(CheckpointError, match="flow=my_flow"):
            cnf.load(tmp_path / str(number))
        assert torch.equal(cnf.load(tmp_path / str(number), flow=copy.deepcopy(flow)).log_prob(torch.ones(1, 2)), flow.log_prob(torch.ones(1, 2)))


class Mute(Distribution):
    arg_constraints = {}  # noqa: RUF012

    def __init__(self):
        super().__init__(event_shape=torch.Size((2,)), validate_args=False)


@pytest.mark.parametrize(
    "base, message",
    [
        (Normal(torch.zeros(2), 1.0), r"batch shape \(2,\) and event shape \(\), .*: use torch.distributions.Independent\(base, 1\)"),
        (Normal(0.0, 1.0), r"batch shape \(\) and event shape \(\)"),
        (MultivariateNormal(torch.zeros(3), torch.eye(3)), r"event shape \(3,\), but the transform's latents have shape \(2,\)"),
        (StandardNormal((1, 2)), r"event shape \(1, 2\), but the transform's latents"),
        (Independent(Bernoulli(torch.ones(2) / 2), 1), "has no density"),
        (Mute(), "base Mute has no density"),
        (Independent(Normal(torch.zeros(2, requires_grad=True), 1.0), 1), "'base_dist.loc' that requires a gradient"),
        (FlowDistribution(cnf.Flow(cnf.CNF(MLP(2)), (2,))), r"holds a module \(Flow at 'flow'\)"),
        (torch.nn.Linear(2, 2), "base is a Linear, expected a torch.distributions.Distribution or a cnf.bases.Base"),
    ],
)
def test_refused_bases(base, message):
    with pytest.raises(ConfigError, match=message):
        cnf.Flow(cnf.CNF(MLP(2)), (2,), base=base)


def test_refusals():
    with pytest.raises(ConfigError, match=r"base_std=0\.5 is the standard deviation of a normal base, but base=GaussianMixture is given"):
        cnf.Flow(cnf.CNF(MLP(2)), (2,), base=mixture(), base_std=0.5)
    z = blobs(20)
    for call, error, message in (
        (lambda: GaussianMixture(2, 0), ConfigError, "components must be at least 1, got 0"),
        (lambda: GaussianMixture(0, 1), ConfigError, "event_shape"),
        (lambda: GaussianMixture(2, 2, "spherical"), ConfigError, "covariance='spherical' is unknown: expected 'full', 'tied' or 'diag'"),
        (lambda: StandardNormal(2, math.nan), ConfigError, "std must be positive"),
        (lambda: GaussianMixture.fit(z[:4], 5), DataError, "z has 4 rows, expected at least 5 for 5 components"),
        (lambda: GaussianMixture.fit(z[:1], 1), DataError, "z has 1 rows, expected at least 2"),
        (lambda: GaussianMixture.fit(z[:, 0], 1), DataError, r"z has shape \(20,\)"),
        (lambda: GaussianMixture.fit(torch.where(z == z[3, 1], math.nan, z), 2), DataError, "NaN or infinity, first in row 3"),
        (lambda: GaussianMixture.fit(z * torch.tensor([1.0, 0.0]), 2), DataError, "dimension 1 of z is constant at 0"),
        (lambda: GaussianMixture.fit(z, 2, min_variance=-1.0), DataError, "2 components cannot be fitted to z: .*reg_covar"),
        (lambda: GaussianMixture.choose(z, z, ()), ConfigError, "candidates is empty"),
        (lambda: GaussianMixture.choose(z, z[:0]), DataError, "validation has no rows"),
        (lambda: mixture().log_prob(normal(3, 3)), DataError, r"z has shape \(3, 3\), expected \(N, 2\)"),
        (lambda: DistributionBase(student()).log_prob(normal(3, 3)), DataError, r"z has shape \(3, 3\), expected \(N, 2\)"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(NotImplementedError, match="_draw"):
        Base(2).sample(1)


def test_a_mixture_of_images():
    x = torch.randint(0, 4, (60, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = Sequential([Dequantize(4), Gaussianize((1, 2, 2), 4), cnf.CNF(ConvField(1, hidden=(3,), zero_init=True))])
    start = cnf.Flow(transform, (1, 2, 2)).eval()
    start.fit_statistics(x)
    z = start.encode(x, noise=Noise(0)).detach()
    flow = cnf.Flow(transform, (1, 2, 2), base=GaussianMixture.fit(z, 2)).eval()
    assert flow.sample(3, quantize=True).dtype == torch.uint8
    change = flow.log_prob(x, noise=Noise(0)) - start.log_prob(x, noise=Noise(0))
    assert torch.allclose(change, flow.base.log_prob(z) - start.base.log_prob(z), rtol=0, atol=1e-4)
    before, after = (float(each.bits_per_dim(x, noise=Noise(0)).detach().mean()) for each in (start, flow))
    assert after < before


def test_a_standard_normal_refuses_other_shapes():
    """They were taken for events of more dimensions, with another density."""
    for z in (torch.zeros(5, 2, 3), torch.zeros(5, 4), torch.zeros(3)):
        with pytest.raises(DataError, match=r"expected \(N, 3\)"):
            StandardNormal(3).log_prob(z)
