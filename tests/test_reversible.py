"""Reversible grids: the published recursion, its own gradient exactly, the way back, and memory that does not grow."""

import math
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import F64, ROOT, TIGHT, LinearField, perturbed, slow

from cnf._utils.async_checks import defer_checks
from cnf.config import FlowConfig, SolverConfig
from cnf.errors import ConfigError, SolverError
from cnf.fields import MLP, AugmentedTimeConditioning, ConvField, TimePath
from cnf.losses import Likelihood
from cnf.models import build
from cnf.neural_ode.neural_ode import NeuralODE
from cnf.neural_ode.odenet import ODENet, mlp_maps
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Exact, Hutchinson
from cnf.ode.quadratures import JacobianFrobenius, Kinetic, RunningCost
from cnf.random import Noise
from cnf.solvers import TABLEAUS, FixedGrid, Reversible
from cnf.training.solver_monitor import SolverMonitor
from cnf.transforms import Request

sys.path.insert(0, str(ROOT / "benchmarks"))

import memory


def wavy(s, y):
    return (torch.cos(3 * s) * y[0] - 0.3 * y[0] ** 2, s * y[0].sum(1))


def start():
    return torch.linspace(-1, 0.7, 6, dtype=F64).reshape(2, 3), torch.zeros(2, dtype=F64)


# --- the scheme -------------------------------------------------------------------------------------------------------


def increment(tableau, rhs, s, h, y):
    """h Σ b_i k_i of the dynamic entry and of the quadrature, by the tableau's definition."""
    slopes = []
    for c, a in zip(tableau.c, tableau.a, strict=True):
        point = y + h * sum((w * k[0] for w, k in zip(a, slopes, strict=True)), torch.zeros_like(y))
        slopes.append(rhs(s + c * h, (point,)))
    return [h * sum(w * k[j] for w, k in zip(tableau.b, slopes, strict=True)) for j in (0, 1)]


@pytest.mark.parametrize("coupling", [1.0, 0.99, 0.6, None])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_it_is_the_published_recursion(method, coupling):
    """McCallum and Foster's pair (y, z), written down as they do, with the quadrature summed along z."""
    solver, (x, total) = Reversible(method, 5, coupling), start()
    lam, h, y, z = solver.coupling, torch.tensor(0.2, dtype=F64), x, x
    for n in range(5):
        step, part = increment(solver.tableau, wavy, n * h, h, z)
        y, total = lam * y + (1 - lam) * z + step, total + part
        z = z - increment(solver.tableau, wavy, (n + 1) * h, -h, y)[0]
    found = solver.solve(wavy, start()).state
    torch.testing.assert_close(found, (y, total), rtol=0, atol=1e-14)


def test_one_step_is_the_method_itself():
    found, plain = (s.solve(wavy, start()) for s in (Reversible("rk4", 1), FixedGrid("rk4", 1)))
    torch.testing.assert_close(found.state, plain.state, rtol=0, atol=1e-15)
    assert found.stats.nfe == plain.stats.nfe == 4


@pytest.mark.parametrize("coupling", [1.0, None])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "dopri5"])
def test_order_of_point_and_quadrature(method, coupling):
    truth = TIGHT.solve(wavy, start()).state
    steps = [8, 16, 32]
    for j in (0, 1):
        errors = []
        for n in steps:
            found = Reversible(method, n, coupling).solve(wavy, start()).state[j]
            errors.append(float((found - truth[j]).abs().max()))
        slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
        assert slope > TABLEAUS[method].order - 0.3, (j, slope, errors)
        assert slope < TABLEAUS[method].order + 0.7 or method in ("euler", "dopri5"), (j, slope, errors)


def test_linear_field_is_the_matrix_exponential_both_ways_and_so_is_its_gradient():
    torch.manual_seed(0)
    a, x = torch.randn(4, 4, dtype=F64) / 2, torch.randn(5, 4, dtype=F64)
    block = CNF(LinearField(a), Exact(), Reversible("dopri5", 64), end_time=0.8)
    out = block(x)
    truth = torch.linalg.matrix_exp(0.8 * block.field.a)
    assert np.allclose(truth.detach(), scipy.linalg.expm(0.8 * a.numpy()), atol=1e-13)
    torch.testing.assert_close(out.value, x @ truth.T, rtol=0, atol=1e-10)
    torch.testing.assert_close(out.log_det, (0.8 * a.trace()).expand(5), rtol=0, atol=1e-10)
    grads = [torch.autograd.grad(v.sin().sum(), block.field.a)[0] for v in (out.value, x @ truth.T)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-9)
    back = block.inverse(out.value.detach())
    torch.testing.assert_close(back.value, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(back.log_det, -out.log_det, rtol=0, atol=1e-9)


def test_the_default_coupling_is_stable_where_the_flow_contracts():
    """exp(-5): the second copy's error grows as the first one shrinks, unless the coupling damps it."""
    x = torch.ones(1, dtype=F64)

    def error(solver):
        return float((solver.solve(lambda s, y: (-5 * y[0],), (x,)).state[0] - math.exp(-5)).abs())

    assert error(Reversible("rk4", 16)) < 1.5 * error(FixedGrid("rk4", 16))
    assert error(Reversible("rk4", 16, 0.99)) > 100 * error(Reversible("rk4", 16))


# --- the gradient -----------------------------------------------------------------------------------------------------


def both(make, x, steps, back=False, context=None, method="rk4", inputs=()):
    """Gradients of everything by everything: of the scheme differentiated directly, and walked back."""
    found = []
    for gradient in ("direct", "reversible"):
        block = make(Reversible(method, steps, gradient=gradient))
        point = x.clone().requires_grad_()
        out = (block.inverse if back else block)(point, Request(context, Noise(0)))
        loss = out.value.sin().sum() + out.log_det.square().sum() + sum(v.sum() for v in out.integrals.values())
        found.append(torch.autograd.grad(loss, [point, *inputs, *block.parameters()]))
    for direct, walked in zip(*found, strict=True):
        torch.testing.assert_close(walked, direct, rtol=1e-10, atol=1e-10)
    assert all(bool(g.abs().max() > 0) for g in found[0])
    return out.stats


ESTIMATES = [Exact(), Exact(closed_form=False), Hutchinson(), Hutchinson(mode="reverse")]
TERMS = [Kinetic(), JacobianFrobenius()]


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("estimate", ESTIMATES, ids=repr)
def test_the_gradient_is_the_schemes_own_with_context_regularisers_and_a_learned_end_time(estimate, back):
    torch.manual_seed(0)
    field = perturbed(MLP(3, (5, 5), context_dim=2))
    context = torch.randn(4, 2, dtype=F64, requires_grad=True)

    def make(solver):
        return CNF(field, estimate, solver, quadratures=TERMS, end_time=0.7, learn_end_time=True).double()

    stats = both(make, torch.randn(4, 3, dtype=F64), 5, back, context, inputs=[context])
    assert (stats.nfe, stats.nfe_backward, stats.accepted) == (36, 36, 5)  # two increments a step, but for the last


@pytest.mark.parametrize("method", list(TABLEAUS))
@pytest.mark.parametrize("steps", [1, 2, 64])
def test_every_method_and_number_of_steps(method, steps):
    field, x = perturbed(MLP(2, (4,), "ignore")), torch.linspace(-1, 1, 6, dtype=F64).reshape(3, 2)
    both(lambda solver: CNF(field, Exact(), solver), x, steps, method=method)


@pytest.mark.parametrize("drive", ["concat", "both"])
@pytest.mark.parametrize("back", [False, True])
def test_a_learned_time_is_walked_back_beside_the_point(drive, back):
    torch.manual_seed(0)
    field = MLP(2, (4, 4), AugmentedTimeConditioning(drive, k=3, **({} if drive == "concat" else {"m": 2})))
    whole = perturbed(CNF(field, path=TimePath(3, learn_start=True), quadratures=TERMS))

    def make(solver):
        whole.solver = solver
        return whole

    both(make, torch.randn(3, 2, dtype=F64), 4, back)


@pytest.mark.parametrize("layer", ["concat", "concatsquash"])
@pytest.mark.parametrize("estimate", [Exact(), Hutchinson(), Hutchinson(mode="reverse")], ids=repr)
def test_convolutional_fields(estimate, layer):
    torch.manual_seed(0)
    field, x = perturbed(ConvField(2, (3, 3), layer)), torch.randn(2, 2, 4, 3, dtype=F64)
    both(lambda solver: CNF(field, estimate, solver, quadratures=TERMS), x, 3)


def test_a_neural_ode_with_an_end_time_for_each_sample():
    torch.manual_seed(0)
    field, x = ODENet(*mlp_maps(3, (4,), "concat"), "softplus"), torch.randn(5, 2, dtype=F64)
    model, found = perturbed(NeuralODE(field, (2,), 2, augment=1, adaptive_depth=True)), []
    for gradient in ("direct", "reversible"):
        model.solver = Reversible("midpoint", 6, gradient=gradient)
        found.append(torch.autograd.grad(model.predict(x).outputs.sin().sum(), list(model.parameters())))
    for direct, walked in zip(*found, strict=True):
        torch.testing.assert_close(walked, direct, rtol=1e-11, atol=1e-11)


def test_gradcheck_of_log_prob_in_point_and_parameters():
    block = perturbed(CNF(MLP(2, (4,)), Exact(), Reversible("rk4", 3), end_time=0.5, learn_end_time=True))
    x = torch.randn(2, 2, dtype=F64, requires_grad=True)

    def log_prob(point, *_):
        out = block(point)
        return -0.5 * out.value.square().sum(1) + out.log_det

    assert torch.autograd.gradcheck(log_prob, (x, *block.parameters()), eps=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [4, slow(256)])
def test_float32_is_as_good_walked_back_as_direct(steps):
    torch.manual_seed(0)
    field, x = perturbed(MLP(3, (16, 16))).float(), torch.randn(32, 3)
    found = []
    for solver in (Reversible("rk4", steps, gradient="direct"), Reversible("rk4", steps)):
        out = CNF(field, Hutchinson(), solver)(x, Request(noise=Noise(0)))
        assert out.value.dtype == out.log_det.dtype == torch.float32
        parts = torch.autograd.grad((out.log_det + out.value.square().sum(1)).mean(), list(field.parameters()))
        found.append(torch.cat([g.flatten() for g in parts]))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 2e-6


@pytest.mark.parametrize(("steps", "dtype", "most"), [(4, F64, 1e-9), (96, F64, 1e-9), slow(256, F64, 1e-9), (64, torch.float32, 1e-6)])
def test_the_walk_back_meets_the_points_of_the_way_there(steps, dtype, most):
    """Every point that the right-hand side saw, the first state among them."""
    w, seen = torch.tensor(-3.0, dtype=dtype, requires_grad=True), {False: [], True: []}

    def rhs(s, y):
        seen[torch.is_grad_enabled()].append((s.detach(), y[0].detach()))
        return (w * torch.sin(2 * y[0] + s),)

    x = torch.linspace(-2, 2, 50, dtype=dtype)
    y = Reversible("midpoint", steps).solve(rhs, (x,), parameters=[w]).state[0]
    y.sum().backward()
    assert len(seen[True]) == len(seen[False]) == 4 * steps - 2
    there = sorted(seen[False], key=lambda pair: float(pair[0]))
    back = sorted(seen[True], key=lambda pair: float(pair[0]))
    worst = max(min(float((p - q).abs().max()) for r, q in back if r == s) for s, p in there)
    assert worst < most
    # the first of the last step
    assert float((seen[True][-2][1] - x).abs().max()) < most


def test_what_is_computed_once_before_the_solve_may_be_closed_over_and_autocast_is_the_same():
    w = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=F64).requires_grad_()
    grads, types = [], set()
    for gradient in ("direct", "reversible"):
        kernel = (w.exp() * w).sin()  # one graph, met at every step
        y = Reversible("rk4", 4, gradient=gradient).solve(
            lambda s, y: (torch.tanh(y[0] @ kernel),), (torch.ones(2, 3, dtype=F64),), parameters=[w]
        )
        grads.append(torch.autograd.grad(y.state[0].sin().sum(), w)[0])
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)

    v = torch.ones(3, 3, requires_grad=True)

    def rhs(s, y):
        product = y[0] @ v
        types.add(product.dtype)
        return (product.float(),)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = Reversible("euler", 3).solve(rhs, (torch.ones(2, 3),), parameters=[v]).state[0]
    y.sum().backward()
    assert types == {torch.bfloat16} and v.grad.dtype == torch.float32


def test_two_solves_before_one_backward_and_a_second_backward():
    block = CNF(perturbed(MLP(3, (6,))), Hutchinson(), Reversible("rk4", 4))
    x, weights = torch.randn(4, 3, dtype=F64), list(block.parameters())
    alone = torch.autograd.grad(block(x, Request(noise=Noise(0))).log_det.sum(), weights)
    first = block(x, Request(noise=Noise(0))).log_det.sum()
    block(x, Request(noise=Noise(1)))
    for _ in range(2):
        for a, b in zip(alone, torch.autograd.grad(first, weights, retain_graph=True), strict=True):
            assert torch.equal(a, b)
    (g, *_) = torch.autograd.grad(block(x, Request(noise=Noise(0))).log_det.square().sum(), weights, create_graph=True)
    with pytest.raises(ConfigError, match="second derivative"):
        g.square().sum().backward()


def test_without_gradients_nothing_is_kept_and_a_part_of_the_outputs_will_do():
    block, x = perturbed(CNF(MLP(2, (4,)), Exact(), Reversible("rk4", 3))), torch.randn(3, 2, dtype=F64)
    with torch.no_grad():
        assert not block(x).value.requires_grad
    weights, direct = list(block.parameters()), Reversible("rk4", 3, gradient="direct")
    for name in ("value", "log_det"):
        found = []
        for solver in (block.solver, direct):
            block.solver = solver
            found.append(torch.autograd.grad(getattr(block(x), name).sum(), weights, allow_unused=True))
        block.solver = Reversible("rk4", 3)
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# --- memory -----------------------------------------------------------------------------------------------------------


def profile(solver):
    torch.manual_seed(0)
    flow = build(
        FlowConfig.of(field="conv", hidden=(8, 8), time_conditioning="concat", nonlinearity="softplus"),
        SolverConfig.of(divergence="hutchinson", hutchinson_mode="reverse"),
        (1, 8, 8),
        levels=17,
    ).train()
    flow.blocks[0].solver = solver
    x = torch.randint(0, 17, (4, 1, 8, 8), dtype=torch.uint8)
    return memory.profile(Likelihood(flow, 0.01, 0.01), x, Noise(0))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps():
    few, many, plain = (profile(s) for s in (Reversible("rk4", 4), Reversible("rk4", 16), FixedGrid("rk4", 4)))
    assert many["saved"] == few["saved"] < 0.05 * plain["saved"]
    assert many["peak"] < 1.005 * few["peak"] and few["peak"] < 0.6 * plain["peak"]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_tensors_that_would_get_no_gradient_are_refused():
    """One of the motion, and one that only a quadrature looks at."""
    hidden = torch.ones((), requires_grad=True)
    y = Reversible("euler", 3).solve(lambda s, y: (hidden * y[0],), (torch.ones(2, requires_grad=True),)).state[0]
    with pytest.raises(ConfigError, match=r"gradient='reversible'.*shape \(\).*parameters.*gradient='direct'"):
        y.sum().backward()
    cost = RunningCost("cost", lambda t, x: hidden * x.square().sum(1))
    block = CNF(MLP(2, (4,)), Exact(), Reversible("rk4", 2), quadratures=[cost])
    with pytest.raises(ConfigError, match=r"shape \(\).*parameters"):
        block(torch.randn(3, 2)).integrals["cost"].sum().backward()


def test_a_state_that_is_not_met_again_is_an_error_or_no_number_where_checks_are_deferred():
    w, calls = torch.ones((), dtype=F64, requires_grad=True), []

    def rhs(s, y):
        calls.append(1)
        return (w * y[0] * (1 if len(calls) <= 7 else 1.1),)  # another function on the way back

    def solve():
        calls.clear()
        return Reversible("euler", 4).solve(rhs, (torch.ones(2, dtype=F64),), parameters=[w]).state[0].sum()

    with pytest.raises(SolverError, match=r"reversed.*reconstructed initial state.*more steps"):
        solve().backward()
    with defer_checks():
        loss = solve()
    loss.backward()
    assert bool(loss.isfinite()) and bool(w.grad.isnan())


def test_a_solve_that_fails_says_where_and_settings_that_cannot_be_say_so():
    class Bad(torch.nn.Module):
        def forward(self, t, x, context=None):
            return torch.exp(50 * x.abs()) * x

    with pytest.raises(SolverError, match=r"step \d+ of 4 \(rk4\) .* evaluations"):
        CNF(Bad(), Exact(), Reversible("rk4", 4))(torch.ones(1, 2))
    # finite in the sums, but not in the state's own type
    with pytest.raises(SolverError, match=r"step 2 of 2"):
        Reversible("euler", 2).solve(
            lambda s, y: (1.5 * 2.0**127 * (1 + 0 * y[0]),), (torch.full((1,), 1.5 * 2.0**126),)
        )
    for make, told in (
        (lambda: Reversible("rk5"), r"method='rk5'.*did you mean"),
        (lambda: Reversible(steps=0), "steps must be at least 1, got 0"),
        (
            lambda: Reversible(gradient="checkpoint"),
            r"gradient='checkpoint' is unknown for Reversible: expected 'reversible' or 'direct'",
        ),
        (lambda: Reversible(coupling=0.0), r"coupling must be in .*got 0\.0"),
        (lambda: Reversible(coupling=1.5), r"coupling must be in .*got 1\.5"),
        (lambda: Reversible(coupling=math.nan), r"coupling must be in .*got nan"),
        (lambda: Reversible("rk4", 64, 0.5), r"coupling=0\.5 with steps=64: .* at least 0\.8"),
        (
            lambda: SolverConfig.of(train_solver="adaptive", gradient="reversible"),
            r"gradient='reversible'; expected one of direct, adjoint",
        ),
    ):
        with pytest.raises(ConfigError, match=told):
            make()


# --- in training ------------------------------------------------------------------------------------------------------


def test_a_refined_grid_has_twice_the_steps_and_the_same_coupling_over_the_whole():
    for solver in (Reversible("midpoint", 4), Reversible("rk4", 8, 0.9), Reversible("euler", 2, gradient="direct")):
        finer = solver.refined()
        assert type(finer) is Reversible and finer.steps == 2 * solver.steps
        assert (finer.method, finer.gradient) == (solver.method, solver.gradient)
        assert finer.coupling**finer.steps == pytest.approx(solver.coupling**solver.steps, rel=1e-12)
    assert repr(Reversible("rk4", 3)) == "Reversible('rk4', steps=3, coupling=0.1, gradient='reversible')"


def test_the_option_is_built_and_watched_as_a_grid():
    config = SolverConfig.of(method="midpoint", grid_steps=2, gradient="reversible")
    flow = perturbed(build(FlowConfig.of(hidden=(8,), zero_init=False), config, (2,)), 1.0).train()
    assert isinstance(flow.blocks[0].solver, Reversible)
    said, objective = [], Likelihood(flow)
    watch = SolverMonitor(1e-12, 8, 100)
    watch.attach(objective, said.append)
    x = torch.randn(6, 2, dtype=F64)
    assert watch.measure(1, x, None, Noise(0))["grid_steps"] == 4
    assert isinstance(flow.blocks[0].solver, Reversible) and flow.blocks[0].solver.steps == 4
    assert "now Reversible('midpoint', steps=4" in said[0]
    objective(x, noise=Noise(0))["loss"].mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in flow.parameters())
