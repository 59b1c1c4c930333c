"""Transforms: one generic test of the identities for every transform, and each one's own truths and errors."""

import copy
import math

import pytest
import torch
from conftest import F64, TIGHT, jacobian, normal, perturbed, slow, uniform

from cnf.errors import ConfigError, DataError
from cnf.fields import MLP, ConvField
from cnf.flow import Flow
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Exact
from cnf.ode.quadratures import Kinetic
from cnf.random import Noise
from cnf.transforms import Dequantize, Logit, Request, Rescale, Sequential, Squeeze, Standardize, iter_leaves


def block(field, **options):
    return perturbed(CNF(field, solver=TIGHT, eval_solver=TIGHT, **options))


# constructor, data, context: a new transform is one line
CASES = {
    "standardize": lambda: (Standardize(normal(3), 0.5 + uniform(3)), normal(4, 3), None),
    "standardize channels": lambda: (Standardize(normal(2, 1, 1), 0.5 + uniform(2, 1, 1)), normal(4, 2, 2, 3), None),
    "dequantize": lambda: (Dequantize(17).double(), uniform(4, 1, 2, 2), None),
    "logit 0.05": lambda: (Logit(0.05), uniform(4, 5), None),
    "logit of a box": lambda: (Logit(0.0, torch.tensor([-1.0, 0.0], dtype=F64), torch.tensor([3.0, 7.0], dtype=F64)), uniform(4, 2), None),
    "logit 1e-6": lambda: (Logit(1e-6), uniform(4, 1, 2, 2), None),
    "center shift": lambda: (Rescale(), uniform(4, 3), None),
    "squeeze": lambda: (Squeeze(), normal(2, 3, 2, 4), None),
    "cnf": lambda: (block(MLP(3, (6, 5))), normal(4, 3), None),
    "cnf three hidden": lambda: (block(MLP(2, (5, 4, 5), "concat", "softplus")), normal(4, 2), None),
    "cnf tangents": lambda: (block(MLP(3, (5,)), divergence=Exact(chunk=2, closed_form=False)), normal(4, 3), None),
    "cnf learned end time": lambda: (block(MLP(2, (5,)), end_time=0.7, learn_end_time=True), normal(4, 2), None),
    "cnf residual linear": lambda: (block(MLP(3, (4,), "hyper", residual="linear")), normal(4, 3), None),
    "cnf residual minus": lambda: (block(MLP(3, (4,), "blend", residual="minus")), normal(4, 3), None),
    "cnf images": lambda: (block(ConvField(2, (3,))), normal(2, 2, 3, 2), None),
    "cnf context rows": lambda: (block(MLP(2, (5,), context_dim=3)), normal(4, 2), uniform(4, 3)),
    "cnf one context": lambda: (block(MLP(2, (5,), "squash", context_dim=3)), normal(4, 2), uniform(3)),
    "chain": lambda: (
        Sequential([Logit(0.1), Sequential([Rescale(), block(MLP(4, (5,)))]), Squeeze(), block(ConvField(4, (2,)))]),
        uniform(2, 1, 2, 2),
        None,
    ),
    "nothing": lambda: (Sequential([]), normal(2, 3), None),
}


# whose identities test_flow.py has as those of flows
IN_FLOWS = ("cnf three hidden", "cnf residual linear", "cnf residual minus", "cnf context rows", "cnf one context")


@pytest.mark.parametrize("name", [slow(name) if name in IN_FLOWS else name for name in CASES])
def test_identities(name):
    transform, x, context = CASES[name]()
    x.requires_grad_()
    out = transform(x, Request(context))
    assert out.value.dtype == out.log_det.dtype == F64
    assert out.log_det.shape == x.shape[:1]
    assert tuple(out.value.shape[1:]) == transform.latent_shape(tuple(x.shape[1:]))
    truth = torch.linalg.slogdet(jacobian(out.value, x))[1]
    assert torch.allclose(out.log_det, truth, rtol=0, atol=1e-8)
    z = out.value.detach().requires_grad_()
    back = transform.inverse(z, Request(context))
    assert torch.allclose(back.value, x, rtol=0, atol=1e-8)
    assert torch.allclose(back.log_det, -out.log_det, rtol=0, atol=1e-8)
    assert torch.allclose(back.log_det, torch.linalg.slogdet(jacobian(back.value, z))[1], rtol=0, atol=1e-8)
    for one in (transform(x, Request(context, log_det=False)), transform(x, Request(context, integrals=False))):
        assert torch.allclose(one.value, out.value, rtol=0, atol=1e-9)
    if parameters := list(transform.parameters()):
        (out.value.square().sum() + out.log_det.sum()).backward()
        assert all(p.grad is not None and bool((p.grad != 0).any()) for p in parameters)


@pytest.mark.parametrize("name", CASES)
def test_copies_and_state(name):
    transform, x, context = CASES[name]()
    twin = copy.deepcopy(transform)
    other = CASES[name]()[0]
    with torch.no_grad():
        for value in (*other.parameters(), *other.buffers()):
            value.fill_(0.5)
    other.load_state_dict(transform.state_dict())
    with torch.no_grad():
        out = transform(x, Request(context))
        for equal in (twin, other):
            found = equal(x, Request(context))
            assert torch.equal(found.value, out.value) and torch.equal(found.log_det, out.log_det)
        for p in twin.parameters():
            p.zero_()
        assert torch.equal(transform(x, Request(context)).value, out.value)


def test_sums_along_a_chain():
    blocks = [block(MLP(2, (4,)), quadratures=[Kinetic()]) for _ in range(2)]
    x = normal(3, 2)
    whole = Sequential(blocks)(x)
    first = blocks[0](x)
    second = blocks[1](first.value)
    assert torch.allclose(whole.integrals["kinetic"], first.integrals["kinetic"] + second.integrals["kinetic"], atol=1e-12)
    assert torch.allclose(whole.log_det, first.log_det + second.log_det, atol=1e-12)
    assert whole.stats.nfe == first.stats.nfe + second.stats.nfe > 0


def test_leaves_open_inner_chains():
    parts = [Logit(0.1), Rescale(), Squeeze(), Rescale()]
    chain = Sequential([parts[0], Sequential([parts[1], Sequential([parts[2]])]), parts[3]])
    assert [leaf for leaf, _ in iter_leaves(chain)] == parts
    assert [leaf for leaf, _ in iter_leaves(parts[0])] == parts[:1]


def test_standardize_statistics_come_in_batches():
    x = 1e3 + normal(101, 3) * torch.tensor([1.0, 1e-3, 1e3], dtype=F64)
    whole = Standardize(torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64))
    whole.fit(x)
    assert torch.allclose(whole.mean, x.mean(0), rtol=1e-13) and torch.allclose(whole.std, x.std(0), rtol=1e-11)
    parts = copy.deepcopy(whole)
    parts.fit_batches(x.split(7))
    assert torch.allclose(parts.mean, whole.mean, rtol=1e-13) and torch.allclose(parts.std, whole.std, rtol=1e-9)
    z = whole(x).value
    assert torch.allclose(z.mean(0), torch.zeros(3, dtype=F64), atol=1e-9)  # 1e3 with a spread of 1e-3
    assert torch.allclose(z.std(0), torch.ones(3, dtype=F64), atol=1e-9)


@pytest.mark.parametrize("bad", ["zero", "negative", "nan", "infinite", "mean", "shapes"])
def test_standardize_refuses(bad):
    mean, std = torch.zeros(3), torch.ones(3)
    value = {"zero": 0.0, "negative": -1.0, "nan": math.nan, "infinite": math.inf}
    if bad in value:
        std[1] = value[bad]
    elif bad == "mean":
        mean[1] = math.nan
    else:
        std = torch.ones(2)
    with pytest.raises(ConfigError, match="shape" if bad == "shapes" else r"(std|mean) must be .* at index \[1\]"):
        Standardize(mean, std)


def test_standardize_refuses_data_without_a_density():
    def fit(x):
        whiten = Standardize(torch.zeros(2), torch.ones(2))
        whiten.fit(x)
        return whiten

    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    kept = fit(x)
    for value in (0.0, 0.1, 1e20):  # 0.1 is no binary fraction: its rounded mean leaves a tiny std
        y = x.double().clone()
        y[:, 1] = value
        with pytest.raises(DataError, match=r"dimension \[1\] is constant"):
            fit(y)
    y = x.clone()
    y[3, 0] = math.nan
    with pytest.raises(DataError, match=r"NaN or infinity in dimension \[0\]"):
        fit(y)
    with pytest.raises(DataError, match="at least 2"):
        fit(x[:1])
    with pytest.raises(DataError, match="expected"):
        fit(torch.randn(5, 3))
    with pytest.raises(DataError, match=r"expected \(N, 2\)"):
        kept(torch.randn(5, 3))
    before = kept.std.clone()
    with pytest.raises(DataError):
        kept.fit(y)
    assert torch.equal(kept.std, before)  # a refused fit changes nothing


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("levels", [2, 17, 49, 256])
def test_dequantize_stays_inside_its_grey_level(levels, dtype):
    dequantize = Dequantize(levels).to(dtype)
    k = torch.arange(levels, dtype=torch.uint8).repeat(40, 1)
    top = torch.full(k.shape, 1 - torch.finfo(dtype).eps / 2, dtype=dtype)
    for noise in (Noise(0), Noise.replay({"dequantize": torch.zeros(k.shape)}), Noise.replay({"dequantize": top})):
        out = dequantize(k, Request(noise=noise))
        assert out.value.dtype == out.log_det.dtype == dtype
        assert bool((out.value >= 0).all()) and bool((out.value < 1).all())
        assert torch.equal(dequantize.quantize(out.value), k)
        assert torch.allclose(out.log_det, torch.tensor(-levels * math.log(levels), dtype=dtype), rtol=1e-6)
    u = dequantize(k, Request(noise=Noise(0))).value * levels - k
    n = u.numel()
    assert abs(float(u.mean() - 0.5)) < 5 * math.sqrt(1 / 12 / n)
    assert abs(float((u**2).mean() - 1 / 3)) < 5 * math.sqrt(4 / 45 / n)


def test_dequantize_passes_floats_and_refuses_the_rest():
    dequantize = Dequantize(17)
    x = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    out = dequantize(x)
    assert torch.equal(out.value, x) and torch.equal(out.log_det, torch.zeros(3))
    assert "_one" not in dequantize.state_dict()
    with pytest.raises(DataError, match=r"between 0 and 16 \(levels=17\), got 17"):
        dequantize(torch.full((1, 1, 2, 2), 17, dtype=torch.uint8))
    for dtype in (torch.int32, torch.int64, torch.bool):
        with pytest.raises(DataError, match="expected uint8"):
            dequantize(torch.zeros(1, 1, 2, 2, dtype=dtype))
    for levels in (1, 257):
        with pytest.raises(ConfigError, match=f"between 2 and 256, got {levels}"):
            Dequantize(levels)
    outside = torch.tensor([-0.3, 0.0, 0.5, 1.0, 1.3])
    assert dequantize.quantize(outside).tolist() == [0, 0, 8, 16, 16]


@pytest.mark.parametrize("alpha", [0.0, 0.5, -0.1, math.nan])
def test_logit_refuses_alpha(alpha):
    with pytest.raises(ConfigError, match="alpha"):
        Logit(alpha)


def test_logit_domain():
    logit = Logit(0.05)
    edge = torch.tensor([[0.0, 1.0]], dtype=F64)
    assert torch.allclose(logit(edge).value, torch.tensor([[0.05, 0.95]], dtype=F64).logit())
    # the inverse lands in (-margin, 1 + margin), and the map takes all of it back
    z = torch.linspace(-20, 20, 41, dtype=F64)[:, None]
    x = logit.inverse(z).value
    assert float(x.min()) > -logit.margin and float(x.max()) < 1 + logit.margin and float(x.min()) < 0
    assert torch.allclose(logit(x).value, z, atol=1e-6)
    for bad in (-0.06, 1.06, 255.0):
        with pytest.raises(DataError, match=r"takes x in \[0, 1\], but x spans"):
            logit(torch.tensor([[0.5, bad]]))
    with pytest.raises(DataError, match="x holds NaN"):
        logit(torch.tensor([[0.5, math.nan]]))
    with pytest.raises(DataError, match="put Dequantize before"):
        logit(torch.zeros(1, 2, dtype=torch.uint8))


def test_logit_of_a_box():
    low, high = torch.tensor([-1.0, 5.0], dtype=F64), torch.tensor([1.0, 5.5], dtype=F64)
    box, flow = Logit(0.0, low, high), Flow(Sequential([Logit(0.0, low, high)]), (2,))
    ticks = torch.linspace(0, 1, 401, dtype=F64)[:-1] + 0.5 / 400
    x = low + (high - low) * torch.cartesian_prod(ticks, ticks)
    assert abs(float(flow.log_prob(x).exp().sum()) * float((high - low).prod()) / 400**2 - 1) < 1e-4
    edge = torch.stack([low, high])
    assert bool(box(edge).value.isfinite().all()) and torch.allclose(box.inverse(box(edge).value).value, edge)
    sample = flow.sample(2000)
    assert bool(((sample > low) & (sample < high)).all())
    outside = flow.distribution(validate_args=False).log_prob(torch.stack([high + 0.1, low - 0.1]))
    assert bool((outside == -math.inf).all()) and flow.like.dtype == F64
    with pytest.raises(DataError, match="Logit takes x in its box, but x spans"):
        flow.log_prob(high + 0.1)
    with pytest.raises(ConfigError, match="must be finite borders, low less than high"):
        Logit(0.1, high, low)


def test_squeeze_order_and_refusals():
    x = torch.arange(2 * 2 * 4 * 6).reshape(2, 2, 4, 6).double()
    z = Squeeze()(x).value
    for c in range(2):
        for i in range(2):
            for j in range(2):
                assert torch.equal(z[:, 4 * c + 2 * i + j], x[:, c, i::2, j::2])
    with pytest.raises(DataError, match="even height and width"):
        Squeeze()(torch.zeros(1, 1, 3, 4))
    with pytest.raises(DataError, match=r"expected \(N, 4C, H, W\)"):
        Squeeze().inverse(torch.zeros(1, 3, 2, 2))
    for shape in ((3,), (1, 3, 4)):
        with pytest.raises(ConfigError, match="even height and width"):
            Squeeze().latent_shape(shape)
    with pytest.raises(DataError, match="Dequantize"):
        Rescale()(torch.zeros(1, 2, dtype=torch.uint8))


def test_standardisation_refuses_integers():
    """Its statistics would be rounded to them."""
    with pytest.raises(DataError, match=r"x has type torch\.int64, expected floats"):
        Standardize(torch.full((2,), 0.5), torch.full((2,), 1.5))(torch.ones(3, 2, dtype=torch.long))
