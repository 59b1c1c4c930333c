"""Any nn.Module as a field: what it may not do to the solve, and what the solve may not overlook in it."""

import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from conftest import F64, slow
from torch import nn

import cnf.fields
from cnf import CNF, Adaptive, Exact, FixedGrid, Flow, Hutchinson, Noise
from cnf._utils.compilation import CompilationWarning
from cnf.errors import ConfigError
from cnf.fields import (
    AUGMENTED_TIME_LAYERS,
    LAYERS,
    MLP,
    AugmentedTimeConditioning,
    ConvField,
    SqueezeSum,
    TimePath,
    UNet,
    VectorField,
)
from cnf.fields.custom import protect
from cnf.solvers import Reversible
from cnf.transforms import Request

SOLVERS = {
    "grid": lambda: FixedGrid("rk4", 6),
    "checkpoint": lambda: FixedGrid("rk4", 6, gradient="checkpoint"),
    "reversible": lambda: Reversible("rk4", 6),
    "adaptive": lambda: Adaptive("dopri5", 1e-8, 1e-8),
    "adjoint": lambda: Adaptive("dopri5", 1e-8, 1e-8, gradient="adjoint"),
}
DIVERGENCES = {
    "exact": lambda: Exact(),
    "chunks": lambda: Exact(chunk=1),
    "forward": lambda: Hutchinson(),
    "reverse": lambda: Hutchinson(mode="reverse"),
}


class Field(nn.Module):
    """A user's network of x and context."""

    def __init__(self, *layers, context_dim=0):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(*layers, nn.Linear(2 + context_dim, 12), nn.Tanh(), nn.Linear(12, 2)).to(F64)
        self.context_dim = context_dim

    def forward(self, t, x, context=None):
        return self.net(x if context is None else torch.cat([x, context], 1))


def flow_of(field, solver="grid", divergence="exact"):
    return Flow(CNF(field, DIVERGENCES[divergence](), SOLVERS[solver]()), (2,))


def gradients(flow, x, noise=Noise(0)):  # noqa: B008
    flow.zero_grad()
    loss = flow.log_prob(x, noise=noise).sum()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in flow.parameters()])


def jacobian_log_prob(flow, x, noise=None):
    """log p from the autodiff Jacobian of the map itself, whose rows do not depend on each other."""
    point = x.clone().requires_grad_()
    with torch.enable_grad():
        z = flow.encode(point, noise=noise)
        columns = [torch.autograd.grad(c.sum(), point, retain_graph=True)[0].flatten(1) for c in z.flatten(1).T]
    return (flow.base_log_prob(z) + torch.linalg.slogdet(torch.stack(columns, 1))[1]).detach()


# -- in-place writes ---------------------------------------------------------------------------------------------------


class Overwriting(Field):
    """Writes into everything that it is handed."""

    def forward(self, t, x, context=None):
        value = super().forward(t, x, context)
        for given in (t, x, context):
            if given is not None:
                given.mul_(0).add_(7)
        return value


@pytest.mark.parametrize("solver, divergence", [
    ("reversible", "forward"), ("adjoint", "forward"), *(("grid", d) for d in DIVERGENCES), slow("checkpoint", "forward"), slow("adaptive", "forward"),
])  # fmt: skip
def test_a_field_cannot_change_what_it_is_handed(solver, divergence):
    x, context = torch.randn(5, 2, dtype=F64), torch.randn(5, 3, dtype=F64)
    mine, given = x.clone(), context.clone()
    found = []
    for kind in (Field, Overwriting):
        flow = flow_of(kind(context_dim=3), solver, divergence)
        found.append((flow.log_prob(mine, given, noise=Noise(0)), flow.sample(3, given, noise=Noise(1))))
        found[-1][0].sum().backward()
        found[-1] += tuple(p.grad for p in flow.parameters())
    assert torch.equal(mine, x) and torch.equal(given, context)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_an_inplace_activation_as_first_layer():
    x = torch.randn(5, 2, dtype=F64)
    flows = [flow_of(Field(nn.SiLU(inplace=k))) for k in (False, True)]
    for flow in flows[1:]:
        torch.testing.assert_close(flow.log_prob(x.clone()), flows[0].log_prob(x))
        torch.testing.assert_close(flow.sample(3, noise=Noise(0)), flows[0].sample(3, noise=Noise(0)))


def test_a_field_may_return_one_buffer_again_and_again():
    class Buffered(Field):
        def __init__(self):
            super().__init__()
            self.out = torch.empty(5, 2, dtype=F64)

        def forward(self, t, x, context=None):
            return self.out.copy_(super().forward(t, x) * (1 + t))

    class Fresh(Field):
        def forward(self, t, x, context=None):
            return super().forward(t, x) * (1 + t)

    x = torch.randn(5, 2, dtype=F64)
    with torch.no_grad():
        torch.testing.assert_close(flow_of(Buffered()).encode(x), flow_of(Fresh()).encode(x), rtol=0, atol=0)


def test_a_users_own_jvp_cannot_change_the_probe():
    class Own(Field):
        def jvp(self, t, x, v, context=None, *, t_dot=None):
            dx, product = torch.func.jvp(lambda y: self(t, y), (x,), (v[0],))
            v.zero_()
            return dx, product[None]

    x = torch.randn(4, 2, dtype=F64)
    torch.testing.assert_close(flow_of(Own(), divergence="forward").log_prob(x, noise=Noise(0)),
                               flow_of(Field(), divergence="forward").log_prob(x, noise=Noise(0)))  # fmt: skip


# -- random layers -----------------------------------------------------------------------------------------------------


class Functional(Field):
    def forward(self, t, x, context=None):
        return super().forward(t, nn.functional.dropout(x, 0.4)) + 0.1 * torch.randn_like(x)


RANDOM = {"module": lambda: Field(nn.Dropout(0.5)), "functional": Functional}


@pytest.mark.parametrize(
    "kind, solver, divergence",
    [("module", s, "chunks") for s in ("checkpoint", "reversible", "adaptive")] + [("functional", "checkpoint", d) for d in ("exact", "forward")]
    + [("functional", "adjoint", "reverse"), slow("module", "grid", "chunks"), slow("module", "adjoint", "chunks"),
       slow("functional", "checkpoint", "chunks"), slow("functional", "checkpoint", "reverse")],
)  # fmt: skip
def test_random_layers_draw_once_a_solve(kind, solver, divergence):
    x = torch.randn(4, 2, dtype=F64)
    reference, wanted = gradients(flow_of(RANDOM[kind](), "adaptive" if solver == "adjoint" else "grid", divergence), x)
    flow = flow_of(RANDOM[kind](), solver, divergence)
    loss, gradient = gradients(flow, x)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if solver in ("grid", "checkpoint") else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(loss, reference, **tolerance)
    torch.testing.assert_close(gradient, wanted, **tolerance)
    weight = flow.transform.field.net[-1].weight
    step = torch.zeros_like(weight)
    step[0, 3] = 1e-5
    ends = []
    for sign in (1, -2, 1):  # the gradient is the derivative of the very number that is returned
        weight.data.add_(sign * step)
        with torch.no_grad():
            ends.append(flow.log_prob(x, noise=Noise(0)).sum())
    slope = (ends[0] - ends[1]) / 2e-5
    place = sum(p.numel() for p in flow.parameters()) - weight.numel() - 2 + 3
    torch.testing.assert_close(gradient[place], slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", RANDOM)
def test_with_random_layers_the_log_det_is_that_of_the_map_and_the_map_is_invertible(kind):
    flow = Flow(CNF(RANDOM[kind](), Exact(), FixedGrid("dopri5", 8)), (2,))
    x = torch.randn(3, 2, dtype=F64)
    z = flow.encode(x, noise=Noise(4))
    torch.testing.assert_close(flow.decode(z, noise=Noise(4)), x, rtol=1e-5, atol=1e-5)
    torch.manual_seed(11)
    z = flow.encode(x)
    torch.manual_seed(11)
    torch.testing.assert_close(flow.decode(z), x, rtol=1e-5, atol=1e-5)
    one = x[:1]  # the mask is drawn for the whole batch
    torch.testing.assert_close(flow.log_prob(one, noise=Noise(4)), jacobian_log_prob(flow, one, Noise(4)), rtol=1e-5, atol=1e-5)
    assert not torch.equal(flow.encode(x, noise=Noise(4)), flow.encode(x, noise=Noise(5)))
    assert not torch.equal(flow.encode(x), flow.encode(x))


def test_generators_move_as_if_the_field_were_called_once_and_not_at_all_with_noise():
    flow, plain, x = flow_of(Field(nn.Dropout(0.5))), flow_of(Field()), torch.randn(4, 2, dtype=F64)
    torch.manual_seed(0)
    flow.transform.field(torch.zeros(()), x)
    once = torch.get_rng_state()
    torch.manual_seed(0)
    flow.encode(x)
    assert torch.equal(torch.get_rng_state(), once)
    flow.encode(x, noise=Noise(0))
    plain.encode(x)
    assert torch.equal(torch.get_rng_state(), once)


# -- rows of a batch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False), nn.SyncBatchNorm(2)], ids=repr)
def test_batch_statistics_are_refused_by_name(layer):
    flow, x = flow_of(Field(layer)), torch.randn(5, 2, dtype=F64)
    for call in (flow.log_prob, flow.encode, flow.decode, lambda _: flow.sample(3)):
        with pytest.raises(ConfigError, match=r"net\.0 is a \w*BatchNorm\w* .*GroupNorm or LayerNorm.*eval mode"):
            call(x)
    if layer.running_mean is None:
        flow.eval()
        with pytest.raises(ConfigError, match="BatchNorm"):
            flow.log_prob(x)
    elif isinstance(layer, nn.SyncBatchNorm):
        return
    else:
        layer.eval()
        assert flow.log_prob(x).shape == (5,)


def test_statistics_over_the_batch_without_such_a_layer_are_noticed():
    class Centred(Field):
        def forward(self, t, x, context=None):
            return super().forward(t, x - x.mean(0))

    class Normed(Field):
        def forward(self, t, x, context=None):
            return super().forward(t, nn.functional.batch_norm(x, None, None, training=True))

    x = torch.randn(5, 2, dtype=F64)
    with pytest.raises(ConfigError, match="field Centred returns another value for a row"):
        flow_of(Centred()).log_prob(x)
    for call in (lambda f: f.log_prob(x), lambda f: f.encode(x)):
        with pytest.raises(ConfigError, match="field Normed returns another value for a row"):
            call(flow_of(Normed()))
    flow_of(Field(nn.LayerNorm(2))).log_prob(x)
    flow_of(Field(nn.Unflatten(1, (2, 1)), nn.GroupNorm(1, 2), nn.Flatten())).log_prob(x)


def test_the_check_of_rows_leaves_no_trace_in_the_field():
    class Counting(Field):
        calls = 0

        def forward(self, t, x, context=None):
            self.calls += 1
            return super().forward(t, x)

    flow, seen = flow_of(Counting()), []
    flow.transform.field.register_forward_hook(lambda *_: seen.append(1))
    stats = flow.evaluate(torch.randn(5, 2, dtype=F64), Request(log_det=False)).stats
    assert stats.nfe == flow.transform.field.calls == len(seen) == 24


# -- shapes, types, signatures -----------------------------------------------------------------------------------------


class Returning(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, t, x, context=None):
        return self.value(x)


@pytest.mark.parametrize(
    "value, message",
    [
        (lambda x: x[:, :1], r"returned shape \(5, 1\); expected \(5, 2\)"),
        (lambda x: x[0], r"returned shape \(2,\); expected \(5, 2\)"),
        (lambda x: x.sum(), r"returned shape \(\); expected \(5, 2\)"),
        (lambda x: x[None], r"returned shape \(1, 5, 2\)"),
        (lambda x: x.T, r"returned shape \(2, 5\)"),
        (lambda x: (x, x), "returned a tuple"),
        (lambda x: None, "returned a NoneType"),
        (lambda x: x.detach().numpy(), "returned a ndarray"),
        (lambda x: x.to(torch.complex64), "returned type torch.complex64"),
        (lambda x: x.long(), "returned type torch.int64"),
        (lambda x: x > 0, "returned type torch.bool"),
    ],
)
def test_what_is_no_vector_field_is_refused(value, message):
    flow, x = Flow(CNF(Returning(value), solver=FixedGrid("rk4", 2)), (2,)), torch.randn(5, 2)
    with pytest.raises(ConfigError, match=message):
        flow.encode(x)
    with pytest.raises((ConfigError, TypeError, RuntimeError)):
        flow.log_prob(x)


def test_a_field_of_another_precision_computes_for_a_state_of_this_one():
    flow = Flow(CNF(Returning(lambda x: -x.double()), solver=FixedGrid("rk4", 32)), (2,))
    x = torch.randn(5, 2)
    torch.testing.assert_close(flow.encode(x), x * math.exp(-1), rtol=1e-5, atol=1e-5)


def test_signatures():
    class TwoArguments(Field):
        def forward(self, t, x):
            return self.net(x)

    class PointFirst(Field):
        def forward(self, x, t):
            return self.net(x)

    class ByKeyword(Field):
        def forward(self, t, x, *, context=None):
            return self.net(x)

    class OneArgument(Field):
        def forward(self, x):
            return self.net(x)

    class Keyword(Field):
        def forward(self, t, x, c=None, *, scale=1.0):
            return self.net(x)

    x = torch.randn(5, 2, dtype=F64)
    truth = flow_of(Field()).log_prob(x)
    for kind in (TwoArguments, Keyword):
        assert torch.equal(flow_of(kind()).log_prob(x), truth)
    field = TwoArguments()
    del field.context_dim
    flow = flow_of(field)
    assert flow.context_dim == 0 and flow(x).shape == (5,)
    with pytest.raises(ConfigError, match="built without context"):
        flow.log_prob(x, torch.zeros(5, 1, dtype=F64))
    with pytest.raises(ConfigError, match=r"forward\(x, t\) takes the point first"):
        CNF(PointFirst())
    with pytest.raises(ConfigError, match="takes 1 arguments"):
        CNF(OneArgument())
    with pytest.raises(ConfigError, match=r"takes context by keyword alone; expected forward\(t, x, context=None\)"):
        CNF(ByKeyword())
    with pytest.raises(ConfigError, match=r"field is a function; expected an nn\.Module"):
        CNF(lambda t, x: -x)


# -- the base class ----------------------------------------------------------------------------------------------------


class Decay(VectorField):
    """-x, with a closed form that a subclass may outdate."""

    def forward(self, t, x, context=None):
        return -x

    def divergence(self, t, x, context=None):
        return -x, x.new_full((len(x),), -float(x[0].numel()))


class Slower(Decay):
    def forward(self, t, x, context=None):
        return -0.5 * x


def test_a_capability_is_used_only_if_it_belongs_to_the_forward_that_it_describes():
    x = torch.randn(3, 2, dtype=F64)
    for field, rate, closed in ((Decay(), 1.0, True), (Slower(), 0.5, False)):
        assert field.closed_form is closed and protect(field).closed_form is closed and not protect(field).own_jvp
        torch.testing.assert_close(Flow(CNF(field), (2,)).evaluate(x).log_det, torch.full((3,), -2 * rate, dtype=F64), rtol=1e-4, atol=1e-4)
    plain = VectorField()
    assert plain.context_dim is None and not plain.time_rows and not plain.closed_form and plain.precompute(x) is None
    with pytest.raises(NotImplementedError, match="VectorField has no forward"):
        plain(torch.zeros(()), x)
    with pytest.raises(ConfigError, match="Slower has no closed-form divergence"):
        protect(Slower()).divergence(torch.zeros(()), x)
    assert torch.equal(Slower().jvp(torch.zeros((), dtype=F64), x, x[None])[1][0], -0.5 * x)


def test_old_names_warn():
    for old, new in (("Drive", "AugmentedTimeConditioning"), ("Schedule", "Interpolant")):
        with pytest.warns(DeprecationWarning, match=f"{old} is called {new}"):
            assert getattr(cnf.fields, old) is getattr(cnf.fields, new)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = cnf.fields.Nothing


# -- hooks, parametrisations, replaced layers --------------------------------------------------------------------------


def built_in():
    torch.manual_seed(0)
    cases = {f"mlp {kind}": (MLP(2, (8, 8), kind), (2,)) for kind in LAYERS}
    cases |= {f"conv {kind}": (ConvField(1, (4,), kind), (1, 4, 4)) for kind in LAYERS}
    cases |= {f"driven {kind}": (MLP(2, (8,), AugmentedTimeConditioning(kind, 3, 3)), (2,)) for kind in AUGMENTED_TIME_LAYERS}
    cases["context"] = (MLP(2, (8, 8), context_dim=3), (2,))
    cases["residual"] = (MLP(2, (8,), residual="minus"), (2,))
    cases["transposed"] = (ConvField(1, (4, 4), strides=(2, 1, -2)), (1, 4, 4))
    cases["sum"] = (SqueezeSum([ConvField(4**s, (4,)) for s in range(2)]), (1, 4, 4))
    cases["unet"] = (UNet(1, (8,), depth=1, zero_init=False), (1, 4, 4))
    for field, _ in cases.values():
        for p in field.parameters():
            nn.init.normal_(p, std=0.2)
    return {name: (field.to(F64), shape) for name, (field, shape) in cases.items()}


@pytest.mark.parametrize("name", built_in())
def test_called_as_modules_built_in_fields_compute_the_same(name):
    field, shape = built_in()[name]
    driven = name.startswith("driven")
    path = TimePath(3).to(F64) if driven else None
    solver = FixedGrid("rk4", 2)
    flow = Flow(CNF(field, Exact(), solver, solver, path=path), shape)
    x, context = torch.randn(3, *shape, dtype=F64), torch.randn(3, 3, dtype=F64) if name == "context" else None
    before = flow.log_prob(x, context), flow.sample(3, context if context is None else context[0], noise=Noise(0))
    calls = []
    for m in field.modules():
        m.register_forward_hook(lambda module, *_: calls.append(module))
    after = flow.log_prob(x, context), flow.sample(3, context if context is None else context[0], noise=Noise(0))
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    assert {m for m in field.modules() if isinstance(m, kinds)} <= set(calls) and field in calls


@pytest.mark.parametrize("name, where", [
    (name, where) if where == "inner" or name == "mlp concatsquash" else slow(name, where)
    for name in ("mlp concatsquash", "conv concat", "unet", "sum") for where in ("field", "layer", "inner")
])  # fmt: skip
def test_hooks_act_on_log_prob_as_on_samples(where, name):
    field, shape = built_in()[name]
    solver = FixedGrid("rk4", 4)
    flow = Flow(CNF(field, Exact(), solver, solver), shape)
    x = torch.randn(2, *shape, dtype=F64)
    inner = next(m for m in field.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    module = {"field": field, "layer": field.layers[0] if hasattr(field, "layers") else inner, "inner": inner}[where]
    plain = flow.log_prob(x)
    handle = module.register_forward_hook(lambda module, given, out: 1.2 * out)
    hooked = flow.log_prob(x)
    assert float((hooked - plain).detach().abs().max()) > 1e-4
    z, log_det = flow.evaluate(x)[:2]
    j = torch.autograd.functional.jacobian(lambda v: flow.encode(v[None])[0].flatten(), x[0]).flatten(1)
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(j)[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(flow.decode(z), x, rtol=1e-2, atol=1e-2)
    handle.remove()
    assert torch.equal(flow.log_prob(x), plain)


def test_hooks_on_transforms_run():
    from cnf.transforms import Sequential, Standardize

    flow = Flow(Sequential([Standardize(torch.zeros(2), torch.ones(2)), CNF(MLP(2, (8,))), CNF(MLP(2, (8,)))]), (2,))
    calls = []
    for m in (flow, flow.transform, *flow.transform.transforms):
        m.register_forward_hook(lambda *_: calls.append(1))
    flow(torch.randn(3, 2))
    assert len(calls) == 5


@pytest.mark.parametrize("change", ["parametrised", "weight_norm", "spectral_norm", "replaced", "sequence", "instance", "global"])
def test_what_changes_a_layer_changes_log_prob(change):
    torch.manual_seed(1)
    field = MLP(2, (8, 8)).to(F64)
    core = field.layers[1].core
    handle = None

    class Doubled(nn.Module):
        def forward(self, w):
            return 2 * w

    class LowRank(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.sin(x)

    if change == "parametrised":
        nn.utils.parametrize.register_parametrization(core, "weight", Doubled())
    elif change == "weight_norm":
        nn.utils.parametrizations.weight_norm(core)
    elif change == "spectral_norm":
        nn.utils.parametrizations.spectral_norm(core).eval()
    elif change == "replaced":
        field.layers[1].core = LowRank(8, 8, dtype=F64)
    elif change == "sequence":
        field.layers[1].core = nn.Sequential(nn.Linear(8, 8, bias=False, dtype=F64), nn.Tanh())
    elif change == "instance":
        plain = core.forward
        core.forward = lambda x: plain(x) + torch.sin(x)
    else:
        hook = nn.modules.module.register_module_forward_hook
        handle = hook(lambda module, given, out: 1.3 * out if module is core else None)
    try:
        flow = Flow(CNF(field, Exact(), FixedGrid("dopri5", 6)), (2,))
        x = torch.randn(3, 2, dtype=F64)
        torch.testing.assert_close(flow.log_prob(x), jacobian_log_prob(flow, x), rtol=1e-5, atol=1e-5)
    finally:
        if handle is not None:
            handle.remove()


@pytest.mark.parametrize("base", [MLP, lambda dim, hidden: UNet(1, (8,), depth=1, zero_init=False)])
def test_a_subclass_with_a_forward_of_its_own_is_solved_by_that_one(base):
    kind = MLP if base is MLP else UNet

    class Own(kind):
        def forward(self, t, x, context=None):
            return 0.5 * super().forward(t, x, context) - 0.3 * x

    torch.manual_seed(0)
    field = (Own(2, (8, 8)) if kind is MLP else Own(1, (8,), depth=1, zero_init=False)).to(F64)
    shape = (2,) if kind is MLP else (1, 2, 2)
    flow = Flow(CNF(field, Exact(), FixedGrid("dopri5", 6)), shape)
    x = torch.randn(2, *shape, dtype=F64)
    out = flow.evaluate(x)
    j = torch.autograd.functional.jacobian(lambda v: flow.encode(v[None])[0].flatten(), x[0]).flatten(1)
    torch.testing.assert_close(out.log_det[0], torch.linalg.slogdet(j)[1], rtol=1e-5, atol=1e-5)


def test_a_wrapper_that_forwards_attributes_is_called_itself():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

        def forward(self, t, x, context=None):
            return 0.5 * self.inner(t, x, context)

    flow = Flow(CNF(Wrapper(MLP(2, (8,)).to(F64)), Exact(), FixedGrid("dopri5", 6)), (2,))
    x = torch.randn(3, 2, dtype=F64)
    torch.testing.assert_close(flow.log_prob(x), jacobian_log_prob(flow, x), rtol=1e-6, atol=1e-6)


# -- operations without a forward-mode derivative ----------------------------------------------------------------------


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class Tokens(nn.Module):
    """A layer that mixes the entries of a row, each one a token."""

    context_dim = 0

    def __init__(self, mix):
        super().__init__()
        torch.manual_seed(2)
        self.enter, self.leave, self.mix = nn.Linear(1, 4), nn.Linear(4, 1), mix()
        self.to(F64)

    def forward(self, t, x):
        h = self.enter(x[..., None])
        if isinstance(self.mix, nn.MultiheadAttention):
            h = self.mix(h, h, h, need_weights=False)
        elif isinstance(self.mix, nn.Identity):
            h = nn.functional.scaled_dot_product_attention(h, h, h)
        else:
            h = self.mix(h)
        return self.leave(h[0] if isinstance(h, tuple) else h)[..., 0]


MIXES = {
    "attention": lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    "encoder": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation="gelu", batch_first=True),
    "function": nn.Identity,
    "lstm": lambda: nn.LSTM(4, 4, batch_first=True),
}


def Attention():
    return Tokens(MIXES["attention"])


@pytest.mark.parametrize("mix, divergence", [
    (mix, divergence) if mix == "attention" else slow(mix, divergence)
    for mix in MIXES for divergence in ("exact", "forward", "reverse")
])  # fmt: skip
def test_composite_layers_have_the_derivative_of_autograds_jacobian(mix, divergence):
    field, x = Tokens(MIXES[mix]), torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    e = Noise(0).draw("probe", "rademacher", (1, 3, 2), dtype=F64, batch_dim=1)
    j = torch.stack([torch.autograd.functional.jacobian(lambda v: field(torch.zeros(()), v[None])[0], row) for row in x])
    wanted = j.diagonal(dim1=1, dim2=2).sum(1) if divergence == "exact" else torch.einsum("ni,nij,nj->n", e[0], j, e[0])
    for mode in (torch.enable_grad, torch.no_grad):
        for training in (True, False):
            with mode():
                out = DIVERGENCES[divergence]().linearize(field.train(training), torch.zeros((), dtype=F64), x, e, None, frozenset({"div"}))
            torch.testing.assert_close(out.div, wanted, rtol=1e-9, atol=1e-9)
    if divergence != "exact":
        found = {kind: gradients(flow_of(Tokens(MIXES[mix]), kind, divergence), x) for kind in SOLVERS}
        for one, other, off in (("grid", "checkpoint", 1e-9), ("adaptive", "adjoint", 1e-3), ("grid", "reversible", 5e-2)):
            torch.testing.assert_close(found[one], found[other], rtol=off, atol=off)
    flow_of(field, divergence=divergence).eval().score(x, noise=Noise(0))


@pytest.mark.slow
def test_fields_that_change_their_buffers_run_uncompiled():
    """spectral_norm iterates at every call in training, which a compiled backward pass would read too late."""

    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))

        def forward(self, t, x):
            return t * self.net(x).tanh()

    x, found = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), []
    for unit in (False, True):
        torch.manual_seed(0)
        flow = Flow(CNF(Spectral(), solver=FixedGrid("rk4", 2), compile=unit), (2,)).train()
        with nullcontext() if not unit else pytest.warns(CompilationWarning, match="changes its buffers"):
            found.append(gradients(flow, x))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_attention_compiles(monkeypatch):
    monkeypatch.setattr("cnf._utils.compilation.BACKEND", "aot_eager")
    x = torch.randn(3, 2, dtype=F64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompilationWarning)
        found = [gradients(Flow(CNF(Attention(), Hutchinson(), FixedGrid("euler", 1), compile=c), (2,)), x) for c in (False, True)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("field", [lambda: Returning(lambda x: -0.2 * _Cube.apply(x)), Attention], ids=["function", "attention"])
def test_operations_without_a_forward_mode_derivative(field, training):
    solver = FixedGrid("rk4", 16)
    flow = Flow(CNF(field(), Exact(), solver, solver), (2,)).train(training)
    x = torch.randn(3, 2, dtype=F64) * (1 if any(True for _ in flow.parameters()) else 0.7)
    if not any(True for _ in flow.parameters()):
        x = x.float()
    truth = jacobian_log_prob(flow, x)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(flow.log_prob(x), truth, rtol=1e-5, atol=1e-5)
    if training:
        probed = Flow(CNF(flow.transform.field, Hutchinson(), solver), (2,))
        values = probed.log_prob(x.repeat(400, 1), noise=Noise(0)).detach().reshape(400, 3)
        z = (values.mean(0) - truth) / (values.std(0) / 20 + 1e-5)
        assert float(z.abs().max()) < 5


# -- gradients ---------------------------------------------------------------------------------------------------------


class Closing(Field):
    """Closes over a tensor, such as an encoder's output."""

    def __init__(self):
        super().__init__(context_dim=2)
        self.context_dim, self.seen = 0, None

    def forward(self, t, x, context=None):
        return self.net(torch.cat([x, self.seen], 1))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_tensor_that_a_field_closes_over_gets_its_gradient_or_an_error(solver):
    found = []
    for kind in ("grid", solver):
        flow, encoder = flow_of(Closing(), kind), nn.Linear(3, 2, dtype=F64)
        nn.init.constant_(encoder.weight, 0.3)
        nn.init.zeros_(encoder.bias)
        torch.manual_seed(5)
        flow.transform.field.seen = encoder(torch.randn(4, 3, dtype=F64))
        loss = flow.log_prob(torch.randn(4, 2, dtype=F64)).sum()
        if kind in ("checkpoint", "reversible"):
            with pytest.raises(ConfigError, match="requires a gradient but is not in parameters"):
                loss.backward()
            return
        loss.backward()
        found.append(encoder.weight.grad)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("field", [Field, lambda: MLP(2, (8, 8)).to(F64)], ids=["custom", "built-in"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_second_derivative_is_right_or_an_error(solver, field):
    torch.manual_seed(0)
    x, values = torch.randn(3, 2, dtype=F64), []
    shared = field()
    for kind in ("grid", solver):
        flow = flow_of(shared, kind)
        flow.zero_grad()
        y = x.clone().requires_grad_()
        try:
            out = flow.evaluate(y)
            (slope,) = torch.autograd.grad(out.log_det.sum(), y, create_graph=True)
            slope.square().sum().backward()
        except ConfigError as error:
            assert solver in ("checkpoint", "reversible", "adjoint") and "second derivative" in str(error)
            return
        values.append([y.grad, *(p.grad for p in flow.parameters() if p.grad is not None)])
    assert solver in ("grid", "adaptive")
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


class Cubic(VectorField):
    context_dim = 0

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor, self.weight = factor, nn.Parameter(torch.tensor([0.1, -0.2], dtype=F64))

    def forward(self, t, x, context=None):
        return self.weight * x**3


class InClosedForm(Cubic):
    def forward(self, t, x, context=None):
        return self.weight * x**3

    def divergence(self, t, x, context=None):
        return self(t, x), self.factor * (3 * self.weight * x.square()).sum(1)


class Precomputed(Cubic):
    def forward(self, t, x, context=None):
        return self.weight * x**3

    def precompute(self, x, context=None):
        return protect(lambda t, y, context=None: self.factor * self.weight * y**3)


def test_what_a_field_offers_besides_forward_is_compared_with_it():
    x = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))

    def log_prob(field):
        return Flow(CNF(field, Exact(), FixedGrid("rk4", 4), FixedGrid("rk4", 4)), (2,)).log_prob(x)

    for kind in (InClosedForm, Precomputed):
        torch.testing.assert_close(log_prob(kind()), log_prob(Cubic()))
        for _ in range(2):
            with pytest.raises(ConfigError, match=f"field {kind.__name__} has a .* that does not match its forward.* correct it, or leave it out"):
                log_prob(kind(2.0))
