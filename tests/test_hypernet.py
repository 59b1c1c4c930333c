"""HyperMLP: a field whose weights one net generates, from t, from an augmented time, and with it as an input."""

import copy

import pytest
import torch
from conftest import F64, normal

import cnf
from cnf import CNF, Adaptive, FixedGrid
from cnf.config import FlowConfig, NeuralODEConfig, SolverConfig, preset
from cnf.errors import ConfigError
from cnf.fields import AugmentedTimeConditioning, HyperMLP, TimePath
from cnf.losses import Likelihood
from cnf.models import build
from cnf.transforms import Request

K = 3
AUGMENTED_TIME_LAYERS = {"none": None, "hyper": AugmentedTimeConditioning("hyper", k=K, m=2), "both": AugmentedTimeConditioning("both", k=K, m=2)}


def field(drive, dim=2, hidden=(6,), **more):
    torch.manual_seed(0)
    return HyperMLP(dim, hidden, AUGMENTED_TIME_LAYERS[drive], (5, 4), **more).double()


def time(drive):
    return torch.tensor(0.3, dtype=F64) if drive == "none" else torch.tensor([0.4, -0.7, 0.9], dtype=F64)


def block(drive, solver=None, **more):
    torch.manual_seed(1)
    path = None if drive == "none" else TimePath(K, learn_start=True, nonlinearity="elu")
    if path is not None:
        torch.nn.init.normal_(path.initial)
    solver = solver or FixedGrid("dopri5", 24)
    return CNF(field(drive, **more), path=path, end_time=1.5, solver=solver, eval_solver=solver).double().eval()


@pytest.mark.parametrize("drive", AUGMENTED_TIME_LAYERS)
def test_one_hidden_layer_is_the_papers_formula(drive):
    """The mean over m of u_m sigma(g_m) tanh(w_m [x, a] + b_m), term by term."""
    f, t, x = field(drive), time(drive), normal(4, 2)
    entering = t.reshape(1) if drive == "none" else t[:2]
    features = f.generator(entering)
    first, last = (layer.head(features) for layer in f.layers)
    seen = x if drive != "both" else torch.cat([x, t.expand(4, K)], 1)
    w, b = first[:-6].reshape(6, seen.shape[1]), first[-6:]
    u, g = last.reshape(2, 2, 6)
    truth = sum(u[:, m] * torch.sigmoid(g[:, m]) * torch.tanh(seen @ w[m] + b[m])[:, None] for m in range(6)) / 6
    assert torch.allclose(f(t, x), truth, atol=1e-13)


@pytest.mark.parametrize("drive", AUGMENTED_TIME_LAYERS)
@pytest.mark.parametrize("hidden", [(6,), (5, 4), (4, 3, 4)])
def test_divergence_and_fused_tangents_equal_autodiff(drive, hidden):
    f, t, x = field(drive, 3, hidden, residual="linear", context_dim=2), time(drive), normal(4, 3)
    torch.nn.init.normal_(f.linear)
    context, v, t_dot = normal(4, 2), normal(2, 4, 3), torch.ones_like(t) * 0.6
    jacobian = torch.stack([torch.func.jacrev(lambda y, c=c: f(t, y[None], c[None])[0])(y) for y, c in zip(x, context, strict=True)])
    if len(hidden) < 3:
        assert torch.allclose(f.divergence(t, x, context)[1], jacobian.diagonal(dim1=1, dim2=2).sum(1), atol=1e-13)
    dx, pushed = f.jvp(t, x, v, context, t_dot=t_dot)
    assert torch.allclose(dx, f(t, x, context), atol=1e-13)
    for tangent, product in zip(v, pushed, strict=True):
        truth = torch.func.jvp(lambda s, y: f(s, y, context), (t, x), (t_dot, tangent))[1]
        assert torch.allclose(product, truth, atol=1e-13)


@pytest.mark.parametrize("drive", ["none", "both"])
def test_log_det_inverse_and_gradients(drive):
    flow, x = block(drive), normal(3, 2)
    out = flow(x)
    rows = [torch.func.jacrev(lambda y: flow(y[None], Request(log_det=False)).value[0])(y) for y in x]
    assert (torch.linalg.slogdet(torch.stack(rows))[1] - out.log_det).abs().max() < 1e-8
    back = flow.inverse(out.value)
    assert (back.value - x).abs().max() < 1e-8 and (back.log_det + out.log_det).abs().max() < 1e-8

    def gradients(solver):
        flow.eval_solver = solver
        flow.zero_grad()
        found = flow(x)
        (found.value.square().sum() + found.log_det.sum()).backward()
        return [p.grad.clone() for p in flow.parameters()]

    direct = gradients(FixedGrid("rk4", 6))
    assert all(g.abs().max() > 0 for g in direct)
    for mine, other in zip(direct, gradients(FixedGrid("rk4", 6, "checkpoint")), strict=True):
        assert torch.allclose(mine, other, rtol=1e-10, atol=1e-13)
    fine = gradients(FixedGrid("dopri5", 24))
    for mine, other in zip(fine, gradients(Adaptive("dopri5", 1e-10, 1e-10, "adjoint", max_steps=10_000)), strict=True):
        assert torch.allclose(mine, other, rtol=1e-6, atol=1e-7)


def test_a_copy_has_a_generator_of_its_own_and_it_is_registered_once():
    f = field("both")
    twin, t, x = copy.deepcopy(f), time("both"), normal(4, 2)
    before = f(t, x)
    assert torch.equal(twin(t, x), before)
    with torch.no_grad():
        twin.generator[0].bias += 1
    assert torch.equal(f(t, x), before) and (twin(t, x) - before).abs().max() > 1e-3
    names = {n for n, _ in f.named_parameters()}
    assert names == {f"{a}.{b}" for a in ("layers.0.head", "layers.1.head", "generator.0", "generator.2") for b in ("weight", "bias")}
    assert set(f.state_dict()) == names
    half = {n: p / 2 for n, p in f.named_parameters()}  # functional_call reaches the shared generator
    with torch.no_grad():
        for p in twin.parameters():
            p.copy_(half[next(n for n, q in twin.named_parameters() if q is p)])
    assert torch.equal(torch.func.functional_call(f, half, (t, x)), twin(t, x))


def test_the_published_presets_and_their_counts():
    counts = {"ffjord-toy-published": 15_904, "affjord-toy-published": 20_160 + 17}
    for name, parameters in counts.items():
        config = preset(name).config
        flow = build(config.model, config.solver, (2,))
        assert sum(p.numel() for p in flow.parameters()) == parameters
        block = flow.blocks[0]
        assert (block.solver.method, block.solver.steps, block.end_time(torch.zeros(())).item()) == ("rk4", 40, 10.0)
        x = torch.tensor([[0.3, -0.2]])
        variance = torch.distributions.MultivariateNormal(torch.zeros(2), 0.1 * torch.eye(2))
        assert torch.allclose(flow.base_log_prob(x), variance.log_prob(x))


@pytest.mark.parametrize("drive", ["none", "hyper", "both"])
@pytest.mark.parametrize("zero", [False, True])
def test_every_parameter_has_had_a_gradient_within_ten_adam_steps(drive, zero):
    sizes = {} if drive == "none" else {"augmented_time": drive, "augmented_time_dim": 4, "augmented_time_entries": 3, "augmented_time_start": "learned"}
    flow = build(FlowConfig.of(field="hypernet", hidden=(6,), generator=(5, 4), zero_init=zero, **sizes), SolverConfig.of(grid_steps=2), (3,))
    x, moved = torch.randn(16, 3), set()
    if zero:
        assert torch.equal(flow.blocks[0](x).value, x)
    objective, optimizer = Likelihood(flow.train(), 0.01, 0.01), torch.optim.Adam(flow.parameters(), 1e-3)
    for step in range(10):
        optimizer.zero_grad()
        objective(x, noise=cnf.Noise(0, "train", step))["loss"].mean().backward()
        moved |= {n for n, p in flow.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    assert moved == {n for n, _ in flow.named_parameters()}


@pytest.mark.parametrize(("make", "words"), [
    (lambda: HyperMLP(2, ()), ("hidden=()",)),
    (lambda: HyperMLP(2, generator=()), ("generator=()",)),
    (lambda: HyperMLP(2, (4, 0)), ("hidden=(4, 0)",)),
    (lambda: HyperMLP(0), ("dim=0",)),
    (lambda: HyperMLP(2, augmented_time=AugmentedTimeConditioning("concat", k=3)), ("'concat'", "'both'")),
    (lambda: HyperMLP(2, augmented_time=AugmentedTimeConditioning("both", k=3, m=2, rank=1)), ("rank=1",)),
    (lambda: HyperMLP(2)(torch.zeros(5), torch.zeros(5, 2)), ("(5,)", "single time")),
    (lambda: HyperMLP(2)(torch.zeros(()), torch.zeros(5, 3)), ("(5, 3)", "HyperMLP", "dim=2")),
    (lambda: HyperMLP(2, augmented_time=AugmentedTimeConditioning("both", k=3, m=2))(torch.zeros(()), torch.zeros(5, 2)), ("()", "(3,)")),
    (lambda: CNF(HyperMLP(2, augmented_time=AugmentedTimeConditioning("both", k=3, m=2))), ("path=TimePath(3)",)),
    (lambda: CNF(HyperMLP(2), path=TimePath(3)), ("Generated", "AugmentedTimeConditioning")),
    (lambda: build(FlowConfig.of(field="hypernet", time_conditioning="concat"), SolverConfig(), (2,)), ("time_conditioning='concat'", "hypernet")),
    (lambda: build(FlowConfig.of(field="hypernet", augmented_time="concat"), SolverConfig(), (2,)), ("'concat'", "'both'")),
    (lambda: NeuralODEConfig.of(field="hypernet"), ("'hypernet'", "mlp, conv")),
    (lambda: cnf.models.build_predictor(FlowConfig(), SolverConfig(), (2,), outputs=1), ("'stack'", "NeuralODEConfig")),
    (lambda: build(NeuralODEConfig(), SolverConfig(), (2,)), ("'node'", "predicts")),
])  # fmt: skip
def test_clear_errors(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)
