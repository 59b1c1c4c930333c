"""Fields and transforms that hide their derivative, their randomness or their weights from torch, or write into what they are given."""

import math
import random
import warnings

import numpy as np
import pytest
import torch
from conftest import F64, mostly_slow
from torch import nn

from cnf import CNF, Adaptive, Exact, FixedGrid, Flow, Hutchinson, Noise, from_velocity
from cnf.errors import ConfigError, DataError, SolverError
from cnf.fields import MLP, AugmentedTimeConditioning, ConvField, TimePath
from cnf.neural_ode import NeuralODE
from cnf.ode.multiscale import multiscale
from cnf.ode.quadratures import Directional, TotalDerivative
from cnf.solvers import Reversible, Stats
from cnf.transforms import DeterministicTransform, Request, Sequential, Transform, TransformOutput

GRID = FixedGrid("rk4", 4)
POINTS = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).to(F64)

    def forward(self, t, x):
        return self.net(x)


def flow_of(field, divergence=None):
    return Flow(CNF(field, divergence, GRID, GRID), (2,))


# -- derivatives -------------------------------------------------------------------------------------------------------


class Detached(Field):
    def forward(self, t, x):
        return self.net(x.detach())


class Partly(Field):
    def forward(self, t, x):
        return self.net(x.detach()) + 0.1 * x


class Inference(Field):
    @torch.inference_mode()
    def forward(self, t, x):
        return self.net(x)


class Unrecorded(Field):
    @torch.no_grad()
    def forward(self, t, x):
        return self.net(x)


class StraightThrough(Field):
    """Values that are rounded, with the derivative of those that are not."""

    def forward(self, t, x):
        y = self.net(x)
        return y + (y.mul(4).round() / 4 - y).detach()


class Numpy(Field):
    def forward(self, t, x):
        return torch.from_numpy(np.tanh(x.detach().numpy()))


class WrongProduct(Field):
    def jvp(self, t, x, v, context=None, *, t_dot=None):
        return self(t, x), 0 * v


@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(), Hutchinson(mode="reverse")], ids=["exact", "forward", "reverse"])
@pytest.mark.parametrize("kind", [Detached, Partly, Inference, Unrecorded, StraightThrough, Numpy, WrongProduct])
def test_a_derivative_that_is_not_that_of_the_values_is_refused(kind, divergence):
    flow, truth = flow_of(kind(), divergence), flow_of(Field(), divergence)
    if kind not in (Partly, StraightThrough, Numpy):
        assert torch.equal(flow.encode(POINTS), truth.encode(POINTS))  # the map needs no derivative
    right = (kind is Unrecorded and divergence.__class__.__name__ + getattr(divergence, "mode", "forward") != "Hutchinsonreverse") or (
        kind is WrongProduct and getattr(divergence, "mode", "") == "reverse"
    )
    if right:
        torch.testing.assert_close(flow.log_prob(POINTS, noise=Noise(0)), truth.log_prob(POINTS, noise=Noise(0)))
        return
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"field {kind.__name__} has a derivative that does not match its values: .* (detach|torch)"):
            flow.log_prob(POINTS, noise=Noise(0))


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, g):
        return g * (1 - torch.tanh(ctx.saved_tensors[0]) ** 2)


class Once(Twice):
    backward = staticmethod(torch.autograd.function.once_differentiable(Twice.backward))


class NumpyBackward(Twice):
    @staticmethod
    def backward(ctx, g):
        return g * torch.from_numpy(1 - np.tanh(ctx.saved_tensors[0].detach().numpy()) ** 2)


class Constant(Twice):
    @staticmethod
    def forward(ctx, x):
        ctx.slope = (1 - torch.tanh(x) ** 2).detach()
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.slope


class Applied(Field):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, t, x):
        return self.net[2](self.function(self.net[0](x)))


class Checkpointed(Field):
    def forward(self, t, x):
        return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)


@pytest.mark.parametrize("solver", [GRID, FixedGrid("rk4", 4, gradient="checkpoint"), Adaptive(gradient="adjoint"), Reversible("rk4", 4)], ids=lambda s: s.gradient)
@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(), Hutchinson(mode="reverse")], ids=["exact", "forward", "reverse"])
def test_a_gradient_of_the_log_det_that_is_not_that_of_its_values_is_refused(solver, divergence):
    """Its derivative is right and its second derivative zero: the values are right, and the gradient would be wrong."""
    truth = Flow(CNF(Field(), divergence, solver), (2,))
    x = POINTS.clone().requires_grad_()
    right = truth.log_prob(x, noise=Noise(0))
    slopes = torch.autograd.grad(right.sum(), [x, *truth.parameters()])
    for field in (Applied(Twice.apply), Checkpointed()):
        flow = Flow(CNF(field, divergence, solver), (2,))
        found = flow.log_prob(x, noise=Noise(0))
        torch.testing.assert_close(found, right)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), [x, *flow.parameters()]), slopes)
    for function in (Once, NumpyBackward, Constant):
        flow = Flow(CNF(Applied(function.apply), divergence, solver), (2,))
        for _ in range(2):
            found = flow.log_prob(x, noise=Noise(0))
            torch.testing.assert_close(found, right)
            with pytest.raises(ConfigError, match=r"field Applied has a second derivative that does not match its values: 0 by autodiff and .* differentiable twice"):
                torch.autograd.grad(found.sum(), [x, *flow.parameters()])
        flow.encode(x).sum().backward()  # needs the first derivative alone


def test_a_part_that_is_switched_off_at_first_is_checked_when_it_acts():
    class Gated(Field):
        def __init__(self, extra):
            super().__init__()
            self.gate, self.extra = nn.Parameter(torch.zeros((), dtype=F64)), extra

        def forward(self, t, x):
            return self.net(x) + self.gate * self.extra(x)

    class Last(Detached):
        def __init__(self):
            super().__init__()
            self.gate = self.net[2].weight
            nn.init.zeros_(self.gate)

    class Later(Field):
        def forward(self, t, x):
            return self.net(x) + t * x.mean(0)

    with pytest.raises(ConfigError, match="another value for a row"):
        flow_of(Later()).log_prob(POINTS)
    for made, message in ((lambda: Gated(lambda x: x.mean(0)), "another value for a row"), (Last, "a derivative that does not match")):
        for training in (True, False):
            field = made()
            flow = flow_of(field).train(training)
            flow.log_prob(POINTS)
            with torch.no_grad():
                field.gate += 1.0
            for _ in range(2):
                with pytest.raises(ConfigError, match=message):
                    flow.log_prob(POINTS)


@pytest.mark.parametrize("path", [False, True])
def test_a_time_that_is_read_as_a_number_gives_a_learned_one_no_wrong_gradient(path):
    class Timed(Field):
        def __init__(self, read):
            super().__init__()
            self.read = read

        def forward(self, t, x):
            return self.net(x) * self.read(t)

    def flow(read):
        torch.manual_seed(1)
        options = {"path": TimePath(2, learn_start=True)} if path else {"learn_end_time": True}
        return Flow(CNF(Timed(read), Exact(), FixedGrid("rk4", 16), **options), (2,)).to(F64)

    right = flow(lambda t: 1 + t.square().sum())
    p = right.transform.path.initial if path else right.transform.sqrt_end_time
    (slope,) = torch.autograd.grad(right.log_prob(POINTS).sum(), p)
    ends = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            p += step
            ends.append(right.log_prob(POINTS).sum())
    torch.testing.assert_close(slope.sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-8)
    wrong = flow(lambda t: 1 + sum(v**2 for v in t.flatten().tolist()))
    with pytest.raises(ConfigError, match=r"field Timed has a derivative in t that does not match its values: 0 by autodiff and .* float\(t\)"):
        wrong.log_prob(POINTS)
    with torch.no_grad():
        wrong.log_prob(POINTS)
    if not path:
        wrong.transform.learn_end_time, wrong.transform.fixed_end_time = False, 1.0
        wrong.log_prob(POINTS)  # nothing takes its derivative in t


def test_torch_func_in_a_field_and_chunks_of_the_exact_trace():
    class Func(Field):
        def forward(self, t, x):
            return torch.func.vmap(torch.func.grad(lambda y: self.net(y).square().sum()))(x)

    found, truth = ([] for _ in range(2))
    for chunk, into in ((1, found), (2, truth)):
        flow = flow_of(Func(), Exact(chunk=chunk))
        log_prob = flow.log_prob(POINTS)
        into += [log_prob, *torch.autograd.grad(log_prob.sum(), [*flow.parameters()], allow_unused=True, materialize_grads=True)]
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("value", [lambda x: x.abs(), lambda x: nn.functional.relu(x), lambda x: torch.sin(1e4 * x), lambda x: 0 * x])
def test_kinks_and_fast_fields_pass(value):
    class Kinked(Field):
        def forward(self, t, x):
            return 0.1 * value(x)

    flow = Flow(CNF(Kinked(), Exact(), GRID), (2,)).float()
    for x in (torch.zeros(5, 2), torch.randn(5, 2), 1e17 * torch.ones(3, 2)):
        flow.log_prob(x)


def test_inference_mode_changes_no_number():
    for field, divergence in ((Field(), Hutchinson(mode="reverse")), (MLP(2, (8,)).to(F64), Hutchinson(mode="reverse")), (Field(), Exact())):
        flow = flow_of(field, divergence)
        truth, score = flow.log_prob(POINTS, noise=Noise(0)), flow.score(POINTS, noise=Noise(0))
        with torch.inference_mode():
            x = POINTS.clone()
            torch.testing.assert_close(flow.log_prob(x, noise=Noise(0)), truth.detach())
            torch.testing.assert_close(flow.score(x, noise=Noise(0)), score)


def test_torch_jit_and_wrappers_of_two_arguments():
    truth = flow_of(Field()).log_prob(POINTS)
    with pytest.warns():
        made = [torch.jit.script(Field()), torch.jit.trace(Field(), (torch.zeros((), dtype=F64), POINTS))]
    made += [torch.compile(Field(), backend="eager"), nn.DataParallel(Field()), torch.optim.swa_utils.AveragedModel(Field())]
    for field in made:
        flow = flow_of(field)
        assert flow.context_dim == 0
        found = flow(POINTS)
        torch.testing.assert_close(found, truth)
        found.sum().backward()
        flow_of(field, Exact(chunk=1)).log_prob(POINTS).sum().backward()
        torch.testing.assert_close(flow_of(field, Hutchinson()).log_prob(POINTS, noise=Noise(0)), flow_of(Field(), Hutchinson()).log_prob(POINTS, noise=Noise(0)))


def test_a_second_derivative_at_a_state_of_zero_is_finite():
    flow = Flow(CNF(MLP(2, (8,), AugmentedTimeConditioning("hyper", 3, 3)), solver=Adaptive(), path=TimePath(3, learn_start=True)), (2,)).to(F64)
    x = POINTS.clone().requires_grad_()
    (slope,) = torch.autograd.grad(flow.log_prob(x).sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in flow.parameters() if p.grad is not None)


# -- randomness, weights, signatures -----------------------------------------------------------------------------------


class PythonRandom(Field):
    def forward(self, t, x):
        return self.net(x) * (1.0 if random.random() < 0.5 else 0.1)


class NumpyRandom(Field):
    def forward(self, t, x):
        return self.net(x) * float(np.random.default_rng().uniform(0.5, 1))


class OwnGenerator(Field):
    generator = torch.Generator().manual_seed(0)

    def forward(self, t, x):
        return self.net(x) * torch.rand(x.shape, generator=torch.Generator().manual_seed(random.getrandbits(30)), dtype=x.dtype)


@pytest.mark.parametrize("kind", [PythonRandom, NumpyRandom, OwnGenerator])
def test_randomness_that_is_not_torchs_is_refused(kind):
    random.seed(0)
    with pytest.raises(ConfigError, match=rf"field {kind.__name__} returns another value for the same point .* torch's global generator"):
        flow_of(kind()).encode(POINTS)


def test_lazy_layers_are_refused_until_they_have_weights():
    class Lazy(Field):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 2))

    flow, x = Flow(CNF(Lazy(), solver=GRID), (2,)), POINTS.float()
    with pytest.raises(ConfigError, match=r"Lazy has lazy layers without weights: call it once"):
        flow.log_prob(x)
    flow.transform.field(torch.zeros(()), x)
    assert flow.log_prob(x).shape == (4,)


def test_predictors_check_what_they_are_given():
    class PointFirst(Field):
        def forward(self, x, t):
            return self.net(x)

    for field, message in ((PointFirst(), "takes the point first"), (lambda t, x: -x, "field is a function"), ([Field(), 3], "field is a int")):
        with pytest.raises(ConfigError, match=message):
            NeuralODE(field, (2,), 1)


# -- transforms that write ---------------------------------------------------------------------------------------------


class Doubling(Transform):
    def forward(self, x, request):
        if request.context is not None:
            request.context.zero_()
        return TransformOutput(x.mul_(2), x.new_full((len(x),), x[0].numel() * 0.6931471805599453), {}, Stats())

    def inverse(self, z, request):
        return TransformOutput(z.div_(2), z.new_full((len(z),), -z[0].numel() * 0.6931471805599453), {}, Stats())


class Halved(DeterministicTransform):
    def _forward(self, x):
        return x.mul_(0.5), x.new_full((len(x),), -x[0].numel() * 0.6931471805599453)

    def _inverse(self, z):
        return z.mul_(2), z.new_full((len(z),), z[0].numel() * 0.6931471805599453)


def test_a_transform_of_two_maps_cannot_change_what_it_is_handed():
    x = POINTS.clone()
    flow = Flow(Halved(), (2,))
    torch.testing.assert_close(flow.decode(flow.encode(x)), POINTS)
    assert torch.equal(x, POINTS)


def test_a_transform_cannot_change_what_it_is_handed():
    block = CNF(MLP(2, (8,), context_dim=2), Exact(), GRID).to(F64)
    for transform in (Doubling(), Sequential([Doubling()]), Sequential([Doubling(), block])):
        flow, x, context = Flow(transform, (2,)), POINTS.clone(), POINTS.clone() if block in transform.modules() else None
        flow.register_buffer("kind", torch.zeros(1, dtype=F64))
        z = flow.encode(x, context)
        kept = z.clone()
        torch.testing.assert_close(flow.decode(z, context), x)
        flow.score(x, context)
        assert torch.equal(x, POINTS) and torch.equal(z, kept) and (context is None or torch.equal(context, POINTS))
        samples, log_prob = flow.sample_and_log_prob(3, None if context is None else context[0], noise=Noise(0))
        torch.testing.assert_close(flow.log_prob(samples.detach(), None if context is None else context[0]), log_prob, rtol=1e-3, atol=1e-3)


# -- nothing at all, and other types -----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_empty_batches_of_blocks_distributions_and_paths(training):
    empty = torch.zeros(0, 2)
    for block in (CNF(MLP(2)), CNF(Field().float()), CNF(MLP(2, (8,), AugmentedTimeConditioning("hyper", 3, 3)), path=TimePath(3)), CNF(MLP(2), Hutchinson())):
        block.train(training)
        for out in (block(empty), block.inverse(empty)):
            assert out.value.shape == (0, 2) and out.log_det.shape == (0,)
        flow = Flow(block, (2,)).train(training)
        assert flow.trajectory(empty, torch.linspace(0, 1, 3)).shape == (3, 0, 2)
        p = flow.distribution()
        assert p.sample((0,)).shape == (0, 2) and p.log_prob(empty).shape == (0,) and p.log_prob(torch.zeros(3, 0, 2)).shape == (3, 0)
    conditional = Flow(CNF(MLP(2, context_dim=3)), (2,)).train(training)
    p = conditional(torch.zeros(0, 3))
    assert p.sample((5,)).shape == (5, 0, 2) and p.log_prob(torch.zeros(5, 0, 2)).shape == (5, 0)
    assert conditional(torch.zeros(4, 3)).sample((0,)).shape == (0, 4, 2)
    images = Flow(multiscale((1, 8, 8), lambda shape: CNF(ConvField(shape[0], (4,)), Hutchinson())), (1, 8, 8)).train(training)
    assert images.trajectory(torch.zeros(0, 1, 8, 8), torch.linspace(0, 1, 3)).shape == (3, 0, 1, 8, 8)


def test_counts_and_types_of_samples_and_values():
    flow = Flow(CNF(MLP(2), solver=GRID), (2,))
    assert flow.sample(np.int64(3)).shape == (3, 2) and flow.sample(torch.tensor(3)).shape == (3, 2)
    for n in (2.5, (2.5,), "three", None, np.array([1.5])):
        with pytest.raises(ConfigError, match="n must be a number of samples, or a shape"):
            flow.sample(n)
    with pytest.raises(DataError, match="value is a ndarray"):
        flow().log_prob(np.zeros((3, 2)))
    with pytest.raises(DataError, match=r"layout torch\.sparse_coo, expected a dense tensor"):
        flow.log_prob(torch.eye(2).to_sparse())
    assert repr(flow().expand((3,))).startswith("FlowDistribution(batch_shape=(3,), event_shape=(2,), context=None, transform=FlowTransform([CNF]")


def test_a_velocity_that_detaches_is_refused_for_its_likelihood_alone():
    net = Field()
    flow = from_velocity(lambda t, x: net(t, x.detach()), (2,), "noise-to-data")
    assert flow.sample(3).shape == (3, 2)
    with pytest.raises(ConfigError, match="a derivative that does not match its values"):
        flow.log_prob(POINTS)


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [lambda h: nn.functional.normalize(h, dim=0), lambda h: h + (h[[3]] if len(h) > 3 else 0)])
def test_rows_that_see_each_other_in_other_ways_are_refused(mix):
    class Mixed(Field):
        def forward(self, t, x):
            return mix(self.net(x))

    with pytest.raises(ConfigError, match="field Mixed returns another value for a row"):
        flow_of(Mixed()).log_prob(POINTS.repeat(2, 1))


def test_rows_that_a_field_holds_by_their_places_are_not_evaluated_apart():
    class Placed(Field):
        def __init__(self):
            nn.Module.__init__(self)
            torch.manual_seed(0)
            self.enter, self.leave, self.held = nn.Linear(2, 16), nn.Linear(16, 2), torch.randn(6, 16)

        def forward(self, t, x):
            return self.leave(torch.relu(3 * self.enter(x) + self.held[: len(x)] + t))

    x, flow = torch.randn(6, 2, generator=torch.Generator().manual_seed(1)), Flow(CNF(Placed()), (2,)).eval()
    with torch.no_grad():
        found = flow.log_prob(x)
        flow.transform.eval_solver = FixedGrid("rk4", 200)
        assert float((found - flow.log_prob(x)).abs().max()) < 5e-3


def test_a_path_is_that_of_one_solve_with_random_layers():
    field = Field()
    field.net.insert(1, nn.Dropout(0.5))
    flow = Flow(Sequential([CNF(field, solver=FixedGrid("rk4", 16)), CNF(field, solver=FixedGrid("rk4", 16))]), (2,))
    frames = flow.trajectory(POINTS, torch.linspace(0, 1, 9, dtype=F64), noise=Noise(3))
    torch.testing.assert_close(frames[-1], flow.encode(POINTS, noise=Noise(3)), rtol=1e-6, atol=1e-6)
    single = Flow(CNF(field, solver=FixedGrid("rk4", 16)), (2,))
    state = torch.get_rng_state()
    a, b = (single.trajectory(POINTS, torch.tensor(times)) for times in ([1.0], [0.25, 0.5, 1.0]))
    torch.testing.assert_close(a[-1], b[-1], rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["log_prob", "decode"])
def test_compiling_a_whole_direction_with_a_context(direction):
    torch.manual_seed(0)
    flow, context = Flow(CNF(MLP(2, (8,), context_dim=3), Exact(), FixedGrid("rk4", 1)), (2,)).to(F64), torch.randn(4, 3, dtype=F64)
    call = getattr(flow, direction)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(POINTS, context), call(POINTS, context), rtol=1e-9, atol=1e-9)


def test_a_row_at_which_a_custom_field_is_not_finite_is_named():
    class Root(nn.Module):
        def forward(self, t, x):
            return 0.1 * x.sqrt()

    flow = Flow(CNF(Root()), (2,)).eval()
    with pytest.raises(SolverError, match="row 1 of 3 cannot be solved"), torch.no_grad():
        flow.encode(torch.tensor([[1.0, 1.0], [2.0, -1.0], [3.0, 3.0]]))


def test_random_fields_in_evaluation_mode_are_told():
    class Random(torch.nn.Linear):
        def forward(self, t, x):
            return super().forward(x) + torch.randn_like(x)

    flow, x = Flow(CNF(Random(2, 2)), (2,)), torch.randn(4, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        flow.log_prob(x)  # in training, as dropout is
    with pytest.warns(UserWarning, match="field Random draws random numbers in evaluation mode"):
        flow.eval().log_prob(x)


@pytest.mark.parametrize("recorded", [False, True])
def test_fields_that_are_gradients_of_an_energy(recorded):
    """The flow of -∇E, E = |x|^2 / 2, is e^-t x: log p of x = N(e^-1 x) - D."""

    class Gradient(torch.nn.Module):
        def forward(self, t, x):
            with torch.set_grad_enabled(recorded or torch.is_grad_enabled()):
                x = x.requires_grad_() if recorded else x
                return -torch.autograd.grad(0.5 * x.square().sum(), x, create_graph=True)[0]

    flow, x = Flow(CNF(Gradient()), (2,)).eval(), torch.randn(4, 2)
    if not recorded:
        with pytest.raises(ConfigError, match=r"takes a derivative by x.*enable_grad.*requires_grad_"):
            flow.sample(2)
        return
    truth = torch.distributions.Normal(0.0, 1.0).log_prob(x * math.exp(-1)).sum(1) - 2
    assert torch.allclose(flow.log_prob(x), truth, atol=1e-4) and flow.sample(2).shape == (2, 2)


OPERATIONS = {
    "layer": lambda self, h: self.norm(h),
    "function": lambda self, h: torch.nn.functional.layer_norm(h, (4,)),
    "instance": lambda self, h: torch.nn.functional.instance_norm(h[:, None])[:, 0],
    "solve": lambda self, h: torch.linalg.solve(3 * torch.eye(4).to(h) + h[:, :, None] * self.norm.weight * h[:, None], h),
    "slogdet": lambda self, h: h * torch.linalg.slogdet(3 * torch.eye(4).to(h) + h[:, :, None] * self.norm.weight * h[:, None])[1][:, None],
}


class Normed(nn.Module):
    """Calls an operation whose second derivative is wrong in torch's forward mode."""

    def __init__(self, operation):
        super().__init__()
        self.enter, self.leave, self.norm = nn.Linear(3, 4), nn.Linear(4, 2), nn.LayerNorm(4) if operation == "layer" else nn.RMSNorm(4)
        self.operation = operation

    def forward(self, t, x):
        return self.leave(OPERATIONS[self.operation](self, torch.tanh(self.enter(torch.cat([x, t.expand(len(x), 1)], 1)))))


@pytest.mark.parametrize("operation", mostly_slow(OPERATIONS, "layer", "function"))
@pytest.mark.parametrize("quadrature", [None, Directional(), TotalDerivative()], ids=["log_det", "directional", "total"])
def test_second_derivatives_that_forward_mode_gets_wrong(operation, quadrature):
    torch.manual_seed(1)
    field, x = Normed(operation).double(), torch.randn(4, 2, dtype=F64)
    for divergence in (Exact(), Hutchinson("rademacher", "forward"), Hutchinson("rademacher", "reverse")):
        block = CNF(field, divergence, FixedGrid("rk4", 2), quadratures=() if quadrature is None else (quadrature,)).double().train()

        def loss(block=block):
            out = block(x, Request(noise=Noise(0)))
            return (out.log_det if quadrature is None else out.integrals[quadrature.name]).sum()

        weight, step = field.enter.weight, 1e-6
        if quadrature is not None and operation in ("layer", "function", "instance"):
            with pytest.raises(ConfigError, match="no right derivative of the derivative along the path: take GroupNorm"):
                loss()
            with torch.no_grad():
                assert math.isfinite(float(loss()))
            continue
        slope = torch.autograd.grad(loss(), weight)[0][1, 0]
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[1, 0] += sign * step
                values.append(float(loss()))
                weight[1, 0] -= sign * step
        assert float(slope) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("kind", ["sign", "floor", "round", "experts", "where"])
def test_jumps_are_reported(kind):
    """The density of a field with jumps does not integrate to 1: what they add to the log-det is not in its derivative."""

    class Jumping(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.experts, self.gate = nn.ModuleList(nn.Linear(1, 1) for _ in range(3)), nn.Linear(1, 3)

        def forward(self, t, x):
            if kind == "experts":  # the likeliest expert alone
                each = torch.stack([expert(x) for expert in self.experts], 1)
                return each[torch.arange(len(x)), self.gate(x).argmax(1)]
            return {"sign": -0.5 * x.sign(), "floor": 0.3 * torch.floor(2 * x), "round": -0.5 * x.round(decimals=1), "where": torch.where(x > 0.2, 0.3 * x + 0.2, -0.1 * x)}[kind]

    flow = Flow(CNF(Jumping(), Exact(), GRID, GRID), (1,))
    x = torch.linspace(-12, 12, 4001)[:, None]
    with pytest.warns(UserWarning, match=r"field Jumping jumps by [\d.]+% of its size .* does not integrate to 1"), torch.no_grad():
        mass = torch.trapezoid(flow.log_prob(x).exp(), x[:, 0])
    assert abs(float(mass) - 1) > 0.02  # the warning is right
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow.log_prob(x)  # it is given once
        flow.sample(3)


@pytest.mark.parametrize("value", [torch.abs, torch.relu, lambda x: 3 * torch.tanh(1e3 * x), lambda x: x.sort(1).values, lambda x: torch.sin(1e3 * x)])
def test_continuous_fields_have_no_jumps(value):
    class Continuous(nn.Module):
        def forward(self, t, x):
            return 0.1 * value(x)

    flow = Flow(CNF(Continuous(), Exact(), GRID), (2,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scale in (1e-3, 1.0, 1e3):
            flow.log_prob(scale * torch.randn(64, 2))


def test_a_branch_that_is_not_taken_makes_no_nan_in_silence():
    class Branched(nn.Module):
        def __init__(self, safe):
            super().__init__()
            self.safe, self.scale = safe, nn.Parameter(torch.tensor(0.3, dtype=F64))

        def forward(self, t, x):
            taken = x > 0
            return self.scale * torch.where(taken, torch.sqrt(torch.where(taken, x, 1.0) if self.safe else x), torch.sin(x))

    def flow(safe, divergence=None):
        return Flow(CNF(Branched(safe), divergence, GRID, GRID), (2,))

    right = flow(True).log_prob(POINTS)
    with torch.no_grad():  # forward mode selects the branch
        torch.testing.assert_close(flow(False).log_prob(POINTS), right)
    with pytest.raises(ConfigError, match=r"nan by autodiff and .* \(torch\.where differentiates both branches"):
        flow(False).log_prob(POINTS).sum().backward()
    with torch.no_grad(), pytest.raises(ConfigError, match=r"nan by autodiff and .* \(torch\.where differentiates both branches"):
        flow(False, Hutchinson(mode="reverse")).log_prob(POINTS)


@pytest.mark.parametrize("unit", [(1e-3, 1e-3), (1e-4, 1e-3, 1.0, 1e3, 1e4)], ids=["small", "mixed"])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_derivatives_are_compared_in_the_units_of_each_column(unit, offset):
    """With one step for all columns, right fields were refused, and wrong ones were not."""

    class InUnits(nn.Module):
        def __init__(self, cut):
            super().__init__()
            torch.manual_seed(0)
            self.cut, self.net = cut, nn.Sequential(nn.Linear(len(unit), 16), nn.Tanh(), nn.Linear(16, len(unit)))
            self.register_buffer("unit", torch.tensor(unit))

        def forward(self, t, x):
            y = x / self.unit
            return self.net(y.detach() if self.cut else y) * self.unit

    torch.manual_seed(0)
    points = torch.tensor(unit) * (torch.randn(64, len(unit)) + offset)
    for x in (points, points[:1]):
        for divergence in (Exact(), Hutchinson(mode="reverse")):
            Flow(CNF(InUnits(False), divergence, FixedGrid("euler", 1)), (len(unit),)).log_prob(x)
            with pytest.raises(ConfigError, match=r"has a (second )?derivative that does not match its values"):
                Flow(CNF(InUnits(True), divergence, FixedGrid("euler", 1)), (len(unit),)).log_prob(x).sum().backward()
