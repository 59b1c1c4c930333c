"""Fast modes: the same gradient as the plain path's, compiled or not, in every field; bf16 near it; steps chosen while training."""

import itertools
import math
import warnings

import pytest
import torch
from conftest import slow
from torch import nn

from cnf import build
from cnf._utils import compilation
from cnf._utils.compilation import CompilationWarning, compiled
from cnf.config import FlowConfig, SolverConfig
from cnf.errors import ConfigError
from cnf.evaluation import block_errors, evaluate, solver_error
from cnf.fields import MLP, AugmentedTimeConditioning, ConvField, HyperMLP, SqueezeSum, TimePath
from cnf.fields.activations import activation
from cnf.losses import Likelihood
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Exact, Hutchinson
from cnf.ode.quadratures import JacobianFrobenius, Kinetic, StepError
from cnf.random import Noise
from cnf.solvers import FixedGrid, Reversible
from cnf.training.auto_steps import AutoSteps
from cnf.transforms import Request

LAYERS = ("ignore", "concat", "concatsquash", "concatcoord", "blend", "hyper")


class Plain(nn.Module):
    """A field without anything of its own: torch.func.jvp pushes its tangents, one evaluation at a time."""

    def __init__(self, field):
        super().__init__()
        self.inner = field

    def forward(self, t, x, context=None):
        return self.inner(t, x, context)


def auto_steps(objective, say, *limits):
    monitor = AutoSteps(*limits)
    monitor.attach(objective, say)
    return monitor


def scrambled(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


def gradients(block, x, seed=0):
    out = block(x, Request(noise=Noise(seed)))
    loss = out.value.square().flatten(1).sum(1) / 2 - out.log_det + sum(0.1 * v for v in out.integrals.values())
    return [loss.detach(), *torch.autograd.grad(loss.mean(), list(block.parameters()), materialize_grads=True)]


def close(ours, truth, tolerance):
    largest = max(float(t.abs().max()) for t in truth)
    return all(float((a.double() - b.double()).abs().max()) <= tolerance * largest for a, b in zip(ours, truth, strict=True))


def fields():
    for layer in LAYERS:
        yield f"mlp-{layer}", lambda layer=layer: (MLP(3, (7, 6, 5), layer), None, (5, 3))
        yield f"conv-{layer}", lambda layer=layer: (ConvField(2, (4, 5, 4), layer), None, (3, 2, 5, 4))
    for kind in ("concat", "hyper", "both"):
        drive = AugmentedTimeConditioning(kind, 4, 1 if kind == "concat" else 3)
        yield f"affjord-mlp-{kind}", lambda drive=drive: (MLP(3, (6, 6), drive), TimePath(4), (5, 3))
        yield f"affjord-conv-{kind}", lambda drive=drive: (ConvField(2, (4, 4), drive, strides=(1, 0, 1)), TimePath(4), (3, 2, 4, 5))
        if kind != "concat":
            yield f"hypernet-{kind}", lambda drive=drive: (HyperMLP(3, (6,), drive, (4, 5)), TimePath(4), (5, 3))
    yield "hypernet", lambda: (HyperMLP(3, (6, 5), None, (4,)), None, (5, 3))
    yield "conv-strides", lambda: (ConvField(2, (4, 5, 4), "concat", strides=(1, 2, -2, 0)), None, (3, 2, 4, 6))
    yield "parallel", lambda: (SqueezeSum([ConvField(4**s, (4,), "concat") for s in range(3)]), None, (3, 1, 4, 8))


FIELDS = dict(fields())


def pair(name, dtype, divergence, **options):
    """The block with all that is fast, and the plain one with the same weights."""
    torch.manual_seed(0)
    field, path, shape = FIELDS[name]()
    field = scrambled(field)
    quadratures = (Kinetic(), JacobianFrobenius()) if isinstance(divergence, Hutchinson) else (Kinetic(),)
    fast = CNF(field, divergence, FixedGrid("rk4", 3), quadratures=quadratures, path=path, **options).to(dtype).train()
    truth = Exact(closed_form=False) if isinstance(divergence, Exact) else divergence
    plain = CNF(Plain(field), truth, FixedGrid("rk4", 3), quadratures=quadratures, path=path).to(dtype).train()
    return fast, plain, torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("name", FIELDS)
def test_fused_tangents_have_the_plain_paths_gradient(name):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        fast, plain, x = pair(name, dtype, Hutchinson("gaussian"))
        assert close(gradients(fast, x), gradients(plain, x), tolerance)


@pytest.mark.parametrize("shape, layer", [
    (shape, layer) if shape in ((5, 3), (2, 4, 5, 4)) or layer == "concatsquash" else slow(shape, layer)
    for shape in ((5, 3), (3, 2, 2, 3), (3, 1, 1, 1), (2, 4, 5, 4), (2, 3, 1, 6)) for layer in LAYERS
])  # fmt: skip
def test_closed_form_has_the_gradient_of_the_unit_tangents(layer, shape):
    torch.manual_seed(1)
    for hidden in ((6, 5), (6,), ()):
        field = MLP(3, hidden, layer) if len(shape) == 2 else ConvField(shape[1], hidden, layer)
        field = scrambled(field)
        x = torch.randn(shape, dtype=torch.float64)
        fast = CNF(field, Exact(), FixedGrid("rk4", 2)).double().train()
        plain = CNF(Plain(field), Exact(), FixedGrid("rk4", 2)).double().train()
        assert close(gradients(fast, x), gradients(plain, x), 1e-10)


@pytest.mark.parametrize("field, shape", [(MLP(2, (4, 3), "concat", "softplus"), (2,)), (ConvField(1, (3, 2)), (1, 2, 3))])
def test_transforms_within_transforms_have_the_derivatives_of_autograd(field, shape):
    block = CNF(scrambled(field).double(), Exact(), FixedGrid("rk4", 1)).train().requires_grad_(False)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def log_det(y):
        return block(y[None]).log_det[0]

    truth = torch.autograd.functional.hessian(log_det, x)
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        for inner in (torch.func.jacfwd, torch.func.jacrev):
            assert torch.allclose(outer(inner(log_det))(x), truth, rtol=1e-9, atol=1e-12)


@pytest.fixture
def traced(monkeypatch):
    """All that compilation traces and differentiates, but for the machine code, which takes a compiler a minute."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    compiled.cache_clear()
    torch._dynamo.reset()
    yield
    compiled.cache_clear()
    torch._dynamo.reset()


COMPILED = {
    "conv-concat": Hutchinson("gaussian"), "mlp-concatsquash": Hutchinson(), "affjord-conv-both": Exact(), "affjord-mlp-concat": Exact(),
    "hypernet-both": Exact(),
}  # fmt: skip
# every graph is traced anew, for seconds
TRACED = [("mlp-concatsquash", "direct", torch.float32)]


@pytest.mark.parametrize("name, gradient, dtype", [
    case if case in TRACED else slow(*case)
    for case in itertools.product(COMPILED, ("direct", "checkpoint"), (torch.float64, torch.float32))
], ids=str)  # fmt: skip
def test_compiled_has_the_plain_paths_gradient_and_compiles_once(name, gradient, dtype, traced):
    fast, plain, x = pair(name, dtype, COMPILED[name], compile=True)
    fast.solver = FixedGrid("rk4", 3, gradient)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompilationWarning)
        found = gradients(fast, x)
    assert close(found, gradients(plain, x), 1e-10 if dtype == torch.float64 else 1e-5)
    before = made()
    fast.solver = FixedGrid("rk4", 5, gradient)  # nor for other numbers of steps
    gradients(fast, x, seed=1)
    assert made() == before


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
@pytest.mark.parametrize("name", ["mlp-concatsquash", "conv-concat"])
def test_machine_code_has_the_plain_paths_gradient(name, gradient):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10))[: 1 if name == "mlp-concatsquash" else 2]:
        fast, plain, x = pair(name, dtype, Hutchinson("gaussian"), compile=True)
        fast.solver = FixedGrid("rk4", 3, gradient)
        found = gradients(fast, x)
        assert close(found, gradients(plain, x), tolerance)
        before = made()
        gradients(fast, x, seed=1)
        assert made() == before


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_a_stage_drawn_at_random_is_compiled_once_whatever_its_weight_and_the_steps(gradient, traced):
    torch.manual_seed(0)
    field, x = scrambled(MLP(3, (5, 4), "concat")).double(), torch.randn(4, 3, dtype=torch.float64)
    fast, plain = (CNF(field, quadratures=(JacobianFrobenius(),), compile=c).train() for c in (True, False))
    counts = []
    for steps in (2, 3):
        fast.solver, plain.solver = FixedGrid("rk4", steps, gradient), FixedGrid("rk4", steps)
        for seed in range(6):
            assert close(gradients(fast, x, seed), gradients(plain, x, seed), 1e-10)
        counts.append(made())
    assert counts[0] == counts[1] and len({plain.solver.stage(u)[2] for u in (0.01, 0.1)}) == 2


def test_too_many_shapes_run_uncompiled_with_a_reason(traced, monkeypatch):
    monkeypatch.setattr(compilation, "GRAPHS", 1)
    torch.manual_seed(0)
    block = CNF(MLP(3, (5, 4)), compile=True).train()
    with torch._dynamo.config.patch(recompile_limit=1), pytest.warns(CompilationWarning, match="more than 1 shapes"):
        for n in (2, 3):
            out = block(torch.randn(n, 3))
    assert bool(out.log_det.isfinite().all())


def made():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_blocks_of_one_shape_share_what_is_compiled(traced):
    torch.manual_seed(0)
    one, two = (CNF(MLP(3, (6, 5)), solver=FixedGrid("rk4", 2), compile=True).train() for _ in range(2))
    x = torch.randn(4, 3)
    gradients(one, x)
    before = made()
    gradients(two, x)
    assert made() == before


def test_evaluation_is_not_compiled_and_runs_in_the_states_precision(traced):
    torch.manual_seed(0)
    field = scrambled(MLP(3, (6, 5)))
    fast = CNF(field, solver=FixedGrid("rk4", 2), compile=True, autocast=torch.bfloat16)
    plain = CNF(field, solver=FixedGrid("rk4", 2))
    x = torch.randn(4, 3)
    before = made()
    assert torch.equal(fast.eval()(x).log_det, plain.eval()(x).log_det) and made() == before
    assert not torch.equal(fast.train()(x[:3]).log_det, plain.train()(x[:3]).log_det)
    with torch.no_grad():
        fast.train()(x)
    assert made() - before <= 2  # of the one training call


def test_without_a_compiler_it_warns_and_runs_plain(monkeypatch):
    def missing(x):
        return x + 1

    def broken(*_):
        raise torch._dynamo.exc.BackendCompilerFailed(missing, RuntimeError("No working C++ compiler found"), "here")

    monkeypatch.setattr(compiled(missing), "compiled", broken)
    with pytest.warns(CompilationWarning, match=r"compiler"):
        assert compiled(missing)(1) == 2
    assert compiled(missing)(2) == 3  # and says it once


def test_what_cannot_be_compiled_runs_plain_with_a_reason(traced):
    torch.manual_seed(0)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(()))

        def forward(self, t, x, context=None):
            return torch.tanh(x * self.w) if float(self.w) > -1e9 else x

    block = CNF(Odd(), Exact(), FixedGrid("rk4", 2), compile=True).train()
    x = torch.randn(4, 2)
    from cnf.ode import dynamics as rhs

    try:
        with pytest.warns(CompilationWarning, match="uncompiled"):
            found = gradients(block, x)
        block.compiles = False
        assert close(found, gradients(block, x), 1e-6)
    finally:
        compiled.cache_clear()
    assert compiled(rhs._evaluate).compiled is not None


def test_bf16_stays_inside_the_field():
    torch.manual_seed(0)
    for name in ("conv-concat", "mlp-concatsquash"):
        fast, plain, x = pair(name, torch.float32, Hutchinson("gaussian"), autocast=torch.bfloat16)
        out = fast(x, Request(noise=Noise(0)))
        assert all(v.dtype == torch.float32 for v in (out.value, out.log_det, *out.integrals.values()))
        found, truth = gradients(fast, x), gradients(plain, x)
        assert close(found, truth, 0.1) and not close(found, truth, 1e-5)


def test_one_stage_carries_the_jacobian_penalty_in_expectation():
    torch.manual_seed(0)
    field = scrambled(MLP(3, (6, 5))).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    for method in ("rk4", "midpoint", "dopri5"):
        grid = FixedGrid(method, 3)
        block = CNF(field, Exact(), grid, quadratures=(Kinetic(), JacobianFrobenius())).train()
        calls = []
        sizes = [abs(b) for b in grid.tableau.b] * grid.steps
        mean, edge = 0.0, 0.0
        e = torch.ones(1, 4, 3, dtype=torch.float64)
        for i, size in enumerate(sizes):
            if size:
                u = torch.tensor((edge + size / 2) / sum(sizes), dtype=torch.float64)
                drawn = grid.stage(float(u))
                assert drawn == (*divmod(i, len(grid.tableau.b)), pytest.approx(size / sum(sizes)))
                out = block(x, Request(noise=Noise.replay({"probe": e, "stage": u})))
                calls.append(out.integrals["jacobian"].detach())
                mean = mean + size / sum(sizes) * calls[-1]
            edge += size
        block.solver = Everywhere(method, 3)
        whole = block(x, Request(noise=Noise.replay({"probe": e}))).integrals["jacobian"]
        assert torch.allclose(mean, whole, rtol=1e-12) and float(torch.stack(calls).std()) > 0


class Everywhere(FixedGrid):
    """A grid that is not of the type whose stages are drawn."""


def test_block_errors_are_each_blocks_own():
    torch.manual_seed(0)
    flow = scrambled(build(FlowConfig.of(hidden=(8,), blocks=3, time_conditioning="concat", zero_init=False), SolverConfig.of(grid_steps=1), (2,)), 3).double().train()
    x = torch.randn(16, 2, dtype=torch.float64)
    with torch.no_grad():
        for p in flow.blocks[1].parameters():
            p.mul_(2)
    found = block_errors(flow, x, noise=Noise(0))
    before = flow.log_prob(x).detach()
    for i, block in enumerate(flow.blocks):
        kept, block.solver = block.solver, FixedGrid("rk4", 2)
        moved = (flow.log_prob(x).detach() - before).abs().mean() / 2
        block.solver = kept
        assert math.isclose(found[i], float(moved), rel_tol=1e-9, abs_tol=1e-14)
    assert max(found) == found[1] and [b.solver.steps for b in flow.blocks] == [1, 1, 1]
    assert solver_error(flow, x) <= 1.5 * sum(found)


def test_block_errors_with_an_augmented_time():
    torch.manual_seed(0)
    model = FlowConfig.of(hidden=(6, 6), blocks=2, augmented_time="hyper", augmented_time_dim=4, augmented_time_entries=2, zero_init=False)
    flow = build(model, SolverConfig.of(grid_steps=1), (2,)).double().train()
    scrambled(flow)
    found = block_errors(flow, torch.randn(8, 2, dtype=torch.float64), noise=Noise(0))
    assert len(found) == 2 and all(v > 0 for v in found)


def test_steps_follow_the_error_up_and_down():
    torch.manual_seed(0)
    config = SolverConfig.of(grid_steps=1, automatic_steps=True)
    flow = build(FlowConfig.of(hidden=(8,), blocks=2, time_conditioning="concat"), config, (2,)).train()
    objective, said = Likelihood(flow), []
    watch = auto_steps(objective, said.append, 1e-3, 16, 100)
    x = torch.randn(64, 2)

    def settle():
        for step in range(12):
            row = watch.measure(step, x, None, Noise(0))
        return row, [s.steps for s in objective.solvers]

    assert settle()[1] == [1, 1]  # f = 0
    with torch.no_grad():
        for p in flow.blocks[1].parameters():
            p.add_(1.5 * torch.randn_like(p))
    row, steps = settle()
    assert row["solver_error"] <= 1e-3 and steps[1] > 1 and said and row["most_grid_steps"] == max(steps)
    with torch.no_grad():
        for p in flow.blocks[1].parameters():
            p.mul_(0.1)
    row, fewer = settle()
    assert row["solver_error"] <= 1e-3 and fewer[1] < steps[1]
    other = auto_steps(objective, said.append, 1e-3, 16, 100)
    other.load_state_dict(watch.state_dict() | {"grids": [3, 5]})
    assert [s.steps for s in objective.solvers] == [3, 5] and other.state_dict() == watch.state_dict()
    other.load_state_dict({"grids": [1, 2]})  # as earlier versions wrote it
    assert other.state_dict()["measured"] == [None, 0, 5] and other.least == {}


def test_steps_that_were_not_enough_are_not_given_again_soon():
    torch.manual_seed(0)
    config = SolverConfig.of(grid_steps=1, automatic_steps=True)
    flow = build(FlowConfig.of(hidden=(8,), time_conditioning="concat"), config, (2,)).train()
    watch = auto_steps(Likelihood(flow), lambda _: None, 1e-3, 64, 1000)
    x = torch.randn(64, 2)

    def steps(at):
        before = flow.blocks[0].solver.steps
        watch.measure(at, x, None, Noise(0))
        after = flow.blocks[0].solver.steps
        assert watch.measures(at) and not watch.measures(at + 1) and (after == before or watch.measures(at + 5))  # soon after a change
        return after

    def scaled(factor):
        with torch.no_grad():
            for p in flow.parameters():
                p.mul_(factor)

    assert steps(5) == 1
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(torch.randn_like(p))
    scaled(1.5)
    enough = steps(105)  # measured again at once, till it is
    assert enough > 2 and watch.least[0][1] == 205
    assert watch.objective.block_errors(x, noise=Noise(0).rows(0, len(x)))[0] <= 1e-3
    scaled(0.05)
    kept = watch.least[0][0]
    assert 1 < kept <= enough and steps(150) == kept and steps(204) == kept and steps(205) < kept


def test_steps_of_a_reversible_grid_follow_the_error_too():
    torch.manual_seed(0)
    config = SolverConfig.of(grid_steps=1, gradient="reversible", automatic_steps=True)
    flow = scrambled(build(FlowConfig.of(hidden=(8,), blocks=2, zero_init=False), config, (2,))).train()
    watch = auto_steps(Likelihood(flow), lambda _: None, 1e-7, 64, 100)
    x = torch.randn(16, 2)
    watch.measure(5, x, None, Noise(0))
    assert [(type(b.solver), b.solver.gradient) for b in flow.blocks] == [(Reversible, "reversible")] * 2
    assert all(2 <= b.solver.steps < 64 for b in flow.blocks)
    assert sum(watch.objective.block_errors(x[:8], noise=Noise(0).rows(0, 16), whole=True)) <= 1e-7  # measured again at once
    solver = Reversible("rk4", 4, 0.5)
    for steps in (1, 3, 8):
        assert math.isclose(solver.with_steps(steps).coupling ** steps, 0.5**4)


def test_steps_are_measured_often_at_the_start():
    watch = auto_steps(Likelihood(build(FlowConfig.of(hidden=(4,)), SolverConfig(), (2,))), print, 0.01, 64, 100)
    x, due = torch.randn(8, 2), []
    for step in range(1, 1300):
        if watch.measures(step):
            watch.measure(step, x, None, Noise(0))
            due.append(step)
    assert due[:10] == [5, 10, 15, 20, 25, 30, 35, 40, 45, 50] and due[-3:] == [1005, 1105, 1205], due


def test_double_precision_is_everywhere():
    flow = build(FlowConfig.of(hidden=(8, 8), field="conv", blocks=1), SolverConfig(precision="fp64"), (1, 4, 4), levels=4).train()
    x = torch.randint(0, 4, (6, 1, 4, 4), dtype=torch.uint8)
    out = flow.evaluate(x, Request(noise=Noise(0)))
    assert out.value.dtype == out.log_det.dtype == torch.float64
    assert evaluate(flow.eval(), x).per_item.dtype == torch.float64


def test_lower_precision_leaves_the_reported_figure_alone():
    torch.manual_seed(0)
    config = SolverConfig.of(divergence="hutchinson")
    flows = [build(FlowConfig.of(hidden=(8, 8), zero_init=False), config.change(precision=p), (3,)) for p in ("fp32", "bf16")]
    flows[1].load_state_dict(flows[0].state_dict())
    x = torch.randn(7, 3)
    one, other = (evaluate(flow.eval(), x) for flow in flows)
    assert torch.equal(one.per_item, other.per_item)


@pytest.mark.parametrize("method, local", [("heun", 2), ("midpoint", 2), ("rk4", 3), ("rk4-classic", 3)])
def test_step_error_is_the_embedded_methods(method, local):
    torch.manual_seed(0)
    block = CNF(scrambled(MLP(2, (5, 5))).double(), solver=FixedGrid(method, 2), quadratures=(Kinetic(), StepError())).double().train()
    x = torch.randn(4, 2, dtype=torch.float64)
    found = {}
    for steps in (2, 32, 64, 128):
        block.solver = FixedGrid(method, steps)
        found[steps] = block(x).integrals["step_error"]
        block.solver = FixedGrid(method, steps, "checkpoint")
        # stages are prepared for all steps at once, or step by step: the same but for rounding
        assert torch.allclose(block(x).integrals["step_error"], found[steps], rtol=1e-10, atol=1e-15)
    # local errors h^(p+1), times h, summed over 1/h steps
    slopes = [float((found[n] / found[2 * n]).log2().mean()) for n in (32, 64)]
    assert all(abs(slope - local) < 0.1 for slope in slopes)
    h, t = 0.5, [torch.tensor(v, dtype=torch.float64) for v in (0.0, 0.5)]
    truth, y = torch.zeros(4, dtype=torch.float64), x
    tableau = FixedGrid(method).tableau
    for s in t:
        k = []
        for c, a in zip(tableau.c, tableau.a, strict=True):
            k.append(block.field(s + c * h, y + h * sum((w * v for w, v in zip(a, k, strict=False)), torch.zeros_like(y))))
        truth = truth + h * (h * sum(e * v for e, v in zip(tableau.error, k, strict=True))).norm(dim=1)
        y = y + h * sum(b * v for b, v in zip(tableau.b, k, strict=True))
    assert torch.allclose(found[2], truth, rtol=1e-10)


def test_step_error_is_a_term_of_the_loss():
    flow = build(FlowConfig.of(hidden=(8,), zero_init=False), SolverConfig.of(grid_steps=2), (3,)).train()
    x = torch.randn(5, 3)
    terms = Likelihood(flow, step_error=0.5)(x)
    assert torch.allclose(terms["loss"], terms["nll"] + 0.5 * terms["step_error"]) and float(terms["step_error"].min()) > 0
    for bad in (SolverConfig.of(method="euler"), SolverConfig.of(gradient="reversible"), SolverConfig.of(train_solver="adaptive")):
        with pytest.raises(ConfigError, match=r"step_error=0\.5"):
            Likelihood(build(FlowConfig.of(hidden=(8,)), bad, (3,)), step_error=0.5)
    assert "step_error" not in Likelihood(flow)(x)


def test_fields_of_ones_own_are_called_as_they_are():
    class Doubled(MLP):
        def forward(self, t, x, context=None):
            return 2 * super().forward(t, x, context)

    torch.manual_seed(0)
    field, x = scrambled(MLP(2, (5,))), torch.randn(4, 2)
    double = Doubled(2, (5,))
    double.load_state_dict(field.state_dict())
    ours, plain = (CNF(f, Hutchinson(mode="reverse"), FixedGrid("rk4", 2)).train() for f in (double, Plain(double)))
    assert torch.allclose(ours(x, Request(noise=Noise(0))).log_det, plain(x, Request(noise=Noise(0))).log_det, atol=1e-6)
    calls = []
    field.register_forward_hook(lambda *_: calls.append(1))
    CNF(field, solver=FixedGrid("rk4", 2)).train()(x, Request(log_det=False))
    assert len(calls) == 8


def test_compiled_second_derivatives_of_tanh():
    value = activation("tanh").value
    x = torch.randn(3, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(lambda x: torch.func.hessian(lambda y: value(y).sum())(x), backend="aot_eager")
    y = x.tanh()
    assert torch.allclose(compiled(x), torch.diag(-2 * y * (1 - y * y)), atol=1e-6)
