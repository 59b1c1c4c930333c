"""Fields: values, tangents and closed-form traces against autodiff in float64, for every layer type."""

import pytest
import torch
from conftest import F64, perturbed, slow

from cnf.errors import ConfigError
from cnf.fields import LAYERS, MLP, ConvField
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Exact, Hutchinson
from cnf.ode.quadratures import RunningCost


def jacobian(field, t, x, context=None):
    return torch.stack(
        [
            torch.autograd.functional.jacobian(
                lambda y, i=i: field(t, y[None], context if context is None or context.ndim == 1 else context[i : i + 1])[0], x[i]
            ).reshape(x[0].numel(), -1)
            for i in range(len(x))
        ]
    )


@pytest.mark.parametrize("hidden, context", [
    ((), None), ((5,), "rows"), ((5, 7), "one"), ((4, 5, 6), "rows"),
    *(slow(hidden, context) for hidden, context in [((), "rows"), ((), "one"), ((5,), None), ((5,), "one"), ((5, 7), None), ((5, 7), "rows"),
                                                    ((4, 5, 6), None), ((4, 5, 6), "one")]),
])  # fmt: skip
@pytest.mark.parametrize("layer", list(LAYERS))
def test_mlp_tangents_and_closed_form(layer, hidden, context):
    torch.manual_seed(0)
    field = perturbed(MLP(4, hidden, layer, residual="linear", context_dim=3 if context else 0), 0.3)
    c = {None: None, "rows": torch.randn(3, 3, dtype=F64), "one": torch.randn(3, dtype=F64)}[context]
    x, v, t = torch.randn(3, 4, dtype=F64), torch.randn(2, 3, 4, dtype=F64), torch.tensor(0.3, dtype=F64)
    j = jacobian(field, t, x, c)
    dx, jv = field.jvp(t, x, v, c)
    assert torch.allclose(dx, field(t, x, c), atol=1e-12)
    assert torch.allclose(jv, torch.einsum("nij,knj->kni", j, v), atol=1e-12)
    one = torch.ones((), dtype=F64)
    _, total = torch.func.jvp(lambda s, y: field(s, y, c), (t, x), (one, v[0]))
    assert torch.allclose(field.jvp(t, x, v[:1], c, t_dot=one)[1][0], total, atol=1e-12)
    trace = j.diagonal(dim1=1, dim2=2).sum(1)
    if field.closed_form:
        assert torch.allclose(field.divergence(t, x, c)[1], trace, atol=1e-12)
    else:
        with pytest.raises(ConfigError, match="at most two hidden layers"):
            field.divergence(t, x, c)
    for exact in (Exact(chunk=3, closed_form=False), Exact(closed_form=False)):
        found = exact.linearize(field, t, x, None, c, frozenset({"div", "jac_sq"}))
        assert torch.allclose(found.div, trace, atol=1e-12)
        assert torch.allclose(found.jac_sq, j.square().sum((1, 2)), atol=1e-11)


@pytest.mark.parametrize("layer", list(LAYERS))
@pytest.mark.parametrize("strides", [None, (1, 0, 1), (1, 2, -2, 1)])
def test_conv_tangents(layer, strides):
    torch.manual_seed(0)
    hidden = (3,) * (len(strides) - 1 if strides else 2)
    field = perturbed(ConvField(2, hidden, layer, "softplus", strides, context_dim=2), 0.3)
    x, v = torch.randn(2, 2, 6, 4, dtype=F64), torch.randn(3, 2, 2, 6, 4, dtype=F64)
    c, t = torch.randn(2, 2, dtype=F64), torch.tensor(0.4, dtype=F64)
    dx, jv = field.jvp(t, x, v, c)
    expected = [torch.func.jvp(lambda y: field(t, y, c), (x,), (e,)) for e in v]
    assert torch.allclose(dx, expected[0][0], atol=1e-12)
    assert torch.allclose(jv, torch.stack([e[1] for e in expected]), atol=1e-12)


@pytest.mark.parametrize("layer", list(LAYERS))
def test_zero_initialisation_is_zero_for_every_time_and_learns(layer):
    torch.manual_seed(0)
    for field, shape in ((MLP(3, (5,), layer, zero_init=True), (4, 3)), (ConvField(1, (3,), layer, zero_init=True), (2, 1, 4, 4))):
        x = torch.randn(shape)
        for t in (0.0, 0.37, 1.0):
            assert torch.equal(field(torch.tensor(t), x), torch.zeros_like(x))
        optimizer = torch.optim.Adam(field.parameters(), 1e-2)
        moved = {name: 0.0 for name, _ in field.named_parameters()}
        for t in torch.linspace(0.1, 1, 10):
            optimizer.zero_grad()
            (field(t, x) - torch.sin(3 * x + t)).square().sum().backward()
            for name, p in field.named_parameters():
                moved[name] += 0.0 if p.grad is None else float(p.grad.abs().sum())
            optimizer.step()
        assert all(moved.values()), [n for n, g in moved.items() if not g]


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased(mode, noise):
    torch.manual_seed(0)
    field = perturbed(MLP(4, (6,)), 0.3)
    x, t = torch.randn(1, 4, dtype=F64), torch.tensor(0.2, dtype=F64)
    j = jacobian(field, t, x)[0]
    torch.manual_seed(1)
    estimate = Hutchinson(noise, mode)
    rows = x.expand(20_000, 4)
    need = frozenset({"div", "jac_sq"})
    found = estimate.linearize(field, t, rows, estimate.probe(rows, None, need, field), None, need)
    for values, truth in ((found.div, j.trace()), (found.jac_sq, j.square().sum())):
        z = (values.mean() - truth) / (values.std() / len(values) ** 0.5)
        assert abs(z) < 5


def test_both_modes_agree_on_the_trace_for_one_probe_and_generic_fields_work():
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 3).double()

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, t, x, context=None):
            return torch.tanh(self.net(x)) * t

    x, t = torch.randn(5, 3, dtype=F64), torch.tensor(0.7, dtype=F64)
    need = frozenset({"div", "jac_sq"})
    probe = Hutchinson(probes=2).probe(x, None, need, Plain())
    a, b = (Hutchinson(mode=m, probes=2).linearize(Plain(), t, x, probe, None, need).div for m in ("forward", "reverse"))
    assert torch.allclose(a, b, atol=1e-13)
    exact = Exact().linearize(Plain(), t, x, None, None, need)
    j = jacobian(Plain(), t, x)
    assert torch.allclose(exact.div, j.diagonal(dim1=1, dim2=2).sum(1), atol=1e-13)


def test_a_field_that_leaves_x_out_has_no_divergence():
    class Drift(torch.nn.Module):
        def __init__(self, learned):
            super().__init__()
            self.speed = torch.nn.Parameter(torch.ones(3, dtype=F64), requires_grad=learned)

        def forward(self, t, x, context=None):
            return (t * self.speed).expand_as(x)

    x, t = torch.randn(5, 3, dtype=F64), torch.tensor(0.7, dtype=F64)
    need = frozenset({"div", "jac_sq"})
    for estimate in (Hutchinson(probes=2), Hutchinson(mode="reverse", probes=2), Exact()):
        for field in (Drift(True), Drift(False)):
            found = estimate.linearize(field, t, x, estimate.probe(x, None, need, field), None, need)
            assert torch.equal(found.dx, field(t, x))
            assert not found.div.any() and not found.jac_sq.any() and found.div.shape == (5,)


def test_bad_arguments_are_named():
    with pytest.raises(ConfigError, match="did you mean 'concatsquash'"):
        MLP(2, (3,), "concatsqush")
    with pytest.raises(ConfigError, match="did you mean 'softplus'"):
        MLP(2, (3,), nonlinearity="softplu")
    with pytest.raises(ConfigError, match="hidden"):
        MLP(2, (0,))
    with pytest.raises(ConfigError, match="strides"):
        ConvField(1, (3,), strides=(2, 1))
    with pytest.raises(ConfigError, match="context=None"):
        MLP(2, (3,), context_dim=2)(torch.tensor(0.0), torch.randn(1, 2))
    with pytest.raises(ConfigError, match="dim=2"):
        MLP(2)(torch.tensor(0.0), torch.randn(1, 3))
    with pytest.raises(ConfigError, match="probes must be at least 1, got 0"):
        Hutchinson(probes=0)
    cost = RunningCost("cost", lambda t, x: x.sum(1))
    cost.need = frozenset({"nonsense"})
    with pytest.raises(ConfigError, match="need='nonsense'"):
        CNF(MLP(2), quadratures=[cost])(torch.randn(1, 2))


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 2), (2, 3), (3, 2), (4, 5), (6, 3)])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("hidden", [(), (3,), (3, 5)])
def test_conv_closed_form_at_every_border(size, channels, hidden):
    """The trace against autodiff for every class of pixel: corners, lines, interior, and images without interior."""
    torch.manual_seed(0)
    field = perturbed(ConvField(channels, hidden, "concatsquash", residual="minus"), 0.3)
    x, t = torch.randn(2, channels, *size, dtype=F64), torch.tensor(0.3, dtype=F64)
    dx, div = field.divergence(t, x)
    assert torch.equal(dx, field(t, x)) or torch.allclose(dx, field(t, x), rtol=0, atol=1e-13)
    truth = jacobian(field, t, x).diagonal(dim1=1, dim2=2).sum(1)
    assert (div - truth).abs().max() < 1e-12


@pytest.mark.parametrize("context", [None, "rows"])
@pytest.mark.parametrize("layer", list(LAYERS))
def test_conv_closed_form_of_every_layer_and_its_gradient(layer, context):
    torch.manual_seed(0)
    field = perturbed(ConvField(2, (3, 4), layer, strides=(1, 0, 1), context_dim=2 if context else 0), 0.3)
    c = torch.randn(2, 2, dtype=F64) if context else None
    x, t = torch.randn(2, 2, 4, 3, dtype=F64), torch.tensor(0.3, dtype=F64)
    if context and layer in ("squash", "concatsquash"):  # the context is in the last gate: a kernel of its own for every row
        assert not field.closed_form
        with pytest.raises(ConfigError, match="context"):
            field.divergence(t, x, c)
        return
    ways = [Exact(), Exact(closed_form=False)]
    found = [way.linearize(field, t, x, None, c, frozenset({"div"})).div for way in ways]
    assert torch.allclose(*found, rtol=0, atol=1e-12)
    weights = torch.randn(2, dtype=F64)
    gradients = [
        torch.autograd.grad((div * weights).sum(), list(field.parameters()), allow_unused=True, retain_graph=True) for div in found
    ]
    for p, mine, other in zip(field.parameters(), *gradients, strict=True):
        mine, other = (torch.zeros_like(p) if g is None else g for g in (mine, other))
        assert torch.allclose(mine, other, rtol=1e-9, atol=1e-11)


def test_strided_and_deep_convolutions_have_no_closed_form():
    for field in (ConvField(1, (3, 3), strides=(2, 1, -2)), ConvField(1, (3, 3, 3))):
        assert not field.closed_form
        with pytest.raises(ConfigError, match="closed form"):
            field.divergence(torch.tensor(0.0), torch.randn(2, 1, 4, 4))
    rows = ConvField(1, (3, 3), "squash")
    with pytest.raises(ConfigError, match="one time for all rows"):
        rows.divergence(torch.rand(2), torch.randn(2, 1, 4, 4))
