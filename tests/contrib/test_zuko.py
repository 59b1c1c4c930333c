"""Flows in zuko's place, and its transforms in ours: the assertions of zuko's own tests of flows, on thirteen kinds."""

import pytest
import torch
from conftest import F64, mostly_slow
from torch import nn, randn

import cnf
from cnf.bases import ConditionalMixture
from cnf.distribution import LazyTransform
from cnf.fields import MLP
from cnf.solvers import Reversible
from cnf.transforms import Sequential, Standardize

zuko = pytest.importorskip("zuko", reason="zuko is not installed")
GRID = cnf.FixedGrid("rk4", 8)


class Custom(nn.Module):
    context_dim = 5

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, t, x, context):
        return self.net(torch.cat([x, context.expand(len(x), 5)], 1)) * (1 + t)


def flow(*parts, **options):
    return cnf.Flow(Sequential([Standardize(torch.zeros(3), torch.ones(3)), *parts]), (3,), **options)


def block(field=None, divergence=None, solver=GRID, **options):
    return cnf.CNF(field or MLP(3, (8,), context_dim=5), divergence, solver, **options)


def built(**model):
    made = cnf.build(cnf.FlowConfig.of(hidden=(8,), zero_init=False, **model), cnf.SolverConfig(), (3,), context_dim=5)
    for each in made.blocks:
        each.solver = GRID
    return made


KINDS = {
    "closed form": lambda: flow(block()),
    "tangents": lambda: flow(block(divergence=cnf.Exact(closed_form=False))),
    "hutchinson": lambda: flow(block(divergence=cnf.Hutchinson())),
    "custom field": lambda: flow(block(Custom())),
    "two blocks": lambda: flow(block(), block()),
    "learned end time": lambda: flow(block(learn_end_time=True)),
    "reversible": lambda: flow(block(solver=Reversible("rk4", 16))),
    "adaptive": lambda: flow(block(solver=cnf.Adaptive("dopri5", 1e-6, 1e-6, gradient="direct"))),
    "squash": lambda: built(time_conditioning="squash"),
    "blend": lambda: built(time_conditioning="blend"),
    "residual": lambda: built(residual="linear"),
    "conditional mixture": lambda: flow(block(), base=ConditionalMixture(3, 2, 5, (8,))),
    "with zuko's spline": lambda: flow(block(), zuko.flows.MaskedAutoregressiveTransform(3, 5, univariate=zuko.transforms.MonotonicRQSTransform, shapes=[(8,), (8,), (7,)])),
}  # fmt: skip


@pytest.fixture(autouse=True)
def double_precision(double):
    """As in zuko's tests."""


@pytest.mark.parametrize("kind", mostly_slow(KINDS, "closed form", "hutchinson", "with zuko's spline"))
def test_zukos_assertions(kind, tmp_path):
    flow = KINDS[kind]()
    x, c = randn(256, 3), randn(5)
    log_p = flow(c).log_prob(x)
    assert log_p.shape == (256,) and log_p.requires_grad
    (-log_p.mean()).backward()
    assert all(p.grad is not None for p in flow.parameters())
    assert flow(c).sample((32,)).shape == (32, 3)
    if flow(c).has_rsample:
        flow.zero_grad(set_to_none=True)
        flow(c).rsample().square().sum().sqrt().backward()
        assert all(p.grad is not None for p in flow.transform.parameters())
    x, c = randn(256, 3), randn(256, 5)
    t = flow(c).transform
    assert torch.allclose(t.inv(t(x)), x, atol=1e-4)
    x, t = randn(3), flow(randn(5)).transform
    jacobian = torch.autograd.functional.jacobian(t, x)
    if kind != "hutchinson":  # an estimate
        assert torch.allclose(t.log_abs_det_jacobian(x, t(x)), torch.linalg.slogdet(jacobian)[1], atol=1e-4)
    torch.save(flow, tmp_path / "flow.pth")
    other = torch.load(tmp_path / "flow.pth", weights_only=False)
    x, c, seed = randn(3), randn(5), torch.seed()
    log_p = flow(c).log_prob(x)
    torch.manual_seed(seed)
    assert torch.allclose(log_p, other(c).log_prob(x)) and repr(flow) and repr(flow(c))


def test_our_blocks_inside_zukos_flow():
    ours = cnf.Flow(block(), (3,)).double()
    spline = zuko.flows.MaskedAutoregressiveTransform(3, 5)
    base = zuko.lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, torch.zeros(3), torch.ones(3), buffer=True)
    theirs = zuko.lazy.Flow([LazyTransform(ours), spline], base)
    same = flow(block(), spline).double()
    same.transform.transforms[1] = ours.transform
    x, c = randn(7, 3), randn(5)
    assert torch.allclose(theirs(c).log_prob(x), same(c).log_prob(x), atol=1e-8)
    assert set(ours.transform.parameters()) < set(theirs.parameters())
    x, log_p = theirs(c).rsample_and_log_prob((4,))
    assert torch.allclose(same(c).log_prob(x), log_p, atol=1e-4)
    d = zuko.distributions.NormalizingFlow(ours(c).transform, ours(c).base)
    assert torch.allclose(d.log_prob(x), ours(c).log_prob(x)) and d.event_shape == (3,)


def test_zukos_transforms_without_context():
    rotation = zuko.lazy.UnconditionalTransform(zuko.transforms.RotationTransform, randn(3, 3))
    own = cnf.Flow(Sequential([rotation, zuko.transforms.SoftclipTransform(5.0).inv, torch.distributions.AffineTransform(torch.ones(3), 2.0)]), (3,))
    assert own.context_dim == 0 and own.like.dtype == F64 and len(list(own.parameters())) == 1
    x = 0.1 * randn(5, 3)
    z = own.encode(x)
    truth = own.base_log_prob(z) + torch.stack([torch.linalg.slogdet(torch.autograd.functional.jacobian(own.encode, one))[1] for one in x])
    assert torch.allclose(own(x), truth) and torch.allclose(own.decode(z), x)
