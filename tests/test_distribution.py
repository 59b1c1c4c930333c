"""The distribution and the transform that a flow returns: one solve, one probe, contexts of any batch shape, torch's contract."""

import io
import math

import pytest
import torch
from conftest import F64, normal, perturbed
from torch.distributions import (
    AffineTransform,
    Categorical,
    ExpTransform,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    SigmoidTransform,
    TransformedDistribution,
    kl_divergence,
)

import cnf
from cnf.bases import ConditionalMixture
from cnf.distribution import LazyTransform
from cnf.fields import MLP
from cnf.transforms import Logit, Sequential, Standardize, TorchTransform

GRID = cnf.FixedGrid("rk4", 3)


def flow_of(context_dim=0, dim=2, divergence=None, first=(), **options):
    torch.manual_seed(0)
    block = cnf.CNF(MLP(dim, (5,), context_dim=context_dim), divergence, GRID, GRID)
    return perturbed(cnf.Flow(Sequential([*first, block]), (dim,), **options))


class Counting(torch.nn.Module):
    """A field that counts its evaluations."""

    def __init__(self):
        super().__init__()
        self.net, self.calls, self.context_dim = torch.nn.Linear(2, 2, dtype=F64), 0, 0

    def forward(self, t, x):
        self.calls += 1
        return self.net(x).tanh()


def test_the_parts_make_the_density():
    flow, c = flow_of(3), normal(4, 3)
    d = flow(c)
    x = normal(5, 4, 2)
    z, log_det = d.transform.call_and_ladj(x)
    truth = torch.stack([flow.log_prob(x[:, m], c[m]) for m in range(4)], 1)
    assert torch.allclose(d.base.log_prob(z) + log_det, truth, atol=1e-12) and torch.allclose(d.log_prob(x), truth, atol=1e-12)
    assert torch.allclose(d.transform(x), z, atol=1e-12) and torch.allclose(d.transform.log_abs_det_jacobian(x, z), log_det, atol=1e-12)
    assert d.base.batch_shape == (4,) and d.base.sample((6,)).shape == (6, 4, 2)
    one = flow(c[0]).transform
    jacobian = torch.autograd.functional.jacobian(one, x[0, 0])
    assert torch.allclose(one.log_abs_det_jacobian(x[0, 0], one(x[0, 0])), torch.linalg.slogdet(jacobian)[1], atol=1e-3)  # the grid's error
    back, back_det = d.transform.inv.call_and_ladj(z)
    assert torch.allclose(back, d.transform._inverse(z), atol=1e-12) and torch.allclose(d.transform.inv.inv(x), z, atol=1e-12)
    assert torch.allclose(back, x, atol=1e-3) and torch.allclose(back_det, -log_det, atol=1e-2)
    assert d.transform == flow(c[0]).expand((2,)).transform.__class__(flow, c, d.noise) and d.transform != d.transform.inv


def test_one_solve_gives_samples_and_their_density():
    field = Counting()
    flow = cnf.Flow(cnf.CNF(field, solver=GRID), (2,)).double()
    x, log_p = flow().rsample_and_log_prob((7,))  # the first call also checks the field
    assert x.requires_grad and log_p.shape == (7,) and torch.allclose(flow().log_prob(x), log_p, atol=2e-2)
    calls = []
    for run in (lambda: flow().log_prob(x), lambda: flow().rsample_and_log_prob((7,))):
        field.calls = 0
        run()
        calls.append(field.calls)
    assert calls[0] == calls[1] == 12


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("sample", [(), (4,), (2, 4), (0,)])
def test_contexts_and_samples_of_any_shape(batch, sample):
    flow = flow_of(3)
    d = flow(normal(*batch, 3))
    x, log_p = d.rsample_and_log_prob(sample)
    assert x.shape == (*sample, *batch, 2) and log_p.shape == (*sample, *batch) == d.log_prob(x).shape
    assert d.sample(sample).shape == x.shape == d.transform.inv(d.base.sample(sample)).shape
    wide = d.expand((5, *batch))
    assert wide.sample(sample).shape == (*sample, 5, *batch, 2) and wide.log_prob(wide.sample(sample)).shape == (*sample, 5, *batch)
    if batch == (1,):  # broadcast against points and batches
        assert d.log_prob(normal(6, 2)).shape == (6,) and d.expand((6,)).sample(sample).shape == (*sample, 6, 2)
        assert torch.allclose(d.expand((6,)).log_prob(normal(6, 2)), d.log_prob(normal(6, 2)))


def test_a_hutchinson_flow_keeps_its_probe():
    flow = flow_of(dim=4, divergence=cnf.Hutchinson())
    x = normal(8, 4)
    d = flow()
    torch.manual_seed(1)
    found = d.log_prob(x)
    assert torch.equal(found, d.log_prob(x)) and torch.equal(found, d.expand((3, 8)).log_prob(x)[2])
    assert torch.allclose(found[2:5], d.log_prob(x[2:5]), atol=1e-12)  # a function of the point, whatever is next to it
    y, log_p = d.rsample_and_log_prob((6,))
    assert torch.allclose(d.log_prob(y), log_p, atol=3e-2) and not torch.equal(y, d.rsample((6,)))
    torch.manual_seed(1)
    assert torch.equal(found, flow().log_prob(x))  # the probe is torch's global generator's
    assert not torch.allclose(found, flow().log_prob(x))
    exact = torch.stack([flow().log_prob(x) for _ in range(100)]).mean(0)  # Exact = E[Hutchinson]
    spread = torch.stack([flow().log_prob(x) for _ in range(30)]).std(0) / 10
    assert bool(((exact - flow.log_prob(x, divergence=cnf.Exact())).abs() < 5 * spread).all())
    twin = torch.load(_saved(d), weights_only=False)
    assert torch.equal(twin.log_prob(x), found)


def _saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


def test_flows_without_random_parts_leave_the_generator_alone():
    flow, state = flow_of(), torch.get_rng_state()
    flow().log_prob(normal(3, 2))
    assert torch.equal(state, torch.get_rng_state())


def test_torch_contract():
    flow, c = flow_of(3), normal(4, 3)
    d = flow(c)
    mixture = MixtureSameFamily(Categorical(logits=torch.zeros(4, dtype=F64)), d)
    x = mixture.sample((50,))
    assert torch.allclose(mixture.log_prob(x), torch.stack([flow.log_prob(x, one) for one in c]).logsumexp(0) - math.log(4), atol=1e-9)
    moved = TransformedDistribution(d, [ExpTransform()])
    assert torch.allclose(moved.log_prob(x[:4].exp()), d.log_prob(x[:4]) - x[:4].sum(1), atol=1e-9)
    pushed = TransformedDistribution(Independent(Normal(torch.zeros(4, 2, dtype=F64), 1.0), 1), [d.transform.inv])
    assert torch.allclose(pushed.log_prob(x[:4]), d.log_prob(x[:4]), atol=1e-2)  # two solves of a coarse grid
    assert torch.equal(torch.load(_saved(d), weights_only=False).log_prob(x[:4]), d.log_prob(x[:4]))
    assert d.transform.forward_shape((7, 2)) == (7, 2) and d.transform.domain.event_dim == d.transform.codomain.event_dim == 1
    assert "MLP" not in repr(d) and "context=(4, 3)" in repr(d) and "CNF" in repr(d.transform.inv)
    assert isinstance(d, cnf.FlowDistribution)
    with pytest.raises(cnf.errors.ConfigError, match=r"batch_shape=\(3,\) does not extend that of the context, \(4,\)"):
        d.expand((3,))


def test_kl_by_monte_carlo():
    """Against the closed form of normals, which linear maps make of the base."""
    torch.manual_seed(0)
    mean, scale = torch.tensor([0.3, -0.2], dtype=F64), torch.tensor([1.2, 0.7], dtype=F64)
    p = cnf.Flow(Sequential([Standardize(mean, scale)]), (2,)).double()()
    q = MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    same = MultivariateNormal(mean, scale.square().diag())
    for found, truth in ((kl_divergence(p, q), kl_divergence(same, q)), (kl_divergence(q, p), kl_divergence(q, same))):
        assert abs(float(found - truth)) < 0.15
    assert abs(float(kl_divergence(p, p))) < 1e-12
    assert kl_divergence(p.expand((3,)), q).shape == (3,)
    flow = flow_of()
    kl_divergence(flow(), q).backward()
    assert all(w.grad is not None for w in flow.parameters())
    mixed = flow_of(3, base=ConditionalMixture(2, 2, 3, (4,)))  # samples without gradient
    assert kl_divergence(mixed(normal(3)), q).shape == ()


def test_outside_of_the_support_without_validation():
    flow = flow_of(first=[Logit(0.05)])
    inside = torch.full((2,), 0.4, dtype=F64)
    x = torch.stack([inside, 3 * inside, inside + math.inf, inside * math.nan])
    found = flow.distribution(validate_args=False).expand((2, 4)).log_prob(x)
    assert torch.allclose(found[0, 0], flow.log_prob(inside)) and found[1, 1:].tolist()[:2] == [-math.inf, -math.inf] and found[0, 3].isnan()
    assert bool((flow.distribution(validate_args=False).log_prob(x[1:3]) == -math.inf).all())
    with pytest.raises(ValueError, match="within the support"):
        flow.distribution(validate_args=True).log_prob(x)


# -- torch's transforms in ours ------------------------------------------------------------------------------------------


def test_transforms_of_torch_are_transforms_of_a_flow():
    loc, scale = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.5])
    flow = cnf.Flow(Sequential([ExpTransform().inv, AffineTransform(loc, scale).inv]), (2,))
    truth = TransformedDistribution(Independent(Normal(loc.double(), scale.double()), 1), [ExpTransform()])
    flow = flow.double()  # their tensors are buffers
    x = truth.sample((20,))
    assert torch.allclose(flow.log_prob(x), truth.log_prob(x), atol=1e-12)
    assert torch.allclose(flow.decode(flow.encode(x)), x, atol=1e-12) and flow.context_dim == 0
    assert sorted(flow.state_dict()) == ["transform.transforms.1.value__inv__loc", "transform.transforms.1.value__inv__scale"]
    assert "AffineTransform" in repr(flow) or "_InverseTransform" in repr(flow) or "Inverse" in repr(flow)
    alone = cnf.Flow(SigmoidTransform().inv, (2,)).double()
    assert alone.sample(3).shape == (3, 2)
    with pytest.raises(cnf.errors.ConfigError, match="AbsTransform is not bijective"):
        Sequential([torch.distributions.AbsTransform()])
    with pytest.raises(cnf.errors.ConfigError, match=r"'_inv\.loc' that requires a gradient"):
        Sequential([AffineTransform(loc.clone().requires_grad_(), 1.0).inv])
    with pytest.raises(cnf.errors.ConfigError, match="transform is a int"):
        TorchTransform(3)


def test_a_flow_as_a_lazy_transform():
    flow, c = flow_of(3), normal(4, 3)
    lazy, x = LazyTransform(flow), normal(4, 2)
    assert torch.equal(lazy(c)(x), flow.encode(x, c)) and set(lazy.parameters()) == set(flow.parameters())
