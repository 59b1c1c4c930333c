"""Flows inside torch's own transformations: torch.func, torch.compile, torch.export, the meta device, DataParallel."""

import pytest
import torch
from conftest import F64, mostly_slow, slow
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vjp, vmap

from cnf import CNF, Adaptive, Exact, FixedGrid, Flow, Hutchinson, Noise
from cnf.errors import ConfigError, DataError, SolverError
from cnf.fields import MLP, ConvField
from cnf.solvers import Reversible
from cnf.transforms import Gaussianize, Logit, Sequential, Standardize


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        self.context_dim = 0

    def forward(self, t, x, context=None):
        return self.net(x) * (1 + t)


def chain():
    parts = [Standardize(torch.tensor([0.1, 0.2]), torch.tensor([1.5, 0.7])), CNF(MLP(2, (6,)), solver=FixedGrid("rk4", 3)), CNF(MLP(2, (6,)), solver=FixedGrid("rk4", 3))]
    return Sequential(parts)


GRIDS = {
    "closed form": lambda: CNF(MLP(2, (8, 8)), Exact(), FixedGrid("rk4", 2)),
    "custom field": lambda: CNF(Custom(), Exact(), FixedGrid("rk4", 2)),
    "checkpoint": lambda: CNF(MLP(2, (8,)), Exact(), FixedGrid("rk4", 4, gradient="checkpoint")),
    "reversible": lambda: CNF(MLP(2, (8,)), Exact(), Reversible("rk4", 4)),
    "chain": chain,
    "midpoint": lambda: CNF(MLP(2, (8, 8)), Exact(), FixedGrid("midpoint", 2)),  # a closed form whose graph is soon traced
}


def flow_of(transform, **options):
    torch.manual_seed(0)
    return Flow(transform(), (2,), **options).to(F64)


@pytest.mark.parametrize("name", mostly_slow([name for name in GRIDS if name != "midpoint"], "custom field", "reversible", "chain"))
def test_func_transforms_of_a_grid(name):
    flow, x = flow_of(GRIDS[name]), torch.randn(4, 2, dtype=F64)
    close = {"rtol": 1e-9, "atol": 1e-9}
    for one in (flow.log_prob, lambda v: flow.log_prob(v[None])[0]):
        torch.testing.assert_close(vmap(one)(x), flow.log_prob(x), **close)
        torch.testing.assert_close(vmap(grad(one))(x), flow.score(x), **close)
    torch.testing.assert_close(grad(flow.log_prob)(x[0]), flow.score(x)[0], **close)
    torch.testing.assert_close(vmap(flow.encode)(x), flow.encode(x), **close)
    torch.testing.assert_close(vmap(flow.decode)(x), flow.decode(x), **close)
    truth = torch.autograd.functional.jacobian(lambda v: flow.encode(v), x[0])
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(jacobian(flow.encode)(x[0]), truth, **close)
        torch.testing.assert_close(vmap(jacobian(flow.encode))(x)[0], truth, **close)
    torch.testing.assert_close(flow.log_prob(x[0]), flow.base_log_prob(flow.encode(x[:1]))[0] + torch.linalg.slogdet(truth)[1], rtol=1e-2, atol=1e-2)
    weights = dict(flow.named_parameters())
    torch.testing.assert_close(functional_call(flow, weights, (x,)), flow.log_prob(x), **close)
    moved = {k: 1.1 * v for k, v in weights.items()}
    found = grad(lambda p: functional_call(flow, p, (x,)).sum())(moved)
    with torch.no_grad():
        for k, v in moved.items():
            weights[k].copy_(v)
    flow.zero_grad()
    flow.log_prob(x).sum().backward()
    for k, p in flow.named_parameters():
        torch.testing.assert_close(found[k], p.grad, **close)


def test_hessian_of_a_grid():
    flow, x = flow_of(GRIDS["closed form"]), torch.randn(2, dtype=F64)
    torch.testing.assert_close(hessian(flow.log_prob)(x), torch.autograd.functional.hessian(flow.log_prob, x), rtol=1e-9, atol=1e-9)


def test_ensembles_of_weights_under_vmap():
    flows = [flow_of(GRIDS["closed form"]) for _ in range(3)]
    for i, flow in enumerate(flows):
        with torch.no_grad():
            for p in flow.parameters():
                p.add_(0.1 * i)
    weights, _ = torch.func.stack_module_state(flows)
    x = torch.randn(4, 2, dtype=F64)
    found = vmap(lambda p: functional_call(flows[0], p, (x,)))(weights)
    torch.testing.assert_close(found, torch.stack([f.log_prob(x) for f in flows]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method, solver", [("dopri5", "direct"), ("bosh3", "adjoint"), slow("dopri5", "adjoint"), slow("bosh3", "direct")])
def test_func_gradients_of_an_adaptive_solve(method, solver):
    flow = flow_of(lambda: CNF(MLP(2, (8, 8)), eval_solver=Adaptive(method, 1e-7, 1e-7, gradient=solver))).eval()
    x = torch.randn(2, dtype=F64)
    plain = flow_of(lambda: CNF(MLP(2, (8, 8)), eval_solver=Adaptive(method, 1e-7, 1e-7))).eval()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(grad(flow.log_prob)(x), plain.score(x), **close)
    truth = torch.autograd.functional.jacobian(plain.encode, x)
    torch.testing.assert_close(jacrev(flow.encode)(x), truth, **close)
    torch.testing.assert_close(jacfwd(flow.encode)(x), truth, **close)
    value, pull = vjp(flow.log_prob, x)
    torch.testing.assert_close(value, plain.log_prob(x), **close)
    torch.testing.assert_close(pull(torch.ones_like(value))[0], plain.score(x), **close)


def test_an_adaptive_solve_under_vmap_says_what_can():
    flow, x = flow_of(GRIDS["closed form"]).eval(), torch.randn(4, 2, dtype=F64)
    for call in (flow.log_prob, flow.encode, flow.decode, grad(flow.log_prob)):
        with pytest.raises(SolverError, match=r"eval_solver=FixedGrid"):
            vmap(call)(x)


def test_probes_under_vmap_are_those_of_the_noise():
    flow, x = flow_of(lambda: CNF(MLP(2, (8,)), Hutchinson(), FixedGrid("rk4", 4))), torch.randn(3, 2, dtype=F64)
    found = vmap(lambda v: flow.log_prob(v, noise=Noise(0)), randomness="same")(x)
    torch.testing.assert_close(found, torch.stack([flow.log_prob(v, noise=Noise(0)) for v in x]), rtol=1e-9, atol=1e-9)


def test_value_checks_of_transforms_do_not_stand_in_the_way():
    for first in (Logit(0.05), Gaussianize((2,), levels=4)):
        flow = flow_of(lambda first=first: Sequential([first, CNF(MLP(2, (6,)), solver=FixedGrid("rk4", 3))]))
        x = torch.rand(4, 2, dtype=F64) * 0.8 + 0.1
        flow.fit_statistics(torch.rand(100, 2, dtype=F64))
        torch.testing.assert_close(vmap(flow.log_prob)(x), flow.log_prob(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(vmap(grad(flow.log_prob))(x), flow.score(x), rtol=1e-9, atol=1e-9)


SLOW = [slow(name) for name in ("closed form", "checkpoint", "chain")]


@pytest.mark.parametrize("name", ["midpoint", "custom field", *SLOW])
def test_export_with_a_dynamic_batch(name):
    flow = flow_of(GRIDS[name]).train()

    class Called(nn.Module):
        def __init__(self, call):
            super().__init__()
            self.flow, self.call = flow, call

        def forward(self, x):
            return getattr(self.flow, self.call)(x)

    x, y = torch.randn(4, 2, dtype=F64), torch.randn(7, 2, dtype=F64)
    for call in ("decode", "encode") if name == "custom field" else ("decode",):
        program = torch.export.export(Called(call), (x,), dynamic_shapes={"x": {0: torch.export.Dim("n")}})
        torch.testing.assert_close(program.module()(y), getattr(flow, call)(y), rtol=1e-9, atol=1e-9)
    if name == "custom field":
        with pytest.raises(ConfigError, match=r"torch\.export records no derivative"):
            torch.export.export(Called("log_prob"), (x,))
        return
    program = torch.export.export(flow, (x,), dynamic_shapes={"x": {0: torch.export.Dim("n")}})
    torch.testing.assert_close(program.module()(y), flow.log_prob(y), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["midpoint", "custom field", *SLOW])
def test_compiling_the_whole_log_prob(name):
    flow, x = flow_of(GRIDS[name]), torch.randn(4, 2, dtype=F64)
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), flow.log_prob(x), rtol=1e-9, atol=1e-9)
    compiled(x).sum().backward()
    found = [p.grad for p in flow.parameters()]
    flow.zero_grad()
    flow.log_prob(x).sum().backward()
    for a, p in zip(found, flow.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-9, atol=1e-9)


def test_the_meta_device():
    flow = flow_of(GRIDS["chain"]).to("meta")
    x = torch.zeros(5, 2, dtype=F64, device="meta")
    assert flow.log_prob(x).shape == (5,) and flow.decode(x).shape == (5, 2) and flow.log_prob(x).is_meta
    images = Flow(CNF(ConvField(1, (4,)), Hutchinson(), FixedGrid("rk4", 2)), (1, 4, 4)).to("meta")
    assert images.log_prob(torch.zeros(3, 1, 4, 4, device="meta")).shape == (3,)
    with pytest.raises(DataError, match="x is on cpu, but the flow is on meta"):
        flow.log_prob(torch.zeros(5, 2, dtype=F64))
    with pytest.raises((ConfigError, SolverError), match="FixedGrid"):
        flow.eval().log_prob(x)


def test_calling_a_flow():
    flow, x = flow_of(GRIDS["closed form"]), torch.randn(4, 2, dtype=F64)
    for call in (flow, nn.DataParallel(flow)):
        assert torch.equal(call(x), flow.log_prob(x))
    conditional = flow_of(lambda: CNF(MLP(2, (8,), context_dim=3), solver=FixedGrid("rk4", 4)))
    context = torch.eye(3, dtype=F64)[[0, 1, 2, 0]]
    assert torch.equal(conditional(x, context), conditional.log_prob(x, context))
    p = conditional(context)
    assert p.batch_shape == (4,) and torch.equal(p.log_prob(x), conditional.log_prob(x, context))
    assert flow().event_shape == (2,) and flow().sample((3, 2)).shape == (3, 2, 2)
    with pytest.raises(ConfigError, match="context is missing, expected shape"):
        conditional()
    unknown = flow_of(lambda: CNF(Custom(), solver=FixedGrid("rk4", 4)))
    del unknown.transform.field.context_dim
    with pytest.raises(ConfigError, match="points or context"):
        unknown(x)
    assert unknown().log_prob(x).shape == (4,)
