"""Evaluation: bounds against bin probabilities by quadrature, standard errors, checks, columns, ranks, reports."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from conftest import F64

from cnf.config import FlowConfig, SolverConfig
from cnf.config.results import CAUTION
from cnf.data import DataSplits
from cnf.errors import ConfigError, DataError
from cnf.evaluation import (
    ItemNoise,
    check,
    column_report,
    conditional_log_prob,
    evaluate,
    integral_2d,
    rank,
    round_trip_error,
    solver_error,
    spacing_entropy,
)
from cnf.fields import MLP
from cnf.flow import Flow
from cnf.models import build
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Exact, Hutchinson
from cnf.solvers import Adaptive, FixedGrid, Stats, refined
from cnf.training import comparability, score, summary, write_json, write_scores
from cnf.training.report import columns_text
from cnf.transforms import Dequantize, Logit, MarginalTransform, Sequential, Transform, TransformOutput

pytestmark = pytest.mark.usefixtures("double")



class Density(Transform):
    """Independent pixels with a known CDF and log-density on [0, 1], carried to N(0, 1) by the CDF."""

    def __init__(self, cdf, log_density):
        super().__init__()
        self.cdf, self.log_density = cdf, log_density

    def forward(self, x, request):
        z = torch.special.ndtri(self.cdf(x).clamp(1e-15, 1 - 1e-15))
        log_p = self.log_density(x) + 0.5 * z.square() + 0.5 * math.log(2 * math.pi)
        return TransformOutput(z, log_p.flatten(1).sum(1), {}, Stats())


class Linear(Transform):
    """x A^T."""

    def __init__(self, a):
        super().__init__()
        self.a = a

    def forward(self, x, request):
        return TransformOutput(x @ self.a.T, torch.linalg.slogdet(self.a)[1].expand(len(x)), {}, Stats())

    def inverse(self, z, request):
        x = torch.linalg.solve(self.a, z.T).T
        return TransformOutput(x, -torch.linalg.slogdet(self.a)[1].expand(len(x)), {}, Stats())


def gaussian(covariance):
    """The flow whose density is N(0, covariance)."""
    return Flow(Linear(torch.linalg.inv(torch.linalg.cholesky(covariance))), (len(covariance),))


def exponential(a, levels):
    """One pixel with density proportional to exp(a x)."""
    total = math.expm1(a) / a
    density = Density(lambda x: torch.expm1(a * x) / a / total, lambda x: a * x - math.log(total))
    return Flow(Sequential([Dequantize(levels), density]), (1, 1, 1))


def image_flow(shape=(1, 1, 2), levels=3, divergence=None, solver=None):
    """A CNF of images, far from the identity, solved on a fine grid so that rows do not depend on their batch."""
    torch.manual_seed(0)
    field = MLP(math.prod(shape), (6,), "concatsquash")
    for p in field.parameters():
        p.data += 0.5 * torch.randn_like(p)
    grid = solver or FixedGrid("rk4", 12)
    block = CNF(field, divergence or Exact(), grid, grid)
    return Flow(Sequential([Dequantize(levels), Logit(0.05), block]), shape).eval()


def legendre(n, low=0.0, high=1.0):
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(n))
    return (nodes + 1) / 2 * (high - low) + low, weights / 2 * (high - low)


# -- bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", [1, 2, 7])
def test_density_constant_in_each_bin_is_exact_for_every_k(importance):
    levels = 17
    uniform = Flow(Sequential([Dequantize(levels), Density(lambda x: x, torch.zeros_like)]), (1, 2, 3))
    x = torch.randint(0, levels, (13, 1, 2, 3), dtype=torch.uint8)
    found = evaluate(uniform, x, importance=importance, draws=2, batch_size=5)
    assert torch.allclose(found.per_item, torch.full((13,), math.log2(levels)), atol=1e-12, rtol=0)
    assert found.mean == pytest.approx(math.log2(levels), abs=1e-12)
    assert found.standard_error < 1e-12 and found.noise_standard_error < 1e-12 and found.bound

    p = torch.tensor([0.1, 0.6, 0.3])

    def bins(v):
        return (v * 3).floor().long().clamp(0, 2)

    def cdf(v):
        return torch.cumsum(p, 0)[bins(v)] - p[bins(v)] + p[bins(v)] * (v * 3 - bins(v))

    steps = Flow(Sequential([Dequantize(3), Density(cdf, lambda v: (3 * p[bins(v)]).log())]), (1, 2, 1))
    pixels = torch.cartesian_prod(torch.arange(3), torch.arange(3)).to(torch.uint8).reshape(9, 1, 2, 1)
    truth = p[pixels.long()].log().flatten(1).sum(1)
    assert torch.allclose(evaluate(steps, pixels, importance=importance).log_prob, truth, atol=1e-12, rtol=0)
    assert torch.allclose(evaluate(steps, pixels, dequantisation="mid-bin").log_prob, truth, atol=1e-12, rtol=0)


def test_bound_rises_with_k_to_the_bin_probability_that_quadrature_gives():
    flow = image_flow(shape=(1, 1, 1), levels=2)
    n, x = 4000, torch.ones(4000, 1, 1, 1, dtype=torch.uint8)
    nodes, weights = legendre(60, 0.5, 1.0)
    log_w = flow.log_prob(nodes.reshape(-1, 1, 1, 1)).detach() - math.log(2)  # density times the bin's width
    share = 2 * weights  # of the uniform noise
    truth = float(torch.logsumexp(log_w + share.log(), 0))
    one = float((log_w * share).sum())
    pairs = torch.logaddexp(log_w[:, None], log_w[None]) - math.log(2)
    two = float((pairs * share[:, None] * share[None]).sum())
    assert one < two - 0.01 < truth - 0.01  # the toy is curved enough to tell them apart
    found = {k: evaluate(flow, x, importance=k).log_prob for k in (1, 2, 4, 16)}
    for k, expected in ((1, one), (2, two)):
        z = float((found[k].mean() - expected) / (found[k].std() / math.sqrt(n)))
        assert abs(z) < 5, (k, z)
    for low, high in ((1, 2), (2, 4), (4, 16)):  # the samples of a smaller K are among those of a larger one
        gain = found[high] - found[low]
        assert float(gain.mean() / (gain.std() / math.sqrt(n))) > 5, (low, high)
    assert abs(float(found[2].mean() - found[1].mean()) - (two - one)) < 5 * float((found[2] - found[1]).std()) / math.sqrt(n)
    assert float(found[16].mean()) < truth < float(found[16].mean()) + (truth - one) / 8


def test_mean_weight_is_the_probability_of_two_pixels_and_k_samples_are_averaged_with_minus_ln_k():
    flow = image_flow(levels=3)
    n = 1500
    nodes, weights = legendre(20)
    square = torch.cartesian_prod(nodes, nodes)
    area = torch.cartesian_prod(weights, weights).prod(1)
    total = 0.0
    for pixels in ([0, 0], [1, 2], [2, 0]):
        x = torch.tensor(pixels, dtype=torch.uint8).reshape(1, 1, 1, 2)
        points = (torch.tensor(pixels, dtype=F64) + square) / 3
        truth = float((flow.log_prob(points.reshape(-1, 1, 1, 2)).detach().exp() * area).sum()) / 9
        total += truth
        found = evaluate(flow, x.expand(n, 1, 1, 2), importance=8).log_prob.exp()
        z = float((found.mean() - truth) / (found.std() / math.sqrt(n)))
        assert abs(z) < 5, (pixels, z)
    assert 0.05 < total < 1
    x = torch.tensor([[0, 1], [2, 2]], dtype=torch.uint8).reshape(2, 1, 1, 2)
    by_hand = []
    for sample in range(3):
        u = ItemNoise(4, [0, 1], 0, sample).draw("dequantize", "uniform", (2, 1, 1, 2))
        by_hand.append(flow.log_prob((x + u) / 3).detach() - 2 * math.log(3))
    expected = torch.stack(by_hand).logsumexp(0) - math.log(3)
    assert torch.allclose(evaluate(flow, x, importance=3, seed=4).log_prob, expected, atol=1e-10, rtol=0)


def test_mid_bin_is_the_density_there_and_is_called_no_bound():
    flow = image_flow()
    x = torch.randint(0, 3, (7, 1, 1, 2), dtype=torch.uint8)
    found = evaluate(flow, x, dequantisation="mid-bin", draws=5)
    direct = flow.bits_per_dim((x + 0.5) / 3).detach()
    assert torch.allclose(found.per_item, direct, atol=1e-12, rtol=0)
    assert found.bound is False and "no bound" in found.note
    assert found.draws == 1 and found.noise_standard_error == 0.0  # no noise enters with an exact trace
    a = 4.0  # log p is linear: mid-bin is the bound's own mean, so it lies below the truth by the bound's deficit
    steep = exponential(a, 2)
    truth = math.log((math.exp(a / 2) - 1) / (math.exp(a) - 1))
    mid = float(evaluate(steep, torch.zeros(1, 1, 1, 1, dtype=torch.uint8), dequantisation="mid-bin").log_prob)
    assert mid == pytest.approx(a / 4 - math.log(math.expm1(a) / a) - math.log(2), abs=1e-12) and mid < truth


# -- noise and errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(probes=2)])
def test_figures_do_not_depend_on_batches_or_on_which_items_are_scored(divergence):
    flow = image_flow(divergence=divergence)
    x = torch.randint(0, 3, (11, 1, 1, 2), dtype=torch.uint8)
    whole = evaluate(flow, x, draws=2, importance=2, seed=7)
    for size in (1, 4, 11):
        other = evaluate(flow, x, draws=2, importance=2, seed=7, batch_size=size)
        assert torch.allclose(other.per_item, whole.per_item, atol=1e-11, rtol=0)
    index = torch.tensor([3, 8, 10])
    part = evaluate(flow, x[index], draws=2, importance=2, seed=7, index=index)
    assert torch.allclose(part.per_item, whole.per_item[index], atol=1e-11, rtol=0)
    assert bool((part.index == index).all())
    assert not torch.allclose(evaluate(flow, x, seed=8).per_item, evaluate(flow, x, seed=7).per_item)
    assert whole.mean == pytest.approx(math.fsum(whole.per_item.tolist()) / 11, abs=1e-14)


def test_importance_samples_share_the_probe_and_with_one_are_called_no_bound():
    noise = [ItemNoise(0, range(3), 1, k).child(2) for k in range(2)]
    probes = [n.draw("probe", "rademacher", (2, 3, 50), batch_dim=1) for n in noise]
    assert bool((probes[0] == probes[1]).all()) and tuple(probes[0].shape) == (2, 3, 50)
    u = [n.draw("dequantize", "uniform", (3, 5)) for n in noise]
    assert not bool((u[0] == u[1]).any())
    other = ItemNoise(0, range(3), 2, 0).child(2).draw("probe", "rademacher", (2, 3, 50), batch_dim=1)
    assert not bool((other == probes[0]).all()) and not bool((probes[0][:, 0] == probes[0][:, 1]).all())
    flow = image_flow(divergence=Hutchinson())
    x = torch.randint(0, 3, (4, 1, 1, 2), dtype=torch.uint8)
    assert evaluate(flow, x).bound is True  # unbiased in the logarithm: a bound in expectation
    found = evaluate(flow, x, importance=2)
    assert found.bound is False and "exact trace" in found.note
    with pytest.raises(ConfigError, match="ItemNoise has noise for"):
        noise[0].draw("probe", "normal", (4, 2))


def test_standard_errors_are_what_the_known_variance_says():
    a, levels, n, draws = 3.0, 2, 4000, 4
    flow = exponential(a, levels)
    zeros = torch.zeros(n, 1, 1, 1, dtype=torch.uint8)
    found = evaluate(flow, zeros, draws=draws)
    # log p = a (k + u) / 2 + constant, u uniform: variance a^2 / 48
    sigma = a / 2 / math.sqrt(12) / math.log(2)
    assert found.noise_standard_error == pytest.approx(sigma / math.sqrt(n * draws), rel=0.03)
    assert found.standard_error == pytest.approx(sigma / math.sqrt(n * draws), rel=0.06)  # these items differ by noise alone
    mean = -(a / 4 - math.log(math.expm1(a) / a) - math.log(2)) / math.log(2)
    assert abs(found.mean - mean) < 5 * found.noise_standard_error
    mixed = evaluate(flow, (torch.arange(n) % 2).to(torch.uint8).reshape(n, 1, 1, 1), draws=draws)
    assert mixed.standard_error == pytest.approx(math.hypot(a / 4 / math.log(2), sigma / math.sqrt(draws)) / math.sqrt(n), rel=0.03)
    assert mixed.noise_standard_error == pytest.approx(found.noise_standard_error, rel=0.05)
    one = evaluate(flow, zeros[:1])
    assert math.isnan(one.standard_error) and one.noise_standard_error is None and math.isfinite(one.mean)
    vectors = evaluate(gaussian(torch.eye(2)), torch.randn(5, 2), draws=6)
    assert vectors.draws == 1 and vectors.noise_standard_error == 0.0 and vectors.bound is None and vectors.unit == "nats"
    with pytest.raises(DataError, match="x has no rows"):
        evaluate(flow, zeros[:0])


def test_context_of_rows_and_of_all_and_floats_in_the_unit_interval():
    torch.manual_seed(0)
    config = FlowConfig.of(hidden=(6,), zero_init=False, preprocess="logit")
    flow = build(config, SolverConfig(), (1, 2, 2), levels=4, context_dim=3).eval()
    for block in flow.blocks:
        block.eval_solver = FixedGrid("rk4", 8)
    x = torch.randint(0, 4, (7, 1, 2, 2), dtype=torch.uint8)
    c = torch.randn(3)
    rows = evaluate(flow, x, c.expand(7, 3), batch_size=3)
    assert torch.allclose(evaluate(flow, x, c, batch_size=3).per_item, rows.per_item, atol=1e-12, rtol=0)
    assert not torch.allclose(evaluate(flow, x, torch.randn(7, 3)).per_item, rows.per_item)
    floats = torch.rand(7, 1, 2, 2)
    found = evaluate(flow, floats, c)
    assert found.dequantisation == "none" and found.bound is None and found.unit == "bits/dim"
    assert torch.allclose(found.per_item, flow.bits_per_dim(floats, c).detach(), atol=1e-12, rtol=0)
    # the logit reaches a little beyond [0, 1], where nobody's pixels are
    with pytest.raises(DataError, match=r"spans \[0\.5, 1\.005\], expected floats in \[0, 1\]"):
        evaluate(flow, torch.tensor([0.5, 1.005]).repeat(2).reshape(1, 1, 2, 2), c)


def test_options_that_cannot_be_are_refused():
    flow = image_flow()
    x = torch.randint(0, 3, (2, 1, 1, 2), dtype=torch.uint8)
    for options, match in (
        (dict(dequantisation="midbin"), "must be one of uniform, variational, truncated-normal, mid-bin, got 'midbin'"),
        (dict(dequantisation="variational"), "was built without it"),
        (dict(dequantisation="mid-bin", importance=4), "importance=4"),
        (dict(draws=0), "draws must be at least 1, got 0"),
        (dict(importance=0), "importance must be at least 1, got 0"),
        (dict(batch_size=0), "batch_size must be at least 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=match):
            evaluate(flow, x, **options)
    with pytest.raises(ConfigError, match="is for uint8 images"):
        evaluate(flow, x / 3, dequantisation="uniform")
    with pytest.raises(ConfigError, match="importance=2"):
        evaluate(gaussian(torch.eye(2)), torch.randn(3, 2), importance=2)


# -- checks ------------------------------------------------------------------------------------------------------------


def test_check_finds_the_solver_error_and_the_round_trip_and_puts_the_solvers_back():
    coarse, fine = Adaptive("dopri5", 1e-3, 1e-3), Adaptive("dopri5", 1e-4, 1e-4)
    flow = image_flow(solver=coarse, divergence=Hutchinson())
    x = torch.randint(0, 3, (6, 1, 1, 2), dtype=torch.uint8)
    found = check(flow, x, seed=5)
    flow.blocks[0].eval_solver = fine
    after = evaluate(flow, x, seed=5).per_item
    flow.blocks[0].eval_solver = coarse
    moved = after - evaluate(flow, x, seed=5).per_item
    assert found.difference == pytest.approx(float(moved.mean()), abs=1e-14) and found.difference != 0
    assert found.largest == pytest.approx(float(moved.abs().max()), abs=1e-14)
    mid = (x + 0.5) / 3
    assert found.round_trip == pytest.approx(float((flow.decode(flow.encode(mid)) - mid).detach().abs().max()), abs=1e-14)
    assert 1e-9 < found.round_trip < 1e-2 and found.items == 6 and found.unit == "bits/dim"
    # at these tolerances the move is the error itself, but for its tenth
    flow.blocks[0].eval_solver = Adaptive("dopri5", 1e-11, 1e-11)
    truth = evaluate(flow, x, seed=5).per_item - after + moved
    assert abs(found.difference - float(truth.mean())) < 0.5 * abs(float(truth.mean()))
    # in batches it is the same to the order of the solver's error
    flow.blocks[0].eval_solver = coarse
    parts = check(flow, x, seed=5, batch_size=4)
    assert parts.round_trip < 1e-2 and parts.largest < 10 * found.largest
    assert flow.blocks[0].eval_solver is coarse and flow.blocks[0].solver is coarse
    assert refined(flow.blocks[0]).rtol == pytest.approx(1e-4) and flow.blocks[0].eval_solver is coarse


def test_solver_error_per_dimension_and_round_trip_of_floats():
    flow = image_flow(solver=FixedGrid("rk4", 1))
    x = torch.rand(5, 1, 1, 2)
    before = flow.log_prob(x).mean()
    flow.blocks[0].eval_solver = FixedGrid("rk4", 2)
    move = float((flow.log_prob(x).mean() - before).abs().detach()) / 2 / math.log(2)
    flow.blocks[0].eval_solver = FixedGrid("rk4", 1)
    assert solver_error(flow, x) == pytest.approx(move, rel=1e-9)
    direct = float((flow.decode(flow.encode(x)) - x).abs().max().detach())
    assert round_trip_error(flow, x) == pytest.approx(direct, abs=1e-15)
    assert round_trip_error(gaussian(torch.eye(3)), torch.randn(4, 3)) < 1e-14


def test_round_trip_of_vectors_is_in_standard_deviations():
    torch.manual_seed(0)
    scale = torch.tensor([1e5, 1e-3, 1.0])
    z = torch.randn(40, 3) * torch.tensor([1.0, 2.0, 0.5]) + 1
    units, plain = (build(FlowConfig.of(hidden=(6,), zero_init=False), SolverConfig(), (3,)).eval() for _ in range(2))
    plain.load_state_dict(units.state_dict())
    for flow, x in ((units, z * scale), (plain, z)):
        flow.fit_statistics(x)
        flow.blocks[0].eval_solver = FixedGrid("midpoint", 2)
    x = z * scale
    apart = (units.decode(units.encode(x)) - x).abs().detach()
    assert round_trip_error(units, x) == pytest.approx(float((apart / x.std(0)).max()), rel=1e-9)
    assert 1e-6 < round_trip_error(units, x) < 1e-1 and float(apart.max()) > 1e3 * round_trip_error(units, x)
    # so that it does not depend on the units of the columns, and neither does a check's
    assert round_trip_error(units, x) == pytest.approx(round_trip_error(plain, z), rel=1e-6)
    assert check(units, x).round_trip == pytest.approx(check(plain, z).round_trip, rel=1e-6)
    # images stay on the scale [0, 1], standardised inside or not
    image = build(FlowConfig.of(hidden=(6,), zero_init=False), SolverConfig(), (1, 1, 2), levels=4).eval()
    image.blocks[0].eval_solver = FixedGrid("rk4", 2)
    pixels = torch.randint(0, 4, (9, 1, 1, 2), dtype=torch.uint8)
    image.fit_statistics(pixels)
    mid = (pixels + 0.5) / 4
    assert round_trip_error(image, pixels) == pytest.approx(float((image.decode(image.encode(mid)) - mid).abs().max().detach()), rel=1e-9)


def test_integral_of_a_gaussian_is_one():
    assert integral_2d(gaussian(torch.tensor([[1.0, 0.8], [0.8, 2.0]])), extent=12.0) == pytest.approx(1, abs=1e-9)
    assert integral_2d(gaussian(torch.eye(2)), extent=1.0) == pytest.approx(math.erf(1 / math.sqrt(2)) ** 2, abs=1e-4)


# -- columns -----------------------------------------------------------------------------------------------------------


def correlated(dim=4, seed=0):
    torch.manual_seed(seed)
    a = torch.randn(dim, dim) / 2 + torch.eye(dim)
    return a @ a.T


@pytest.mark.parametrize("narrow", [False, True])
def test_conditional_log_density_of_a_gaussian(narrow):
    covariance = correlated()
    if narrow:  # column 3 is nearly a sum of the others: its conditional is a thousand times narrower than itself
        covariance = torch.block_diag(covariance[:3, :3], torch.eye(1) * 1e-6)
        mix = torch.eye(4)
        mix[3] = torch.tensor([1.0, -1.0, 0.5, 1.0])
        covariance = mix @ covariance @ mix.T
    flow, precision = gaussian(covariance), torch.linalg.inv(covariance)
    x = torch.randn(40, 4) @ torch.linalg.cholesky(covariance).T
    for j in range(4):
        others = [i for i in range(4) if i != j]
        mean = -(x[:, others] @ precision[j, others]) / precision[j, j]
        truth = torch.distributions.Normal(mean, precision[j, j] ** -0.5).log_prob(x[:, j])
        sigma = float(covariance[j, j].sqrt())
        support = (-9 * sigma, 9 * sigma)
        full, half = conditional_log_prob(flow, x, j, support=support, scale=sigma)
        assert torch.allclose(full, truth, atol=1e-5, rtol=0), (j, float((full - truth).abs().max()))
        assert float((half - truth).abs().max()) < 0.02
        finer = conditional_log_prob(flow, x, j, support=support, scale=sigma, points=161)[0]
        assert torch.allclose(finer, truth, atol=1e-8, rtol=0), (j, float((finer - truth).abs().max()))
        split, _ = conditional_log_prob(flow, x, j, support=support, scale=sigma, batch_size=37)
        assert torch.allclose(split, full, atol=1e-12, rtol=0)


class TwoModes(Flow):
    """Columns (a, b), b = ±2 + a + a little noise: a conditional density with two narrow peaks."""

    width = 0.2

    def log_prob(self, x, context=None, *, noise=None, solver=None, divergence=None):
        normal = torch.distributions.Normal
        peaks = [normal(x[:, 0] + s, self.width).log_prob(x[:, 1]) for s in (-2.0, 2.0)]
        return normal(0.0, 1.0).log_prob(x[:, 0]) + torch.logaddexp(*peaks) - math.log(2)


def test_conditional_log_density_with_two_peaks():
    flow = TwoModes(Linear(torch.eye(2)), (2,))
    a = torch.randn(30)
    b = a + 2 * torch.randn(30).sign() + flow.width * torch.randn(30)
    x = torch.stack([a, b], 1)
    truth = flow.log_prob(x) - torch.distributions.Normal(0.0, 1.0).log_prob(a)
    full, half = conditional_log_prob(flow, x, 1, support=(-9.0, 9.0), scale=2.2, points=401)
    assert torch.allclose(full, truth, atol=1e-4, rtol=0)
    rough, rough_half = conditional_log_prob(flow, x, 1, support=(-9.0, 9.0), scale=2.2, points=41)
    assert float((rough - rough_half).abs().mean()) > 0.1  # too few points, and the report says so
    assert float((full - half).abs().mean()) < 5e-3


def test_column_report_of_a_gaussian_gives_the_entropies_and_the_mutual_information():
    covariance = correlated()
    scales = torch.tensor([1.0, 10.0, 0.1, 1.0])
    covariance = covariance * scales[:, None] * scales[None]
    precision = torch.linalg.inv(covariance)
    x = torch.randn(6000, 4) @ torch.linalg.cholesky(covariance).T
    report = column_report(gaussian(covariance), x, names=("a", "b", "c", "d"), items=256)
    for j, column in enumerate(report):
        alone = 0.5 * math.log(2 * math.pi * math.e * float(covariance[j, j]))
        given = 0.5 * math.log(2 * math.pi * math.e / float(precision[j, j]))
        assert column.name == "abcd"[j]
        assert abs(column.alone - alone) < 0.05
        assert abs(column.given_others - given) < 5 * column.standard_error and column.standard_error < 0.06
        information = 0.5 * math.log(float(covariance[j, j] * precision[j, j]))
        assert abs(column.saved - information) < 0.05 + 5 * column.standard_error
        assert column.log_scale == pytest.approx(0.5 * math.log(float(covariance[j, j])), abs=0.05)
        assert column.quadrature_error < 0.01
    # a model that takes the columns for independent saves nothing, and one with wrong signs loses
    independent = column_report(gaussian(covariance.diagonal().diag()), x, items=64)
    assert all(abs(c.saved) < 5 * c.standard_error + 0.05 for c in independent)
    wrong = covariance * torch.tensor([1.0, -1.0, -1.0, 1.0])[:, None] * torch.tensor([1.0, -1.0, -1.0, 1.0])[None]
    assert min(c.saved for c in column_report(gaussian(wrong), x, items=64)) < -0.5
    # logarithms keep the mutual information, and their support ends where the quadrature would go on
    covariance = correlated()
    y = torch.randn(3000, 4) @ torch.linalg.cholesky(covariance).T
    logs = MarginalTransform(4, kinds=("log",))
    logs.fit(y.exp())
    joint = gaussian(torch.corrcoef(y.T)).transform
    for j, column in enumerate(column_report(Flow(Sequential([logs, joint]), (4,)).eval(), y.exp(), items=256, points=401)):
        information = 0.5 * math.log(float(covariance[j, j] * torch.linalg.inv(covariance)[j, j]))
        assert abs(column.saved - information) < 0.1 + 3 * column.standard_error
    text = columns_text([vars(c) for c in report])
    assert all(name in text for name in "abcd") and "alone" in text
    with pytest.raises(DataError, match="constant"):
        column_report(gaussian(torch.eye(2)), torch.stack([torch.randn(9), torch.ones(9)], 1))
    with pytest.raises(ConfigError, match="names="):
        column_report(gaussian(torch.eye(2)), torch.randn(9, 2), names=("one",))
    with pytest.raises(DataError, match="table"):
        column_report(image_flow(), torch.rand(3, 1, 1, 2))
    with pytest.raises(DataError, match="beyond support="):
        conditional_log_prob(gaussian(torch.eye(2)), torch.full((2, 2), 3.0), 0, support=(-2, 2), scale=1.0)


def test_entropy_of_columns_by_spacings():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    assert abs(spacing_entropy(x) - 0.5 * math.log(2 * math.pi * math.e)) < 0.03
    assert abs(spacing_entropy(-x.abs().log()) - spacing_entropy(-3 * x.abs().log()) + math.log(3)) < 1e-9
    means = [spacing_entropy(torch.rand(30, generator=torch.Generator().manual_seed(i)), m=4) for i in range(800)]
    z = np.mean(means) / (np.std(means) / math.sqrt(800))
    assert abs(z) < 5, z  # unbiased for a uniform density
    assert spacing_entropy(torch.ones(100).round()) == -math.inf
    with pytest.raises(DataError, match="at least 3"):
        spacing_entropy(torch.zeros(2))


# -- ranks, files, reports ---------------------------------------------------------------------------------------------


def test_rank_sorts_by_likelihood_and_says_what_it_is_not():
    flow = gaussian(torch.eye(2))
    x = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    reference = evaluate(flow, torch.tensor([[0.0, 0.5], [0.0, 2.0], [0.0, 4.0], [6.0, 6.0]])).per_item
    found = rank(flow, x, ["centre", "far", "near", "gone"], reference=reference)
    assert found.names == ("gone", "far", "near", "centre")
    assert found.order.tolist() == [3, 1, 2, 0]
    assert found.below.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert found.scores.tolist() == sorted((0.5 * x.square().sum(1) + math.log(2 * math.pi)).tolist(), reverse=True)
    text = found.text(limit=2)
    assert "gone" in text and "centre" not in text and "2 more" in text and CAUTION in text
    assert "not an anomaly score" in text and "centre" in found.text(None)
    assert rank(flow, x).names == ("3", "1", "2", "0")
    logs = MarginalTransform(2, kinds=("log",))
    logs.fit(torch.randn(200, 2).exp())
    found = rank(Flow(logs, (2,)), torch.tensor([[1.0, 1.0], [1.0, -2.0], [9.0, 1.0]]))  # the second has no logarithm
    assert found.names == ("1", "2", "0") and math.isinf(found.scores[0]) and "density is 0" in found.text()
    assert torch.equal(found.evaluation.log_prob[[0, 2]], rank(Flow(logs, (2,)), torch.tensor([[1.0, 1.0], [9.0, 1.0]])).evaluation.log_prob)
    with pytest.raises(ConfigError, match="names has 1"):
        rank(flow, x, ["one"])


def test_scores_are_written_whole_in_both_formats(tmp_path):
    flow = exponential(2.0, 4)
    x = (torch.arange(6) % 4).to(torch.uint8).reshape(6, 1, 1, 1)
    found = evaluate(flow, x, index=torch.arange(6) * 10)
    write_scores(tmp_path / "a.npz", found, names=list("uvwxyz"))
    with np.load(tmp_path / "a.npz") as arrays:
        assert np.array_equal(arrays["nll"], found.per_item.numpy()) and str(arrays["unit"]) == "bits/dim"
        assert np.array_equal(arrays["log_prob"], found.log_prob.numpy()) and list(arrays["name"]) == list("uvwxyz")
        assert arrays["index"].tolist() == [0, 10, 20, 30, 40, 50]
    write_scores(tmp_path / "a.csv", found)
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "bits_per_dim", "log_prob"]
    assert [float(r["bits_per_dim"]) for r in rows] == found.per_item.tolist()  # to the last digit
    assert [float(r["log_prob"]) for r in rows] == found.log_prob.tolist()
    write_scores(tmp_path / "n.csv", evaluate(gaussian(torch.eye(2)), torch.randn(2, 2)))
    assert (tmp_path / "n.csv").read_text().startswith("index,nats,log_prob")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.npz", "n.csv"]
    with pytest.raises(ConfigError, match=r"npz or \.csv"):
        write_scores(tmp_path / "a.txt", found)
    with pytest.raises(ConfigError, match="names are 1"):
        write_scores(tmp_path / "a.csv", found, names=["one"])


def images(n=40):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 3, (n, 1, 1, 2), dtype=torch.uint8, generator=generator)
    return DataSplits("noise", "image", x, x, x, levels=3)


def test_result_holds_what_changes_the_number_and_the_line_says_it(tmp_path):
    flow, data = image_flow(divergence=Hutchinson("gaussian", probes=3), solver=Adaptive("dopri5", 1e-4, 1e-6)), images()
    result, _ = score(flow, data, draws=3, importance=2)
    whole = evaluate(flow, data.test, draws=3, importance=2, seed=30_000)
    assert result["bits_per_dim"] == pytest.approx(whole.mean, abs=1e-12)
    expected = {
        "split": "test", "items": 40, "items_of": 40, "data": "noise", "dimensions": 2, "levels": 3, "dequantisation": "uniform",
        "importance_samples": 2, "noise_draws": 3, "alpha": 0.05, "solver": "dopri5", "rtol": 1e-4, "atol": 1e-6,
        "grid_steps": None, "divergence": "hutchinson", "probe": "gaussian", "probes": 3, "bound": False, "checked_items": 16,
        "dtype": "float64", "device": "cpu",
    }  # fmt: skip
    assert {k: result[k] for k in expected} == expected
    assert result["parameters"] == sum(p.numel() for p in flow.parameters())
    for key in ("standard_error", "noise_standard_error", "solver_error", "round_trip_error", "nfe", "evaluation_seconds"):
        assert isinstance(result[key], float), key
    assert set(result["versions"]) == {"cnf", "python", "torch", "torchdiffeq"}
    line = comparability(result)
    for part in (
        "3 levels", "uniform dequantisation, K = 2, 3 draws", "alpha 0.05", "hutchinson trace (3 gaussian probes)",
        "dopri5 rtol 0.0001 atol 1e-06", "bits/dim on 16 items", "40 of 40 test items of noise",
    ):  # fmt: skip
        assert part in line, (part, line)
    assert "\n" not in line and line in summary(result) and "not a bound: Hutchinson" in summary(result)
    write_json(tmp_path / "r.json", {**result, "validation": math.inf, "nested": [math.nan]})
    stored = json.loads((tmp_path / "r.json").read_text())
    assert stored["validation"] is None and stored["nested"] == [None] and stored["rtol"] == 1e-4


def test_score_of_some_items_is_that_of_the_same_items_in_the_whole():
    flow, data = image_flow(), images()
    _, whole = score(flow, data, draws=2)
    result, part = score(flow, data, draws=2, items=10, check=True)
    assert result["items"] == 10 and result["items_of"] == 40 and result["checked_items"] == 10
    assert torch.allclose(part.per_item, whole.per_item[part.index], atol=1e-12, rtol=0)
    assert part.index.tolist() == sorted(set(part.index.tolist())) and part.index.tolist() != list(range(10))
    assert result["grid_steps"] == 12 and result["rtol"] is None and "rk4 in 12 steps" in comparability(result)
    mid, _ = score(flow, data, dequantisation="mid-bin", items=3)
    assert mid["noise_draws"] == 1 and mid["bound"] is False and "not a bound: the density at the middle" in summary(mid)
    assert "mid-bin dequantisation;" in comparability(mid) and "draws" not in comparability(mid)
    probed, _ = score(image_flow(divergence=Hutchinson(probes=2)), data, draws=5, dequantisation="mid-bin", items=3)
    assert "hutchinson trace (2 rademacher probes), 5 draws;" in comparability(probed)  # the probe is drawn anew all the same
    one, _ = score(flow, data, draws=1, items=1)
    assert one["standard_error"] is None and "one draw cannot tell" in summary(one)
    with pytest.raises(ConfigError, match="items=0"):
        score(flow, data, items=0)


def test_score_of_a_toy_set_gives_its_entropy_and_integral():
    torch.manual_seed(0)
    x = torch.randn(300, 2)
    data = DataSplits("normal", "toy", x, x, x, entropy=math.log(2 * math.pi * math.e))
    flow = build(FlowConfig.of(hidden=(8,)), SolverConfig(), (2,)).eval()
    result, _ = score(flow, data)
    assert result["nats"] == pytest.approx(float((0.5 * x.square().sum(1)).mean()) + math.log(2 * math.pi), abs=1e-9)
    assert result["integral"] == pytest.approx(1, abs=1e-3) and result["bound"] is None and result["alpha"] is None
    text = summary(result)
    assert "true entropy" in text and "integrates" in text and "levels" not in text and "exact trace; dopri5" in text


def test_a_report_that_cannot_be_made_does_not_take_the_figure_with_it(monkeypatch):
    from types import SimpleNamespace

    from cnf.training import report
    from cnf.training.report import add_columns

    x = torch.stack([torch.randn(9), torch.ones(9)], 1)  # a constant column, as a small split may have
    data = SimpleNamespace(kind="table", test=x, test_context=None, columns=("a", "b"))
    result, said = {"nats": 1.0}, []
    add_columns(result, gaussian(torch.eye(2)), data, "test", said.append)
    assert result == {"nats": 1.0} and len(said) == 1 and "constant" in said[0]

    def full(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(report, "column_report", full)
    add_columns(result, gaussian(torch.eye(2)), data, "test", said.append)
    assert result == {"nats": 1.0} and "not enough memory" in said[1]


def test_columns_with_long_tails_cost_what_a_product_of_their_densities_says():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 2, generator=generator, dtype=torch.float64).mul(torch.tensor([1.0, 4.0])).exp()
    marginals = MarginalTransform(2, kinds=("log",))
    marginals.fit(x)
    flow = Flow(marginals, (2,)).double()
    report = column_report(flow, x, items=40)
    assert all(column.quadrature_error < 0.01 for column in report)
    rows = x[torch.linspace(0, 399, 40).round().long()]
    normal = torch.distributions.LogNormal(x.log().mean(0), x.log().std(0, correction=0))
    for column, truth in zip(report, -normal.log_prob(rows).mean(0), strict=True):
        assert column.given_others == pytest.approx(float(truth), abs=0.01)
