"""torchdiffeq's other methods, options and callbacks, and a solver of the user's own, against the matrix exponential."""

import copy

import pytest
import torch
from conftest import F64, LinearField, mostly_slow, normal

from cnf import CNF, Adaptive, Flow
from cnf.errors import ConfigError, SolverError
from cnf.fields import MLP
from cnf.solvers import Solution, Stats
from cnf.solvers.base import Counter

A = 0.7 * normal(3, 3, seed=1)
SOLVERS = {
    "explicit Adams": Adaptive("explicit_adams", options={"step_size": 0.01}),
    "implicit Adams": Adaptive("implicit_adams", 1e-10, 1e-10, "adjoint", options={"step_size": 0.02, "max_order": 4}),
    "LSODA": Adaptive("scipy_solver", 1e-9, 1e-9, "adjoint"),
    "Radau": Adaptive("scipy_solver", 1e-9, 1e-9, "adjoint", options={"solver": "Radau"}),
    "dopri5 with options": Adaptive("dopri5", 1e-9, 1e-9, options={"first_step": 0.01, "safety": 0.8, "max_step": 0.1}),
}


def flow_of(solver):
    return Flow(CNF(LinearField(A.clone()), None, solver, solver), (3,)).double()


@pytest.mark.filterwarnings("ignore:The following arguments have no effect")  # torchdiffeq gives scipy min_step
@pytest.mark.parametrize("name", mostly_slow(SOLVERS, "explicit Adams", "LSODA"))
def test_a_linear_field(name):
    flow, x = flow_of(SOLVERS[name]), normal(4, 3)
    truth = Flow(CNF(LinearField(A.clone()), None, Adaptive("dopri5", 1e-11, 1e-11)), (3,)).double()
    with torch.no_grad():
        z = flow.encode(x)
        assert torch.allclose(z, x @ torch.linalg.matrix_exp(A).T, atol=1e-5 if name == "explicit Adams" else 1e-6)
        assert torch.allclose(flow.log_prob(x), flow.base_log_prob(z) + A.trace(), atol=1e-6)
        assert torch.allclose(flow.decode(z), x, atol=1e-5)
    for each in (flow, truth):
        each.log_prob(x).sum().backward()
    assert torch.allclose(flow.transform.field.a.grad, truth.transform.field.a.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:The following arguments have no effect")
def test_a_stiff_field_takes_few_evaluations_of_an_implicit_method():
    def nfe(solver):
        flow = Flow(CNF(LinearField(torch.diag(torch.tensor([-300.0, -1.0], dtype=F64))), None, solver, solver), (2,)).double()
        with torch.no_grad():
            return flow.evaluate(normal(3, 2)).stats.nfe

    assert nfe(Adaptive("scipy_solver", gradient="adjoint", options={"solver": "BDF"})) < nfe(Adaptive("dopri5", max_steps=5000)) / 2


def test_refinement_and_callbacks():
    adams = SOLVERS["explicit Adams"]
    assert adams.refined().options["step_size"] == 0.005 and adams.options["step_size"] == 0.01 and "step_size" in repr(adams)
    seen = []
    names = ("callback_step", "callback_accept_step")
    solver = Adaptive("dopri5", callbacks={name: lambda s, y, h, name=name: seen.append((name, float(s), y[0].shape)) for name in names})
    with torch.no_grad():
        stats = flow_of(solver).evaluate(normal(4, 3)).stats
        assert sum(name == "callback_accept_step" for name, *_ in seen) == stats.accepted > 0
        assert sum(name == "callback_step" for name, *_ in seen) == stats.accepted + stats.rejected
        assert all(0 <= s <= 1 and shape == (4, 3) for _, s, shape in seen)
        assert flow_of(adams).evaluate(normal(4, 3)).stats.accepted == 100


@pytest.mark.parametrize("method, options, message", [
    ("rk45", {}, "method='rk45' is unknown for Adaptive"),
    ("dopri5", {"options": {"step_t": 1.0}}, "options='step_t' is unknown for method 'dopri5'"),
    ("dopri5", {"callbacks": {"on_step": print}}, "callbacks='on_step' is unknown"),
    ("implicit_adams", {}, r"needs a step_size in \(0, 1\]"),
    ("implicit_adams", {"options": {"step_size": 0.1}, "norm": "row"}, "has no step control of its own"),
    ("scipy_solver", {}, "take gradient='adjoint'"),
    ("scipy_solver", {"gradient": "adjoint", "callbacks": {"callback_step": print}}, "callbacks='callback_step' is unknown for method 'scipy_solver'"),
])  # fmt: skip
def test_what_is_refused(method, options, message):
    with pytest.raises(ConfigError, match=message):
        Adaptive(method, **options)


def test_failures_are_solver_errors():
    class Explodes(torch.nn.Module):
        context_dim = 0

        def forward(self, t, x):
            return x**3 * 50

    for solver in (Adaptive("scipy_solver", gradient="adjoint", max_steps=5), Adaptive("explicit_adams", options={"step_size": 0.1}, max_steps=5)):
        with torch.no_grad(), pytest.raises(SolverError):
            Flow(CNF(Explodes(), None, solver), (2,)).encode(torch.ones(3, 2))
    with pytest.raises(ConfigError, match=r"does not run under torch\.func"):
        flow = flow_of(SOLVERS["explicit Adams"])
        torch.func.grad(lambda x: flow.log_prob(x))(normal(3))


class Euler:
    """The protocol of a solver, as in docs/architecture.md."""

    def __init__(self, steps):
        self.steps = steps

    def solve(self, rhs, state, *, dynamic=1, parameters=()):
        counter = Counter()
        for i in range(self.steps):
            counter.count()
            slopes = rhs(state[0].new_full((), i / self.steps), state)
            state = tuple(y + dy / self.steps for y, dy in zip(state, slopes, strict=True))
        return Solution(state, Stats([counter]))

    def refined(self):
        return Euler(2 * self.steps)


def test_a_solver_of_the_users_own():
    x = normal(4, 3)
    found = []
    for steps in (20, 40):
        flow = flow_of(Euler(steps))
        out = flow.evaluate(x)
        assert out.stats.nfe == steps
        found.append(float((out.value - x @ torch.linalg.matrix_exp(A).T).abs().max().detach()))
        flow.log_prob(x).sum().backward()
        assert bool((flow.transform.field.a.grad != 0).any())
    assert 1.7 < found[0] / found[1] < 2.3  # first order
    flow = copy.deepcopy(Flow(CNF(MLP(2), None, Euler(5), Euler(5)), (2,)))
    assert flow.sample(3).shape == (3, 2)
