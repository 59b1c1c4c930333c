"""Neural ODEs that predict: solves and gradients against torchdiffeq, depth bases against their formulas, identities."""

import math

import numpy as np
import pytest
import torch
from conftest import F64, TIGHT, perturbed, slow
from torchdiffeq import odeint

from cnf.config import FlowConfig, NeuralODEConfig, ResNetConfig, SolverConfig
from cnf.errors import ConfigError, DataError, SolverError
from cnf.fields import MLP, ConvField, Linear
from cnf.fields.autodiff import autodiff_jvp
from cnf.fields.depth import BASES, Galerkin, basis, galerkin
from cnf.models import build, build_predictor
from cnf.neural_ode import NeuralODE, ResidualNet, anode_conv, anode_mlp, residual_net
from cnf.neural_ode.odenet import ODENet, conv_maps, mlp_maps
from cnf.solvers import Adaptive, FixedGrid

NODE = NeuralODEConfig.of(hidden=(8, 8), time_conditioning="concat", nonlinearity="softplus", zero_init=False)


def points(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(config=NODE, shape=(2,), outputs=3, levels=None, solver=None, seed=0, scale=1.5):
    torch.manual_seed(seed)
    model = build_predictor(config, SolverConfig(), shape, outputs=outputs, levels=levels).double()
    with torch.no_grad():  # what starts at zero should take part, and the field should bend
        for p in model.parameters():
            p.mul_(scale).add_(0.1 * points(*p.shape, seed=seed + 1))
    model.solver = model.eval_solver = solver or TIGHT
    return model


def flip(n):
    """Points around 1 and -1 in turn, and their targets -1 and 1."""
    side = torch.tensor([1.0, -1.0]).repeat(n // 2)[:, None]
    return side + 0.1 * torch.randn(n, 1), -side


def truth(f, start, end=1.0, begin=0.0):
    """The state at ``end`` by torchdiffeq itself, a step ending there (it would interpolate otherwise)."""
    times = torch.tensor([begin, end], dtype=torch.float64)
    return odeint(f, start, times, method="dopri8", rtol=1e-12, atol=1e-12, options={"step_t": times[1:]})[-1]


# -- the solve and its gradient ----------------------------------------------------------------------------------


ALL = {"augment": 1, "data_control": True, "learn_end_time": True, "end_time": 0.7}


@pytest.mark.parametrize("changes, gradient", [
    ({}, "direct"), ({"augment": 3, "input_layer": True}, "direct"), (ALL, "direct"), ({"augment": 2}, "adjoint"), (ALL, "adjoint"),
    slow({}, "adjoint"), slow({"augment": 2}, "direct"), slow({"augment": 3, "input_layer": True}, "adjoint"),
    slow({"data_control": True}, "direct"), slow({"data_control": True}, "adjoint"),
])  # fmt: skip
def test_solve_and_gradient_are_odeints(gradient, changes):
    model = made(NODE.change(**changes), solver=Adaptive("dopri5", 1e-11, 1e-11, gradient))
    x, weight = points(5, 2), points(5, 3, seed=9)
    parameters = list(model.parameters())
    outputs, features, stats = model.train().predict(x)
    gradients = torch.autograd.grad((outputs * weight).sum(), parameters)
    assert stats.nfe > 20 and (stats.nfe_backward > 20) == (gradient == "adjoint")

    zeros = torch.zeros(5, changes.get("augment", 0), dtype=torch.float64)
    start = torch.cat([x, zeros], 1) if model.lift is None else x @ model.lift.weight.T + model.lift.bias
    control = x if changes.get("data_control") else torch.zeros(5, 0, dtype=torch.float64)
    end = model.sqrt_end_time**2 if changes.get("learn_end_time") else torch.tensor(1.0)

    def f(s, y):
        t = (s * end).expand(5, 1)
        h = torch.cat([t, y, control], 1)  # time enters the first layer alone
        for i, layer in enumerate(model.fields[0].layers):
            h = torch.nn.functional.linear(h, layer.core.weight, layer.core.bias)
            h = torch.nn.functional.softplus(h) if i < 2 else h
        return end * h

    state = truth(f, start)
    expected = state @ model.head.weight.T + model.head.bias
    assert torch.allclose(features, state, rtol=0, atol=1e-9) and torch.allclose(outputs, expected, rtol=0, atol=1e-9)
    for name, ours, theirs in zip(
        [n for n, _ in model.named_parameters()], gradients,
        torch.autograd.grad((expected * weight).sum(), parameters), strict=True,
    ):  # fmt: skip
        assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-8), name


def test_convolutions_are_the_flows_field():
    torch.manual_seed(0)
    model = anode_conv((1, 5, 4), 6, augment=2, time_dependent=True).double()
    field = ConvField(3, (6, 6), "concat", "relu", (0, 1, 0)).double()
    field.load_state_dict(model.fields[0].state_dict())
    x = points(3, 3, 5, 4)
    assert torch.equal(model.fields[0](torch.tensor(0.3, dtype=torch.float64), x), field(torch.tensor(0.3, dtype=torch.float64), x))


def test_images_are_scaled_augmented_and_controlled():
    config = NeuralODEConfig.of(field="conv", hidden=(4, 4), strides=(0, 1, 0), time_conditioning="concat", nonlinearity="softplus", zero_init=False, augment=2, data_control=True)  # fmt: skip
    model = made(config, (1, 4, 3), 10, levels=17)
    pixels = torch.randint(0, 17, (3, 1, 4, 3), dtype=torch.uint8)
    x = pixels.double() / 16
    start = model.start(pixels)
    assert torch.equal(start[:, :1], x) and torch.equal(start[:, 1:], torch.zeros(3, 2, 4, 3, dtype=torch.float64))
    state = truth(lambda t, y: model.fields[0](t, y, x), start)
    assert torch.allclose(model.predict(pixels).features, state, atol=1e-9)
    assert torch.equal(model(pixels), model(x))
    flat = made(NODE.change(augment=2), (1, 4, 3), 10, levels=17)
    assert flat.predict(pixels).features.shape == (3, 14)


def test_state_head_is_the_flow_itself():
    model = made(NODE.change(augment=1, head="state"), outputs=2)
    outputs, features, _ = model.predict(points(4, 2))
    assert torch.equal(outputs, features[:, :2])


def test_train_and_eval_select_the_solver_and_evaluations_are_counted():
    model = anode_mlp(2, 8, augment=1, solver=FixedGrid("rk4", 3), eval_solver=FixedGrid("midpoint", 5))
    x = torch.randn(4, 2)
    assert model.train().predict(x).stats.nfe == 12 and model.eval().predict(x).stats.nfe == 10
    stats = NeuralODE([MLP(2, (4,)) for _ in range(3)], (2,), 1, solver=FixedGrid("rk4", 2)).predict(x).stats
    assert stats.nfe == 3 * 8
    calls = []
    field = MLP(2, (4,))
    field.register_forward_hook(lambda *_: calls.append(1))
    model = NeuralODE(field, (2,), 1, solver=Adaptive("dopri5", 1e-4, 1e-4, "adjoint"))
    outputs, _, stats = model.predict(x)
    assert stats.nfe == len(calls)
    outputs.sum().backward()
    assert stats.nfe + stats.nfe_backward == len(calls) and stats.nfe_backward > 0


def test_checkpointed_gradients_are_the_direct_ones():
    config = NODE.change(augment=1, data_control=True, adaptive_depth=True)
    found = []
    for gradient in ("direct", "checkpoint"):
        model = made(config, solver=FixedGrid("rk4", 6, gradient)).train()
        found.append(torch.autograd.grad(model(points(4, 2)).square().sum(), list(model.parameters())))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-11) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("solver", [FixedGrid("dopri5", 12, "checkpoint"), Adaptive("dopri5", 1e-10, 1e-10, "adjoint")])
def test_the_gradient_in_the_event_is_counted_once(solver):
    """With both, the event enters the field twice: as the control, and through its end time."""
    config = NODE.change(augment=1, data_control=True, adaptive_depth=True)
    found = []
    for one in (FixedGrid("dopri5", 12), solver):
        x = points(4, 2).requires_grad_()
        found.append(torch.autograd.grad(made(config, solver=one).train()(x).square().sum(), x)[0])
    assert torch.allclose(*found, rtol=0, atol=1e-6)


def test_trajectory_passes_through_the_solve():
    for config in (NODE, NODE.change(depth="stacked", depth_terms=3), NODE.change(adaptive_depth=True)):
        model, x = made(config), points(4, 2)
        way = model.trajectory(x, torch.tensor([0.0, 0.2, 0.5, 0.5, 1.0]))
        assert torch.equal(way[0], x) and torch.equal(way[2], way[3])
        assert torch.allclose(way[-1], model.predict(x).features, atol=1e-9)
        end = model.end_time(x)
        if config is NODE:
            assert torch.allclose(way[1], truth(lambda t, y, m=model: m.fields[0](t, y), x, float(0.2 * end)), atol=1e-9)
    with pytest.raises(ConfigError, match="increasing times"):
        model.trajectory(x, torch.tensor([0.5, 0.2]))


# -- depth -------------------------------------------------------------------------------------------------------


def test_bases_are_their_formulas():
    for u in (0.0, 0.13, 0.5, 0.77, 1.0):
        t = torch.tensor(u, dtype=torch.float64)
        chebyshev = [math.cos(n * math.acos(2 * u - 1)) for n in range(15)]
        assert basis("chebyshev", t, 15).tolist() == pytest.approx(chebyshev, abs=1e-12)
        fourier = [1.0] + [v for k in range(1, 6) for v in (math.cos(2 * math.pi * k * u), math.sin(2 * math.pi * k * u))]
        assert basis("fourier", t, 11).tolist() == pytest.approx(fourier, abs=1e-12)
    assert basis("chebyshev", t, 1).tolist() == [1.0]


@pytest.mark.parametrize("name", BASES)
def test_a_layer_in_a_basis(name):
    torch.manual_seed(0)
    layer = Galerkin(Linear(3, 2), name=name, terms=4, end_time=2.0).double()
    x = points(5, 3)
    plain = x @ layer.weights[0].T + layer.biases[0]
    assert torch.allclose(layer(torch.tensor(1.3, dtype=torch.float64), x), plain)  # constant at the start
    with torch.no_grad():
        layer.weights.normal_(), layer.biases.normal_()
    t = torch.tensor(0.6, dtype=torch.float64)
    b = basis(name, t / 2, 4)
    weight = sum(b[n] * layer.weights[n] for n in range(4))
    assert torch.allclose(layer(t, x), x @ weight.T + sum(b[n] * layer.biases[n] for n in range(4)), atol=1e-13)
    # inside a flow's field: the tangent, with time moving too, and the closed-form trace
    field = MLP(3, (4,), galerkin(name, 3, 2.0)).double()
    with torch.no_grad():
        for p in field.parameters():
            p.normal_()
    v, one = points(1, 5, 3, seed=4), torch.ones((), dtype=torch.float64)
    dx, jv = field.jvp(t, x, v, t_dot=one)
    expected = torch.func.jvp(lambda s, y: field(s, y), (t, x), (one, v[0]))
    assert torch.allclose(dx, expected[0]) and torch.allclose(jv[0], expected[1], atol=1e-12)
    jacobian = torch.autograd.functional.jacobian(lambda y: field(t, y).sum(0), x).diagonal(dim1=0, dim2=2).sum(1)
    assert torch.allclose(field.divergence(t, x)[1], jacobian, atol=1e-12)


@pytest.mark.parametrize("name", BASES)
def test_a_node_in_a_basis_is_odeints(name):
    model = made(NODE.change(hidden=(6,), time_conditioning="ignore", depth=name, depth_terms=5, end_time=1.7))
    x = points(4, 2)

    def f(t, y):
        b = basis(name, t / 1.7, 5)
        for i, layer in enumerate(model.fields[0].layers):
            y = y @ torch.einsum("n,noi->oi", b, layer.weights).T + b @ layer.biases
            y = torch.nn.functional.softplus(y) if i == 0 else y
        return y

    assert torch.allclose(model.predict(x).features, truth(f, x, 1.7), atol=1e-9)


def test_stacked_is_a_sequence_of_blocks():
    model = made(NODE.change(depth="stacked", depth_terms=3, end_time=1.2))
    x = state = points(4, 2)
    for k, field in enumerate(model.fields):
        state = truth(lambda t, y, f=field: f(t, y), state, 0.4 * (k + 1), 0.4 * k)
    assert torch.allclose(model.predict(x).features, state, atol=1e-9)
    # on a grid, steps end where pieces end: order 4, though the weights jump
    errors = []
    for steps in (2, 4, 8):
        model.eval_solver = FixedGrid("rk4", steps)
        errors.append((model.eval().predict(x).features - state).abs().max().item())
    assert all(3.5 < math.log2(a / b) < 4.6 for a, b in zip(errors, errors[1:], strict=False))


def test_adaptive_depth_is_each_samples_own_end_time():
    model = made(NODE.change(augment=1, adaptive_depth=True, end_time=0.8))
    x = points(5, 2)
    ends = model.end_time(x)
    hidden = torch.tanh(x @ model.depth[1].weight.T + model.depth[1].bias)
    rate = torch.nn.functional.softplus(hidden @ model.depth[3].weight[0] + model.depth[3].bias)
    assert torch.allclose(ends, 0.8 * rate / math.log(2)) and ends.std() > 0.01
    features = model.predict(x).features
    for i in range(5):
        start = torch.cat([x[i : i + 1], torch.zeros(1, 1, dtype=torch.float64)], 1)
        assert torch.allclose(features[i : i + 1], truth(lambda t, y: model.fields[0](t, y), start, ends[i].item()), atol=1e-9)
    torch.manual_seed(0)
    fresh = build_predictor(NODE.change(adaptive_depth=True, end_time=0.8), SolverConfig(), (2,), outputs=1)
    assert torch.allclose(fresh.end_time(torch.randn(3, 2)), torch.full((3,), 0.8))


@pytest.mark.parametrize("changes", [
    {}, {"augment": 2, "input_layer": True, "data_control": True, "adaptive_depth": True}, {"learn_end_time": True},
    {"time_conditioning": "ignore", "depth": "chebyshev", "depth_terms": 3}, {"time_conditioning": "ignore", "depth": "fourier", "depth_terms": 3},
    {"depth": "stacked", "depth_terms": 2}, {"zero_init": True},
])  # fmt: skip
def test_every_parameter_gets_a_gradient_within_ten_steps(changes):
    torch.manual_seed(0)
    model = build_predictor(NODE.change(**changes), SolverConfig(), (2,), outputs=2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    x, moved = torch.randn(16, 2), set()
    for _ in range(10):
        optimizer.zero_grad()
        (model(x) - x.flip(1)).square().mean().backward()
        moved |= {n for n, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
        optimizer.step()
    assert moved == {n for n, _ in model.named_parameters()}


def test_adaptive_depth_flips_a_line():
    """By end times that differ, with time in the field by default (2002.08071): no two paths cross at one time."""
    torch.manual_seed(2)
    model = anode_mlp(1, 16, head="state", adaptive_depth=True, solver=FixedGrid("rk4", 4))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(120):
        x, y = flip(32)
        optimizer.zero_grad()
        (model.train()(x) - y).square().mean().backward()
        optimizer.step()
    x, y = flip(200)
    assert (model.eval()(x) - y).square().mean() < 1e-2
    ends = model.end_time(x)
    assert (ends > 0).all() and (ends[::2].mean() - ends[1::2].mean()).abs() > 1


def test_time_enters_with_adaptive_depth_by_default():
    """One more weight for each unit of the first layer (each filter's nine of a 3x3 convolution, and so on)."""
    def count(model):
        return sum(p.numel() for p in model.fields.parameters())

    for make, size in ((anode_mlp, 2), (anode_conv, (1, 4, 4))):
        timed, plain = (count(make(size, 8, time_dependent=with_time)) for with_time in (True, False))
        assert timed > plain == count(make(size, 8))
        assert count(make(size, 8, adaptive_depth=True)) == timed
        assert count(make(size, 8, adaptive_depth=True, time_dependent=False)) == plain


# -- what only augmentation can do -------------------------------------------------------------------------------


def test_a_node_of_one_dimension_keeps_the_order():
    model = made(NODE.change(head="state"), (1,), 1, scale=4.0)
    x = torch.linspace(-2, 2, 50, dtype=torch.float64)[:, None]
    assert bool((model(x)[:, 0].diff() > 0).all())


# -- the residual net --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden", "nonlinearity"), [(5, "relu"), ((5, 4), "tanh")])
def test_residual_net_is_its_formula(hidden, nonlinearity):
    torch.manual_seed(0)
    net, x = ResidualNet((2,), 3, hidden, 2, nonlinearity=nonlinearity).double(), points(4, 2)
    h, parameters = x, iter(net.fields.parameters())
    for _ in range(2):
        step = h
        for i in range(layers := 2 if hidden == 5 else 3):
            step = torch.nn.functional.linear(step, next(parameters), next(parameters))
            step = getattr(torch, nonlinearity)(step) if i + 1 < layers else step  # linear at the end: it may decrease h
        h = h + step
    outputs, features, stats = net.predict(x)
    assert torch.allclose(features, h) and torch.allclose(outputs, h @ net.head.weight.T + net.head.bias) and stats.nfe == 0
    start = ResidualNet((2,), 2, hidden, 2, zero_init=True, head="state").double()
    assert torch.equal(start(x), x)


def test_a_residual_net_flips_a_line():
    """What no NODE can do in one dimension (1904.01681), and no net whose blocks end in a relu."""
    torch.manual_seed(0)
    net = residual_net(1, hidden=16, blocks=2, head="state")
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(150):
        x, y = flip(32)
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
    x, y = flip(200)
    assert (net(x) - y).square().mean() < 1e-2


# -- wrong use ---------------------------------------------------------------------------------------------------

RESNET = ResNetConfig.of(hidden=(8,), nonlinearity="relu", zero_init=False)


@pytest.mark.parametrize(("config", "changes", "message"), [
    (NODE, {"augment": -1}, r"augment=-1; expected zero or more"),
    (NODE, {"time_conditioning": "conact"}, r"'conact' is unknown.*did you mean 'concat'"),
    (NODE, {"nonlinearity": "rleu"}, r"did you mean 'relu'"),
    (NODE, {"head": "affine"}, r"head='affine'; expected one of linear, state"),
    (NODE, {"head": "state"}, r"reads outputs=3 off a state of 2"),
    (NODE, {"hidden": (0,)}, r"every size must be at least 1"),
    (NODE, {"end_time": -1.0}, r"end_time=-1.0; expected a positive"),
    (NODE, {"field": "conv"}, r"field='conv' needs images"),
    (NODE, {"strides": (0, 1, 0)}, r"strides=\(0, 1, 0\) is for field='conv', not for field='mlp'"),
    (NODE, {"blocks": 3}, r"blocks=3 is no setting of NeuralODEConfig"),
    (NODE, {"alpha": 0.1}, r"alpha=0.1 is no setting of NeuralODEConfig"),
    (NODE, {"residual": "minus"}, r"residual='minus' is no setting of NeuralODEConfig"),
    (NODE, {"depth_terms": 3}, r"depth_terms=3 is for depth='chebyshev', 'fourier' or 'stacked', not for depth='constant'"),
    (NODE, {"depth": "stacked"}, r"depth_terms=1: depth='stacked' takes at least 2"),
    (NODE, {"depth": "fourier", "depth_terms": 3}, r"time_conditioning='concat': with depth='fourier'.*use time_conditioning='ignore'"),
    (NODE, {"time_conditioning": "ignore", "depth": "fourier", "depth_terms": 3, "adaptive_depth": True}, r"depth='fourier'.*leave one out"),
    (NODE, {"time_conditioning": "ignore", "depth": "chebyshev", "depth_terms": 3, "learn_end_time": True}, r"lives on \[0, end_time\]"),
    (NODE, {"time_conditioning": "hyper", "adaptive_depth": True}, r"time_conditioning='hyper'.*leave one out"),
    (NODE, {"learn_end_time": True, "adaptive_depth": True}, r"leave learn_end_time=False"),
    (RESNET, {"augment": 1}, r"augment=1 is no setting of ResNetConfig"),
    (RESNET, {"time_conditioning": "concat"}, r"time_conditioning='concat' is no setting"),
    (RESNET, {"hidden": ()}, r"hidden=\(\), blocks=1; expected at least one hidden layer"),
    (RESNET, {"hidden": (8, 0)}, r"every size must be at least 1"),
    (RESNET, {"nonlinearity": "rleu"}, r"did you mean 'relu'"),
    (RESNET, {"blocks": 0}, r"blocks=0"),
    (NODE, {"architecture": "stack"}, r"architecture='stack'; expected one of node"),
])  # fmt: skip
def test_settings_that_cannot_be(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_predictor(config.change(**changes), SolverConfig(), (2,), outputs=3)


def test_densities_refuse_what_is_for_predictors():
    with pytest.raises(ConfigError, match=r"architecture='node' predicts"):
        build(NODE, SolverConfig(), (2,))
    with pytest.raises(ConfigError, match=r"augment=2 is no setting of FlowConfig"):
        build(FlowConfig.of(augment=2), SolverConfig(), (2,))


def test_other_wrong_use():
    with pytest.raises(ConfigError, match="augment=-2"):
        anode_mlp(2, augment=-2)
    with pytest.raises(ConfigError, match="augment=-2"):
        anode_conv((1, 4, 4), augment=-2)
    with pytest.raises(ConfigError, match=r"fields=\(\) is empty"):
        NeuralODE([], (2,), 1)
    with pytest.raises(ConfigError, match="outputs=0"):
        anode_mlp(2, outputs=0)
    with pytest.raises(ConfigError, match="'legendre' is unknown: expected 'chebyshev' or 'fourier'"):
        galerkin("legendre", 3)
    with pytest.raises(ConfigError, match="terms must be at least 1, got 0"):
        galerkin("fourier", 0)
    with pytest.raises(ConfigError, match="must be a single time"):
        Galerkin(Linear(2, 2))(torch.zeros(3), torch.zeros(3, 2))
    model = anode_mlp(2)
    with pytest.raises(DataError, match=r"x has shape \(4, 3\); expected \(N, 2\)"):
        model(torch.zeros(4, 3))
    with pytest.raises(DataError, match="expected floats"):
        model(torch.zeros(4, 2, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"x has type torch.float64, but the model computes in torch.float32"):
        model(torch.zeros(4, 2, dtype=torch.float64))
    model.solver = Adaptive("dopri5", 1e-9, 1e-9, max_steps=2)
    with pytest.raises(SolverError, match=r"neural ODE on states \(2,\), t 0 to 1: .*gave up"):
        model(torch.full((4, 2), 30.0))


def test_maps_of_a_factory_are_everywhere():
    maps, layers = mlp_maps(2, (4, 4), "concat", control=3)
    assert layers == ["concat", "ignore", "ignore"] and maps[0].inputs == 5 and maps[-1].outputs == 2
    factory = galerkin("fourier", 3)
    net = ODENet(*mlp_maps(2, (4,), factory))
    assert all(isinstance(layer, Galerkin) for layer in net.layers)
    assert np.isclose(sum(p.numel() for p in net.parameters()), 3 * (2 * 4 + 4 + 4 * 2 + 2))


@pytest.mark.parametrize(("maps", "shape"), [(mlp_maps(3, (8, 8), "concat"), (3,)), (conv_maps(2, (4, 4), "concatsquash", (0, 1, 0)), (2, 5, 5))])
def test_fused_tangents_are_those_of_autodiff(maps, shape):
    field = perturbed(ODENet(*maps, "softplus"))
    x, v, t = torch.randn(4, *shape, dtype=F64), torch.randn(2, 4, *shape, dtype=F64), torch.tensor(0.3, dtype=F64)
    for t_dot in (None, torch.ones_like(t)):
        found, expected = field.jvp(t, x, v, t_dot=t_dot), autodiff_jvp(field, t, x, v, t_dot)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
