"""Integrals at nodes of the path: against closed forms, the whole solve and refined ones; counts; sorted batches."""

import math
import threading
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import F64, ROOT, mostly_slow
from torch import nn

from cnf import CNF, Flow, build
from cnf.config import FlowConfig, SolverConfig
from cnf.distributed import SINGLE_PROCESS, Group
from cnf.errors import ConfigError, DataError, SolverError
from cnf.evaluation import evaluate
from cnf.evaluation.stiffness_batching import local_error, sorted_rows
from cnf.fields import MLP, AugmentedTimeConditioning, ConvField, TimePath
from cnf.models import eval_solver
from cnf.ode.divergence import Exact, Hutchinson
from cnf.ode.logdet_quadrature import FINEST, RULES, patterson, solve_at_nodes
from cnf.ode.quadratures import Directional, JacobianFrobenius, Kinetic, RunningCost, TotalDerivative
from cnf.random import Noise
from cnf.solvers import Adaptive, FixedGrid, refined
from cnf.transforms import Request, Sequential

pytestmark = pytest.mark.usefixtures("double")

TIGHT = Adaptive("dopri5", 1e-10, 1e-10, quadratures_in_norm=True, max_steps=10_000)


def at_nodes(tolerance, tight=1e-10, **more):
    return Adaptive("dopri5", tight, tight, quadrature_tolerance=tolerance, max_steps=10_000, **more)


def block(field, **options):
    """A block that bends."""
    made = CNF(field, eval_solver=TIGHT, **options).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return made


class Counting(nn.Module):
    """A field that counts its calls."""

    def __init__(self, field):
        super().__init__()
        self.field = field
        self.reset()

    @property
    def closed_form(self):
        return self.field.closed_form

    def reset(self):
        self.plain = self.products = 0

    def forward(self, t, x, context=None):
        self.plain += 1
        return self.field(t, x, context)

    def jvp(self, *args, **options):
        self.products += 1
        return self.field.jvp(*args, **options)

    def divergence(self, *args):
        self.products += 1
        return self.field.divergence(*args)


class Own(nn.Module):
    """A field and its divergence from two functions of (t, x)."""

    def __init__(self, f, div):
        super().__init__()
        self.f, self.div = f, div

    def forward(self, t, x, context=None):
        return self.f(t, x)

    def divergence(self, t, x, context=None):
        return self.f(t, x), self.div(t, x)


# field, points, context: what solves with one time for all rows, or drives a field by a learned time, is among them
CASES = {
    "mlp": lambda: (block(MLP(3, (8, 8))), torch.randn(5, 3), None),
    "three hidden": lambda: (block(MLP(3, (6, 6, 6), "concat", "softplus")), torch.randn(5, 3), None),
    "learned end": lambda: (block(MLP(2, (8,)), end_time=0.7, learn_end_time=True), torch.randn(4, 2), None),
    "hyper": lambda: (block(MLP(3, (6,), "hyper", residual="linear")), torch.randn(5, 3), None),
    "blend": lambda: (block(MLP(3, (6,), "blend", residual="minus")), torch.randn(5, 3), None),
    "conv": lambda: (block(ConvField(2, (4,))), torch.randn(3, 2, 3, 4), None),
    "conv tangents": lambda: (block(ConvField(1, (3, 3, 3)), divergence=Exact(chunk=5)), torch.randn(3, 1, 3, 3), None),
    "context rows": lambda: (block(MLP(2, (6,), context_dim=3)), torch.randn(4, 2), torch.randn(4, 3)),
    "one context": lambda: (block(MLP(2, (6,), "squash", context_dim=3)), torch.randn(4, 2), torch.randn(3)),
    "driven concat": lambda: (block(MLP(3, (6,), AugmentedTimeConditioning("concat", k=4)), path=TimePath(4)), torch.randn(5, 3), None),
    "driven both": lambda: (
        block(MLP(3, (6, 5), AugmentedTimeConditioning("both", k=4, m=3)), path=TimePath(4, learn_start=True), end_time=1.3),
        torch.randn(5, 3),
        None,
    ),
}


# -- the rule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", RULES)
def test_rules_are_exact_for_polynomials_and_nested(n):
    nodes, weights = patterson(n)
    assert len(nodes) == len(weights) == n and bool((weights > 0).all()) and bool((nodes.diff() > 0).all())
    exact = 1 if n == 1 else (3 * n + 1) // 2
    powers = torch.arange(exact + 2, dtype=F64)
    apart = (weights @ nodes[:, None] ** powers - 1 / (powers + 1)).abs()
    assert float(apart[: exact + 1].max()) < 1e-14 and (n > 7 or float(apart[-1]) > 1e-8)
    if n < FINEST:
        assert torch.equal(patterson(2 * n + 1)[0][1::2], nodes)
    if n == 3:
        legendre = np.polynomial.legendre.leggauss(3)
        np.testing.assert_allclose((nodes * 2 - 1, weights * 2), legendre, rtol=0, atol=1e-15)


# -- the integrals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("back", [False, True])
def test_linear_fields_have_the_trace_of_the_matrix_exponential(back):
    a, x = torch.randn(3, 3), torch.randn(5, 3)

    def rate(t):
        return 1 + torch.sin(3 * t) + t**2

    field = Own(lambda t, y: rate(t) * (y @ a.T), lambda t, y: (rate(t) * a.trace()).expand(len(y)))
    flow = CNF(field, eval_solver=at_nodes(1e-9), end_time=1.3).eval()
    with torch.no_grad():
        out = (flow.inverse if back else flow.forward)(x)
    total = (1.3 + (1 - math.cos(3.9)) / 3 + 1.3**3 / 3) * (-1 if back else 1)
    torch.testing.assert_close(out.value, x @ torch.linalg.matrix_exp(total * a).T, rtol=0, atol=1e-7)
    torch.testing.assert_close(out.log_det, (total * a.trace()).expand(5), rtol=0, atol=1e-9)
    assert out.stats.products == 15  # what so many steps ask for


def test_a_constant_trace_takes_the_fewest_nodes():
    a = torch.randn(3, 3)
    flow = CNF(Own(lambda t, y: y @ a.T, lambda t, y: a.trace().expand(len(y))), eval_solver=at_nodes(1e-12, 1e-5)).eval()
    with torch.no_grad():
        out = flow(torch.randn(5, 3))
    assert out.stats.products == 3 and out.stats.accepted <= 6
    torch.testing.assert_close(out.log_det, a.trace().expand(5), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", mostly_slow(CASES, "mlp", "learned end", "conv", "conv tangents", "one context", "driven both"))
def test_the_log_det_is_that_of_the_whole_solve_to_the_tolerance(name):
    one, x, context = CASES[name]()
    with torch.no_grad():
        for move in (one.forward, one.inverse):
            one.eval_solver = TIGHT
            whole = move(x, Request(context))
            assert whole.stats.products == whole.stats.nfe > 20
            counts = []
            for tolerance in (1e-3, 1e-6, 1e-9):
                one.eval_solver = at_nodes(tolerance)
                out = move(x, Request(context))
                apart = (out.log_det - whole.log_det).abs() / x[0].numel()
                assert float(apart.mean()) < tolerance and float(apart.max()) < 10 * tolerance
                torch.testing.assert_close(out.value, whole.value, rtol=0, atol=1e-8)
                counts.append(out.stats.products)
            assert counts == sorted(counts) and counts[-1] < whole.stats.products / 1.4


@pytest.mark.parametrize("method", Adaptive.METHODS)
def test_the_path_between_steps_is_as_good_as_the_steps(method):
    one, x, _ = CASES["mlp"]()
    tight = 1e-4 if method in ("adaptive_heun", "fehlberg2") else 1e-6
    with torch.no_grad():
        whole = one(x)
        one.eval_solver = Adaptive(method, tight, tight, quadrature_tolerance=1e-9)
        out = one(x)
    assert float((out.log_det - whole.log_det).abs().mean()) < 30 * tight


@pytest.mark.slow
def test_other_integrals_are_taken_at_the_same_nodes():
    kinds = (Kinetic(), JacobianFrobenius(), Directional(), TotalDerivative(), RunningCost("far", lambda t, x: (t + 1) * x.square().sum(1)))
    for name in ("three hidden", "driven concat"):
        one, x, _ = CASES[name]()
        one.quadratures = kinds
        one.divergence = Exact(closed_form=False)  # whose norm of the Jacobian is exact
        with torch.no_grad():
            for move in (one.forward, one.inverse):
                one.eval_solver = TIGHT
                whole = move(x)
                one.eval_solver = at_nodes(1e-8)
                out = move(x)
                assert out.integrals.keys() == whole.integrals.keys() == {q.name for q in kinds}
                for key, value in whole.integrals.items():
                    torch.testing.assert_close(out.integrals[key], value, rtol=1e-6, atol=1e-6)
                assert out.stats.products < whole.stats.products / 1.5
                assert move(x, Request(integrals=False)).integrals == {}


def test_an_estimate_keeps_its_probe():
    one, x, _ = CASES["mlp"]()
    for mode in ("forward", "reverse"):
        one.divergence = Hutchinson(mode=mode, probes=2)
        with torch.no_grad():
            one.eval_solver = TIGHT
            whole = one(x, Request(noise=Noise(3)))
            one.eval_solver = at_nodes(1e-7)
            out = one(x, Request(noise=Noise(3)))
        torch.testing.assert_close(out.log_det, whole.log_det, rtol=0, atol=1e-6)


def test_float32_is_float64_to_rounding_and_settles_at_tolerances_below_it():
    one, x, _ = CASES["three hidden"]()
    with torch.no_grad():
        whole = one(x)
        one.float()
        one.eval_solver = at_nodes(1e-12, 1e-6)
        out = one(x.float())
    assert out.log_det.dtype == torch.float32 and out.stats.products <= FINEST
    torch.testing.assert_close(out.log_det.double(), whole.log_det, rtol=0, atol=1e-5)


# -- counts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "conv tangents", "driven both"])
@pytest.mark.parametrize("tolerance", [None, 1e-5])
def test_products_and_evaluations_are_those_that_were_made(name, tolerance):
    one, x, _ = CASES[name]()
    one.field = calls = Counting(one.field)
    if name == "conv tangents":
        one.divergence = Exact(chunk=x[0].numel())  # all tangents in one call
    one.eval_solver = Adaptive("dopri5", 1e-6, 1e-6, quadrature_tolerance=tolerance)
    with torch.no_grad():
        for move in (one.forward, one.inverse):
            calls.reset()
            stats = move(x).stats
            assert stats.products == calls.products > 0 and stats.nfe == calls.plain + calls.products
            assert (calls.plain > calls.products) == (tolerance is not None)
        calls.reset()
        stats = one.inverse(x, Request(log_det=False)).stats  # sampling
        assert stats.products == calls.products == 0 and stats.nfe == calls.plain > 0


def test_what_records_a_gradient_or_trains_takes_the_integrals_along():
    one, x, _ = CASES["mlp"]()
    one.eval_solver, one.solver = at_nodes(1e-4), FixedGrid("rk4", 3)
    stats, value = one(x).stats, one(x).log_det
    assert stats.products > 40 and stats.nfe > stats.products  # the gradient's integrals along, the value's at nodes
    with torch.no_grad():
        assert one(x).stats.products < 20 and torch.equal(one(x).log_det, value)
        assert one.train()(x).stats.products == 12
    flow = Flow(one.eval(), (3,))
    score = flow.score(x)
    one.eval_solver = TIGHT
    torch.testing.assert_close(score, flow.score(x), rtol=0, atol=1e-7)


def test_steps_are_counted_over_all_nodes():
    one, x, _ = CASES["mlp"]()
    one.eval_solver = Adaptive("dopri5", 1e-10, 1e-10, quadrature_tolerance=1e-4, max_steps=5)
    with torch.no_grad(), pytest.raises(SolverError, match=r"after 5 accepted.*max_steps \(now 5\)"):
        one(x)


# -- what is rough -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moving", [True, False])
def test_what_the_finest_rule_does_not_settle_is_integrated_along(moving):
    w = 400.0  # the path shows it, or stays where it is while the trace swings
    field = Own(lambda t, y: y * torch.cos(w * t), lambda t, y: (3 * torch.cos(w * t)).expand(len(y)))
    flow = CNF(field, eval_solver=at_nodes(1e-4, 1e-6)).eval()
    x = torch.randn(4, 3) if moving else torch.zeros(4, 3)
    with torch.no_grad():
        out = flow(x)
    assert out.stats.products > FINEST + 100
    torch.testing.assert_close(out.log_det, torch.full((4,), 3 * math.sin(w) / w), rtol=0, atol=1e-4)


@pytest.mark.parametrize("turns", [1, 2, 3, 4, 6, 8])
def test_whole_turns_that_the_path_does_not_show_are_not_missed(turns):
    for phase in (0.0, 0.3, math.pi / 2):

        def rate(t, phase=phase):
            return 1 + torch.cos(2 * math.pi * turns * t + phase)

        flow = CNF(Own(lambda t, y: rate(t) * y, lambda t, y: rate(t).expand(len(y))), eval_solver=at_nodes(1e-3, 1e-5)).eval()
        with torch.no_grad():
            out = flow(torch.zeros(4, 1))  # which stays where it is
        torch.testing.assert_close(out.log_det, torch.ones(4), rtol=0, atol=1e-3)


def test_one_rough_row_among_many_is_not_averaged_away():
    for rough in (1.0, 15.0, 25.0, 40.0, 80.0):
        w = torch.ones(1000)
        w[17] = rough

        def rhs(s, state, w=w):
            still = torch.zeros_like(state[0])
            return (still,) if len(state) == 1 else (still, torch.sin(w * s))

        start = (torch.randn(1000, 1), torch.zeros(1000))
        found = solve_at_nodes(at_nodes(1e-3, 1e-5), rhs, start, dynamic=1, tolerance=1e-3)
        assert (found.stats.products > 7) == (rough > 1)
        assert float((found.state[1] - (1 - w.cos()) / w).abs().max()) < 1e-2


def test_a_state_that_is_not_finite_is_an_error_all_the_same():
    field = Own(lambda t, y: y**3, lambda t, y: 3 * y.square().sum(1))
    flow = CNF(field, eval_solver=at_nodes(1e-4, 1e-5), end_time=5.0).eval()
    with torch.no_grad(), pytest.raises(SolverError):
        flow(3 * torch.ones(2, 2))


# -- settings ----------------------------------------------------------------------------------------------------------


def test_built_flows_share_the_tolerance_among_their_blocks():
    config = FlowConfig.of(hidden=(5,), blocks=3)
    for levels, unit, shape in ((None, 1.0, (2,)), (4, math.log(2), (1, 1, 2))):
        flow = build(config, SolverConfig(eval_tolerance=6e-4), shape, levels=levels)
        assert [b.eval_solver.quadrature_tolerance for b in flow.blocks] == pytest.approx([2e-4 * unit] * 3)
        assert all(b.solver.method == "rk4" for b in flow.blocks)
        finer = refined(flow.eval().blocks[0])
        assert finer.quadrature_tolerance == pytest.approx(2e-5 * unit) and finer.rtol == pytest.approx(1e-6)
    assert build(config, SolverConfig(eval_tolerance=0), (2,)).blocks[0].eval_solver.quadrature_tolerance is None
    assert eval_solver(SolverConfig()).quadrature_tolerance is None
    assert CNF(MLP(2)).eval_solver.quadrature_tolerance == 1e-3 and CNF(MLP(2)).eval_solver.norm == "row"
    for options in (dict(quadrature_tolerance=0.0), dict(quadrature_tolerance=1e-3, quadratures_in_norm=True)):
        with pytest.raises(ConfigError, match="quadrature_tolerance"):
            Adaptive(**options)
    with pytest.raises(ConfigError, match="norm='rows'"):
        Adaptive(norm="rows")


@pytest.mark.parametrize("architecture", ["stack", "multiscale"])
def test_the_error_of_a_built_flow_is_below_its_tolerance(architecture):
    config = FlowConfig.of(architecture=architecture, field="conv", hidden=(4,), blocks=1, zero_init=False, time_conditioning="concat", preprocess="logit")
    flow = build(config, SolverConfig(eval_tolerance=1e-3), (1, 4, 4), levels=5).eval()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x = torch.randint(0, 5, (6, 1, 4, 4), dtype=torch.uint8)
    found = evaluate(flow, x)
    for b in flow.blocks:
        b.eval_solver = TIGHT
    whole = evaluate(flow, x)
    assert float((found.per_item - whole.per_item).abs().mean()) < 1e-3
    assert found.products < whole.products / 3 and whole.products == whole.nfe > found.nfe > found.products


# -- sorted batches ----------------------------------------------------------------------------------------------------


def test_hardness_is_of_the_order_of_one_step_and_zero_where_it_is_exact():
    one, x, _ = CASES["mlp"]()
    flow = Flow(one, (3,))
    found = []
    for end in (0.2, 0.1, 0.05):
        one.fixed_end_time = end
        found.append(local_error(flow, x) * end)  # the step's error itself
    orders = [float((a / b).log2().mean()) for a, b in zip(found, found[1:], strict=False)]
    assert all(4.7 < order < 5.3 for order in orders), orders
    cubic = Own(lambda t, y: torch.ones_like(y) * t**3, lambda t, y: 0 * y[:, 0])
    assert float(local_error(Flow(CNF(cubic), (3,)), x).max()) < 1e-14
    quartic = Own(lambda t, y: torch.ones_like(y) * t**4, lambda t, y: 0 * y[:, 0])
    assert float(local_error(Flow(CNF(quartic), (3,)), x).min()) > 1e-5


def varied():
    """A flow whose rows take very different steps: row i turns i times as fast."""

    def f(t, y):
        speed = y[:, :1].abs()
        return torch.cat([0 * speed, (speed * 3 * t).sin() * speed], 1)

    flow = Flow(CNF(Own(f, lambda t, y: 0 * y[:, 0]), eval_solver=Adaptive("dopri5", 1e-7, 1e-7)), (2,)).eval()
    return flow, torch.stack([0.2 + 3 * torch.rand(40), torch.randn(40)], 1)


def test_batches_are_cut_in_the_order_of_hardness(monkeypatch):
    flow, x = varied()
    alone = torch.tensor([flow.evaluate(row[None], Request(log_det=False)).stats.nfe for row in x]).double()
    order = sorted_rows(flow, x, None, size=8, group=SINGLE_PROCESS)
    assert sorted(order.tolist()) == list(range(40))
    nfe = alone[order].reshape(5, 8).mean(1)
    assert nfe.tolist() == sorted(nfe.tolist()) and nfe[-1] > 1.5 * nfe[0]
    own = evaluate(flow, x, batch_size=8)
    monkeypatch.setattr("cnf.evaluation.likelihood.sorted_rows", lambda flow, x, context, **_: torch.arange(len(x)))
    mixed = evaluate(flow, x, batch_size=8)
    assert own.nfe < 0.9 * mixed.nfe and torch.equal(own.index, mixed.index)
    torch.testing.assert_close(own.log_prob, mixed.log_prob, rtol=0, atol=1e-5)
    assert sorted_rows(flow, x, None, size=40, group=SINGLE_PROCESS).tolist() == list(range(40))
    for b in flow.blocks:
        b.eval_solver = FixedGrid("rk4", 64)
    assert sorted_rows(flow, x, None, size=8, group=SINGLE_PROCESS).tolist() == list(range(40))


def test_sorting_puts_results_back_with_their_context_and_noise():
    torch.manual_seed(1)
    chain = Sequential([block(MLP(2, (8,), context_dim=1)) for _ in range(3)])
    flow = Flow(chain, (2,)).eval()
    for b in flow.blocks:
        b.eval_solver = Adaptive("dopri5", 1e-8, 1e-8, quadrature_tolerance=1e-7)
    x, context = torch.randn(30, 2) * torch.linspace(0.1, 6, 30)[torch.randperm(30), None], torch.randn(30, 1)
    whole = evaluate(flow, x, context)
    parts = evaluate(flow, x, context, batch_size=7)
    torch.testing.assert_close(parts.log_prob, whole.log_prob, rtol=0, atol=1e-6)
    assert torch.equal(parts.index, torch.arange(30)) and float(whole.log_prob.std()) > 1
    order = sorted_rows(flow, x, context, size=7, group=SINGLE_PROCESS)
    assert order.tolist() != list(range(30))
    pixels = torch.randint(0, 4, (9, 1, 2, 2), dtype=torch.uint8)
    of_images = build(FlowConfig.of(hidden=(6,), zero_init=False), SolverConfig(), (1, 2, 2), levels=4).eval()
    one, many = (evaluate(of_images, pixels, draws=3, seed=2, batch_size=size) for size in (9, 2))
    torch.testing.assert_close(many.per_item, one.per_item, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [9, 2])
def test_what_does_not_fit_is_named_whatever_the_batches(size):
    plain = build(FlowConfig.of(hidden=(6,)), SolverConfig(), (2,)).eval()
    given = build(FlowConfig.of(hidden=(6,)), SolverConfig(), (2,), context_dim=3).eval()
    for flow, x, context, message in (
        (plain, torch.randn(9, 3), None, r"x has shape .*, expected \(N, 2\)"),
        (plain, torch.full((9, 2), math.nan), None, "x holds NaN or infinity"),
        (plain, torch.ones(9, 2, dtype=torch.long), None, "x has type torch.int64, expected floats"),
        (given, torch.randn(9, 2), torch.randn(9, 2), r"context has shape .*, expected \(3,\)"),
    ):
        with pytest.raises(DataError, match=message):
            evaluate(flow, x, context, batch_size=size)


class Rank(Group):
    """A process of two, played by a thread."""

    box: ClassVar[dict[int, torch.Tensor]] = {}
    gate = threading.Barrier(2, timeout=180)

    def sum(self, value):
        self.box[self.rank] = value
        self.gate.wait()
        total = self.box[0] + self.box[1]
        self.gate.wait()
        return total

    def all_max(self, values):
        return self.sum(torch.tensor(values)).tolist()


def test_several_processes_share_the_sorting_to_the_last_bit():
    flow, x = varied()
    found = {}

    def run(rank):
        torch.set_default_dtype(F64)
        found[rank] = evaluate(flow, x, batch_size=7, group=Rank(rank, 2))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    alone = evaluate(flow, x, batch_size=7)
    for rank in (0, 1):
        assert torch.equal(found[rank].log_prob, alone.log_prob) and found[rank].nfe == alone.nfe


def test_hardness_reaches_the_first_block_of_every_architecture():
    x = torch.randint(0, 5, (7, 1, 4, 4), dtype=torch.uint8)
    for more in (
        dict(architecture="multiscale", field="conv"),
        dict(architecture="multiscale", field="conv", augmented_time="hyper", augmented_time_dim=4, augmented_time_entries=2),
        dict(architecture="parallel", field="conv", squeeze_first=False),
        dict(field="conv", squeeze_first=True),
        dict(field="mlp", dequantize="variational", preprocess="logit"),
    ):
        flow = build(FlowConfig.of(hidden=(4,), zero_init=False, **more), SolverConfig(), (1, 4, 4), levels=5, context_dim=0).eval()
        values = local_error(flow, x)
        assert values.shape == (7,) and values.dtype == F64 and bool((values > 0).all())
        assert sorted(sorted_rows(flow, x, None, size=2, group=SINGLE_PROCESS).tolist()) == list(range(7))


@pytest.mark.slow
def test_the_benchmark_holds_both_sides_to_the_error(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import evaluation
    import measure

    one = block(MLP(2, (6, 6)))
    flow, x = Flow(one, (2,)).float(), torch.randn(16, 2).float()
    rows = [{"case": "tiny", **row} for row in evaluation.compare(flow, x, 1)]
    assert [row["mode"] for row in rows] == ["error 0.001", "error 0.0001", "defaults"]
    for row, error in zip(rows, (*evaluation.ERRORS, 1e-4), strict=True):
        assert row["baseline_error"] < error and row["ours_error"] < error
        assert row["ours_products"] < row["ours_nfe"] and row["baseline_products"] == row["baseline_nfe"]
        assert row["products_ratio"] > 1 and min(row["baseline_s"], row["ours_s"]) > 0
    order = evaluation.in_order(flow, x, 5, 1)
    assert order["difference"] < 1e-3 and order["items"] == 16
    assert measure.markdown(rows, evaluation.COLUMNS).count("\n") == 4
