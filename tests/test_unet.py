"""The U-Net and the denoiser: tangents against autodiff, time row by row, and what may not be."""

import copy

import pytest
import torch
from conftest import slow

from cnf import CNF, Noise, build
from cnf.config import FlowConfig, SolverConfig
from cnf.errors import ConfigError, DataError
from cnf.fields import Denoiser, Interpolant, UNet
from cnf.fields.unet_layers import Attention, Dual, GroupNorm
from cnf.ode.divergence import Exact, Hutchinson
from cnf.ode.quadratures import JacobianFrobenius
from cnf.solvers import FixedGrid
from cnf.transforms import Request


def made(kind, context_dim=0, **more):
    torch.manual_seed(0)
    options = {"hidden": (4, 8), "depth": 2, "attention": True, "context_dim": context_dim, "zero_init": False} | more
    field = UNet(2, **options) if kind == "unet" else Denoiser(2, Interpolant(0.02), level=0.1, **options)
    for p in field.parameters():  # past the zeros of its residual branches
        p.data += 0.1 * torch.randn_like(p)
    if kind == "denoiser":
        field.data_std.fill_(0.7)
    return field.double()


@pytest.mark.parametrize("kind", ["unet", "denoiser"])
@pytest.mark.parametrize("context_dim", [0, 3])
def test_fused_tangents_are_those_of_autodiff(kind, context_dim):
    field = made(kind, context_dim)
    x, v = torch.randn(3, 2, 8, 4).double(), torch.randn(2, 3, 2, 8, 4).double()
    context = torch.randn(3, context_dim).double() if context_dim else None
    t, t_dot = torch.tensor(0.3).double(), torch.tensor(0.7).double()
    dx, product = field.jvp(t, x, v, context)
    _, total = field.jvp(t, x, v, context, t_dot=t_dot)
    with torch.no_grad():  # without gradient by kernels that have none
        for with_gradient, alone in zip((dx, product), field.jvp(t, x, v, context), strict=True):
            torch.testing.assert_close(alone, with_gradient, rtol=1e-11, atol=1e-12)
    for k in range(2):
        value, one = torch.func.jvp(lambda y: field(t, y, context), (x,), (v[k],))
        torch.testing.assert_close(value, dx, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(one, product[k], rtol=1e-11, atol=1e-12)
        _, both = torch.func.jvp(lambda s, y: field(s, y, context), (t, x), (t_dot, v[k]))
        torch.testing.assert_close(both, total[k], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", ["unet", "denoiser"])
def test_the_gradient_of_a_fused_solve_is_the_plain_one(kind):
    field = made(kind)

    class Plain(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, t, x, context=None):
            return self.inner(t, x, context)

    x = 0.5 * torch.randn(3, 2, 8, 4).double()
    found = []
    for wrapped in (copy.deepcopy(field), Plain(copy.deepcopy(field))):
        block = CNF(wrapped, Hutchinson(), FixedGrid("rk4", 2), quadratures=[JacobianFrobenius()]).double()
        _, log_det, integrals, _ = block(x, Request(noise=Noise(0)))
        (log_det.mean() + 0.01 * integrals["jacobian"].mean()).backward()
        found.append((log_det.detach(), [p.grad for p in block.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=1e-10)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["unet", "denoiser"])
def test_one_time_a_row(kind):
    field, x, t = made(kind), torch.randn(4, 2, 4, 4).double(), torch.rand(4).double()
    each = torch.cat([field(t[i], x[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(field(t, x), each, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["unet", slow("denoiser")])
def test_the_log_det_is_that_of_the_jacobian(kind):
    field = made(kind, hidden=(4,), depth=1)
    # the denoiser changes fast near the data, and half its time has that
    solver, end = (FixedGrid("dopri5", 48), 1.0) if kind == "unet" else (FixedGrid("rk4", 128), 0.5)
    block = CNF(field, Exact(), solver, end_time=end).double()
    x = 0.3 * torch.randn(2, 2, 2, 4).double()
    z, log_det, _, _ = block(x)
    jacobians = torch.func.jacrev(lambda y: block(y[None], Request(log_det=False)).value[0].flatten())
    truth = torch.linalg.slogdet(jacobians(x[1]).flatten(1)).logabsdet
    torch.testing.assert_close(log_det[1], truth, rtol=1e-6, atol=1e-6)
    back = block.inverse(z)
    torch.testing.assert_close(back.value, x, rtol=1e-6, atol=1e-6)


def test_group_norm_is_torchs():
    torch.manual_seed(0)
    norm = GroupNorm(12, groups=8).double()  # 4 groups: the most that divide both
    torch.nn.init.normal_(norm.gain)
    torch.nn.init.normal_(norm.shift)
    x = torch.randn(3, 12, 5, 4).double()
    truth = torch.nn.functional.group_norm(x, 4, norm.gain, norm.shift)
    torch.testing.assert_close(norm(Dual(x)).value, truth)
    torch.testing.assert_close(norm(Dual(x, torch.zeros(6, 12, 5, 4).double())).value, truth)
    modulation = torch.randn(3, 24).double()
    a, b = norm(Dual(x), modulation).value, norm(Dual(x, torch.zeros_like(x)), modulation).value
    scale, move = (m[:, :, None, None] for m in modulation.chunk(2, 1))
    torch.testing.assert_close(a, truth * (1 + scale) + move)
    torch.testing.assert_close(b, a)


def test_attention_is_torchs():
    torch.manual_seed(0)
    layer = Attention(8, heads=2).double()
    torch.nn.init.normal_(layer.project.weight)
    x = torch.randn(3, 8, 2, 4).double()
    q, k, v = layer.qkv(layer.norm(Dual(x)).value).flatten(2).unflatten(1, (3, 2, 4)).transpose(3, 4).unbind(1)
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(3, 8, 2, 4)
    torch.testing.assert_close(layer(Dual(x)).value, x + layer.project(mixed))


def test_zero_initialisation_is_no_field_at_all():
    field = UNet(1, (4, 8), depth=1)
    assert not bool(field(torch.tensor(0.5), torch.randn(2, 1, 4, 4)).any())


def test_bfloat16_inside_is_near():
    field = made("denoiser").float()
    x, v = torch.randn(8, 2, 8, 8), torch.randn(1, 8, 2, 8, 8)
    exact = field.jvp(torch.tensor(0.4), x, v)
    with torch.autocast("cpu", torch.bfloat16):
        near = field.jvp(torch.tensor(0.4), x, v)
    for a, b in zip(exact, near, strict=True):
        assert b.dtype == torch.float32
        assert float(((a - b).norm() / a.norm()).detach()) < 0.05


def test_the_denoiser_sees_grey_levels_until_noise_hides_them():
    field = made("denoiser")
    x = torch.randn(2, 2, 4, 4).double()
    waves = []
    for t in (0.0, 1.0):
        a, b, r = field._scales(torch.tensor(t).double())
        waves.append(field._seen(x, a, b, r)[:, 2:])
    assert float(waves[0][:, :4].abs().max()) > 0.3  # period one at the data end, sigma a fifth of a level
    assert float(waves[1][:, :4].abs().max()) < 1e-6
    level = field.level
    at = [field._seen(x + shift * level, *field._scales(torch.tensor(0.0).double()))[:, 2:6] for shift in (0, 1)]
    torch.testing.assert_close(at[0], at[1])  # a whole level further it looks the same


def test_data_set_the_denoisers_scale():
    flow = build(FlowConfig.of(field="unet", hidden=(4,), unet_depth=1, dequantize="truncated-normal", preprocess="center"),
                 SolverConfig.of(divergence="hutchinson"), (1, 4, 4), levels=17)  # fmt: skip
    x = torch.randint(0, 17, (50, 1, 4, 4), dtype=torch.uint8)
    flow.fit_statistics(x)
    truth = (2 * ((x.double() + 0.5) / 17 - 0.5)).square().mean().sqrt()
    assert float(flow.blocks[0].field.data_std) == pytest.approx(float(truth), rel=1e-3)
    assert "transform.transforms.2.field.data_std" in flow.state_dict()
    with pytest.raises(DataError, match="mean square is 0"):
        flow.blocks[0].field.fit_batches([torch.zeros(3, 1, 4, 4)])


def test_what_may_not_be():
    with pytest.raises(ConfigError, match="hidden=\\(4, 0\\)"):
        UNet(1, (4, 0))
    with pytest.raises(ConfigError, match="hidden=\\(\\)"):
        UNet(1, ())
    with pytest.raises(ConfigError, match="multiples of 4"):
        UNet(1, (4, 4, 4), depth=1)(torch.tensor(0.0), torch.randn(1, 1, 6, 6))
    with pytest.raises(ConfigError, match="pass context"):
        UNet(1, (4,), context_dim=2)(torch.tensor(0.0), torch.randn(1, 1, 4, 4))
    with pytest.raises(ConfigError, match="heads"):
        UNet(1, (6,), attention=True)
    with pytest.raises(ConfigError, match=r"interpolant\.sigma must be positive"):
        Denoiser(1, Interpolant(), level=0.1)
    with pytest.raises(ConfigError, match=r"level .*must be positive, got 0"):
        Denoiser(1, Interpolant(0.1), level=0.0)


BAD = [
    ({"field": "unet", "strides": (1, 1)}, "strides"),
    ({"field": "unet", "time_conditioning": "concat"}, "time_conditioning='concat' is for field='mlp' or 'conv', not for field='unet'"),
    ({"field": "unet", "hidden": (4, 4, 4, 4)}, "multiples of 8"),
    ({"field": "unet", "hidden": ()}, "channels of one size or more"),
    ({"field": "unet", "architecture": "parallel"}, "architecture='parallel' sums plain nets"),
    ({"field": "conv", "attention": True}, "attention=True is for field='unet'"),
    ({"unet_depth": 3}, "unet_depth=3 is for field='unet'"),
    ({"field": "unet", "dequantize": "truncated-normal"}, "preprocess='center'"),
    ({"field": "unet", "dequantize": "truncated-normal", "preprocess": "center", "blocks": 2}, "blocks=1"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_settings_that_do_not_fit(options, message):
    with pytest.raises(ConfigError) as error:
        build(FlowConfig.of(**{"hidden": (4,)} | options), SolverConfig.of(divergence="hutchinson"), (1, 4, 4), levels=17)
    assert message in str(error.value)


def test_vectors_have_no_unet():
    with pytest.raises(ConfigError, match="needs images"):
        build(FlowConfig.of(field="unet", hidden=(4,)), SolverConfig(), (3,))


def test_a_unet_in_a_plain_stack_conditional_too():
    torch.manual_seed(0)
    config = FlowConfig.of(field="unet", hidden=(4, 8), unet_depth=1, blocks=2, zero_init=False)
    flow = build(config, SolverConfig.of(divergence="hutchinson"), (1, 4, 4), levels=17, context_dim=3)
    x = torch.randint(0, 17, (4, 1, 4, 4), dtype=torch.uint8)
    context = torch.eye(3)[torch.arange(4) % 3]
    values = [flow.log_prob(x, row.expand(4, -1), noise=Noise(0)) for row in torch.eye(3)]
    own = flow.log_prob(x, context, noise=Noise(0))
    for i in range(4):
        assert torch.allclose(own[i], values[i % 3][i], atol=1e-4)
    assert flow.sample(2, context, noise=Noise(0)).shape == (2, 4, 1, 4, 4)
