"""Leading shapes, empty batches, sample shapes, types and the repr of a flow: as in torch.distributions."""

import math

import numpy as np
import pytest
import torch

from cnf import CNF, Exact, FixedGrid, Flow, Noise
from cnf.errors import ConfigError, DataError
from cnf.fields import MLP, ConvField
from cnf.ode.quadratures import RunningCost
from cnf.transforms import Dequantize, Logit, Sequential

GRID = FixedGrid("rk4", 4)


def vectors(context_dim=0):
    torch.manual_seed(0)
    return Flow(CNF(MLP(2, (8,), context_dim=context_dim), Exact(), GRID, GRID), (2,))


def images():
    torch.manual_seed(0)
    return Flow(Sequential([Dequantize(16), Logit(0.05), CNF(ConvField(1, (4,)), Exact(), GRID, GRID)]), (1, 4, 4))


@pytest.mark.parametrize("lead", [(), (1,), (5,), (3, 2), (2, 1, 3), (0,), (2, 0)])
def test_any_leading_shape(lead):
    flow = vectors()
    x = torch.randn(*lead, 2)
    rows = x.reshape(-1, 2)
    assert torch.equal(flow.log_prob(x), flow.log_prob(rows).reshape(lead))
    assert torch.equal(flow.encode(x), flow.encode(rows).reshape(*lead, 2))
    assert torch.equal(flow.decode(x), flow.decode(rows).reshape(*lead, 2))
    assert torch.equal(flow.score(x), flow.score(rows).reshape(*lead, 2))
    pixels = torch.randint(0, 16, (*lead, 1, 4, 4), dtype=torch.uint8)
    given = images().bits_per_dim(pixels, noise=Noise(0))
    assert torch.equal(given, images().bits_per_dim(pixels.reshape(-1, 1, 4, 4), noise=Noise(0)).reshape(lead))


def test_leading_shapes_of_points_and_contexts_are_broadcast():
    flow = vectors(context_dim=3)
    x, context = torch.randn(5, 4, 2), torch.randn(4, 3)
    truth = torch.stack([flow.log_prob(row, context) for row in x])
    torch.testing.assert_close(flow.log_prob(x, context), truth)
    torch.testing.assert_close(flow.log_prob(x, context.expand(5, 4, 3)), truth)
    torch.testing.assert_close(flow(context).log_prob(x), truth)
    one = torch.stack([flow.log_prob(x[0], context[:1].expand(4, 3))])
    torch.testing.assert_close(flow.log_prob(x[:1], context[:1]), one)
    torch.testing.assert_close(flow.log_prob(x[0, 0], context), torch.stack([flow.log_prob(x[0, 0], c) for c in context]))
    with pytest.raises(DataError, match=r"context has shape \(3, 3\), but the points have leading shape \(5, 4\)"):
        flow.log_prob(x, context[:3])


@pytest.mark.parametrize("shape", [(), (5,), (3, 2), (0,), 5])
def test_sample_shapes(shape):
    lead = (shape,) if isinstance(shape, int) else shape
    flow, conditional = vectors(), vectors(context_dim=3)
    for draw in (flow.sample, flow.rsample, lambda n: flow.sample_and_log_prob(n)[0], lambda n: flow().sample(torch.Size(lead))):
        assert draw(shape).shape == (*lead, 2)
    assert flow.sample_and_log_prob(shape)[1].shape == lead
    for context, batch in ((torch.randn(3), ()), (torch.randn(4, 3), (4,)), (torch.randn(2, 4, 3), (2, 4))):
        x, log_prob = conditional.sample_and_log_prob(shape, context)
        assert x.shape == (*lead, *batch, 2) and log_prob.shape == (*lead, *batch)
        torch.testing.assert_close(conditional.log_prob(x.detach(), context), log_prob, rtol=1e-2, atol=1e-2)
    assert images().sample(shape, quantize=True).shape == (*lead, 1, 4, 4)
    assert flow.sample().shape == (2,)
    with pytest.raises(ConfigError, match=r"n must be .*, got -1"):
        flow.sample(-1)


CASES = {
    "float64": (lambda x: x.double(), r"x has type torch\.float64, but the flow computes in torch\.float32: use x\.to\(torch\.float32\)"),
    "half": (lambda x: x.half(), r"x has type torch\.float16"),
    "bfloat16": (lambda x: x.bfloat16(), r"x has type torch\.bfloat16"),
    "complex": (lambda x: x.to(torch.complex64), "complex64, expected floats"),
    "integer": (lambda x: x.long(), "int64, expected floats"),
    "numpy": (lambda x: x.numpy(), r"is a ndarray, expected a torch\.Tensor: use torch\.as_tensor\("),
    "list": (lambda x: x.tolist(), "is a list"),
    "nan": (lambda x: torch.where(torch.arange(4)[:, None] == 2, math.nan, x), "NaN or infinity, first in row 2"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["x", "z", "context"])
def test_types_of_points_latents_and_contexts(name, case):
    flow = vectors(context_dim=2)
    change, message = CASES[case]
    good, bad = torch.randn(4, 2), change(torch.randn(4, 2))
    calls = {"x": [flow.log_prob, flow.encode, flow.score, flow], "z": [flow.decode]}.get(name)
    calls = [lambda v, f=f: f(v, good) for f in calls] if calls else [lambda v: flow.log_prob(good, v), lambda v: flow.sample(3, v), flow]
    for call in calls:
        with pytest.raises(DataError, match=message.replace("x", name) if message.startswith("x") else message) as caught:
            call(bad)
        assert str(caught.value).startswith(name)


def test_weights_in_half_precision_say_what_to_do():
    for kind in (torch.float16, torch.bfloat16):
        with pytest.raises(DataError, match=r"no ODE is solved: convert it by flow\.float\(\)"):
            vectors().to(kind).log_prob(torch.randn(4, 2, dtype=kind))


def test_a_running_cost_cannot_change_the_state():
    x = torch.randn(4, 2)
    found = []
    for cost in (lambda t, y: (y * 2).square().sum(1), lambda t, y: y.mul_(2).square().sum(1)):
        flow = Flow(CNF(MLP(2, (8,), zero_init=True), Exact(), GRID, quadratures=[RunningCost("cost", cost)]), (2,))
        mine = x.clone()
        out = flow.evaluate(mine)
        assert torch.equal(mine, x)
        found.append(out)
    assert torch.equal(found[0].value, found[1].value) and torch.equal(found[0].integrals["cost"], found[1].integrals["cost"])


def test_repr_says_what_the_flow_is():
    text = repr(Flow(CNF(MLP(2, (8,)), Exact(), FixedGrid("rk4", 7), end_time=1.5), (2,)))
    for part in ("event_shape=(2,)", "blocks=1", "divergence=Exact()", "solver=FixedGrid('rk4', steps=7", "eval_solver=Adaptive('dopri5'", "end_time=1.5"):
        assert part in text
    learned = repr(CNF(MLP(2, (8,)), learn_end_time=True, end_time=2.0))
    assert "end_time=2 (learned)" in learned


def test_a_flow_without_weights_computes_in_the_type_of_its_points():
    class Decay(torch.nn.Module):
        def forward(self, t, x):
            return -x

    flow = Flow(CNF(Decay(), Exact(), FixedGrid("rk4", 32)), (2,))
    for kind, close in ((torch.float32, 1e-5), (torch.float64, 1e-7)):
        x = torch.randn(4, 2, dtype=kind)
        truth = flow.base_log_prob(x * math.exp(-1)) - 2
        torch.testing.assert_close(flow.log_prob(x), truth, rtol=close, atol=close)
    with pytest.raises(DataError, match="float16"):
        flow.log_prob(torch.randn(4, 2).half())


def test_numpy_tables_are_one_conversion_away():
    x = np.random.default_rng(0).normal(size=(4, 2))
    flow = vectors()
    assert flow.log_prob(torch.as_tensor(x, dtype=torch.float32)).shape == (4,)
