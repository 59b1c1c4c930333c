"""The default likelihood's error, row by row, against a float64 grid of 2,000 steps; rows that are far out or fail."""

import copy
import math
import warnings

import pytest
import torch
from conftest import F64, slow
from torch import nn

from cnf import CNF, Adaptive, FixedGrid, Flow
from cnf.errors import SolverError
from cnf.evaluation import check, evaluate, rank
from cnf.fields import MLP, AugmentedTimeConditioning, TimePath
from cnf.ode.divergence import Exact, Hutchinson
from cnf.ode.refinement import refine
from cnf.random import Noise
from cnf.transforms import Request

WORST = 5e-3  # nats


class Net(nn.Module):
    """A user's own field, with its divergence in closed form for the reference."""

    def __init__(self, kind, dim=2, width=16, gain=1.0, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = [dim + 1, width, width, dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        with torch.no_grad():
            for layer in self.layers:
                bound = layer.in_features**-0.5
                layer.weight.copy_(gain * bound * (2 * torch.rand(layer.weight.shape, generator=generator) - 1))
                layer.bias.copy_(bound * (2 * torch.rand(layer.bias.shape, generator=generator) - 1))
        self.act = kind()

    def forward(self, t, x, context=None):
        first, second, last = self.layers
        return last(self.act(second(self.act(first(torch.cat([x, t.expand(len(x), 1)], 1))))))

    def with_divergence(self, t, x):
        first, second, last = self.layers
        one = first(torch.cat([x, t.expand(len(x), 1)], 1))
        h, s = self._pair(one)
        k, r = self._pair(second(h))
        inner = (last.weight @ (r[:, :, None] * second.weight)) * s[:, None]  # (N, D, H)
        return last(k), torch.einsum("ndh,hd->n", inner, first.weight[:, : x.shape[1]])

    def _pair(self, x):
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            value = self.act(point)
            (slope,) = torch.autograd.grad(value.sum(), point)
        return value.detach(), slope


@torch.no_grad()
def truth(field, x, steps=2000):
    """log p by rk4 in float64, every stage with its divergence."""
    field, x, h = copy.deepcopy(field).double(), x.double(), 1 / steps
    total = x.new_zeros(len(x))
    for i in range(steps):
        t = x.new_tensor(i * h)
        k1, d1 = field.with_divergence(t, x)
        k2, d2 = field.with_divergence(t + h / 2, x + h / 2 * k1)
        k3, d3 = field.with_divergence(t + h / 2, x + h / 2 * k2)
        k4, d4 = field.with_divergence(t + h, x + h * k3)
        x, total = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    return -0.5 * x.square().sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi) + total


def points(rows, dim, seed):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(1000 + seed))


def worst(flow, x, expected):
    with torch.no_grad():
        return float((flow.log_prob(x).double() - expected).abs().max())


@pytest.mark.parametrize(("kind", "gain"), [(nn.ReLU, 1.3), slow(nn.SELU, 1.0), slow(nn.ELU, 2.5), slow(nn.Tanh, 3.0)])
def test_the_default_is_within_its_error_in_every_row(kind, gain):
    field, x = Net(kind, gain=gain), points(100, 2, 0)
    flow = Flow(CNF(field), (2,)).eval()
    with torch.no_grad():
        samples, log_prob = flow.sample_and_log_prob(30, noise=Noise(0))
    whole = truth(field, torch.cat([x, samples]), 300)
    expected = whole[:100]
    assert float((log_prob.double() - whole[100:]).abs().max()) < WORST
    assert worst(flow, x, expected) < WORST
    with torch.no_grad():
        value = flow.log_prob(x[:1])
    assert float((value.double() - expected[:1]).abs()) < WORST  # a row's error does not depend on its company
    recorded = flow.log_prob(x[:1])
    assert recorded.requires_grad and torch.equal(recorded, value)
    if kind is nn.ELU:
        assert worst(copy.deepcopy(flow).double(), x.double(), expected) < WORST


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.ReLU, nn.SELU, nn.ELU, nn.LeakyReLU, nn.Tanh, nn.Softplus])
@pytest.mark.parametrize("gain", [1.0, 2.0])
@pytest.mark.parametrize("dim", [1, 2, 6])
def test_the_default_is_within_its_error_for_many_fields(kind, gain, dim):
    for seed in range(3):
        field = Net(kind, dim, 32, gain, seed)
        x = points(200, dim, seed)
        flow, expected = Flow(CNF(field), (dim,)).eval(), truth(field, x)
        assert worst(flow, x, expected) < WORST, seed
        assert worst(flow.double(), x.double(), expected) < WORST, seed


@pytest.mark.slow
def test_a_tolerance_of_a_mean_is_kept_where_rules_do_not_settle():
    field, x = Net(nn.ReLU, gain=1.6), points(60, 2, 0)
    flow = Flow(CNF(field, eval_solver=Adaptive("dopri5", 1e-7, 1e-7, quadrature_tolerance=2e-4)), (2,)).eval()
    with torch.no_grad():
        off = (flow.log_prob(x).double() - truth(field, x, 600)).abs() / 2
    assert float(off.mean()) < 2e-4 and float(off.max()) < 2e-3


class Stair(nn.Module):
    """A standing point whose divergence jumps at a time that its context says."""

    def forward(self, t, x, context=None):
        return 0 * x

    def divergence(self, t, x, context=None):
        return 0 * x, (t > context[:, 0]).to(x) - (t > context[:, 1]).to(x)


def test_jumps_at_times_of_each_row_s_own_are_found_whatever_the_batch():
    at = torch.rand(300, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    block = CNF(Stair()).eval()
    x = torch.zeros(300, 1, dtype=F64)
    with torch.no_grad():
        out = block(x, Request(at))
        some = ((at[:, 1] - at[:, 0]).abs() > 0.1).nonzero()[:15, 0]  # closer jumps may stand between the first nodes
        alone = torch.cat([block(x[i : i + 1], Request(at[i : i + 1])).log_det for i in some.tolist()])
    assert float((out.log_det - (at[:, 1] - at[:, 0])).abs().max()) < 1 / 128  # the panels' width: a pulse within one
    assert float((out.log_det - (at[:, 1] - at[:, 0])).abs().mean()) < 1e-3
    assert float((alone - (at[:, 1] - at[:, 0])[some]).abs().max()) < WORST


def test_rows_are_refined_with_their_context_probe_and_augmented_time():
    torch.manual_seed(0)
    x, context = torch.randn(40, 3, dtype=F64), torch.randn(40, 2, dtype=F64)
    field = MLP(3, (12, 12), nonlinearity="relu", context_dim=2).double()
    driven = MLP(3, (12,), AugmentedTimeConditioning("concat", k=4), nonlinearity="relu").double()
    for block, given in (
        (CNF(field, Hutchinson()), context),
        (CNF(field, Exact()), context[0]),
        (CNF(driven, path=TimePath(4).double()), None),
    ):
        block.eval()
        with torch.no_grad():
            found = block(x, Request(given, Noise(1)))
            block.eval_solver = FixedGrid("rk4", 400)
            whole = block(x, Request(given, Noise(1)))
        assert float((found.log_det - whole.log_det).abs().max()) < WORST


def test_what_does_not_settle_says_so():
    def rhs(s, state):
        return (0 * state[0], torch.sin(1e7 * s) * state[0][:, 0])

    path = (torch.ones(129, 2, 1, dtype=F64),)
    with pytest.raises(SolverError, match="did not settle within 500 evaluations: a larger quadrature_tolerance"):
        refine(rhs, path, (torch.zeros(2, dtype=F64),), torch.arange(2), torch.full((1, 1), 1e-8, dtype=F64), None, most=500)


def test_a_layer_in_training_mode_sees_all_rows_together():
    class Together(Stair):
        def divergence(self, t, x, context=None):
            assert len(x) == 6
            return super().divergence(t, x, torch.linspace(0.1, 0.9, 12).reshape(6, 2).to(x))

    block = CNF(Together()).eval()
    block.field.train()
    with torch.no_grad():
        found = block(torch.zeros(6, 1, dtype=F64)).log_det
    assert float((found - 0.8 / 11).abs().max()) < WORST


# -- rows far out ------------------------------------------------------------------------------------------------------

FAR = Adaptive("dopri5", 1e-5, 1e-5, quadrature_tolerance=1e-4), FixedGrid("rk4", 40)


@pytest.mark.parametrize("solver, activation", [
    *((None, activation) for activation in ("tanh", "softplus", "relu")),
    *((solver, "tanh") for solver in FAR),
    *(slow(solver, activation) for solver in FAR for activation in ("softplus", "relu")),
], ids=repr)  # fmt: skip
def test_a_row_far_out_gets_its_density_and_the_others_keep_theirs(activation, solver):
    torch.manual_seed(0)
    flow = Flow(CNF(MLP(2, (8,), nonlinearity=activation), eval_solver=solver), (2,)).eval()
    wide = copy.deepcopy(flow).double()
    x = torch.randn(10, 2)
    far = x.clone()
    with torch.no_grad():
        for value in (1e17, 1e30):
            far[7, 1] = value
            found, others = flow.log_prob(far), torch.arange(10) != 7
            assert float((found - flow.log_prob(x))[others].abs().max()) < 1e-3
            truth = float(wide.log_prob(far[7:8].double()))
            assert float(found[7]) == pytest.approx(truth, rel=1e-4) if value < 1e18 else float(found[7]) == -math.inf
            result = evaluate(flow, far)
            assert float(result.log_prob[7]) == pytest.approx(truth, rel=1e-4) and not result.unsolved
            assert rank(flow, far).order[0] == 7


class Cliff(nn.Module):
    """Infinite beyond 50."""

    def forward(self, t, x, context=None):
        return torch.where(x.abs() > 50, torch.full_like(x, math.inf), -x)


@pytest.mark.parametrize("solver", [None, slow(Adaptive("dopri5", 1e-5, 1e-5)), slow(FixedGrid("rk4", 5))], ids=repr)
def test_rows_that_cannot_be_solved_are_named_and_the_others_keep_theirs(solver):
    flow = Flow(CNF(Cliff(), eval_solver=solver), (2,)).eval()
    x = torch.randn(16, 2)
    with torch.no_grad():
        whole = flow.log_prob(x).double()
    x[[3, 13]] = 3e38
    for call in (flow.log_prob, flow.encode, flow.decode):
        with pytest.raises(SolverError, match=r"rows 3, 13 of 16 cannot be solved \(the other rows can.*3e\+38") as error, torch.no_grad():
            call(x)
        assert error.value.rows == (3, 13)
    with pytest.raises(SolverError, match="row 0 of 1 cannot be solved"), torch.no_grad():
        flow.log_prob(x[3:4])
    for size in (None, 5):
        with pytest.warns(UserWarning, match=r"2 of 16 rows cannot be solved and are left out of the mean \(rows 3, 13\)"):
            found = evaluate(flow, x, batch_size=size)
        solved = torch.tensor([i not in (3, 13) for i in range(16)])
        assert found.unsolved == (3, 13) and bool(found.per_item[~solved].isnan().all())
        torch.testing.assert_close(found.log_prob[solved], whole[solved], rtol=0, atol=1e-4)
        assert found.mean == pytest.approx(-float(whole[solved].mean()), abs=1e-4) and math.isfinite(found.standard_error)
    with pytest.raises(SolverError, match="rows 3, 13"):
        found.require_solved()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranking = rank(flow, x, [f"n{i}" for i in range(16)])
        assert set(ranking.names[-2:]) == {"n3", "n13"} and "ranked last: n3, n13" in ranking.text(3)
        assert check(flow, x).items == 14
        with pytest.raises(SolverError, match="none of 2 rows can be solved"):
            evaluate(flow, x[[3, 13]])


def test_a_batch_that_fails_for_all_rows_is_given_up_soon():
    calls = []

    class Stiff(nn.Module):
        def forward(self, t, x, context=None):
            calls.append(len(x))
            return torch.sin(1e5 * t) * 1e3 + 0 * x

    flow = Flow(CNF(Stiff(), eval_solver=Adaptive("dopri5", 1e-8, 1e-8, max_steps=10)), (1,)).eval()
    with pytest.raises(SolverError, match=r"row 0 of 256 cannot be solved \(there may be more"), torch.no_grad():
        flow.encode(torch.randn(256, 1))
    assert sum(calls) < 3 * 256 * 70 and len(calls) < 10 * 70
