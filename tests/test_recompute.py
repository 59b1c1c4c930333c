"""Checkpointed steps: the gradient of the plain step, nothing kept, also where the step itself differentiates."""

import weakref

import pytest
import torch
from conftest import F64

from cnf.errors import ConfigError
from cnf.fields import MLP, ConvField
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Exact, Hutchinson
from cnf.ode.quadratures import JacobianFrobenius, RunningCost
from cnf.random import Noise
from cnf.solvers import Adaptive, FixedGrid
from cnf.solvers.checkpointing import Recompute
from cnf.transforms import Request


class Step:
    """y + wᵀ-product of tanh(w y), taken by an inner backward pass; remembers what it made."""

    def __init__(self, w):
        self.w, self.calls, self.made = w, 0, []

    def __call__(self, y, total):
        self.calls += 1
        recording = torch.is_grad_enabled()
        with torch.enable_grad():
            point = y if recording and y.requires_grad else y.detach().requires_grad_()
            value = torch.tanh(point @ self.w)
            ones = torch.ones_like(value)
            (product,) = torch.autograd.grad(value, point, ones, create_graph=recording, retain_graph=True)
        self.made += [weakref.ref(value), weakref.ref(product)]
        return y + value, total + product.square().sum(1)


class Held:
    """What autograd keeps in place of a saved tensor."""

    def __init__(self, tensor):
        self.tensor = tensor


def chain(step, call):
    y, total = torch.linspace(-1, 1, 6, dtype=F64).reshape(2, 3), torch.zeros(2, dtype=F64)
    for _ in range(3):
        y, total = call(step, (y, total))
    return (y.square().sum(1) + total).sum()


def weight():
    torch.manual_seed(0)
    return torch.randn(3, 3, dtype=F64, requires_grad=True)


def test_the_gradient_is_the_plain_one_each_step_runs_once_more_and_nothing_is_kept():
    w = weight()
    (plain,) = torch.autograd.grad(chain(Step(w), lambda f, y: f(*y)), w)
    step, recompute = Step(w), Recompute([w])
    loss = chain(step, recompute)
    assert step.calls == 3 and all(made() is None for made in step.made)
    (found,) = torch.autograd.grad(loss, w)
    assert step.calls == 6 and all(made() is None for made in step.made)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-14)


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 16])
def test_a_chain_keeps_few_states_and_has_the_plain_gradient(steps):
    w = weight()
    step = Step(w)
    start = torch.linspace(-1, 1, 6, dtype=F64).reshape(2, 3), torch.zeros(2, dtype=F64)
    held = weakref.WeakSet()

    def pack(tensor):
        held.add(one := Held(tensor.detach()))  # with its history it would hold itself
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        state = Recompute([w]).checkpoint_sequential([step] * steps, start)
    assert step.calls == steps
    states = {one.tensor.data_ptr() for one in held if one.tensor.shape == (2, 3)}
    assert len(states) == min(steps, 4)
    (found,) = torch.autograd.grad(state[0].sin().sum() + state[1].sum(), w)
    # a stretch of one step is repeated once, a longer one's steps twice
    assert step.calls == {1: 2, 3: 6, 4: 8, 5: 5 + 3 + 2 * 2, 16: 48}[steps]
    plain = start
    for _ in range(steps):
        plain = step(*plain)
    (truth,) = torch.autograd.grad(plain[0].sin().sum() + plain[1].sum(), w)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


def test_a_long_chain_refuses_a_tensor_that_would_get_no_gradient():
    w, v = weight(), weight()
    start = torch.ones(2, 3, dtype=F64), torch.zeros(2)
    loss = Recompute([w]).checkpoint_sequential([lambda y, total: (y @ w @ v, total)] * 16, start)
    with pytest.raises(ConfigError, match="parameters"):
        loss[0].sum().backward()


def test_a_second_derivative_is_refused():
    w = weight()
    (g,) = torch.autograd.grad(chain(Step(w), Recompute([w])), w, create_graph=True)
    with pytest.raises(ConfigError, match="second derivative"):
        g.square().sum().backward()


def test_what_is_computed_once_before_the_solve_may_be_closed_over():
    w = weight()
    gradients = []
    for call in (lambda f, y: f(*y), Recompute([w])):
        kernel = (w.exp() * w).sin()  # its graph is shared by all steps
        gradients.append(torch.autograd.grad(chain(Step(kernel), call), w)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-13, atol=1e-13)


def test_a_parameter_that_is_no_leaf_ends_the_search():
    w = weight()
    kernel = w * 2  # what lies behind it is not the step's business
    (g,) = torch.autograd.grad(chain(Step(kernel), Recompute([kernel])), w)
    (plain,) = torch.autograd.grad(chain(Step(w * 2), lambda f, y: f(*y)), w)
    torch.testing.assert_close(g, plain, rtol=1e-13, atol=1e-13)


def test_a_tensor_that_would_get_no_gradient_is_refused():
    w, v = weight(), weight()

    def function(y, total):
        return y @ w @ v, total

    loss = chain(function, Recompute([w]))
    with pytest.raises(ConfigError, match=r"shape \(3, 3\).*parameters.*gradient='direct'"):
        loss.backward()


def test_one_tensor_in_two_places_of_the_state():
    w = torch.tensor(3.0, dtype=F64, requires_grad=True)
    y = torch.tensor([2.0], dtype=F64, requires_grad=True)
    a, b = Recompute([w])(lambda p, q: (w * p * p, q * q), (y, y))
    g = torch.autograd.grad(a.sum() + b.sum(), (y, w))
    assert float(g[0]) == 2 * 3 * 2 + 2 * 2 and float(g[1]) == 4


def test_the_repetition_sees_the_same_autocast():
    w = torch.ones(3, 3, requires_grad=True)
    seen = []

    def function(y):
        out = y @ w
        seen.append(out.dtype)
        return (out,)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        (y,) = Recompute([w])(function, (torch.ones(2, 3),))
    y.sum().backward()
    assert seen == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_a_block_evaluates_each_stage_once_forward_and_once_backward(mode, steps):
    torch.manual_seed(0)
    field, x = MLP(3, (5, 5)).double(), torch.randn(4, 3, dtype=F64)
    gradients = []
    for gradient in ("direct", "checkpoint"):
        block = CNF(field, Hutchinson(mode=mode), FixedGrid("rk4", steps, gradient), quadratures=[JacobianFrobenius()])
        out = block(x, Request(noise=Noise(0)))
        assert (out.stats.nfe, out.stats.nfe_backward) == (4 * steps, 0)
        loss = out.log_det.sum() + out.integrals["jacobian"].sum()
        gradients.append(torch.autograd.grad(loss, list(field.parameters())))
    assert (out.stats.nfe, out.stats.nfe_backward) == (4 * steps, 4 * steps)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


def test_the_chunks_of_an_exact_trace_are_repeated_inside():
    torch.manual_seed(0)
    field, x = MLP(3, (4, 4, 4)).double(), torch.randn(4, 3, dtype=F64)
    gradients = []
    for gradient in ("direct", "checkpoint"):
        block = CNF(field, Exact(chunk=1), FixedGrid("rk4", 6, gradient))
        gradients.append(torch.autograd.grad(block(x).log_det.sum(), list(field.parameters())[:3]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("field", [MLP(3, (4, 4), "concat"), ConvField(3, (4, 4), "ignore")], ids=["mlp", "conv"])
def test_what_a_field_keeps_for_the_solve_has_its_graph_when_a_step_is_repeated(field):
    """The closed-form trace's kernel, first made while a checkpointed step runs without gradients."""
    torch.manual_seed(0)
    for p in field.double().parameters():
        p.data += 0.3 * torch.randn_like(p)
    x = torch.randn(4, 3, *((3, 3) if isinstance(field, ConvField) else ()), dtype=F64)
    gradients = []
    for gradient in ("direct", "checkpoint"):
        block = CNF(field, Exact(), FixedGrid("rk4", 6, gradient))
        gradients.append(torch.autograd.grad(block(x).log_det.sum(), list(field.parameters())[:3]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


def test_a_running_cost_that_hides_what_it_learns_is_refused():
    hidden = torch.ones((), requires_grad=True)
    cost = RunningCost("cost", lambda t, x: hidden * x.square().sum(1))
    block = CNF(MLP(2, (4,)), Exact(), FixedGrid("rk4", 2, "checkpoint"), quadratures=[cost])
    with pytest.raises(ConfigError, match=r"shape \(\).*parameters"):
        block(torch.randn(3, 2)).integrals["cost"].sum().backward()


def test_a_learned_running_cost_gets_its_gradient_in_every_mode():
    torch.manual_seed(0)
    field, cost = MLP(2, (4,)).double(), torch.nn.Linear(2, 1).double()

    class Cost(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = cost

        def forward(self, t, x):
            return self.inner(x).square()[:, 0]

    x = torch.randn(3, 2, dtype=F64)
    gradients = []
    for solver in (
        FixedGrid("rk4", 32),
        FixedGrid("rk4", 32, "checkpoint"),
        Adaptive("dopri5", 1e-10, 1e-10, "adjoint", quadratures_in_norm=True),
    ):
        block = CNF(field, Exact(), solver, quadratures=[RunningCost("cost", Cost())])
        gradients.append(torch.autograd.grad(block(x).integrals["cost"].sum(), cost.weight)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-6, atol=1e-8)


def test_outputs_that_depend_on_nothing_give_nothing():
    w = weight()
    y, total = Recompute([w])(lambda y, total: (y + 1, total + 2), (torch.zeros(2), torch.zeros(2)))
    assert torch.autograd.grad(y.sum() + total.sum(), w, allow_unused=True) == (None,)
