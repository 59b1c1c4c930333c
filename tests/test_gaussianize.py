"""Marginal Gaussianization: exact for independent pixels, an exact log-det, an exact inverse."""

import math

import pytest
import torch
from conftest import F64

from cnf.errors import ConfigError, DataError
from cnf.flow import Flow
from cnf.random import Noise
from cnf.transforms import Dequantize, Gaussianize, Request, Sequential


def fitted(shape=(1, 2, 3), levels=5, n=400, alpha=1e-4):
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(n, *shape, generator=generator).pow(3) * levels).floor().to(torch.uint8)
    transform = Gaussianize(shape, levels, alpha).double()
    transform.fit(Dequantize(levels).double()(x, Request(noise=Noise(0))).value)
    return transform, x


def test_log_det_is_that_of_the_autodiff_jacobian_and_the_inverse_is_one():
    transform, _ = fitted()
    torch.manual_seed(0)
    x = torch.rand(4, 1, 2, 3, dtype=F64)
    out = transform(x)
    back = transform.inverse(out.value)
    assert torch.allclose(back.value, x, atol=1e-13)
    assert torch.allclose(back.log_det, -out.log_det, atol=1e-11)
    for i in range(4):
        j = torch.autograd.functional.jacobian(lambda y: transform(y[None]).value[0], x[i]).reshape(6, 6)
        assert abs(float(torch.linalg.slogdet(j)[1] - out.log_det[i])) < 1e-10
        k = torch.autograd.functional.jacobian(lambda y: transform.inverse(y[None]).value[0], out.value[i].detach()).reshape(6, 6)
        assert torch.allclose(j @ k, torch.eye(6, dtype=F64), atol=1e-9)


def test_alone_it_gives_each_pixel_its_frequency_whatever_the_noise():
    transform, x = fitted()
    flow = Flow(Sequential([Dequantize(5), transform]), (1, 2, 3)).double()
    counts = torch.stack([(x == k).double().sum(0) for k in range(5)], -1)
    pooled = counts.reshape(-1, 5).sum(0)
    counts += 0.5 * pooled / pooled.sum() + 0.5 / 5  # the prior of one observation
    p = counts / counts.sum(-1, keepdim=True)
    expected = torch.take_along_dim(p[None], x[..., None].long(), -1).log().flatten(1).sum(1) + 6 * math.log(1 - 2e-4)
    for seed in (1, 2):
        assert torch.allclose(flow.log_prob(x, noise=Noise(seed)), expected, atol=1e-10)


def test_the_marginals_become_standard_normal():
    transform, x = fitted(n=20_000)
    z = transform(Dequantize(5).double()(x, Request(noise=Noise(1))).value).value
    grid = torch.linspace(-2, 2, 9, dtype=F64)
    below = (z[..., None] < grid).double().mean(0)
    assert float((below - torch.special.ndtr(grid)).abs().max()) < 5 * 0.5 / math.sqrt(20_000)


def test_the_straight_continuation_beyond_the_borders():
    transform, _ = fitted(alpha=0.05)
    z = torch.full((1, 1, 2, 3), 6.0, dtype=F64)
    for end in (z, -z):
        out = transform.inverse(end)
        assert bool(((out.value > 1) | (out.value < 0)).all())
        low, high = transform.bounds
        assert bool(((low < out.value) & (out.value < high)).all())
        assert torch.allclose(transform(out.value).value, end, atol=1e-7)


def test_float32_agrees_with_float64():
    transform, x = fitted()
    y = Dequantize(5)(x, Request(noise=Noise(3))).value
    exact, found = transform(y.double()), transform.float()(y)
    assert found.value.dtype == torch.float32
    assert torch.allclose(found.value.double(), exact.value, atol=1e-4)
    assert torch.allclose(found.log_det.double(), exact.log_det, atol=1e-4)


def test_bad_input_is_named():
    transform, x = fitted()
    for bad, message in ((torch.full((1, 1, 2, 3), 1.5), "spans"), (torch.full((1, 1, 2, 3), math.nan), "NaN"), (x, "Dequantize")):
        with pytest.raises(DataError, match=message):
            transform(bad)
    with pytest.raises(DataError, match=r"expected \(N, 1, 2, 3\)"):
        transform(torch.rand(2, 3))
    with pytest.raises(DataError, match="x has no rows"):
        transform.fit(torch.rand(0, 1, 2, 3))
    for options in ({"alpha": 0.5}, {"prior": 0.0}, {"levels": 1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            Gaussianize((1,), **{"levels": 4, **options})
