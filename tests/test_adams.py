"""Exponential Adams methods: against closed forms and tight adaptive solves, their error estimate, and the settings that choose them."""

import math

import pytest
import torch
from conftest import F64

from cnf import CNF, FlowConfig, Noise, SolverConfig, build
from cnf.cli.options import parse, refuse_meaningless
from cnf.errors import ConfigError, SolverError
from cnf.evaluation import evaluate
from cnf.fields import MLP, Denoiser, Interpolant
from cnf.losses import FlowMatching
from cnf.models import eval_solver
from cnf.ode.divergence import Hutchinson
from cnf.ode.quadratures import Kinetic
from cnf.solvers import Adaptive, ExponentialAdams, FixedGrid, PowerSpacing, coarse
from cnf.transforms import Request

ADAMS = {"field": "unet", "dequantize": "truncated-normal", "preprocess": "center", "hidden": (4,), "unet_depth": 1}


def block_of(zero=False, quadratures=(), std=0.6):
    """A block of a small denoiser in double precision."""
    torch.manual_seed(0)
    field = Denoiser(1, Interpolant(0.05), level=0.5, periods=(1.0,), hidden=(4,), depth=1, zero_init=zero)
    if not zero:
        for p in field.parameters():
            p.data += 0.05 * torch.randn_like(p)
    field.data_std.fill_(std)
    return CNF(field, Hutchinson(), quadratures=quadratures).double().eval()


def solved(block, x, solver, **more):
    with torch.no_grad():
        return block(x, Request(noise=Noise(0), solver=solver, **more))


@pytest.fixture(scope="module")
def exact():
    """A block, points, and point, log-det and kinetic energy by a tight adaptive solve."""
    block = block_of(quadratures=[Kinetic()])
    x = 0.6 * torch.randn(2, 1, 4, 4, dtype=F64)
    out = solved(block, x, Adaptive("dopri8", 1e-8, 1e-8, quadratures_in_norm=True))
    return block, x, out


@pytest.mark.parametrize("order", [3, 4])
def test_a_linear_field_is_solved_exactly_in_one_step(order):
    block, x = block_of(zero=True), torch.randn(3, 1, 4, 4, dtype=F64)
    r = math.hypot(0.6, 0.05)  # of x0 + sigma z, to 1 at the noise
    out = solved(block, x, ExponentialAdams(1, order))
    torch.testing.assert_close(out.value, x / r)
    torch.testing.assert_close(out.log_det, torch.full((3,), -16 * math.log(r), dtype=F64))
    with torch.no_grad():
        back = block.inverse(out.value, Request(noise=Noise(0), solver=ExponentialAdams(1, order)))
    torch.testing.assert_close(back.value, x)
    torch.testing.assert_close(back.log_det, -out.log_det)


def test_the_linear_part_has_the_derivatives_that_it_says():
    field = block_of().field
    t = torch.linspace(0, 1, 7, dtype=F64)
    part, rates = torch.func.jvp(field.semilinear, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(rates.scale / part.scale, part.rate)
    torch.testing.assert_close(rates.angle, part.speed)


@pytest.mark.parametrize("order", [3, 4])
def test_errors_fall_with_the_order(exact, order):
    block, x, truth = exact
    errors = []
    for steps in (20, 40):
        out = solved(block, x, ExponentialAdams(steps, order))
        assert out.stats.nfe == out.stats.products == steps + 1
        pairs = ((out.value, truth.value), (out.log_det, truth.log_det), (out.integrals["kinetic"], truth.integrals["kinetic"]))
        errors.append(torch.stack([(a - b).abs().max() for a, b in pairs]))
    assert bool((errors[1] < errors[0] / 2 ** (order - 1.2)).all()), errors


def test_the_estimate_is_of_the_size_of_the_error(exact):
    block, x, truth = exact
    for steps in (12, 24):
        found = []

        class Watched(ExponentialAdams):
            def attempt(self, *arguments, found=found):
                found.append(super().attempt(*arguments))
                return found[-1]

        out = solved(block, x, Watched(steps))
        error = (out.log_det - truth.log_det - (out.value.square() - truth.value.square()).flatten(1).sum(1) / 2).abs().mean()
        assert 0.3 * error < found[0][1].mean() < 50 * error


def test_steps_are_chosen_by_the_estimate(exact):
    block, x, truth = exact
    tolerance = 1e-4
    out = solved(block, x, ExponentialAdams(8, tolerance=tolerance))
    assert out.stats.accepted > 8 and out.stats.nfe > out.stats.accepted + 8  # the attempts count
    assert float((out.log_det - truth.log_det).abs().mean()) / 16 < 5 * tolerance
    with pytest.raises(SolverError, match=r"estimates an error of .* after 12 steps: a larger tolerance or max_steps"):
        solved(block, x, ExponentialAdams(8, tolerance=1e-9, max_steps=12))


def test_another_solver_draws_samples_and_encodes(exact):
    block, x, _ = exact
    other = FixedGrid("rk4", 5)
    solver = ExponentialAdams(8, otherwise=other)
    with torch.no_grad():
        for run, log_det in ((block.inverse, True), (block.inverse, False), (block, False)):
            found, truth = (run(x, Request(noise=Noise(0), solver=s, log_det=log_det)) for s in (solver, other))
            assert torch.equal(found.value, truth.value) and torch.equal(found.log_det, truth.log_det)
    assert solved(block, x, solver).stats.nfe == 9
    assert solver.refined().otherwise.steps == 10 and solver.coarse().otherwise is other


def test_other_grids_converge_as_well(exact):
    block, x, truth = exact
    solver = ExponentialAdams(60, spacing=PowerSpacing(block.field.interpolant, 12))
    out = solved(block, x, solver.with_steps(60))
    assert float((out.log_det - truth.log_det).abs().max()) < 1e-3


def test_a_part_of_the_path_has_a_part_of_the_steps(exact):
    block, x, truth = exact
    half = torch.tensor(0.5, dtype=F64)
    with torch.no_grad():
        request = Request(noise=Noise(0), solver=ExponentialAdams(40), log_det=False)
        middle, _, first = block.integrate(x, (0 * half, half), request)
        end, _, _ = block.integrate(middle, (half, 2 * half), request)
    assert first.stats.nfe == 21
    torch.testing.assert_close(end, truth.value, rtol=0, atol=2e-3)


def test_gradients_are_those_of_the_discretisation(exact):
    block, x, _ = exact
    x = x[:1].clone().requires_grad_()

    def value(y):
        return block(y, Request(noise=Noise(0), solver=ExponentialAdams(3), integrals=False)).log_det

    (grad,) = torch.autograd.grad(value(x).sum(), x)
    v = torch.randn_like(x)
    with torch.no_grad():
        slope = (value(x + 1e-6 * v) - value(x - 1e-6 * v)) / 2e-6
    torch.testing.assert_close((grad * v).sum()[None], slope, rtol=1e-6, atol=1e-6)


def test_other_fields_and_settings_are_refused():
    x = torch.randn(3, 2)
    with pytest.raises(ConfigError, match=r"is for denoisers .* use FixedGrid"):
        CNF(MLP(2))(x, Request(solver=ExponentialAdams()))
    for options, words in (({"order": 5}, "order must be one of 3, 4, got 5"), ({"steps": 0}, "steps"), ({"tolerance": 0.0}, "tolerance")):
        with pytest.raises(ConfigError, match=words):
            ExponentialAdams(**options)
    block = block_of()
    block.field.data_std.fill_(math.nan)
    with pytest.raises(SolverError, match="not finite after 2 steps"):
        solved(block, torch.zeros(1, 1, 4, 4, dtype=F64), ExponentialAdams(2))


# -- the settings that choose it ---------------------------------------------------------------------------------


def test_denoisers_are_evaluated_by_it_and_validated_coarsely():
    solver = SolverConfig.of(divergence="hutchinson", likelihood_solver="adams", likelihood_tolerance=0.02)
    flow = build(FlowConfig.of(**ADAMS), solver, (1, 4, 4), levels=4).eval()
    own = flow.blocks[0].eval_solver
    assert repr(own) == f"ExponentialAdams(steps=32, order=4, tolerance={0.02 * math.log(2):g})"
    assert repr(coarse(flow.blocks[0])) == "ExponentialAdams(steps=20, order=3)"
    x = torch.randint(0, 4, (8, 1, 4, 4), dtype=torch.uint8)
    assert evaluate(flow, x).products == 33
    assert FlowMatching(flow).validate(flow, x, index=torch.arange(8), seed=0)["validation_nfe"] == 21
    # another field has no linear part: the adaptive solver
    plain = build(FlowConfig.of(**ADAMS | {"dequantize": "uniform"}), solver, (1, 4, 4), levels=4).eval()
    assert isinstance(plain.blocks[0].eval_solver, Adaptive)
    assert coarse(plain.blocks[0]) is plain.blocks[0].eval_solver
    assert eval_solver(solver.change(likelihood_tolerance=0.0), flow).tolerance is None


def test_the_presets_of_denoisers_use_it():
    def read(words):
        command, given, _ = parse(words.split())
        refuse_meaningless(command.config, given)
        return command.config.solver

    assert read("fm-mnist").likelihood_solver.kind == "adams"
    assert read("fm-mnist --likelihood-steps 40").likelihood_solver.likelihood_steps == 40
    assert read("fm-mnist --likelihood-solver adaptive --eval-tolerance 1e-3").likelihood_solver.kind == "adaptive"
    for words, message in (
        ("fm-mnist --eval-tolerance 1e-3", "--eval-tolerance is for likelihoods by the adaptive solver"),
        ("digits --likelihood-solver adams", "--likelihood-solver is for denoisers"),
        ("digits --likelihood-steps 40", "--likelihood-steps 40 is for --likelihood-solver adams"),
    ):
        with pytest.raises(ConfigError, match=message):
            read(words)
