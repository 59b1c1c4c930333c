"""The multiscale chain and the parallel field, in float64, against autodiff and chains written out by hand."""

import math

import pytest
import torch
from conftest import F64, perturbed, slow

from cnf.config import FlowConfig, SolverConfig
from cnf.errors import ConfigError, DataError
from cnf.fields import ConvField, SqueezeSum
from cnf.flow import Flow
from cnf.models import build
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Exact, Hutchinson
from cnf.ode.multiscale import Multiscale, Split, multiscale, scale_shapes
from cnf.ode.quadratures import Kinetic
from cnf.random import Noise
from cnf.solvers import FixedGrid
from cnf.transforms import Request, Sequential, Squeeze, Transform

ACCURATE = FixedGrid("dopri5", 16)


def image_flow(shape, divergence="exact", solver=ACCURATE, levels=None, context_dim=0, **model):
    settings = {
        "architecture": "multiscale",
        "field": "conv",
        "hidden": (4,),
        "time_conditioning": "concat",
        "nonlinearity": "softplus",
    }
    torch.manual_seed(0)
    config = FlowConfig.of(**settings | {"preprocess": "logit", "zero_init": False, "learn_end_time": True} | model)
    trace = {"hutchinson_mode": "reverse"} if divergence == "hutchinson" else {}
    flow = build(config, SolverConfig.of(divergence=divergence, **trace), shape, levels=levels, context_dim=context_dim)
    for block in flow.blocks:
        block.solver = block.eval_solver = solver
    return perturbed(flow, 0.1 if config.architecture == "multiscale" else 0.05)


def slogdet(flow, x, context=None):
    def f(row):
        return flow.transform(row[None], Request(context, log_det=False)).value.flatten()

    j = torch.autograd.functional.jacobian(f, x[0], vectorize=True)
    return torch.linalg.slogdet(j.reshape(x[0].numel(), x[0].numel()))


@pytest.mark.parametrize(("shape", "options"), [
    ((1, 8, 8), {}),
    slow((3, 8, 8), {}),
    ((2, 4, 8), {"blocks": 2}),
    slow((1, 8, 8), {"blocks": 2, "time_conditioning": "hyper"}),
    ((1, 8, 8), {"squeeze_first": True, "strides": (1, 0), "hidden": (4,)}),
    slow((2, 8, 8), {"squeeze_first": True, "strides": (1, 0), "hidden": (4,)}),
    slow((1, 8, 8), {"architecture": "parallel"}),
    ((2, 4, 8), {"architecture": "parallel"}),
    ((2, 4, 8), {"architecture": "stack", "hidden": (3, 4, 3), "strides": (1, 2, -2, 1), "blocks": 2}),
])  # fmt: skip
def test_log_det_is_that_of_the_jacobian(shape, options):
    flow = image_flow(shape, levels=17, alpha=0.05, **options)
    x = 0.05 + 0.9 * torch.rand(1, *shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = flow.evaluate(x)
        back = flow.transform.inverse(out.value)
    sign, expected = slogdet(flow, x)
    assert sign > 0
    assert abs(float(out.log_det) - float(expected)) < 1e-8
    assert float((back.value - x).abs().max()) < 1e-8
    assert abs(float(back.log_det + out.log_det)) < 1e-8
    assert tuple(out.value.shape[1:]) == flow.latent_shape


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("options", [{}, {"squeeze_first": True}, {"architecture": "parallel"}, {"context_dim": 3}])
def test_every_parameter_gets_a_gradient(divergence, options):
    flow = image_flow((1, 8, 8), divergence, FixedGrid("rk4", 2), levels=17, alpha=0.05, **options).train()
    x = torch.rand(3, 1, 8, 8, dtype=F64)
    context = torch.randn(3, 3, dtype=F64) if "context_dim" in options else None
    flow.log_prob(x, context, noise=Noise(0)).sum().backward()
    missing = [name for name, p in flow.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


def test_split_and_order_of_the_latent_written_out():
    """z = what leaves scale 0, then scale 1, ...: of one channel the lower row of every 2x2 square leaves first."""
    x = torch.arange(2 * 8 * 8, dtype=F64).reshape(2, 1, 8, 8)
    chain = multiscale((1, 8, 8), lambda shape: Sequential([]))
    z = chain(x).value
    lower = torch.stack([x[:, 0, 1::2, 0::2], x[:, 0, 1::2, 1::2]], 1)
    upper = torch.stack([x[:, 0, 0::2, 0::2], x[:, 0, 0::2, 1::2]], 1)
    assert torch.equal(z, torch.cat([lower.flatten(1), upper.flatten(1)], 1))
    assert torch.equal(chain.inverse(z).value, x)
    # of three colours red and the upper row of green go on
    x = torch.arange(3 * 8 * 8, dtype=F64).reshape(1, 3, 8, 8)
    on, out = Split()(Squeeze()(x).value)
    assert set(on[0].flatten().tolist()) == set(x[0, 0].flatten().tolist()) | set(x[0, 1, 0::2].flatten().tolist())
    assert torch.equal(Split().inverse(on, out), Squeeze()(x).value)


@pytest.mark.parametrize(("shape", "outputs", "count"), [
    ((1, 28, 28), [(2, 14, 14), (4, 7, 7), (4, 7, 7)], 5),
    ((3, 32, 32), [(6, 16, 16), (12, 8, 8), (24, 4, 4), (24, 4, 4)], 7),
    ((3, 16, 8), [(6, 8, 4), (6, 8, 4)], 3),
    ((2, 4, 4), [(2, 4, 4)], 1),
    ((1, 7, 5), [(1, 7, 5)], 1),
])  # fmt: skip
def test_shapes_of_the_published_chain(shape, outputs, count):
    seen = []

    def block(entering):
        seen.append(entering)
        return Sequential([])

    chain = multiscale(shape, block)
    assert chain.outputs == outputs and len(seen) == count
    assert chain.latent_shape(shape) == (math.prod(shape),)
    if shape == (1, 28, 28):
        assert seen == [(1, 28, 28), (4, 14, 14), (2, 14, 14), (8, 7, 7), (4, 7, 7)]
        assert scale_shapes(shape) == [(1, 28, 28), (2, 14, 14), (4, 7, 7)]


def test_noise_by_place_integrals_and_cost_are_those_of_the_blocks():
    """The chain against its blocks run one by one, each with the noise of its documented place."""
    solver = FixedGrid("rk4", 3)
    torch.manual_seed(0)

    def block(shape):
        return perturbed(CNF(ConvField(shape[0], (3,)), Hutchinson("gaussian"), solver, solver, [Kinetic()]), 0.15)

    chain = multiscale((1, 8, 8), block, num_blocks=2)
    x = torch.randn(3, 1, 8, 8, dtype=F64)
    noise = Noise(7)
    out = chain(x, Request(noise=noise))
    y, parts, log_det, kinetic, nfe = x, [], 0, 0, 0
    for i, scale in enumerate(chain.scales):
        for j, transform in enumerate(scale.transforms):
            step = transform(y, Request(noise=noise.child(i).child(j)))
            y, log_det, nfe = step.value, log_det + step.log_det, nfe + step.stats.nfe
            kinetic = kinetic + step.integrals.get("kinetic", 0)
        if i + 1 < len(chain.scales):
            y, leaving = y.chunk(2, 1)
            parts.append(leaving.flatten(1))
    parts.append(y.flatten(1))
    assert torch.equal(out.value, torch.cat(parts, 1))
    assert torch.allclose(out.log_det, log_det, atol=1e-12) and torch.allclose(
        out.integrals["kinetic"], kinetic, atol=1e-12
    )
    assert out.stats.nfe == nfe == 6 * 4 * 3
    # two blocks of one shape draw different probes; the whole is a function of the noise
    assert torch.equal(chain(x, Request(noise=Noise(7))).log_det, out.log_det)
    assert not torch.equal(chain(x, Request(noise=Noise(8))).log_det, out.log_det)
    places = {
        f"{i}/{j}/probe"
        for i, scale in enumerate(chain.scales)
        for j, m in enumerate(scale.transforms)
        if isinstance(m, CNF)
    }
    assert places == {"0/0/probe", "0/1/probe", "0/3/probe", "0/4/probe", "1/0/probe", "1/1/probe"}
    # rows of a joint batch see the same noise
    half = chain(x[1:], Request(noise=Noise(7, start=1, total=3)))
    assert torch.allclose(half.log_det, out.log_det[1:], atol=1e-12)
    back = chain.inverse(out.value, Request(noise=noise))
    assert back.stats.nfe == nfe
    assert bool((back.integrals["kinetic"] > 0).all())
    assert chain(x, Request(integrals=False)).integrals == {}
    assert torch.equal(chain(x, Request(log_det=False)).value, out.value)


def test_context_reaches_every_block():
    flow = image_flow((1, 8, 8), levels=17, alpha=0.05, context_dim=2, solver=FixedGrid("rk4", 4))
    x, c = torch.rand(3, 1, 8, 8, dtype=F64), torch.randn(3, 2, dtype=F64)
    whole = flow.log_prob(x, c)
    rows = torch.cat([flow.log_prob(x[i : i + 1], c[i]) for i in range(3)])
    assert torch.allclose(whole, rows, atol=1e-10)
    assert not torch.allclose(whole, flow.log_prob(x, -c), atol=1e-3)
    assert flow.sample(2, c).shape == (2, 3, 1, 8, 8)


def test_memory_format_does_not_matter():
    flow = image_flow((3, 8, 8), "hutchinson", FixedGrid("rk4", 2), levels=17, alpha=0.05)
    x = torch.rand(2, 3, 8, 8, dtype=F64)
    rows = x.contiguous(memory_format=torch.channels_last)
    assert rows.stride() != x.stride()
    a, b = (flow.evaluate(v, Request(noise=Noise(0))) for v in (x, rows))
    assert torch.allclose(a.value, b.value, atol=1e-13) and torch.allclose(a.log_det, b.log_det, atol=1e-11)


@pytest.mark.parametrize("options", [slow({}), slow({"squeeze_first": True}), {"architecture": "parallel"}])
def test_sampling_through_the_chain(options):
    """Both directions draw the same probes at the same places, so that even an estimated log_prob agrees."""
    flow = image_flow((1, 8, 8), "hutchinson", levels=17, alpha=0.05, **options).eval()
    noise = Noise(3)
    x, log_prob = flow.sample_and_log_prob(4, noise=noise)
    assert x.shape == (4, 1, 8, 8)
    assert torch.allclose(flow.log_prob(x, noise=noise), log_prob, atol=1e-7)
    z = flow.encode(x)
    assert z.shape == (4, *flow.latent_shape)
    assert torch.allclose(flow.decode(z), x, atol=1e-8)
    drawn = flow.sample(4, noise=noise)
    assert torch.allclose(drawn, x.clamp(0, 1), atol=1e-7)
    pixels = flow.sample(4, noise=noise, quantize=True)
    assert pixels.dtype == torch.uint8 and int(pixels.max()) < 17
    assert flow.log_prob(pixels, noise=noise).shape == (4,)
    x = 0.1 + 0.8 * x.clamp(0, 1)
    score = flow.score(x, noise=noise)
    step = 1e-5 * torch.randn(x.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    change = flow.log_prob(x + step, noise=noise) - flow.log_prob(x - step, noise=noise)
    assert torch.allclose(change, 2 * (score * step).flatten(1).sum(1), atol=1e-8)
    assert flow.distribution().rsample((2,)).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("layer", ["concat", "hyper", "concatsquash"])
def test_parallel_field_is_the_sum_of_its_nets(layer):
    """Against squeezes written out, and tangents against autodiff, that of time included."""
    torch.manual_seed(0)
    field = perturbed(SqueezeSum([ConvField(2 * 4**s, (3,), layer, context_dim=2) for s in range(3)]), 0.3)
    x, v = torch.randn(2, 2, 8, 4, dtype=F64), torch.randn(3, 2, 2, 8, 4, dtype=F64)
    c, t = torch.randn(2, 2, dtype=F64), torch.tensor(0.3, dtype=F64)
    total, squeezed = 0, x
    for s, net in enumerate(field.nets):
        part = net(t, squeezed, c)
        for _ in range(s):
            part = Squeeze().inverse(part).value
        total, squeezed = total + part, Squeeze()(squeezed).value if s < 2 else squeezed
    assert torch.allclose(field(t, x, c), total, atol=1e-13)
    dx, product = field.jvp(t, x, v, c)
    assert torch.allclose(dx, total, atol=1e-12)
    for one, expected in zip(product, v, strict=True):
        assert torch.allclose(one, torch.func.jvp(lambda y: field(t, y, c), (x,), (expected,))[1], atol=1e-12)
    one = torch.ones((), dtype=F64)
    whole = torch.func.jvp(lambda s, y: field(s, y, c), (t, x), (one, v[0]))[1]
    assert torch.allclose(field.jvp(t, x, v[:1], c, t_dot=one)[1][0], whole, atol=1e-12)
    with pytest.raises(ConfigError, match="multiples of 4"):
        field(t, torch.randn(1, 2, 6, 8, dtype=F64))
    with pytest.raises(ConfigError, match="nets is empty"):
        SqueezeSum([])
    field.zero_()
    assert not field(t, x, c).any()


def test_shapes_that_cannot_be():
    for shape, match in (
        ((1, 30, 28), "multiples of 4 to be squeezed 2 times, got 30x28: crop or pad"),
        ((1, 3, 28), "must be at least 4x4, got 3x28"),
        ((64,), "takes images"),
    ):
        with pytest.raises(ConfigError, match=match):
            scale_shapes(shape)
    with pytest.raises(ConfigError, match="num_blocks must be at least 1, got 0"):
        multiscale((1, 8, 8), lambda shape: Sequential([]), 0)
    with pytest.raises(ConfigError, match="scales is empty"):
        Multiscale([], (1, 8, 8))
    with pytest.raises(ConfigError, match="even number of channels"):
        Multiscale([Sequential([]), Sequential([])], (1, 8, 8))
    chain = Multiscale([Squeeze(), Sequential([])], (1, 8, 8))
    with pytest.raises(ConfigError, match="takes events of shape"):
        chain.latent_shape((1, 8, 4))
    with pytest.raises(DataError, match=r"expected \(N, 64\)"):
        chain.inverse(torch.zeros(2, 1, 8, 8))
    with pytest.raises(DataError, match="even number of channels"):
        Split()(torch.zeros(1, 3, 2, 2))
    with pytest.raises(DataError, match="expected the same shape"):
        Split().inverse(torch.zeros(1, 2, 2, 2), torch.zeros(1, 1, 2, 2))
    assert isinstance(chain, Transform)


def test_fields_of_zero_leave_the_base():
    z = torch.randn(5, 1, 8, 8)
    expected = torch.distributions.Normal(0, 1).log_prob(z).flatten(1).sum(1)
    for block in (lambda shape: Sequential([]), lambda shape: CNF(ConvField(shape[0], (2,), zero_init=True), Exact())):
        flow = Flow(multiscale((1, 8, 8), block), (1, 8, 8)).eval()
        assert torch.allclose(flow.log_prob(z), expected, atol=1e-4)
        assert flow.latent_shape == (64,)
