"""Flow and its distribution: every method against an independent truth, for vector, image and conditional flows."""

import copy
import math

import pytest
import scipy.linalg
import torch
from conftest import F64, LinearField, jacobian, normal, slow, uniform
from torch.distributions import AffineTransform, Independent, Normal, TransformedDistribution

from cnf.config import FlowConfig, SolverConfig
from cnf.distribution import FlowDistribution
from cnf.errors import ConfigError, DataError
from cnf.fields import MLP
from cnf.flow import Flow
from cnf.models import build
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Exact, Hutchinson
from cnf.random import Noise
from cnf.solvers import FixedGrid, Stats
from cnf.transforms import Dequantize, Logit, Request, Sequential, Squeeze, Standardize, Transform, TransformOutput

TIGHT = FixedGrid("dopri5", 16)
LN2 = math.log(2)


def perturbed(flow, scale=0.25, dtype=F64):
    generator = torch.Generator().manual_seed(1)
    flow = flow.to(dtype)
    for p in flow.parameters():
        p.data += (scale * torch.randn(p.shape, generator=generator, dtype=F64)).to(dtype)
    for block in flow.blocks:
        block.solver = block.eval_solver = TIGHT if dtype == F64 else FixedGrid("rk4", 16)
    return flow


def built(shape, dtype=F64, levels=None, context_dim=0, **model):
    torch.manual_seed(0)
    flow = perturbed(build(FlowConfig.of(**model), SolverConfig(), shape, levels=levels, context_dim=context_dim), dtype=dtype)
    x = uniform(200, *shape, seed=4) if levels else 1 + 2 * normal(200, *shape, seed=4)
    flow.fit_statistics(x.to(dtype))
    return flow


# constructor, context: a new flow is one line
CASES = {
    "vector": lambda dtype=F64: (built((3,), dtype, hidden=(6, 5)), None),
    "two blocks": lambda dtype=F64: (built((2,), dtype, hidden=(5,), blocks=2, learn_end_time=True, end_time=0.8), None),
    "residual linear": lambda dtype=F64: (built((3,), dtype, hidden=(4,), residual="linear", base_std=0.7), None),
    "blend": lambda dtype=F64: (built((2,), dtype, hidden=(4,), time_conditioning="blend", residual="minus"), None),
    "hyper, three hidden": lambda dtype=F64: (built((2,), dtype, hidden=(3, 4, 3), time_conditioning="hyper"), None),
    "image": lambda dtype=F64: (built((1, 2, 2), dtype, 17, hidden=(6,), alpha=0.05), None),
    "colour image": lambda dtype=F64: (built((3, 2, 2), dtype, 256, field="conv", hidden=(3,), preprocess="logit"), None),
    "context rows": lambda dtype=F64: (built((2,), dtype, context_dim=3, hidden=(5, 5)), uniform(4, 3).to(dtype)),
    "one context": lambda dtype=F64: (built((2,), dtype, context_dim=3, hidden=(5,), time_conditioning="squash"), uniform(3).to(dtype)),
    "image with context": lambda dtype=F64: (
        built((1, 2, 2), dtype, 17, context_dim=2, field="conv", hidden=(3,)),
        uniform(4, 2).to(dtype),
    ),
}


def points(flow, dtype=F64):
    x = uniform(4, *flow.event_shape) if flow.levels else 1 + normal(4, *flow.event_shape)
    return x.to(dtype)


@pytest.mark.parametrize("name", [slow(name) if name in ("vector", "image") else name for name in CASES])  # in others
def test_identities(name):
    flow, context = CASES[name]()
    x = points(flow).requires_grad_()
    z = flow.encode(x, context)
    base = Normal(torch.zeros((), dtype=F64), flow.base_std).log_prob(z).flatten(1).sum(1)
    truth = base + torch.linalg.slogdet(jacobian(z, x))[1]
    found = flow.log_prob(x, context)
    assert found.shape == (4,)
    assert torch.allclose(found, truth, rtol=0, atol=1e-8)
    assert torch.allclose(flow.decode(z, context), x, rtol=0, atol=1e-8)
    (slope,) = torch.autograd.grad(truth.sum(), x, retain_graph=True)
    with torch.no_grad():  # the score is there for those who do not record gradients
        assert torch.allclose(flow.score(x, context), slope, rtol=1e-6, atol=1e-7)
    assert not flow.score(x, context).requires_grad
    found.sum().backward()
    for parameter in flow.parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any())
    if flow.levels:
        assert torch.allclose(flow.bits_per_dim(x, context), (-truth / flow.dim + math.log(flow.levels)) / LN2)


@pytest.mark.parametrize("name", CASES)
def test_samples_and_their_density(name):
    flow, context = CASES[name]()
    rows = context is not None and context.ndim == 2
    lead = (3, 4) if rows else (3,)
    each = context.repeat(3, 1) if rows else context
    x, log_prob = flow.sample_and_log_prob(3, context, noise=Noise(0))
    assert x.requires_grad and log_prob.requires_grad
    x, log_prob = x.detach(), log_prob.detach()
    with torch.no_grad():
        assert x.shape == (*lead, *flow.event_shape) and log_prob.shape == lead and x.dtype == F64
        flat = x.flatten(0, 1) if rows else x
        assert torch.allclose(flow.log_prob(flat, each), log_prob.flatten(), rtol=0, atol=1e-7)
        z = Noise(0).draw("latent", "normal", (math.prod(lead), *flow.latent_shape), dtype=F64)
        for temperature in (1.0, 0.5):
            drawn = flow.rsample(3, context, noise=Noise(0), temperature=temperature)
            truth = flow.decode(z * flow.base_std * temperature, each).reshape(drawn.shape)
            assert torch.allclose(drawn, truth, rtol=0, atol=1e-12)
            found = flow.sample(3, context, noise=Noise(0), temperature=temperature)
            assert torch.allclose(found, truth.clamp(0, 1) if flow.levels else truth, rtol=0, atol=1e-12)
        assert torch.allclose(flow.rsample(3, context, noise=Noise(0)), x, rtol=0, atol=1e-9)
        assert torch.allclose(flow.encode(flat, each), z * flow.base_std, rtol=0, atol=1e-7)
        sample = flow.sample(3, context, noise=Noise(0))
        if rows:  # row m of the sample belongs to row m of the context
            for m in range(4):
                assert torch.allclose(flow.log_prob(x[:, m], context[m]), log_prob[:, m], rtol=0, atol=1e-7)
        if flow.levels:
            pixels = flow.sample(3, context, noise=Noise(0), quantize=True)
            assert pixels.dtype == torch.uint8
            assert torch.equal(pixels, (sample * flow.levels).floor().clamp(max=flow.levels - 1).to(torch.uint8))


@pytest.mark.parametrize("name", ["two blocks", "residual linear", "image", "context rows"])
def test_rsample_gradient_is_that_of_finite_differences(name):
    flow, context = CASES[name]()
    names = [n for n, _ in flow.named_parameters()]
    direction = {n: normal(*p.shape, seed=5) for n, p in flow.named_parameters()}

    def value(h=0.0, shift=0.0):
        moved = {n: p + h * direction[n] for n, p in flow.named_parameters()}
        c = None if context is None else context + shift
        x = torch.func.functional_call(Sampler(flow), {f"flow.{n}": v for n, v in moved.items()}, (c,))
        return (x.flatten() * torch.arange(x.numel(), dtype=F64)).sum()

    gradients = torch.autograd.grad(value(), list(flow.parameters()))
    slope = sum((g * direction[n]).sum() for n, g in zip(names, gradients, strict=True))
    with torch.no_grad():
        difference = (value(1e-4) - value(-1e-4)) / 2e-4
    assert abs(float(slope - difference)) < 1e-5 * abs(float(difference))
    if context is not None:
        c = context.clone().requires_grad_()
        x = flow.rsample(2, c, noise=Noise(0))
        (gradient,) = torch.autograd.grad((x.flatten() * torch.arange(x.numel(), dtype=F64)).sum(), c)
        with torch.no_grad():
            difference = (value(shift=1e-4) - value(shift=-1e-4)) / 2e-4
        assert abs(float(gradient.sum() - difference)) < 1e-5 * abs(float(difference))


class Sampler(torch.nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, context):
        return self.flow.rsample(2, context, noise=Noise(0))


@pytest.mark.parametrize("name", CASES)
def test_copies_state_and_modes(name):
    flow, context = CASES[name]()
    x = points(flow)
    twin, other = copy.deepcopy(flow), CASES[name]()[0]
    with torch.no_grad():
        for value in (*other.parameters(), *other.buffers()):
            value.fill_(0.3)
    assert other.load_state_dict(flow.state_dict()).missing_keys == []
    with torch.no_grad():
        truth = flow.log_prob(x, context)
        assert torch.equal(twin.log_prob(x, context), truth) and torch.equal(other.log_prob(x, context), truth)
        for p in twin.parameters():
            p.add_(0.1)
        assert torch.equal(flow.log_prob(x, context), truth) and not torch.equal(twin.log_prob(x, context), truth)
        flow.blocks[0].solver = FixedGrid("euler", 1)
        assert torch.equal(flow.eval().log_prob(x, context), truth)  # the mode chooses the solver, and nothing else does
        assert not torch.allclose(flow.train().log_prob(x, context), truth, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_single_precision(name):
    single, context = CASES[name](torch.float32)
    double, context64 = CASES[name]()
    x = points(single, torch.float32)
    assert single.like.dtype == torch.float32
    with torch.no_grad():
        found = single.log_prob(x, context)
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), double.log_prob(x.double(), context64), rtol=1e-4, atol=2e-3)
        z = single.encode(x, context)
        assert torch.allclose(single.decode(z, context), x, atol=1e-4)
        assert single.sample(2, context).dtype == torch.float32
    if single.levels:
        pixels = (x * single.levels).to(torch.uint8)
        for flow, c, dtype in ((single, context, torch.float32), (double, context64, F64)):
            assert flow.log_prob(pixels, c, noise=Noise(0)).dtype == dtype


def test_density_integrates_to_one():
    n = 240
    for name, low, high in (("two blocks", -14.0, 16.0), ("blend", -45.0, 47.0), ("one context", -14.0, 16.0)):
        flow, context = CASES[name]()
        for block in flow.blocks:
            block.eval_solver = FixedGrid("rk4", 8)
        side = (high - low) / n
        ticks = torch.linspace(low + side / 2, high - side / 2, n, dtype=F64)
        with torch.no_grad():
            p = flow.eval().log_prob(torch.cartesian_prod(ticks, ticks), context).exp()
        assert abs(float(p.sum()) * side**2 - 1) < 1e-4, name
        edge = p.reshape(n, n)
        assert float(torch.stack([edge[0], edge[-1], edge[:, 0], edge[:, -1]]).max()) < 1e-6 * float(p.max())


def test_density_of_images_integrates_to_one():
    """Over the logit's whole domain, by the midpoint rule in s = logistic(y), whose borders vanish."""
    flow = built((1, 1, 2), levels=17, hidden=(5,), alpha=0.05)
    for block in flow.blocks:
        block.eval_solver = FixedGrid("rk4", 8)
    logit = next(m for m in flow.modules() if isinstance(m, Logit))
    n, low, high = 200, -12.0, 12.0
    side = (high - low) / n
    ticks = torch.linspace(low + side / 2, high - side / 2, n, dtype=F64)
    y = torch.cartesian_prod(ticks, ticks)
    s = torch.sigmoid(y)
    x = (s - 0.05) / 0.9
    weight = (s * (1 - s) / 0.9).prod(1)
    with torch.no_grad():
        p = flow.eval().log_prob(x.reshape(-1, 1, 1, 2)).exp()
    assert abs(float((p * weight).sum()) * side**2 - 1) < 1e-4
    assert math.isclose(logit.margin, 0.05 / 0.9)


class NormalQuantile(Transform):
    """z = Phi^-1(x): uniform data become normal noise exactly."""

    def forward(self, x, request):
        z = math.sqrt(2) * torch.erfinv(2 * x - 1)
        return TransformOutput(z, -Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1), {}, CNFLESS)

    def inverse(self, z, request):
        return TransformOutput((1 + torch.erf(z / math.sqrt(2))) / 2, Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1), {}, CNFLESS)


CNFLESS = Sequential([])(torch.zeros(1, 1)).stats


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_bits_of_a_uniform_density_are_log2_of_the_levels(levels):
    flow = Flow(Sequential([Dequantize(levels), NormalQuantile()]), (1, 3, 4)).double()
    pixels = torch.randint(0, levels, (6, 1, 3, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.allclose(flow.bits_per_dim(pixels, noise=Noise(0)), torch.tensor(math.log2(levels), dtype=F64), atol=1e-12)
    x = uniform(6, 1, 3, 4)
    assert torch.allclose(flow.bits_per_dim(x), torch.tensor(math.log2(levels), dtype=F64), atol=1e-12)
    assert torch.allclose(flow.log_prob(x), torch.zeros(6, dtype=F64), atol=1e-12)
    assert flow.blocks == [] and flow.context_dim == 0 and flow.like.dtype == F64
    sample = flow.sample(50_000, noise=Noise(0))[:, 0, 0, 0]
    assert abs(float(sample.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / 50_000)
    shares = torch.bincount(flow.sample(50_000, noise=Noise(1), quantize=True)[:, 0, 0, 0].long(), minlength=levels)
    spread = math.sqrt(50_000 / levels * (1 - 1 / levels))
    assert bool((shares - 50_000 / levels).abs().max() < 5 * spread)


def test_pixels_are_bounded_by_their_density():
    flow = CASES["image"]()[0]
    k = torch.randint(0, 17, (5, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    u = uniform(5, 1, 2, 2)
    found = flow.log_prob(k, noise=Noise.replay({"0/dequantize": u}))
    assert torch.allclose(found, flow.log_prob((k + u) / 17) - 4 * math.log(17), atol=1e-12)
    bits = flow.bits_per_dim(k, noise=Noise.replay({"0/dequantize": u}))
    assert torch.allclose(bits, flow.bits_per_dim((k + u) / 17), atol=1e-12)
    # one pixel of 4 levels: the mean over u lies below ln P(k), the integral of the density over the grey level
    flow = built((1, 1, 1), levels=4, hidden=(4,), alpha=0.05)
    u = ((torch.arange(200, dtype=F64) + 0.5) / 200).reshape(-1, 1, 1, 1)
    total = 0.0
    for level in range(4):
        with torch.no_grad():
            density = flow.log_prob((level + u) / 4)
            bound = flow.log_prob(torch.full((200, 1, 1, 1), level, dtype=torch.uint8), noise=Noise.replay({"0/dequantize": u}))
        probability = float(density.exp().mean()) / 4
        assert float(bound.mean()) < math.log(probability)
        assert abs(float(bound.mean()) - math.log(probability)) < 0.5
        total += probability
    margin = 0.05 / 0.9
    with torch.no_grad():
        outside = [flow.log_prob(margin * u * (1 - 1e-9) + start).exp().mean() * margin for start in (-margin + 1e-12, 1.0)]
    assert abs(total + float(sum(outside)) - 1) < 1e-3


def linear_flow(base_std=1.0):
    a = normal(3, 3, seed=6) / 2
    mean, std = normal(3, seed=7), 0.5 + uniform(3, seed=8)
    chain = Sequential([Standardize(mean, std), CNF(LinearField(a), Exact(), TIGHT, TIGHT, end_time=0.9)])
    m = torch.from_numpy(scipy.linalg.expm(0.9 * a.numpy())) / std  # z = m (x - mean)
    return Flow(chain, (3,), base_std=base_std), mean, m


def test_linear_flow_is_a_gaussian():
    flow, mean, m = linear_flow(base_std=0.8)
    precision = m.T @ m / 0.8**2
    truth = torch.distributions.MultivariateNormal(mean, precision_matrix=(precision + precision.T) / 2)
    x = truth.sample((6,))
    assert torch.allclose(flow.log_prob(x), truth.log_prob(x), rtol=0, atol=1e-8)
    assert torch.allclose(flow.score(x), -(x - mean) @ precision, rtol=0, atol=1e-7)
    assert flow.context_dim is None  # a field of one's own says nothing about it
    for temperature in (1.0, 0.6):
        n = 20_000
        drawn = flow.sample(n, noise=Noise(0), temperature=temperature)
        white = (drawn - mean) @ m.T / (0.8 * temperature)  # standard normal if the sampler is right
        assert float((white.mean(0) * math.sqrt(n)).abs().max()) < 5
        second = (white.T @ white - n * torch.eye(3, dtype=F64)) / math.sqrt(n)
        assert float((second / (1 + torch.eye(3, dtype=F64)).sqrt()).abs().max()) < 5


@torch.no_grad()
def test_trajectory():
    flow, _ = CASES["two blocks"]()
    x = points(flow)
    times = torch.tensor([0.0, 0.2, 0.5, 0.5, 0.75, 1.0], dtype=F64)
    path = flow.trajectory(x, times)
    assert path.shape == (6, 4, 2) and not path.requires_grad
    whiten, first, second = flow.transform.transforms
    start = whiten(x).value
    middle = first(start).value
    assert torch.allclose(path[0], start, atol=1e-12)
    assert torch.allclose(path[2], middle, atol=1e-9) and torch.equal(path[2], path[3])
    assert torch.allclose(path[-1], flow.encode(x), atol=1e-9)
    end = first.end_time(x)
    assert torch.allclose(path[1], first.integrate(start, (0 * end, 0.4 * end))[0], atol=1e-9)
    assert torch.allclose(path[4], second.integrate(middle, (0 * end, 0.5 * second.end_time(x)))[0], atol=1e-9)
    assert torch.allclose(flow.trajectory(x, times[-1:])[0], flow.encode(x), atol=1e-9)
    # nested chains are one chain; the conditional rows keep their context
    nested = Flow(Sequential([whiten, Sequential([first, second])]), (2,))
    assert torch.allclose(nested.trajectory(x, times), path, atol=1e-12)
    flow, context = CASES["context rows"]()
    path = flow.trajectory(x, times, context)
    for row in range(4):
        assert torch.allclose(flow.trajectory(x[row : row + 1], times, context[row])[:, 0], path[:, row], atol=1e-8)
    flow, context = CASES["image with context"]()
    pixels = torch.randint(0, 17, (4, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    path = flow.trajectory(pixels, times, context, noise=Noise(0))
    assert torch.allclose(path[-1], flow.encode(pixels, context, noise=Noise(0)), atol=1e-8)


def test_trajectory_refuses():
    flow, _ = CASES["vector"]()
    x = points(flow)
    for times in ([], [-0.1, 0.5], [0.5, 1.1], [0.5, 0.2], [math.nan]):
        with pytest.raises(ConfigError, match="times must be increasing"):
            flow.trajectory(x, torch.tensor(times))
    with pytest.raises(ConfigError, match="at least one block"):
        Flow(Logit(0.1), (2,)).trajectory(torch.rand(3, 2), torch.linspace(0, 1, 3))
    block = CNF(MLP(4, (3,)))

    class Flat(Transform):
        def forward(self, x, request):
            return TransformOutput(x.flatten(1), x.new_zeros(len(x)), {}, Stats())

    with pytest.raises(ConfigError, match=r"one shape between blocks, but Flat makes \(4,\) of \(1, 2, 2\)"):
        Flow(Sequential([block, Flat(), block]), (1, 2, 2)).trajectory(torch.rand(3, 1, 2, 2), torch.linspace(0, 1, 3))
    assert Flow(Sequential([Flat(), block]), (1, 2, 2)).trajectory(torch.rand(3, 1, 2, 2), torch.ones(2)).shape == (2, 3, 4)

    class Holder(NormalQuantile):
        def __init__(self):
            super().__init__()
            self.inner = block

    with pytest.raises(ConfigError, match="but this flow has a Holder with blocks inside"):
        Flow(Sequential([Holder()]), (4,)).trajectory(torch.rand(3, 4), torch.linspace(0, 1, 3))


@torch.no_grad()
def test_fit_statistics():
    model = FlowConfig.of(hidden=(4,), alpha=0.05)
    pixels = torch.randint(0, 17, (300, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    flow = build(model, SolverConfig(), (1, 2, 2), levels=17).double()
    flow.fit_statistics(pixels)
    dequantize, logit, whiten = flow.transform.transforms[:3]
    y = logit(dequantize(pixels, Request(noise=Noise(0, "statistics").child(0))).value).value
    assert torch.allclose(whiten.mean, y.mean(0), atol=1e-12) and torch.allclose(whiten.std, y.std(0), atol=1e-12)
    state = {k: v.clone() for k, v in flow.state_dict().items()}
    torch.manual_seed(7)
    before = torch.get_rng_state()
    flow.fit_statistics(pixels)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, state[k]) for k, v in flow.state_dict().items())
    flow.fit_statistics(pixels, batch_size=64)  # other noise after the first batch
    assert torch.allclose(whiten.mean, y.mean(0), atol=0.05) and torch.allclose(whiten.std, y.std(0), rtol=0.05)
    # two in one chain, one of them inside another chain: the second sees what the first makes; blocks are not run
    x = 3 + normal(50, 2)

    class Bomb(MLP):
        def forward(self, *given):
            raise AssertionError("the field was evaluated")

    def plain():
        return Standardize(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64))

    whitens = [plain() for _ in range(3)]
    chain = [whitens[0], Sequential([whitens[1]]), Sequential([CNF(Bomb(2, (3,)))]), whitens[2]]
    Flow(Sequential(chain), (2,)).fit_statistics(x)
    assert torch.allclose(whitens[0].mean, x.mean(0), atol=1e-12)
    assert torch.allclose(whitens[1].mean, torch.zeros(2, dtype=F64), atol=1e-12)
    assert torch.allclose(whitens[1].std, torch.ones(2, dtype=F64), atol=1e-12)
    assert torch.equal(whitens[2].mean, torch.zeros(2, dtype=F64))  # behind a block nothing is set


def test_refusals_of_points():
    flow, _ = CASES["vector"]()
    single, _ = CASES["vector"](torch.float32)
    x = points(flow)
    for call in (flow.log_prob, flow.encode, flow.score, lambda y: flow.trajectory(y, torch.linspace(0, 1, 2))):
        for shape in ((4, 2), (2,), (), (3, 4)):
            with pytest.raises(DataError, match=r"x has shape .*, expected \(N, 3\)"):
                call(torch.zeros(shape, dtype=F64))
        bad = x.clone()
        bad[2, 1] = math.nan
        with pytest.raises(DataError, match="NaN or infinity, first in row 2"):
            call(bad)
        with pytest.raises(DataError, match=r"float32, but the flow computes in torch\.float64"):
            call(x.float())
    with pytest.raises(DataError, match=r"float64, but the flow computes in torch\.float32"):
        single.log_prob(x)
    with pytest.raises(DataError, match="expected floats"):
        flow.log_prob(torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(DataError, match=r"z has shape \(4, 2\), expected \(N, 3\)"):
        flow.decode(torch.zeros(4, 2, dtype=F64))
    with pytest.raises(DataError, match="z holds NaN"):
        flow.decode(torch.full((4, 3), math.inf, dtype=F64))
    with pytest.raises(DataError, match="bits_per_dim is for images"):
        flow.bits_per_dim(x)
    with pytest.raises(ConfigError, match="quantize=True is for images"):
        flow.sample(3, quantize=True)
    for n, temperature in ((-1, 1.0), (3, 0.0), (3, -1.0), (3, math.nan)):
        with pytest.raises(ConfigError, match=f"n must be .*, got {n}" if n < 0 else f"temperature must be positive and finite, got {temperature}"):
            flow.sample(n, temperature=temperature)


def test_refusals_of_images():
    flow, _ = CASES["image"]()
    x = points(flow)
    for bad in (1.2, -0.2, 255.0):
        y = x.clone()
        y[1, 0, 0, 0] = bad
        with pytest.raises(DataError, match=r"in \[0, 1\]"):
            flow.log_prob(y)
    y[1, 0, 0, 0] = 1.01  # inside the logit's margin: it has a density, but no bits that a pixel could cost
    assert bool(flow.log_prob(y).isfinite().all())
    with pytest.raises(DataError, match=r"x spans \[.*, 1.01\], expected floats in \[0, 1\]"):
        flow.bits_per_dim(y)
    with pytest.raises(DataError, match="int64, expected uint8"):
        flow.log_prob(torch.zeros(2, 1, 2, 2, dtype=torch.int64))
    with pytest.raises(DataError, match=r"between 0 and 16 \(levels=17\)"):
        flow.log_prob(torch.full((2, 1, 2, 2), 17, dtype=torch.uint8))
    with pytest.raises(DataError, match="the score is a derivative"):
        flow.score(torch.zeros(2, 1, 2, 2, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"expected \(N, 1, 2, 2\)"):
        flow.log_prob(torch.rand(2, 2, 2, 1, dtype=F64))


def test_refusals_of_contexts():
    flow, context = CASES["context rows"]()
    x = points(flow)
    for call in (lambda c: flow.log_prob(x, c), lambda c: flow.decode(x, c), lambda c: flow.trajectory(x, torch.ones(1), c)):
        for shape in ((4, 2), (2,), (3, 3), (2, 4, 2), ()):
            with pytest.raises(DataError, match=r"context has shape .* expected .*\(3,\)"):
                call(torch.zeros(shape, dtype=F64))
        with pytest.raises(DataError, match="one-hot"):
            call(torch.zeros(4, 3, dtype=torch.int64))
    for call in (lambda c: flow.sample(2, c), flow.distribution, lambda c: flow.sample_and_log_prob(2, c)):
        with pytest.raises(DataError, match=r"expected \(3,\) or \(N, 3\)"):
            call(torch.zeros(4, 2, dtype=F64))
    with pytest.raises(ConfigError, match="pass context"):
        flow.log_prob(x)
    plain, _ = CASES["two blocks"]()
    for call in (lambda: plain.log_prob(x, context), lambda: plain.sample(2, context), lambda: plain.distribution(context)):
        with pytest.raises(ConfigError, match="built without context"):
            call()
    assert flow.context_dim == 3 and plain.context_dim == 0


def test_refusals_of_flows():
    for base_std in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="base_std"):
            Flow(Logit(0.1), (2,), base_std=base_std)
    for shape in ((), (0,), 3):
        with pytest.raises(ConfigError, match="event_shape"):
            Flow(Logit(0.1), shape)
    with pytest.raises(ConfigError, match="even height and width"):
        Flow(Squeeze(), (1, 3, 4))


# -- torch.distributions ---------------------------------------------------------------------------------------------


def coarse(name):
    """A case on a coarse grid: what is compared here is the same solve twice."""
    flow, context = CASES[name]()
    for block in flow.blocks:
        block.solver = block.eval_solver = FixedGrid("rk4", 3)
    return flow, context


def test_distribution_of_one():
    flow, _ = coarse("vector")
    d = flow.distribution()
    assert d.batch_shape == () and d.event_shape == (3,) and d.has_rsample
    x = d.sample((2, 5))
    assert x.shape == (2, 5, 3) and not x.requires_grad
    assert torch.allclose(d.log_prob(x), flow.log_prob(x.reshape(10, 3)).reshape(2, 5), atol=1e-9)
    assert d.sample().shape == (3,) and d.log_prob(d.sample()).shape == ()
    torch.manual_seed(3)
    drawn = d.rsample((4,))
    torch.manual_seed(3)
    assert torch.allclose(drawn, flow.decode(torch.randn(4, 3, dtype=F64) * flow.base_std), atol=1e-12)
    (gradient,) = torch.autograd.grad(drawn.sum(), next(flow.parameters()))
    assert bool((gradient != 0).any())
    wide = d.expand((2, 4))
    assert isinstance(wide, FlowDistribution) and wide.batch_shape == (2, 4) and wide.sample((3,)).shape == (3, 2, 4, 3)
    assert torch.allclose(wide.log_prob(x[0, 0]), d.log_prob(x[0, 0]).expand(2, 4))
    y = wide.sample((3,))
    assert torch.allclose(wide.log_prob(y), d.log_prob(y), atol=1e-9)


def test_distribution_of_a_batch():
    flow, context = coarse("context rows")
    d = flow.distribution(context)
    assert d.batch_shape == (4,) and d.event_shape == (2,)
    x = d.sample((3,))
    truth = torch.stack([flow.log_prob(x[:, m], context[m]) for m in range(4)], 1)
    assert torch.allclose(d.log_prob(x), truth, atol=1e-8)
    # one value against the whole batch is broadcast, as everywhere in torch.distributions
    assert torch.allclose(d.log_prob(x[0, 0]), torch.stack([flow.log_prob(x[0, :1], c)[0] for c in context]), atol=1e-8)
    assert torch.allclose(d.log_prob(x[:, :1]), torch.stack([flow.log_prob(x[:, 0], c) for c in context], 1), atol=1e-8)
    wide = d.expand((2, 4))
    y = wide.sample((3,))
    assert y.shape == (3, 2, 4, 2)
    assert torch.allclose(wide.log_prob(y), torch.stack([d.log_prob(y[:, i]) for i in range(2)], 1), atol=1e-8)
    one = flow.distribution(context[0])
    assert one.batch_shape == () and one.sample((5,)).shape == (5, 2)
    assert torch.allclose(one.log_prob(x[:, 0]), truth[:, 0], atol=1e-8)
    assert torch.allclose(one.expand((4,)).log_prob(x[0]), one.log_prob(x[0]), atol=1e-8)
    grid = FlowDistribution(flow, context.reshape(2, 2, 3))  # a batch of any shape
    assert grid.batch_shape == (2, 2)
    z = grid.sample((3,))
    assert torch.allclose(grid.log_prob(z), d.log_prob(z.reshape(3, 4, 2)).reshape(3, 2, 2), atol=1e-8)
    # the rows keep their contexts in sampling too
    torch.manual_seed(1)
    drawn = d.rsample((3,))
    torch.manual_seed(1)
    latent = torch.randn(12, 2, dtype=F64) * flow.base_std
    for m in range(4):
        assert torch.allclose(drawn[:, m], flow.decode(latent.reshape(3, 4, 2)[:, m], context[m]), atol=1e-9)


def test_independent_and_transformed():
    flow, context = coarse("context rows")
    d = flow.distribution(context)
    joint = Independent(d, 1)
    assert joint.batch_shape == () and joint.event_shape == (4, 2)
    x = joint.rsample((3,))
    assert torch.allclose(joint.log_prob(x), d.log_prob(x).sum(1), atol=1e-8)
    assert bool(joint.support.check(x).all())
    assert joint.expand((3,)).log_prob(x).shape == (3,)
    loc, scale = torch.tensor([1.0, -2.0], dtype=F64), torch.tensor([3.0, 0.5], dtype=F64)
    moved = TransformedDistribution(d, [AffineTransform(loc, scale, event_dim=1)])
    assert moved.batch_shape == (4,) and moved.event_shape == (2,)
    y = moved.sample((3,))
    truth = d.log_prob((y - loc) / scale) - scale.log().sum()
    assert torch.allclose(moved.log_prob(y), truth, atol=1e-8)
    assert moved.expand((2, 4)).sample().shape == (2, 4, 2)
    # batched affine parameters enlarge the batch of a single flow
    single = TransformedDistribution(coarse("vector")[0].distribution(), [AffineTransform(normal(5, 3), 1.0, event_dim=1)])
    assert single.batch_shape == (5,)
    z = single.sample((2,))
    assert z.shape == (2, 5, 3) and single.log_prob(z).shape == (2, 5) and bool(single.log_prob(z).isfinite().all())


def test_validation_and_support():
    flow, _ = coarse("image")
    d = FlowDistribution(flow, validate_args=True)  # explicit: zuko, where imported, turns torch's default off
    margin = 0.05 / 0.9
    inside = torch.full((1, 2, 2), 1 + 0.99 * margin, dtype=F64)
    outside = torch.full((1, 2, 2), 1 + 1.01 * margin, dtype=F64)
    assert bool(d.support.check(inside)) and not bool(d.support.check(outside))
    x = d.sample((2000,))
    assert bool(d.support.check(x).all()) and bool((x > 1).any())  # not clamped
    assert bool(d.log_prob(x[:50]).isfinite().all())
    with pytest.raises(ValueError, match="to be within the support"):
        d.log_prob(outside)
    with pytest.raises(ValueError, match="event"):
        d.log_prob(torch.zeros(1, 2, 3, dtype=F64))
    loose = FlowDistribution(flow, validate_args=False)
    mixed = loose.log_prob(torch.stack([outside, inside, math.nan * inside]))
    assert float(mixed[0]) == -math.inf and bool(mixed[2].isnan()) and float(loose.log_prob(outside)) == -math.inf
    assert torch.allclose(mixed[1], d.log_prob(inside))
    assert torch.allclose(loose.log_prob(inside), d.log_prob(inside))
    with pytest.raises(DataError, match="bounds the log-probability of pixels"):
        d.log_prob(torch.zeros(3, 1, 2, 2, dtype=torch.uint8))
    vectors = FlowDistribution(coarse("vector")[0], validate_args=True)
    assert bool(vectors.support.check(torch.full((3,), 1e6))) and not bool(vectors.support.check(torch.full((3,), math.nan)))
    with pytest.raises(ValueError, match="to be within the support"):
        vectors.log_prob(torch.full((3,), math.nan, dtype=F64))
    assert loose.expand((3,))._validate_args is False
    assert d.expand((3,))._validate_args is True


def test_probes_come_from_the_noise():
    """An estimated trace: log_prob repeats with the same noise, and its mean is the exact one."""
    flow, _ = CASES["vector"]()
    x = points(flow)
    exact = flow.log_prob(x)
    for block in flow.blocks:
        block.divergence, block.solver = Hutchinson("gaussian"), FixedGrid("rk4", 16)
    with torch.no_grad():
        assert torch.equal(flow.log_prob(x, noise=Noise(1)), flow.log_prob(x, noise=Noise(1)))
        draws = flow.log_prob(x.repeat(1500, 1), noise=Noise(0)).reshape(1500, 4)
    z = (draws.mean(0) - exact.detach()) / (draws.std(0) / math.sqrt(1500))
    assert float(z.abs().max()) < 5
    assert float(draws.std(0).min()) > 1e-3
