"""AFFJORD: the learned time, the fields it drives, and the identities that every driven flow keeps (2306.02731)."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, mostly_slow, perturbed, slow
from torch import nn

import cnf
from cnf import CNF, Adaptive, Exact, FixedGrid, Flow, Hutchinson
from cnf.config import AFFJORD, PUBLISHED, FlowConfig, SolverConfig
from cnf.errors import ConfigError
from cnf.fields import MLP, AugmentedTimeConditioning, Conv, ConvField, Linear, SqueezeSum, TimePath
from cnf.losses import Likelihood
from cnf.models import build, count_parameters
from cnf.ode.divergence import Bound
from cnf.ode.multiscale import SharedAugmentedTime, multiscale
from cnf.ode.quadratures import Directional, JacobianFrobenius, Kinetic, RunningCost, TotalDerivative
from cnf.transforms import Request, Sequential, Squeeze
from cnf.transforms.request import AugmentedTime

pytestmark = pytest.mark.usefixtures("double")

TIGHT = Adaptive("dopri5", 1e-11, 1e-11, max_steps=10_000)
GRID = FixedGrid("dopri5", 24)  # as tight for these fields, and a smaller graph to differentiate
K = 6
AUGMENTED_TIME_LAYERS = {
    "concat": AugmentedTimeConditioning("concat", k=K),
    "hyper": AugmentedTimeConditioning("hyper", k=K, m=4),
    "both": AugmentedTimeConditioning("both", k=K, m=4),
    "low-rank": AugmentedTimeConditioning("both", k=K, m=4, rank=3),  # and hyper's after the first layer
}


def mlp_block(drive, dim=3, hidden=(7, 6), context=0, learn_start=True, residual="none", **more):
    field = MLP(dim, hidden, AUGMENTED_TIME_LAYERS[drive], context_dim=context, residual=residual)
    return perturbed(CNF(field, path=TimePath(K, learn_start=learn_start), eval_solver=TIGHT, **more), 0.3).eval()


def conv_block(drive, shape=(1, 4, 4), hidden=(4,), **more):
    field = ConvField(shape[0], hidden, AUGMENTED_TIME_LAYERS[drive])
    return perturbed(CNF(field, path=TimePath(K), eval_solver=GRID, **more), 0.1).eval()


def full_jacobian(transform, x, context=None):
    n = x[0].numel()
    rows = []
    for i, one in enumerate(x):
        own = None if context is None else context[i : i + 1]
        rows.append(torch.autograd.functional.jacobian(lambda y, c=own: transform(y[None], Request(c, log_det=False)).value[0], one, vectorize=True).reshape(n, n))
    return torch.stack(rows)


@pytest.mark.parametrize("drive, hidden", [
    (drive, hidden) if drive == "low-rank" or hidden == (7, 6) else slow(drive, hidden)
    for drive in AUGMENTED_TIME_LAYERS for hidden in ((), (7,), (7, 6), (5, 6, 5))
])  # fmt: skip
def test_mlp_log_det_is_that_of_the_whole_jacobian(drive, hidden):
    block = mlp_block(drive, hidden=hidden)
    block.eval_solver = FixedGrid("dopri5", 32)
    x = torch.randn(3, 3)
    out = block(x)
    assert (torch.linalg.slogdet(full_jacobian(block, x))[1] - out.log_det).abs().max() < 1e-8


@pytest.mark.parametrize("drive", mostly_slow(AUGMENTED_TIME_LAYERS, "both"))
def test_several_conv_blocks_log_det_and_inverse(drive):
    chain = multiscale((1, 4, 4), lambda shape: conv_block(drive, shape), 2)
    assert isinstance(chain.scales[0], Sequential) and isinstance(chain.scales[0], SharedAugmentedTime)
    x = torch.randn(2, 1, 4, 4)
    z, log_det, _, _ = chain(x)
    assert (torch.linalg.slogdet(full_jacobian(chain, x))[1] - log_det).abs().max() < 1e-8
    back = chain.inverse(z)
    assert (back.value - x).abs().max() < 1e-8 and (back.log_det + log_det).abs().max() < 1e-8


@pytest.mark.parametrize("drive", mostly_slow(AUGMENTED_TIME_LAYERS, "concat"))
def test_two_scales_with_squeeze_log_det_and_inverse(drive):
    chain = multiscale((1, 8, 8), lambda shape: conv_block(drive, shape, (2,)), 1)
    assert [type(s) for s in chain.scales] == [SharedAugmentedTime, SharedAugmentedTime]
    x = torch.randn(1, 1, 8, 8)
    z, log_det, _, _ = chain(x)
    assert (torch.linalg.slogdet(full_jacobian(chain, x))[1] - log_det).abs().max() < 1e-8
    assert (chain.inverse(z).value - x).abs().max() < 1e-7


def test_a_is_carried_through_a_scale_and_starts_afresh_at_the_next():
    blocks = []

    def block(shape):
        blocks.append(conv_block("concat", shape))
        return blocks[-1]

    chain = multiscale((1, 8, 8), block, 1)
    x = torch.randn(2, 1, 8, 8)
    z = chain(x).value
    with torch.no_grad():
        # by hand: every block alone, from where the one before left a
        one = torch.ones(())
        shared = AugmentedTime(one, blocks[0].initial_augmented_time(x))
        y = blocks[0](x, Request(augmented_time=shared)).value
        y = blocks[1](Squeeze()(y).value, Request(augmented_time=shared)).value
        on, out = chain.split(y)
        assert shared.value.abs().max() > 1e-3 and blocks[2].initial_augmented_time(on).abs().max() == 0
        last = blocks[2](on).value
    assert torch.equal(z, torch.cat([out.flatten(1), last.flatten(1)], 1))
    # afresh in a plain stack: each block is the transform it is alone
    stack = Sequential(blocks[:1] + [conv_block("concat")])
    y = stack(x[..., :4, :4]).value
    alone = stack.transforms[1](blocks[0](x[..., :4, :4]).value).value
    assert torch.equal(y, alone)


@pytest.mark.parametrize("drive", AUGMENTED_TIME_LAYERS)
def test_the_path_is_driven_by_the_learned_time_and_never_sees_x(drive):
    block = mlp_block(drive)
    x = torch.randn(4, 3)
    z = block(x).value
    assert torch.allclose(block(x[:1]).value, z[:1], atol=1e-9)  # whatever else is in the batch
    with torch.no_grad():
        block.path.net[2].bias += 0.5
    assert (block(x).value - z).abs().max() > 1e-3  # unlike the published concat, which ignores a


@pytest.mark.parametrize("drive", mostly_slow(AUGMENTED_TIME_LAYERS, "concat", "low-rank"))
def test_against_one_ode_of_x_and_a_together(drive):
    """The whole system (x, a) solved as one autonomous ODE by a classic rk4 written here."""
    block = mlp_block(drive)
    x = torch.randn(4, 3)
    a, h, n = block.path.start(x), 1 / 400, 400

    def f(x, a):
        return block.field(a[0], x), block.path(a)

    with torch.no_grad():
        z = x
        for _ in range(n):
            k1 = f(z, a)
            k2 = f(z + h / 2 * k1[0], a + h / 2 * k1[1])
            k3 = f(z + h / 2 * k2[0], a + h / 2 * k2[1])
            k4 = f(z + h * k3[0], a + h * k3[1])
            z = z + h / 6 * (k1[0] + 2 * k2[0] + 2 * k3[0] + k4[0])
            a = a + h / 6 * (k1[1] + 2 * k2[1] + 2 * k3[1] + k4[1])
        assert (block(x).value - z).abs().max() < 1e-9
        assert (block.velocity(torch.ones(()), x) - block.field(a[0], x)).abs().max() < 1e-8


@pytest.mark.parametrize("drive", AUGMENTED_TIME_LAYERS)
@pytest.mark.parametrize("kind", ["mlp", "conv", "sum"])
def test_fused_jvp_and_traces_equal_autodiff(drive, kind):
    if kind == "mlp":
        field, x = MLP(3, (5, 4), AUGMENTED_TIME_LAYERS[drive], residual="linear"), torch.randn(2, 3)
    elif kind == "conv":
        field, x = ConvField(2, (3,), AUGMENTED_TIME_LAYERS[drive], strides=(2, -2)), torch.randn(2, 2, 4, 6)
    else:
        field, x = SqueezeSum([ConvField(4**s, (3,), AUGMENTED_TIME_LAYERS[drive]) for s in range(2)]), torch.randn(2, 1, 4, 4)
    perturbed(field)
    a, a_dot, v = torch.randn(K), torch.randn(K), torch.randn(2, *x.shape)
    dx, product = field.jvp(a, x, v, t_dot=a_dot)
    assert torch.allclose(dx, field(a, x), atol=1e-13)
    for tangent, pushed in zip(v, product, strict=True):
        truth = torch.func.jvp(lambda s, y: field(s, y), (a, x), (a_dot, tangent))[1]
        assert torch.allclose(pushed, truth, atol=1e-12)
    need = frozenset({"div", "jac_sq"})
    exact = Exact(closed_form=False).linearize(field, a, x, None, None, need)
    jacobian = torch.stack([torch.func.jacrev(lambda y: field(a, y[None])[0])(one).reshape(one.numel(), -1) for one in x])
    assert torch.allclose(exact.div, jacobian.diagonal(dim1=1, dim2=2).sum(1), atol=1e-12)
    assert torch.allclose(exact.jac_sq, jacobian.square().sum((1, 2)), atol=1e-11)
    if kind == "mlp":
        assert torch.allclose(field.divergence(a, x)[1], exact.div, atol=1e-12)
    probe = torch.randn(1, *x.shape)
    ways = [Hutchinson(mode=m).linearize(field, a, x, probe, None, need).div for m in ("forward", "reverse")]
    assert torch.allclose(*ways, atol=1e-12)


def test_concat_is_a_layer_that_sees_constant_channels():
    """Against the convolution of [a; x] written out, zero padding included."""
    drive = AugmentedTimeConditioning("concat", k=3)
    layer = drive(cnf.fields.Conv(2, 4))
    a, x = torch.randn(3), torch.randn(5, 2, 6, 4)
    planes = a[None, :, None, None].expand(5, 3, 6, 4)
    assert torch.allclose(layer(a, x), layer.core(torch.cat([planes, x], 1)), atol=1e-12)
    rows = torch.randn(5, 3)  # one a a row, as a regression of the field needs it
    planes = rows[:, :, None, None].expand(5, 3, 6, 4)
    assert torch.allclose(layer(rows, x), layer.core(torch.cat([planes, x], 1)), atol=1e-12)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("stride", [1, 0, 2, -2])
def test_both_is_hyper_around_the_convolution_of_a_and_x(stride, rank):
    """Against hyper's layer on [a; x] written out, zero padding and transposes included, and its weights against a's change."""
    drive, conv = AugmentedTimeConditioning("both", k=3, m=2, rank=rank), Conv.of_stride(2, 4, stride)
    layer, whole = drive(conv), replace(drive, kind="hyper")(Conv.of_stride(5, 4, stride))
    whole.load_state_dict(perturbed(layer).state_dict())
    a, x = torch.randn(3), torch.randn(5, 2, 6, 4)
    seen = torch.cat([a[None, :, None, None].expand(5, 3, 6, 4), x], 1)
    assert torch.allclose(layer(a, x), whole(a, seen), atol=1e-12)
    vector = perturbed(drive(Linear(2, 4)))
    parts = torch.func.functional_call(vector, {"move_bias": torch.zeros(4, 2)}, (a, x[:, :, 0, 0]))
    weight = vector.weight + (vector.move @ a[:2] if not rank else (vector.left * (vector.scales @ a[:2])) @ vector.right)
    assert torch.allclose(parts, torch.cat([a.expand(5, 3), x[:, :, 0, 0]], 1) @ weight.T + vector.bias, atol=1e-12)


def test_both_gives_a_to_the_first_layer_alone():
    for field in (MLP(2, (5, 4), AugmentedTimeConditioning("both", k=3, m=2)), ConvField(2, (5, 4), AugmentedTimeConditioning("both", k=3, m=2))):
        assert [layer.weight.shape[1] for layer in field.time_layers] == [5, 5, 4]
        torch.manual_seed(0)
        hyper = type(field)(2, (5, 4), AugmentedTimeConditioning("hyper", k=3, m=2))
        x, a = torch.randn(4, 2, *(() if isinstance(field, MLP) else (3, 3))), torch.randn(3)
        other = torch.cat([a[:2], a[2:] + 1])
        torch.manual_seed(0)
        assert torch.allclose(type(field)(2, (5, 4), AugmentedTimeConditioning("both", k=3, m=2))(a, x), hyper(a, x), atol=1e-15)  # as it starts
        # entries of a that generate nothing reach f as features, and with hyper they reach nothing
        perturbed(field), perturbed(hyper)
        assert (field(a, x) - field(other, x)).abs().max() > 1e-3
        assert torch.equal(hyper(a, x), hyper(other, x))


@pytest.mark.parametrize("rank", [0, 2])
def test_hyper_weights_are_linear_in_the_first_entries_of_a(rank):
    layer = perturbed(AugmentedTimeConditioning("hyper", k=5, m=3, rank=rank)(cnf.fields.Conv(2, 4)))
    a, b = torch.randn(5), torch.randn(5)

    def parts(a):
        weight, gate, shift = layer.affine_at(a, layer.precompute((6, 4)))
        assert gate is None and weight.shape == (4, 2, 3, 3)
        return torch.cat([weight.flatten(), shift.flatten()])

    zero = parts(torch.zeros(5))
    assert torch.allclose(parts(a + 2 * b) - zero, parts(a) - zero + 2 * (parts(b) - zero), atol=1e-12)
    assert torch.equal(parts(a), parts(torch.cat([a[:3], b[3:]])))
    if rank:
        assert torch.linalg.matrix_rank((parts(a) - zero)[: 4 * 18].reshape(4, 18)) == rank


def test_sizes_of_generators():
    plain = sum(p.numel() for p in ConvField(3, (64, 64), "ignore").parameters())
    sizes = {r: sum(p.numel() for p in ConvField(3, (64, 64), AugmentedTimeConditioning("hyper", rank=r)).parameters()) for r in (0, 8)}
    assert sizes[0] == 11 * plain
    assert plain < sizes[8] < 1.4 * plain


# -- solvers, gradients, regularisers, context --------------------------------------------------------------------------


@pytest.mark.parametrize("drive, back", [
    ("concat", False), slow("low-rank", True), slow("concat", True), slow("both", False), slow("both", True), slow("low-rank", False),
])  # fmt: skip
def test_gradients_of_every_mode_agree(drive, back):
    block = mlp_block(drive, quadratures=(Kinetic(), JacobianFrobenius()))
    x = torch.randn(3, 3)

    def gradient(solver):
        block.eval_solver = solver
        block.zero_grad()
        point = x.clone().requires_grad_()
        noise = cnf.Noise(0, "test")
        out = (block.inverse if back else block)(point, Request(noise=noise))
        loss = out.value.square().sum() + out.log_det.sum() + sum(v.sum() for v in out.integrals.values())
        loss.backward()
        return [loss.detach(), point.grad, *(p.grad.clone() for p in block.parameters())]

    direct = gradient(FixedGrid("rk4", 6))
    for mine, other in zip(direct, gradient(FixedGrid("rk4", 6, "checkpoint")), strict=True):
        assert torch.allclose(mine, other, rtol=1e-10, atol=1e-12)
    assert all(g.abs().max() > 0 for g in direct)
    tight = gradient(TIGHT)
    for mine, other in zip(tight, gradient(Adaptive("dopri5", 1e-11, 1e-11, "adjoint", max_steps=10_000)), strict=True):
        assert torch.allclose(mine, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun", "rk4", "rk4-classic", "dopri5"])
def test_every_grid_converges_to_the_adaptive_solution(method):
    block = mlp_block("hyper")
    x = torch.randn(3, 3)
    truth = block(x)
    errors = []
    for steps in (8, 16):
        block.eval_solver = FixedGrid(method, steps)
        out = block(x)
        errors.append(max(float((a - b).detach().abs().max()) for a, b in zip(out[:2], truth[:2], strict=True)))
    order = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "rk4-classic": 4, "dopri5": 5}[method]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.8


@pytest.mark.parametrize("drive", mostly_slow(AUGMENTED_TIME_LAYERS, "concat", "hyper"))
def test_conditional_flows(drive):
    block = mlp_block(drive, context=2)
    x, context = torch.randn(3, 3), torch.randn(3, 2)
    out = block(x, Request(context))
    truth = torch.linalg.slogdet(full_jacobian(block, x, context))[1]
    assert (truth - out.log_det).abs().max() < 1e-8
    assert (block.inverse(out.value, Request(context)).value - x).abs().max() < 1e-8
    assert (block(x, Request(context + 1)).value - out.value).abs().max() > 1e-3


@pytest.mark.slow
def test_regularisers_against_their_integrands_by_hand():
    """Every quadrature along the path of x and a, by Simpson's rule; the total derivative follows a."""
    quadratures = (Kinetic(), JacobianFrobenius(), Directional(), TotalDerivative(), RunningCost("r", lambda t, x: t * x.square().sum(1)))
    block = mlp_block("hyper", dim=2, quadratures=quadratures, divergence=Exact(closed_form=False))
    x = torch.randn(2, 2)
    out = block(x)
    n = 200
    sums = {q.name: torch.zeros(2) for q in quadratures}
    block.eval_solver = FixedGrid("rk4", 1)
    point, a = x, block.path.start(x)
    with torch.no_grad():
        for i in range(n + 1):
            t = torch.tensor(i / n)
            weight = (1 if i in (0, n) else 4 if i % 2 else 2) / (3 * n)
            f = block.field(a[0], point)
            jacobian = torch.stack([torch.func.jacrev(lambda y, a=a: block.field(a[0], y[None])[0])(p) for p in point])
            moved = torch.func.jvp(lambda s, p=point: block.field(s, p), (a[0],), (block.path(a)[0],))[1]
            bent = torch.einsum("nij,nj->ni", jacobian, f)
            for name, value in (
                ("kinetic", f.square().sum(1)),
                ("jacobian", jacobian.square().sum((1, 2))),
                ("directional", bent.square().sum(1)),
                ("total_derivative", (bent + moved).square().sum(1)),
                ("r", t * point.square().sum(1)),
            ):
                sums[name] += weight * value
            if i < n:
                state = block.integrate(point, (t, t + 1 / n), Request(log_det=False), augmented_time=a)[2].state
                point, a = state[0], state[1]
    for name, value in sums.items():
        assert torch.allclose(out.integrals[name], value, rtol=1e-6), name


def test_a_random_end_time_carries_the_same_a_both_ways():
    chain = SharedAugmentedTime([mlp_block("concat", steer=0.3), mlp_block("hyper", steer=0.3)])
    chain.train()
    for block in chain.transforms:
        block.solver = TIGHT
    x, noise = torch.randn(3, 3), cnf.Noise(1, "test")
    z = chain(x, Request(noise=noise)).value
    assert (chain.inverse(z, Request(noise=noise)).value - x).abs().max() < 1e-8
    assert (chain(x, Request(noise=cnf.Noise(2, "test"))).value - z).abs().max() > 1e-3


def test_trajectory_passes_through_the_solution():
    flow = Flow(Sequential([mlp_block("hyper"), mlp_block("concat")]), (3,)).eval()
    x = torch.randn(4, 3)
    path = flow.trajectory(x, torch.linspace(0, 1, 9))
    assert (path[-1] - flow.encode(x)).abs().max() < 1e-8
    half = flow.transform.transforms[0](x).value
    assert (path[4] - half).abs().max() < 1e-8


def carried_flow(dim=3):
    chain = SharedAugmentedTime([mlp_block("hyper", dim), Sequential([]), mlp_block("concat", dim), mlp_block("low-rank", dim)])
    return Flow(Sequential([chain, mlp_block("concat", dim)]), (dim,)).eval()


@pytest.mark.slow
def test_trajectory_of_a_carried_chain_carries_a():
    flow, x = carried_flow(), torch.randn(4, 3)
    path = flow.trajectory(x, torch.linspace(0, 1, 9))
    assert (path[-1] - flow.encode(x)).abs().max() < 1e-8
    chain = flow.transform.transforms[0]
    assert (path[6] - chain(x).value).abs().max() < 1e-8
    afresh = chain.transforms[2](chain.transforms[0](x).value).value
    assert (path[4] - afresh).abs().max() > 1e-3


def test_vector_field_of_a_carried_chain_is_at_the_carried_a(tmp_path, monkeypatch):
    from cnf import plotting

    flow, seen = carried_flow(2), []
    for block in flow.blocks:
        block.eval_solver = GRID
    velocity = CNF.velocity
    monkeypatch.setattr(CNF, "velocity", lambda *given, **named: seen.append(velocity(*given, **named)) or seen[-1])
    plotting.vector_field_2d(flow, tmp_path / "field.png", times=2, extent=1.0)
    ticks = torch.linspace(-1, 1, 18)
    grid, one, a = torch.cartesian_prod(ticks, ticks), torch.ones(()), None
    with torch.no_grad():
        for i, block in enumerate(flow.blocks):
            a = block.initial_augmented_time(grid) if i in (0, 3) else a
            assert torch.allclose(seen[2 * i], block.field(a[0], grid), atol=1e-8)
            a = block.advance_augmented_time(a, one)
            assert torch.allclose(seen[2 * i + 1], block.field(a[0], grid), atol=1e-8)


def test_a_carried_chain_has_one_learned_start():
    chain = multiscale((1, 8, 8), lambda shape: CNF(ConvField(shape[0], (2,), AUGMENTED_TIME_LAYERS["hyper"]), path=TimePath(K, learn_start=True)), 2)
    starts = [name for name, _ in chain.named_parameters() if name.endswith("path.initial")]
    assert starts == [f"scales.{i}.transforms.0.path.initial" for i in range(2)]
    perturbed(chain, 0.1)(torch.randn(1, 1, 8, 8)).value.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in chain.parameters())
    path = TimePath(K, learn_start=True)  # one path for both: its start is the first's
    both = SharedAugmentedTime([CNF(MLP(2, (4,), AUGMENTED_TIME_LAYERS["concat"]), path=path) for _ in range(2)])
    assert path.initial is not None and both.transforms[0].initial_augmented_time(torch.zeros(1, 2)).requires_grad


# -- training and saving -------------------------------------------------------------------------------------------------

MODELS = {
    f"{drive}-{field}-{rank}": FlowConfig.of(architecture="multiscale" if field == "conv" else "stack", field=field, hidden=(6, 6), blocks=1, nonlinearity="softplus" if field == "conv" else "tanh", zero_init=zero, learn_end_time=True, preprocess="logit", augmented_time=drive, augmented_time_rank=rank, augmented_time_start="learned")
    for drive, field, rank, zero in (
        ("concat", "mlp", 0, True),
        ("hyper", "mlp", 0, False),
        ("hyper", "mlp", 2, True),
        ("both", "mlp", 0, False),
        ("concat", "conv", 0, False),
        ("hyper", "conv", 0, True),
        ("both", "conv", 3, True),
    )
}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_had_a_gradient_within_ten_adam_steps(name):
    torch.set_default_dtype(torch.float32)
    conv = "conv" in name
    flow = build(MODELS[name], SolverConfig.of(grid_steps=2), (1, 4, 4) if conv else (3,), levels=256 if conv else None)
    x = torch.randint(0, 256, (8, 1, 4, 4), dtype=torch.uint8) if conv else torch.randn(16, 3)
    objective = Likelihood(flow.train(), 0.01, 0.01)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)
    moved = set()
    for step in range(10):
        optimizer.zero_grad()
        objective(x, noise=cnf.Noise(0, "train", step))["loss"].mean().backward()
        moved |= {n for n, p in flow.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    assert moved == {n for n, _ in flow.named_parameters()}


@pytest.mark.parametrize("drive", ["none", "concat", "hyper", "both"])
def test_zero_init_is_the_identity(drive):
    flow = build(FlowConfig.of(architecture="multiscale", field="conv", hidden=(4,), blocks=1, zero_init=True, augmented_time=drive), SolverConfig(), (1, 4, 4), levels=256)
    x = torch.randn(2, 1, 4, 4)
    for block in flow.blocks[:1]:
        assert torch.equal(block(x).value, x)


@pytest.mark.slow  # of a plain flow: in test_cli.py; of a loaded chain with its a: in test_golden_affjord.py
def test_a_fresh_process_samples_bit_for_bit(tmp_path):
    """Train, sample, and sample again from the run folder in another process; nothing is kept between calls."""
    from cnf.cli import train_main

    torch.set_default_dtype(torch.float32)
    folder = tmp_path / "run"
    code = train_main(
        ["digits", "--out", str(folder), "--architecture", "multiscale", "--field", "conv", "--hidden", "4",
         "--augmented-time", "both", "--augmented-time-start", "learned", "--augmented-time-hidden", "3", "--augmented-time-nonlinearity", "elu", "--preprocess", "logit", "--steps", "3", "--warmup", "1", "--noise-samples", "1",
         "--divergence", "hutchinson", "--validation-items", "8", "--test-items", "8", "--solver-check-every", "1000", "--batch-size", "8"]
    )  # fmt: skip
    assert code == 0
    flow = cnf.load(folder)
    flow.encode(torch.rand(5, 1, 8, 8))  # an earlier call must not matter
    before = flow.sample(4, noise=cnf.Noise(7, "sample"))
    script = (
        "import sys, torch, cnf; torch.set_num_threads(1); "
        "torch.save(cnf.load(sys.argv[1]).sample(4, noise=cnf.Noise(7, 'sample')), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, str(folder), str(tmp_path / "x.pt")], check=True, cwd=ROOT)
    assert torch.equal(torch.load(tmp_path / "x.pt"), before)
    # and its path, from the noise in the places of the image's entries to the sample
    from cnf.cli import sample_main

    assert sample_main([str(folder), "-n", "3", "--trajectory", "--out", str(tmp_path / "x.npz")]) == 0
    with np.load(tmp_path / "x.npz") as file:
        way, x = file["trajectory"], torch.from_numpy(file["samples"])
    assert way.shape == (21, 3, 1, 8, 8)
    assert np.abs(way[-1] - flow.transform.transforms[1](x).value.numpy()).max() < 1e-4
    assert np.abs(np.sort(way[0].reshape(3, -1)) - np.sort(flow.encode(x).detach().numpy())).max() < 1e-3
    assert sample_main([str(folder), "-n", "2", "--grid-steps", "2", "--out", str(tmp_path / "x.gif")]) == 0
    assert (tmp_path / "x.gif").stat().st_size > 2000


def test_published_counts_and_a_small_generator():
    of = {p.name: p for p in PUBLISHED if p.name.startswith("AFFJORD")}
    assert [p.parameters for p in of.values()] == [417_629, 4_556_169, 4_556_169, 820_815, 8_976_115, 8_976_115]
    small = AFFJORD.change(augmented_time_rank=8)
    assert count_parameters(small, (1, 28, 28)) < 0.2 * count_parameters(AFFJORD, (1, 28, 28))


# -- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AugmentedTimeConditioning("hyper", k=5, m=6), ("m=6", "k=5")),
        (lambda: AugmentedTimeConditioning("hyper", k=0, m=1), ("k must be at least 1, got 0",)),
        (lambda: AugmentedTimeConditioning("concat", k=0), ("k must be at least 1, got 0",)),
        (lambda: AugmentedTimeConditioning("both", k=5, m=6), ("m=6", "k=5")),
        (lambda: AugmentedTimeConditioning("hypr"), ("'hypr'", "'hyper'")),
        (lambda: AugmentedTimeConditioning("hyper", rank=-1), ("rank=-1",)),
        (lambda: TimePath(0), ("k must be at least 1, got 0",)),
        (lambda: TimePath(3, nonlinearity="sine"), ("'sine'", "elu")),
        (lambda: CNF(MLP(2, (4,), AugmentedTimeConditioning("concat", k=3))), ("path=TimePath(3)",)),
        (lambda: CNF(MLP(2, (4,), AugmentedTimeConditioning("concat", k=3)), path=TimePath(4)), ("size 3", "size 4")),
        (lambda: CNF(MLP(2, (4,)), path=TimePath(4)), ("ConcatSquash", "AugmentedTimeConditioning")),
        (lambda: MLP(2, (4,), AugmentedTimeConditioning("concat", k=3))(torch.tensor(0.5), torch.randn(5, 2)), ("(3,)", "path=")),
        (lambda: MLP(2, (4,), AugmentedTimeConditioning("hyper", k=3, m=2))(torch.randn(5, 3), torch.randn(5, 2)), ("(5, 3)", "(3,)")),
        (lambda: MLP(2, (4,), AugmentedTimeConditioning("hyper", k=3, m=2))(torch.randn(5, 3), torch.randn(5, 2)), ("one set of weights per time",)),
        (lambda: MLP(2, (4,), AugmentedTimeConditioning("both", k=3, m=2))(torch.randn(5, 3), torch.randn(5, 2)), ("(5, 3)", "(3,)")),
        (lambda: SharedAugmentedTime([CNF(MLP(2))]), ("path",)),
        (lambda: SharedAugmentedTime([mlp_block("concat"), Sequential([mlp_block("concat")])]), ("blocks inside",)),
        (lambda: build(FlowConfig.of(augmented_time="hyper", augmented_time_entries=30), SolverConfig(), (2,)), ("m=30", "k=20")),
        (lambda: build(FlowConfig.of(augmented_time_dim=30), SolverConfig(), (2,)), ("augmented_time_dim=30", "augmented_time=")),
        (lambda: build(FlowConfig.of(augmented_time="concat", augmented_time_rank=3), SolverConfig(), (2,)), ("augmented_time_rank=3", "'hyper'", "'both'")),
        (lambda: build(FlowConfig.of(augmented_time_hidden=3), SolverConfig(), (2,)), ("augmented_time_hidden=3", "augmented_time='none'")),
        (lambda: build(FlowConfig.of(augmented_time="both", augmented_time_hidden=-1), SolverConfig(), (2,)), ("augmented_time_hidden=-1",)),
        (lambda: build(FlowConfig.of(augmented_time="both", generator=(8,)), SolverConfig(), (2,)), ("generator=(8,)", "'hypernet'")),
    ],
)  # fmt: skip
def test_clear_errors(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_a_field_of_ones_own_is_called_with_a():
    class Own(nn.Module):
        def forward(self, t, x, context=None):
            return -x * t.sum()

    path = TimePath(2)
    with torch.no_grad():
        for p in path.parameters():
            p.zero_()
        path.net[2].bias += 0.5  # a = t/2 (1, 1): f = -x t
    block = CNF(Own(), path=path, eval_solver=TIGHT).eval()
    x = torch.randn(3, 2)
    out = block(x)
    assert torch.allclose(out.value, x * math.exp(-0.5), atol=1e-9)
    assert torch.allclose(out.log_det, torch.full((3,), -1.0), atol=1e-9)
    assert torch.allclose(Bound(block.field)(torch.ones(2), x), -2 * x)
