"""Velocity fields trained elsewhere, against the density that they transport to."""

import functools

import pytest
import torch
from torch import nn

import cnf
from cnf import from_velocity
from cnf.errors import ConfigError
from cnf.ode.divergence import Hutchinson
from cnf.random import Noise

MEAN, STD = torch.tensor([2.0, -1.0, 0.5]), 0.4


def noise_first(t, x):
    """Noise at t = 0: carries N(0, 1) to N(MEAN, STD²) along straight lines."""
    return MEAN.to(x) + (STD - 1) * (x - MEAN.to(x) * t) / (1 + (STD - 1) * t)


def data_first(t, x):
    return -noise_first(1 - t, x)


def expected(x):
    return torch.distributions.Normal(MEAN, STD).log_prob(x).sum(-1)


@pytest.mark.parametrize(("v", "time", "other"), [(noise_first, "noise-to-data", "data-to-noise"), (data_first, "data-to-noise", "noise-to-data")])
def test_the_density_is_that_which_the_velocity_transports_to(v, time, other):
    flow = from_velocity(v, (3,), time=time)
    x = MEAN + STD * torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    assert not flow.training
    torch.testing.assert_close(flow.log_prob(x), expected(x), rtol=0, atol=1e-4)
    samples, log_prob = flow.sample_and_log_prob(2000, noise=Noise(0))
    torch.testing.assert_close(log_prob, expected(samples), rtol=0, atol=1e-4)
    assert float((samples.mean(0) - MEAN).abs().max()) < 0.05 and float((samples.std(0) - STD).abs().max()) < 0.05
    assert float((from_velocity(v, (3,), time=other).log_prob(x) - expected(x)).abs().min()) > 0.5
    torch.testing.assert_close(from_velocity(v, (3,), time, divergence=Hutchinson()).encode(x), (x - MEAN) / STD, rtol=0, atol=1e-4)


def test_the_direction_has_no_default():
    for given in ((), ("forward",), (None,)):
        with pytest.raises(ConfigError, match=r"time must be 'noise-to-data' if the noise is at t=0 \(torchcfm, flow_matching\)"):
            from_velocity(noise_first, (3,), *given)


class Joint(nn.Module):
    """As torchcfm's MLP: of [x, t]."""

    def __init__(self, dim=3):
        super().__init__()
        self.net = nn.Linear(dim + 1, dim)

    def forward(self, x):
        return self.net(x)


class Swapped(nn.Module):
    """As flow_matching's models."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x, t, **extras):
        return self.net(torch.cat([x, t[:, None]], 1))


class Wrapped(nn.Module):
    """As torchcfm's torch_wrapper."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, t, x, *args, **kwargs):
        return self.model(torch.cat([x, t.repeat(x.shape[0])[:, None]], 1))


def test_other_conventions_take_one_line():
    torch.manual_seed(0)
    joint, swapped, x = Joint(), Swapped(), torch.randn(5, 3)
    swapped.net = joint.net
    flows = [
        from_velocity(lambda t, x: joint(torch.cat([x, t.expand(len(x), 1)], 1)), (3,), "noise-to-data"),
        from_velocity(lambda t, x: swapped(x, t.expand(len(x))), (3,), "noise-to-data"),
        from_velocity(Wrapped(joint), (3,), "noise-to-data"),
        from_velocity(functools.partial(lambda net, t, x: net(torch.cat([x, t.expand(len(x), 1)], 1)), joint), (3,), "noise-to-data"),
    ]
    a, b = joint.net.weight.double()[:, :3].detach(), flows[0].log_prob(x)
    z = flows[0].encode(x)
    torch.testing.assert_close(b, flows[0].base_log_prob(z) - a.trace().float(), rtol=0, atol=1e-4)
    for flow in flows:
        torch.testing.assert_close(flow.log_prob(x), b, rtol=0, atol=1e-5)
        assert sum(p.numel() for p in flow.parameters()) == 15  # the network is the flow's
    flows[0].double()
    assert joint.net.weight.dtype == torch.float64


def test_a_context_is_handed_on_where_it_is_taken():
    x, shift = torch.randn(6, 3), torch.randn(6, 3)
    flow = from_velocity(lambda t, x, context: context + 0 * x, (3,), "noise-to-data")
    torch.testing.assert_close(flow.encode(x, shift), x - shift, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="built without context"):
        from_velocity(noise_first, (3,), "noise-to-data").log_prob(x, shift)


def test_what_is_no_velocity_is_refused():
    def needs(t, x, context, more):
        return x

    for v, message in (
        (Joint(), r"v takes \(x\); expected \(t, x\): pass a function"),
        (Swapped(), r"v takes \(x, t\), the time second; expected \(t, x\): pass lambda t, x: v\(x"),
        (lambda x_t, timesteps: x_t, "the time second"),
        (needs, r"v requires \(t, x, context, more\)"),
        (lambda t, x, *, label: x, "v requires"),
        (3, "v is a int"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_velocity(v, (3,), "noise-to-data")
    assert cnf.from_velocity is from_velocity
