"""Forward sensitivity in float64, against autodiff through the solve, matrix exponentials and quadrature."""

import math

import numpy as np
import pytest
import torch
from conftest import F64, normal, slow
from torch import nn
from torch.func import functional_call

from cnf.config import FlowConfig, SolverConfig
from cnf.errors import ConfigError, DataError
from cnf.fields import MLP, AugmentedTimeConditioning, ConvField, TimePath
from cnf.models import build
from cnf.ode.continuous import CNF
from cnf.ode.multiscale import SharedAugmentedTime, multiscale
from cnf.sensitivity import (
    jacobian,
    log_det,
    magnus,
    marginal_log_det,
    parameter_jacobian,
    piecewise_jacobian,
    response,
)
from cnf.solvers import Adaptive, FixedGrid
from cnf.transforms import Dequantize, Gaussianize, Logit, Request, Rescale, Sequential, Squeeze, Standardize, Transform

COARSE = FixedGrid("rk4", 2)
ACCURATE = FixedGrid("dopri5", 20)


def seeded(module, scale=0.2):
    generator = torch.Generator().manual_seed(0)
    for p in module.double().parameters():
        p.data += scale * torch.randn(p.shape, generator=generator, dtype=F64)
    return module


def autodiff(transform, x, context=None, back=False):
    """∂z/∂x (N, D, D) by back-propagation through the solve, row by row."""
    step = transform.inverse if back else transform.forward
    rows = []
    for i in range(len(x)):
        own = context[i : i + 1] if context is not None and context.ndim == 2 else context

        def row(y, own=own):
            return step(y[None], Request(own, log_det=False)).value.flatten()

        j = torch.autograd.functional.jacobian(row, x[i], vectorize=True)
        rows.append(j.flatten(1))
    return torch.stack(rows)


def distance(a, b):
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


class Custom(nn.Module):
    """A field of one's own, without jvp or divergence."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(normal(3, 3, seed=5))

    def forward(self, t, x, context=None):
        return torch.sin(x @ self.weight + t) * (1 + x.roll(1, -1))


class Polynomial(nn.Module):
    """f = (A0 + t A1 + t² A2) x, two or three matrices."""

    def __init__(self, *matrices):
        super().__init__()
        self.matrices = matrices

    def at(self, t):
        return sum(m * t**i for i, m in enumerate(self.matrices))

    def forward(self, t, x, context=None):
        return x @ self.at(t).T


BLOCKS = {
    "concatsquash": lambda **o: (CNF(MLP(3, (6, 6)), **o), (3,)),
    "hyper": lambda **o: (CNF(MLP(3, (6,), "hyper", residual="linear"), learn_end_time=True, **o), (3,)),
    "blend": lambda **o: (CNF(MLP(3, (6,), "blend", "softplus", context_dim=2), end_time=0.7, **o), (3,)),
    "custom": lambda **o: (CNF(Custom(), **o), (3,)),
    "conv": lambda **o: (CNF(ConvField(2, (3, 3)), **o), (2, 2, 4)),
}


def block_of(name, solver, n=2):
    block, event = BLOCKS[name](solver=solver, eval_solver=solver)
    seeded(block)
    context = normal(n, 2, seed=2) if name == "blend" else None
    return block, normal(n, *event, seed=1), context


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("back", [False, True])
def test_jacobian_of_a_grid_is_that_of_the_discretised_map(name, back):
    block, x, context = block_of(name, COARSE)
    with torch.no_grad():
        z, j = jacobian(block, x, context, back=back)
        z3, j3 = jacobian(block, x, context, back=back, chunk=2)
        step = block.inverse if back else block.forward
        value = step(x, Request(context, log_det=False)).value
    assert max(distance(z, value), distance(z3, z), distance(j3, j)) < 1e-13
    assert distance(j, autodiff(block, x, context, back)) < 1e-12


@pytest.mark.parametrize("name", BLOCKS)
def test_log_det_is_the_integral_of_the_divergence(name):
    block, x, context = block_of(name, ACCURATE)
    with torch.no_grad():
        out = block(x, Request(context))
        assert distance(log_det(block, x, context), out.log_det) < 1e-8
        assert distance(log_det(block, out.value, context, back=True), -out.log_det) < 1e-8
        tight = Adaptive("dopri5", 1e-11, 1e-11)
        assert distance(log_det(block, x, context, solver=tight), out.log_det) < 1e-8


def test_linear_field_has_the_matrix_exponential():
    a = normal(4, 4)
    block = CNF(Polynomial(a), end_time=1.5)
    expected = torch.linalg.matrix_exp(1.5 * a).expand(2, 4, 4)
    _, j = jacobian(block, normal(2, 4), solver=FixedGrid("dopri5", 100))
    assert distance(j, expected) < 1e-8
    out = magnus(block, normal(2, 4), order=1, steps=1)
    assert distance(out.jacobian, expected) < 1e-12  # of a constant matrix Ω₁ alone is exact


def test_the_marginal_map_has_the_determinant_of_its_own_jacobian():
    block, x, start = block_of("concatsquash", COARSE)[0], normal(4, 2), normal(1)
    y, value = marginal_log_det(block, x, start)

    def marginal(point):
        return block(torch.cat([point, start])[None], Request(log_det=False)).value[0, :2]

    for n in range(4):
        assert distance(y[n], marginal(x[n])) < 1e-13
        assert distance(value[n], torch.linalg.slogdet(torch.autograd.functional.jacobian(marginal, x[n]))[1]) < 1e-12
    # a linear field: the upper left part of the matrix exponential
    a = normal(3, 3)
    found = marginal_log_det(CNF(Polynomial(a)), x, start, solver=FixedGrid("dopri5", 100))[1]
    assert distance(found, torch.linalg.slogdet(torch.linalg.matrix_exp(a)[:2, :2])[1].expand(4)) < 1e-8
    with pytest.raises(DataError, match=r"one vector \(k,\)"):
        marginal_log_det(block, x, start[None])
    with pytest.raises(DataError, match=r"x has type torch.float32, but the weights are torch.float64"):
        marginal_log_det(block, x.float(), start)
    with pytest.raises(DataError, match="start is a list"):
        marginal_log_det(block, x, [0.0])


def test_nothing_of_the_divergence_is_used():
    class Broken:
        def probe(self, *args):
            raise AssertionError("a divergence was evaluated")

        linearize = probe

    block, x, _ = block_of("concatsquash", COARSE)
    expected = log_det(block, x)
    block.divergence = Broken()
    assert distance(log_det(block, x), expected) == 0


@pytest.mark.parametrize("solver", [
    FixedGrid("dopri5", 16),
    FixedGrid("dopri5", 16, "checkpoint"),
    Adaptive("dopri5", 1e-10, 1e-10, "adjoint"),
], ids=lambda solver: solver.gradient)  # fmt: skip
def test_log_det_is_differentiable(solver):
    block, x, _ = block_of("concatsquash", FixedGrid("dopri5", 16))
    ours = torch.autograd.grad(log_det(block, x, solver=solver).sum(), list(block.parameters()))
    truth = torch.autograd.grad(block(x).log_det.sum(), list(block.parameters()))
    assert max(distance(a, b) for a, b in zip(ours, truth, strict=True)) < 1e-8


def vector_chain():
    marginals = Gaussianize((3,), 5)
    marginals.fit(torch.rand(40, 3, generator=torch.Generator().manual_seed(3)))
    plain = Sequential([marginals, Standardize(normal(3), normal(3, seed=7).exp())])
    return Sequential([plain, CNF(MLP(3, (5,)), end_time=0.5), CNF(Custom(), end_time=0.3)]), (3,)


def image_chain():
    parts = [Dequantize(17), Logit(0.05), CNF(ConvField(1, (3,))), Squeeze(), Rescale(), CNF(ConvField(4, (3,)))]
    return Sequential(parts), (1, 4, 4)


def scales():
    chain = multiscale((1, 8, 8), lambda shape: CNF(ConvField(shape[0], (2,), nonlinearity="tanh"), end_time=0.5))
    return Sequential([Logit(0.05), chain]), (1, 8, 8)


@pytest.mark.parametrize("make", [vector_chain, image_chain, scales])
def test_chains_hand_the_tangents_on(make):
    chain, event = make()
    seeded(chain, 0.1)
    solver = FixedGrid("dopri5", 8)
    for block in (m for m in chain.modules() if isinstance(m, CNF)):
        block.solver = solver
    n = 1 if math.prod(event) > 50 else 2
    x = 0.1 + 0.8 * torch.rand(n, *event, dtype=F64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = chain(x)
        z, j = jacobian(chain, x)
        x2, inverse = jacobian(chain, z, back=True, chunk=50)
    assert distance(z, out.value) < 1e-13
    assert max(distance(x2, x), distance(inverse @ j, torch.eye(len(j[0]), dtype=F64).expand_as(j))) < 1e-7
    assert distance(torch.linalg.slogdet(j)[1], out.log_det) < 1e-8
    assert distance(j, autodiff(chain, x)) < 1e-10


@pytest.mark.parametrize("model", [
    {"architecture": "stack", "blocks": 2},
    {"architecture": "multiscale", "field": "conv"},
    {"architecture": "parallel", "field": "conv"},
])  # fmt: skip
def test_whole_flows(model):
    torch.manual_seed(0)
    config = FlowConfig.of(hidden=(3,), preprocess="logit", zero_init=False, **model)
    flow = seeded(build(config, SolverConfig(), (1, 4, 4), levels=17), 0.1)
    x = torch.rand(2, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for block in flow.blocks:
            block.solver = ACCURATE
        assert distance(log_det(flow.transform, x), flow.transform(x).log_det) < 1e-8


# Magnus


def test_terms_of_a_matrix_linear_in_time():
    a0, a1 = normal(3, 3), normal(3, 3, seed=2)
    h = 0.7
    out = magnus(CNF(Polynomial(a0, a1), end_time=h), normal(1, 3), order=3, steps=1)
    bracket = a0 @ a1 - a1 @ a0
    nested = a1 @ bracket - bracket @ a1
    # the simplex integrals by hand: ∫∫ (t2 - t1) = -h³/6, and E[2 t1 t3 - t1 t2 - t2 t3] = -3/20 on the 3-simplex
    expected = (h * a0 + h**2 / 2 * a1, -(h**3) / 12 * bracket, -(h**5) / 240 * nested)
    for term, truth in zip(out.terms, expected, strict=True):
        assert distance(term[0, 0], truth) < 1e-12


def test_third_term_against_nested_quadrature():
    matrices = normal(3, 2, 2)
    h, m = 0.9, 4
    field = Polynomial(*matrices)
    out = magnus(CNF(field, end_time=h), normal(1, 2), order=3, steps=1, nodes=5)
    nodes, weights = np.polynomial.legendre.leggauss(m + 4)
    nodes, weights = (nodes + 1) / 2, weights / 2
    second, third = torch.zeros(2, 2, dtype=F64), torch.zeros(2, 2, dtype=F64)

    def bracket(p, q):
        return p @ q - q @ p

    for u, p in zip(nodes, weights, strict=True):
        t1 = h * u
        for v, q in zip(nodes, weights, strict=True):
            t2 = t1 * v
            second += 0.5 * p * q * h * t1 * bracket(field.at(t1), field.at(t2))
            for w, r in zip(nodes, weights, strict=True):
                a, b, c = field.at(t1), field.at(t2), field.at(t2 * w)
                third += p * q * r * h * t1 * t2 / 6 * (bracket(a, bracket(b, c)) + bracket(c, bracket(b, a)))
    assert distance(out.terms[1, 0, 0], second) < 1e-11
    assert distance(out.terms[2, 0, 0], third) < 1e-11
    for nodes in (3, 6, 12):  # three interpolate an A of degree two exactly
        again = magnus(CNF(field, end_time=h), normal(1, 2), order=3, steps=1, nodes=nodes)
        assert distance(again.terms, out.terms) < 1e-11


MAGNUS = {
    "linear": lambda h: (CNF(Polynomial(*normal(3, 3, 3)), end_time=h), normal(2, 3)),
    "mlp": lambda h: (seeded(CNF(MLP(3, (8, 8), "concat"), end_time=h), 0.6), normal(16, 3)),
    "custom": lambda h: (CNF(Custom(), end_time=h), normal(16, 3)),
    "driven": lambda h: (
        seeded(CNF(MLP(3, (8,), AugmentedTimeConditioning("hyper", 4, 4)), path=TimePath(4), end_time=h), 0.6),
        normal(16, 3),
    ),
}


@pytest.mark.parametrize("name", MAGNUS)
def test_local_orders(name):
    steps = [0.1, 0.05, 0.025]
    errors = []
    for h in steps:
        torch.manual_seed(0)
        block, x = MAGNUS[name](h)
        with torch.no_grad():
            truth = jacobian(block, x, solver=FixedGrid("dopri5", 12))[1]
            errors.append([float((magnus(block, x, order=k, steps=1).jacobian - truth).norm()) for k in (1, 2, 3)])
    slopes = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert float(abs(slopes - np.array([3, 5, 5])).max()) < 0.2, slopes
    assert all(third < second < first for first, second, third in errors)


def test_magnus_on_a_grid():
    block, x, context = block_of("blend", ACCURATE)
    with torch.no_grad():
        z, truth = jacobian(block, x, context)
        fine, coarse = magnus(block, x, context, steps=8), magnus(block, x, context, steps=4)
        third = magnus(block, x, context, steps=8, order=3)
    assert distance(fine.z, z) < 1e-8
    ratio = distance(coarse.jacobian, truth) / distance(fine.jacobian, truth)
    assert 12 < ratio < 20  # order 4 over a whole path
    traces = third.terms.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert float(traces[1:].abs().max()) < 1e-15
    assert distance(fine.log_det, log_det(block, x, context)) < 1e-8
    assert distance(torch.linalg.slogdet(fine.jacobian)[1], fine.log_det) < 1e-12


# parameters


def gradients(z, tensors):
    """∂z/∂θ (N, *event, *shape) for each of ``tensors``, by autodiff."""
    rows = [torch.autograd.grad(v, tensors, retain_graph=True, materialize_grads=True) for v in z.flatten()]
    return [torch.stack(column).reshape(*z.shape, *column[0].shape) for column in zip(*rows, strict=True)]


def solved(block, x, theta, solver, shares=(0.0, 1.0), context=None):
    """z where the field's parameters are theta(t), by plain autograd."""
    first, last = shares
    end = block.end_time(x)

    def rhs(s, state):
        t = end * (first + s * (last - first))
        named = {name.removeprefix("field."): value for name, value in theta(t).items()}
        return (end * (last - first) * functional_call(block.field, named, (t, state[0], context)),)

    return solver.solve(rhs, (x,)).state[0]


@pytest.mark.parametrize("name", BLOCKS)
def test_parameter_jacobian(name):
    block, x, context = block_of(name, COARSE, n=2)
    z, ours = parameter_jacobian(block, x, context, chunk=None if name != "hyper" else 7)
    names, tensors = zip(*block.named_parameters(), strict=True)
    value = block(x, Request(context, log_det=False)).value
    assert list(ours) == list(names)
    assert distance(z, value) < 1e-13
    for parameter, truth in zip(names, gradients(value, tensors), strict=True):
        assert distance(ours[parameter], truth) < 1e-12, parameter


def test_parameter_jacobian_of_the_exact_ode():
    block, x, _ = block_of("concatsquash", Adaptive("dopri5", 1e-11, 1e-11), n=1)
    names = [n for n, _ in block.named_parameters()][:3:2]
    _, ours = parameter_jacobian(block, x, names=names)
    value = block(x, Request(log_det=False)).value
    for name, truth in zip(names, gradients(value, [block.get_parameter(n) for n in names]), strict=True):
        assert distance(ours[name], truth) < 1e-8


def test_response_is_the_derivative_along_a_function_of_time():
    grid = FixedGrid("dopri5", 4)
    block, x, context = block_of("blend", grid)
    names = [n for n, _ in block.named_parameters()]
    own = {n: block.get_parameter(n).detach() for n in names}
    moves = {n: normal(*p.shape, seed=i) for i, (n, p) in enumerate(own.items())}
    steps = {n: normal(*p.shape, seed=20 + i) for i, (n, p) in enumerate(own.items())}

    def base(t):
        return {n: own[n] + 0.3 * torch.sin(3 * t) * steps[n] for n in names[::2]}

    def change(t):
        return {n: torch.cos(5 * t) * moves[n] for n in names}

    for parameters in (None, base):
        size = torch.zeros((), dtype=F64, requires_grad=True)

        def theta(t, parameters=parameters, size=size):
            now = own | ({} if parameters is None else parameters(t))
            return {n: now[n] + size * v for n, v in change(t).items()}

        value = solved(block, x, theta, grid, context=context)
        (truth,) = gradients(value, [size])
        with torch.no_grad():
            z, dz = response(block, x, change, context, parameters=parameters)
        assert distance(z, value) < 1e-12
        assert distance(dz, truth) < 1e-12
        assert float(truth.abs().max()) > 0.1


def test_response_is_the_integral_with_the_cable_rule():
    """∫ Y(T) Y(t)⁻¹ (∂f/∂θ)(t) δθ(t) dt by Gauss-Legendre (AFFJORD, eq. 13)."""
    block, x, _ = block_of("concatsquash", ACCURATE)
    name = next(iter(dict(block.named_parameters())))
    own, move = block.get_parameter(name).detach(), normal(*block.get_parameter(name).shape)
    nodes, weights = np.polynomial.legendre.leggauss(8)
    _, whole = jacobian(block, x)
    total = torch.zeros_like(x)
    for t, w in zip((nodes + 1) / 2, weights / 2, strict=True):
        now = torch.tensor(t, dtype=F64)
        part = CNF(block.field, end_time=float(t), solver=ACCURATE).double()
        point, until = jacobian(part, x)
        slope = torch.func.jvp(
            lambda p: functional_call(block.field, {name.removeprefix("field."): p}, (now, point)),
            (own,), (torch.exp(now) * move,),
        )[1]  # fmt: skip
        total = total + w * (whole @ torch.linalg.solve(until, slope[..., None]))[..., 0]
    dz = response(block, x, lambda t: {name: torch.exp(t) * move})[1]
    assert distance(dz, total) < 1e-8


@pytest.mark.parametrize("chunk", [None, 5])
def test_piecewise_constant_parameters(chunk):
    block, x, context = block_of("blend", COARSE, n=2)
    names = [n for n, _ in block.named_parameters()][1:3]
    own = {n: block.get_parameter(n).detach() for n in names}
    pieces = [{n: (p + 0.3 * normal(*p.shape, seed=k)).requires_grad_() for n, p in own.items()} for k in range(3)]
    value = x
    for k, piece in enumerate(pieces):
        value = solved(block, value, lambda t: piece, COARSE, (k / 3, (k + 1) / 3), context)
    with torch.no_grad():
        z, ours = piecewise_jacobian(block, x, pieces, context, names=names, chunk=chunk)
    assert distance(z, value) < 1e-13
    for k, piece in enumerate(pieces):
        for name, truth in zip(names, gradients(value, list(piece.values())), strict=True):
            assert distance(ours[name][k], truth) < 1e-12


@pytest.mark.slow
def test_pieces_that_are_alike_add_up_to_the_constant_parameters():
    block, x, _ = block_of("custom", FixedGrid("dopri5", 16))
    with torch.no_grad():
        _, constant = parameter_jacobian(block, x)
        _, pieces = piecewise_jacobian(block, x, [{}] * 4, solver=FixedGrid("dopri5", 4))
        units = torch.eye(9, dtype=F64).reshape(9, 3, 3)
        each = [response(block, x, lambda t: {"field.weight": unit})[1] for unit in units]
    for name, value in constant.items():
        assert distance(pieces[name].sum(0), value) < 1e-8
    assert distance(torch.stack(each, -1).reshape(2, 3, 3, 3), constant["field.weight"]) < 1e-12


# AFFJORD: the learned, augmented time


AUGMENTED_TIME_LAYERS = {
    "concat": AugmentedTimeConditioning("concat", k=3),
    "hyper": AugmentedTimeConditioning("hyper", k=3, m=2),
    "low rank": AugmentedTimeConditioning("both", k=3, m=3, rank=2),
}


def driven_mlp(drive, **options):
    return CNF(MLP(3, (6, 6), drive, **options), path=TimePath(3, learn_start=True))


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("path", [False, True])
def test_gradient_of_a_jacobian_in_every_mode(path, back):
    torch.manual_seed(0)
    field = MLP(3, (6,), AUGMENTED_TIME_LAYERS["hyper"] if path else "concat")
    block = seeded(CNF(field, learn_end_time=True, path=TimePath(3, learn_start=True) if path else None))
    found = []
    for solver in (
        FixedGrid("dopri5", 12),
        FixedGrid("dopri5", 12, "checkpoint"),
        Adaptive("dopri5", 1e-9, 1e-9, "adjoint"),
    ):
        z, j = jacobian(block, normal(2, 3), solver=solver, back=back)
        found.append(torch.autograd.grad(z.square().sum() + j.square().sum(), list(block.parameters())))
    for other in found[1:]:
        for (name, _), a, b in zip(block.named_parameters(), found[0], other, strict=True):
            assert distance(a, b) < 1e-5 * (1 + float(a.abs().max())), name


def driven_chain(drive):
    parts = [driven_mlp(drive), Standardize(normal(3), normal(3, seed=7).exp()), driven_mlp(drive), driven_mlp(drive)]
    return SharedAugmentedTime(parts), (3,)


def driven_sequence(drive):
    return Sequential([driven_mlp(drive), SharedAugmentedTime([driven_mlp(drive), driven_mlp(drive)])]), (3,)


def driven_scales(drive):
    def block(shape):
        return CNF(ConvField(shape[0], (2,), drive), end_time=0.8, path=TimePath(3, learn_start=True))

    return multiscale((1, 8, 8), block, num_blocks=2), (1, 8, 8)


def driven_conv(drive):
    return CNF(ConvField(2, (3, 3), drive), learn_end_time=True, path=TimePath(3)), (2, 3, 4)


AUGMENTED = {
    "mlp": lambda drive: (driven_mlp(drive), (3,)),
    "conv": driven_conv,
    "carried": driven_chain,
    "sequential": driven_sequence,
    "multiscale": driven_scales,
}
KEPT = {("mlp", "low rank"), ("conv", "low rank"), ("carried", "low rank"), ("sequential", "hyper"), ("multiscale", "concat")}  # every flow and every drive


@pytest.mark.parametrize(("name", "drive"), [
    (name, drive) if (name, drive) in KEPT else slow(name, drive)
    for name in AUGMENTED for drive in AUGMENTED_TIME_LAYERS if drive != "low rank" or name in ("mlp", "conv", "carried")
])  # fmt: skip
def test_log_det_of_augmented_flows(name, drive):
    torch.manual_seed(0)
    flow, event = AUGMENTED[name](AUGMENTED_TIME_LAYERS[drive])
    seeded(flow, 0.2 if len(event) == 1 else 0.1)
    solver = FixedGrid("dopri5", 14 if len(event) == 1 else 8)
    for block in (m for m in flow.modules() if isinstance(m, CNF)):
        block.solver = solver
    x = normal(1 if name == "multiscale" else 3, *event)
    with torch.no_grad():
        out = flow(x)
        z, j = jacobian(flow, x)
        assert distance(z, out.value) < 1e-13
        assert distance(torch.linalg.slogdet(j)[1], out.log_det) < 1e-8
        back = flow.inverse(z)
        x2, inverse = jacobian(flow, z, back=True)
        assert max(distance(x2, x), distance(back.value, x2)) < 1e-8
        assert distance(torch.linalg.slogdet(inverse)[1], back.log_det) < 1e-8
    assert distance(j, autodiff(flow, x)) < 1e-11
    assert float(out.log_det.abs().min()) > 1e-3


@pytest.mark.parametrize("drive", ["concat", "hyper"])
def test_log_det_of_augmented_flows_by_an_adaptive_solver(drive):
    chain = seeded(SharedAugmentedTime([driven_mlp(AUGMENTED_TIME_LAYERS[drive], context_dim=2), driven_mlp(AUGMENTED_TIME_LAYERS[drive], context_dim=2)])).eval()
    for block in chain.transforms:
        block.eval_solver = Adaptive("dopri5", 1e-10, 1e-10)
    x, context = normal(2, 3), normal(2, 2, seed=2)
    with torch.no_grad():
        z, claimed, _, _ = chain(x, Request(context))
        assert distance(log_det(chain, x, context), claimed) < 1e-8
        assert distance(log_det(chain, z, context, back=True), -claimed) < 1e-8
        afresh = log_det(Sequential(chain.transforms), x, context)
        assert distance(afresh, claimed) > 1e-3  # what is carried matters


@pytest.mark.parametrize("drive", AUGMENTED_TIME_LAYERS)
def test_parameters_of_augmented_fields(drive):
    block = seeded(driven_mlp(AUGMENTED_TIME_LAYERS[drive], context_dim=2))
    block.solver = COARSE
    x, context = normal(2, 3), normal(2, seed=2)
    _, ours = parameter_jacobian(block, x, context)
    value = block(x, Request(context, log_det=False)).value
    names, tensors = zip(*block.named_parameters(), strict=True)
    assert {"path.initial", "path.net.0.weight"} < set(names)
    for name, truth in zip(names, gradients(value, tensors), strict=True):
        assert distance(ours[name], truth) < 1e-12, name
        if name.startswith("path"):
            assert float(truth.abs().max()) > 1e-3
    # in each half of the time by itself
    _, pieces = piecewise_jacobian(block, x, [{}] * 2, context, solver=FixedGrid("rk4", 1))
    assert max(distance(pieces[n].sum(0), ours[n]) for n in names) < 1e-12
    _, dz = response(block, x, lambda t: {"path.initial": torch.ones(3, dtype=F64)}, context)
    assert distance(dz, ours["path.initial"].sum(-1)) < 1e-12


# what cannot be


def test_errors():
    block, x, _ = block_of("concatsquash", COARSE)
    name, shape = next((n, p.shape) for n, p in block.named_parameters())

    class Wrapped(Transform):
        def __init__(self):
            super().__init__()
            self.block = block

    for call, message in [
        (lambda: jacobian(block, x, chunk=0), "chunk must be at least 1, got 0"),
        (lambda: jacobian(Wrapped(), x), "Wrapped"),
        (lambda: magnus(block, x, order=4), "order must be 1, 2 or 3, got 4"),
        (lambda: magnus(block, x, steps=0), "steps must be at least 1"),
        (lambda: magnus(block, x, nodes=2), "nodes must be at least 3, got 2"),
        (lambda: parameter_jacobian(block, x, names=[name + "s"]), "did you mean"),
        (lambda: parameter_jacobian(block, x, names=[]), "names is empty"),
        (lambda: piecewise_jacobian(block, x, []), "pieces is empty"),
        (lambda: piecewise_jacobian(block, x, [{name: torch.zeros(1)}]), "shape"),
        (lambda: response(block, x, lambda t: {name: torch.zeros(1)}), str(tuple(shape))),
        (lambda: response(block, x, lambda t: {"nothing": torch.zeros(1)}), "no parameter"),
    ]:
        with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")):
            call()
    timed, y, _ = block_of("hyper", COARSE)
    with pytest.raises(ConfigError, match="whole block"):
        piecewise_jacobian(timed, y, [{}], names=["sqrt_end_time"])
    with pytest.raises(ConfigError, match="whole block"):
        response(timed, y, lambda t: {"sqrt_end_time": t})
    for bad in (torch.zeros(3), torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(0, 3)):
        with pytest.raises(DataError, match="expected floats"):
            jacobian(block, bad)
