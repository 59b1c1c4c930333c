"""Marginal transforms of tables: exact inverses and log-dets, normalised densities, known laws, choices, errors by name."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import F64
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from cnf import CNF, Exact, FixedGrid, Flow, MarginalTransform
from cnf._utils.async_checks import defer_checks
from cnf.errors import ConfigError, DataError
from cnf.fields import MLP
from cnf.transforms import Sequential
from cnf.transforms.marginal_selection import ColumnMarginal, ColumnSpec, select_marginal, stack_marginals
from cnf.transforms.quantile_fit import TAILS, Cells, TableOptions, fit_table
from cnf.transforms.quantile_map import forward_map, inverse_map, ndtri_exp

RNG = np.random.default_rng(0)


def column(values):
    return torch.as_tensor(np.asarray(values, dtype=np.float64))[:, None]


def fitted(values, kind, **options):
    """A transform of one column with a given choice."""
    transform = MarginalTransform(1, kinds=[kind], fixed=True, **options).double()
    transform.fit(column(values))
    assert transform.choices == (kind,)
    return transform


LAPLACE = stats.laplace(1000.0, 3.0)
# name: values, kind, options of the transform, grid that covers nearly all of the density
CASES = {
    "standardize": (RNG.normal(5, 2, 800), "standardize", {}, (-20, 30)),
    "log": (RNG.lognormal(0, 0.5, 800), "log", {}, (1e-9, 60)),
    "log of a half-line": (3 + RNG.exponential(2, 800), "log", {"bounds": [(3.0, math.inf)]}, (3 + 1e-12, 2000)),
    "logit": (RNG.beta(2, 3, 800), "logit", {"bounds": [(0.0, 1.0)]}, (-1e-3 + 1e-6, 1 + 1e-3 - 1e-6)),
    "normal": (RNG.normal(0, 1, 5000), "gaussianize", {}, (-12, 12)),
    "few rows": (RNG.normal(0, 1, 120), "gaussianize", {}, (-30, 30)),
    "laplace": (LAPLACE.rvs(8000, random_state=0), "gaussianize", {}, (850, 1150)),
    "uniform": (RNG.uniform(-1, 1, 8000), "gaussianize", {}, (-1.5, 1.5)),
    "cells": (RNG.poisson(3, 4000) + RNG.random(4000), "gaussianize", {"cells": [(0.0, 1.0)]}, (-40, 60)),
    "many cells": (RNG.integers(0, 900, 4000) + RNG.random(4000), "gaussianize", {"cells": [(0.0, 1.0)]}, (-60, 960)),
    "atom": (np.r_[np.zeros(2000), RNG.exponential(1, 4000)], "gaussianize", {}, (-3, 30)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_inverse_and_log_det(name):
    values, kind, options, grid = CASES[name]
    transform = fitted(values, kind, **options)
    edges = column(np.linspace(*grid, 400)) if kind != "log" else column(np.geomspace(*grid, 400))
    x = torch.cat([column(values)[:200], edges]).requires_grad_()
    out = transform(x)
    (slope,) = torch.autograd.grad(out.value.sum(), x, create_graph=True)
    assert bool((slope > 0).all()) and torch.allclose(out.log_det, slope[:, 0].log(), rtol=0, atol=1e-9)
    z = out.value.detach().requires_grad_()
    back = transform.inverse(z)
    scale = 1 + x.detach().abs()
    assert float(((back.value - x).detach().abs() / scale).max()) < 1e-10
    assert torch.allclose(back.log_det, -out.log_det, rtol=0, atol=1e-9)
    (inverse_slope,) = torch.autograd.grad(back.value.sum(), z)
    assert torch.allclose(back.log_det, inverse_slope[:, 0].log(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_far_latents_round_trip(name):
    """z to 10 standard deviations: 1e-9 in float64; in float32 to the rounding of x there."""
    values, kind, options, _ = CASES[name]
    transform = fitted(values, kind, **options)
    z = torch.linspace(-10, 10, 401, dtype=F64)[:, None]
    back = transform.inverse(z)
    assert bool(back.value.isfinite().all() & back.log_det.isfinite().all())
    # a unit in the last place of x moves z by eps |x| dz/dx
    rounding = 4 * torch.finfo(F64).eps * (back.value.abs() + 1)[:, 0] * (-back.log_det).exp()
    assert bool(((transform(back.value).value - z).abs()[:, 0] < 1e-9 + rounding).all())
    single = copy.deepcopy(transform).float()
    back = single.inverse(z.float())
    assert back.value.dtype == torch.float32 and bool(back.value.isfinite().all())
    rounding = 4 * torch.finfo(torch.float32).eps * (back.value.double().abs() + 1)[:, 0] * (-back.log_det.double()).exp()
    error = (single(back.value).value - z).abs()[:, 0]
    assert bool((error < 1e-5 + rounding).all())
    assert float((back.log_det - transform.inverse(z).log_det).abs().max()) < 2e-2  # the tables are rounded too


@pytest.mark.parametrize("name", CASES)
def test_the_density_integrates_to_one(name):
    values, kind, options, _ = CASES[name]
    flow = Flow(Sequential([fitted(values, kind, **options)]), (1,))
    # midpoints of a fine grid in z, which meets every piece, as integration points in x
    ends = flow.transform.inverse(torch.linspace(-8, 8, 200_001, dtype=F64)[:, None]).value[:, 0]
    middle, width = (ends[1:] + ends[:-1]) / 2, ends.diff()
    assert abs(float((flow.log_prob(middle[:, None]).exp() * width).sum()) - 1) < 2e-5


LAWS = {
    "normal": stats.norm(3, 2),
    "exponential": stats.expon(1, 5),
    "student": stats.t(3),
    "uniform": stats.uniform(-2, 7),
    "cauchy": stats.cauchy(),
}


@pytest.mark.parametrize("name", LAWS)
def test_distribution_functions_of_known_laws(name):
    law, n = LAWS[name], 40_000
    transform = fitted(law.rvs(n, random_state=1), "gaussianize")
    x = law.ppf(np.linspace(0.0005, 0.9995, 2000))
    with torch.no_grad():
        out = transform(column(x))
    # Kolmogorov's band of 1e-4, and the interpolation between 200 knots
    assert np.abs(torch.special.ndtr(out.value)[:, 0].numpy() - law.cdf(x)).max() < 2.3 / math.sqrt(n) + 1e-3
    fresh = law.rvs(n, random_state=2)
    log_p = Flow(Sequential([transform]), (1,)).log_prob(column(fresh)).numpy()
    lost = (law.logpdf(fresh) - log_p).mean()  # Kullback-Leibler divergence in nats
    assert lost < 0.02, lost
    # far tails: the log survival probability, which decays as the law's
    far = law.isf(1e-6) if name != "uniform" else law.isf(1e-4)
    p = float(torch.special.log_ndtr(-transform(column([far])).value))
    assert abs(p - law.logsf(far)) < 2


def test_cells_are_exact_whatever_the_noise():
    k = RNG.choice([0, 1, 4, 9], p=[0.7, 0.2, 0.07, 0.03], size=5000)
    u = RNG.random(5000)
    transform = fitted(10 + 0.5 * (k + u), "gaussianize", cells=[(10.0, 0.5)])
    flow = Flow(Sequential([transform]), (1,))
    share = {c: (k == c).mean() for c in (0, 1, 4, 9)}
    for noise in (0.0, 0.25, 0.999):
        log_p = flow.log_prob(column([10 + 0.5 * (c + noise) for c in share]))
        assert np.allclose(log_p, [math.log(p / 0.5) for p in share.values()], atol=0.02)  # up to the prior
    inside = [float(flow.log_prob(column([10 + 0.5 * (1 + v)]))) for v in (0.01, 0.5, 0.99)]
    assert max(inside) - min(inside) < 1e-9
    z = transform(column([10.5, 11.0])).value
    below = np.array([share[0], share[0] + share[1]])
    assert np.allclose(torch.special.ndtr(z)[:, 0], below, atol=1e-3)


def test_a_mixture_with_a_dequantised_atom():
    n = 30_000
    atom = RNG.random(n) < 0.3
    values = np.where(atom, RNG.random(n) * 0.1, 0.1 + RNG.exponential(1, n))
    transform = fitted(values, "gaussianize")
    x = np.linspace(0.001, 6, 1500)
    truth = np.where(x < 0.1, 3 * x, 0.3 + 0.7 * stats.expon(0.1).cdf(x))
    assert np.abs(torch.special.ndtr(transform(column(x)).value)[:, 0].numpy() - truth).max() < 2.3 / math.sqrt(n) + 1e-3


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(12, 400),
    ties=st.floats(0, 0.9),
    power=st.floats(0.2, 4),
    pieces=st.integers(8, 60),
    smooth=st.booleans(),
    tails=st.tuples(st.sampled_from(TAILS), st.sampled_from(TAILS)),
    cells=st.booleans(),
)
def test_every_table_is_strictly_increasing_and_invertible(seed, n, ties, power, pieces, smooth, tails, cells):
    rng = np.random.default_rng(seed)
    y = rng.normal(size=n)
    y = np.sign(y) * np.abs(y) ** power
    y = np.sort(np.where(rng.random(n) < ties, np.round(y), y))
    if y[0] == y[-1]:
        return
    table = fit_table(y, TableOptions(pieces, smooth, tails), Cells(math.floor(y[0]), 0.25) if cells else None)
    assert len(table.width) <= pieces and (table.width > 0).all() and (table.mass > 0).all()
    assert math.isclose(table.mass.sum() + sum(table.tail_mass), 1, rel_tol=1e-9) and min(table.tail_mass) > 0
    state = stack_marginals([ColumnMarginal("gaussianize", 0.0, 1.0, table=table)], pieces)
    span = float(y[-1] - y[0])
    x = torch.linspace(float(y[0]) - span, float(y[-1]) + span, 500, dtype=F64)[:, None]
    z, slope = forward_map(state, x)
    assert bool((z.diff(dim=0) >= 0).all()) and bool(slope.isfinite().all())
    back, inverse_slope = inverse_map(state, z)
    assert torch.allclose(forward_map(state, back)[0], z, rtol=1e-9, atol=1e-9)
    z = torch.linspace(-10, 10, 300, dtype=F64)[:, None]
    back, inverse_slope = inverse_map(state, z)
    assert bool(inverse_slope.isfinite().all()) and bool((back.diff(dim=0) > 0).all())


def test_quantiles_from_log_probabilities():
    z = -torch.cat([torch.linspace(0, 37, 200, dtype=F64), torch.logspace(1.6, 6, 50, dtype=F64)])
    log_p = torch.special.log_ndtr(z).requires_grad_()
    found = ndtri_exp(log_p)
    assert torch.allclose(found, z, rtol=1e-13, atol=1e-13)
    some = torch.special.log_ndtr(torch.tensor([-0.1, -3.0, -30.0, -500.0], dtype=F64)).requires_grad_()
    assert torch.autograd.gradcheck(ndtri_exp, some, eps=1e-7, rtol=1e-6)
    assert torch.autograd.gradgradcheck(ndtri_exp, some[:3], eps=1e-6, rtol=1e-4)


def table_of_columns(n=4000, seed=3):
    rng = np.random.default_rng(seed)
    columns = [rng.normal(2, 3, n), rng.lognormal(1, 1, n), 1 / (1 + np.exp(-rng.normal(1, 2, n))), np.abs(rng.standard_t(3, n)) - 9, rng.poisson(2, n) + rng.random(n)]
    return torch.as_tensor(np.stack(columns, 1))


NAMES = ["height", "income", "share", "load", "count"]
OPTIONS = {
    "names": NAMES,
    "bounds": [None, None, (0.0, 1.0), None, None],
    "cells": [None, None, None, None, (0.0, 1.0)],
}


def several(x, validation=None, **options):
    transform = MarginalTransform(5, **{**OPTIONS, **options}).to(x.dtype)
    transform.fit(x, validation)
    return transform


def test_choices_by_held_out_likelihood():
    x, validation = table_of_columns(), table_of_columns(2000, 4)
    transform = several(x, validation)
    assert transform.choices == ("standardize", "log", "logit", "gaussianize", "gaussianize")
    assert several(x).choices == transform.choices
    lines = transform.report()
    assert lines[0] == "column 0 ('height'): standardize, +0.0000 nats per row over standardising"
    gains = [float(line.split()[-6]) for line in lines]
    ordinary = MarginalTransform(5, kinds=("standardize",)).double()
    ordinary.fit(x, validation)
    log_p, base = (Flow(Sequential([t]), (5,)).log_prob(validation).mean() for t in (transform, ordinary))
    assert float(log_p - base) == pytest.approx(sum(gains), abs=1e-3)
    assert several(x, kinds=("standardize", "log")).choices == ("standardize", "log", "standardize", "standardize", "standardize")
    given = ["standardize", "gaussianize", "standardize", "standardize", "gaussianize"]
    assert several(x, kinds=given, fixed=True).choices == tuple(given)


def test_outliers_do_not_hide_a_gain():
    x = torch.as_tensor(stats.cauchy.rvs(size=(4000, 1), random_state=0))
    transform = MarginalTransform(1).double()
    transform.fit(x)
    assert transform.choices == ("gaussianize",)


def test_few_rows_are_standardised():
    x = table_of_columns(30)
    assert set(several(x).choices) == {"standardize"}


def test_jacobian_score_and_a_flow_behind_it():
    x = table_of_columns()
    torch.manual_seed(0)
    block = CNF(MLP(5, (8,)), divergence=Exact(), solver=FixedGrid("rk4", 8), eval_solver=FixedGrid("rk4", 8))
    flow = Flow(Sequential([MarginalTransform(5, **OPTIONS), block]), (5,)).double().eval()
    flow.fit_statistics(x)
    marginals = flow.transform.transforms[0]
    assert marginals.choices == several(x).choices and marginals.latent_shape((5,)) == (5,)
    point = x[:6]
    score = flow.score(point)
    for j in range(5):
        h = 1e-5
        step = h * torch.eye(5, dtype=F64)[j]
        difference = (flow.log_prob(point + step) - flow.log_prob(point - step)) / (2 * h)
        assert torch.allclose(score[:, j], difference, rtol=1e-3, atol=1e-3), j
    assert bool(flow.sample(2000).isfinite().all())
    j = torch.autograd.functional.jacobian(lambda y: marginals(y[None]).value[0], x[0])
    assert float(torch.linalg.slogdet(j)[1]) == pytest.approx(float(marginals(x[:1]).log_det), abs=1e-9)


def test_statistics_are_fitted_in_batches_and_behind_other_transforms():
    x = table_of_columns()
    flow = Flow(Sequential([MarginalTransform(5, **OPTIONS)]), (5,)).double()
    flow.fit_statistics(x, batch_size=700)
    whole = several(x)
    assert all(torch.equal(a, b) for a, b in zip(flow.transform.transforms[0].buffers(), whole.buffers(), strict=True))


def test_save_and_load(tmp_path):
    x = table_of_columns()
    for dtype in (torch.float32, F64):
        transform = several(x.to(dtype))
        save_file(transform.state_dict(), tmp_path / "weights.safetensors")
        other = MarginalTransform(5).to(dtype)
        other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        assert other.choices == transform.choices
        a, b = transform(x[:50].to(dtype)), other(x[:50].to(dtype))
        assert torch.equal(a.value, b.value) and torch.equal(a.log_det, b.log_det)
    small = table_of_columns(60, 8)
    other.fit(small)  # the sizes do not depend on the data
    assert {k: v.shape for k, v in other.state_dict().items()} == {k: v.shape for k, v in transform.state_dict().items()}


def test_float32_agrees_with_float64():
    x = table_of_columns()
    exact, single = several(x), several(x).float()
    a, b = exact(x[:500].float().double()), single(x[:500].float())
    assert b.value.dtype == b.log_det.dtype == torch.float32
    # at the sharp edge of a column (-9, density 30) the rounding of x itself counts
    for near in ((b.value.double() - a.value).abs().amax(1), (b.log_det.double() - a.log_det).abs()):
        assert float(near.quantile(0.95)) < 1e-5 and float(near.max()) < 3e-3


def test_it_is_traced_as_one_graph_and_reads_nothing_back():
    x = table_of_columns()
    transform = several(x)
    out = transform(x[:64])
    traced = torch.compile(transform, backend="eager", fullgraph=True)(x[:64])
    assert torch.allclose(traced.value, out.value, atol=1e-12) and torch.allclose(traced.log_det, out.log_det, atol=1e-12)
    back = torch.compile(transform.inverse, backend="eager", fullgraph=True)(out.value)
    assert torch.allclose(back.value, x[:64], atol=1e-9)
    meta = several(x).to("meta")
    with defer_checks():
        assert meta(x[:64].to("meta")).value.shape == (64, 5)  # meta tensors have no values to read
        assert transform(-x[:4]).value[:, 1].isnan().all()  # the caller checks


class Reads(TorchDispatchMode):
    """Notes operations that make the CPU wait for values or that copy numbers to the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(part in str(function) for part in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "equal")):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def test_nothing_is_read_from_the_device():
    x = table_of_columns()[:64]
    transform = several(table_of_columns())
    with defer_checks(), Reads() as reads:
        transform.inverse(transform(x.requires_grad_()).value).value.sum().backward()
    assert reads.found == []


def test_tangents():
    x = table_of_columns()
    transform = several(x)
    _, tangent = torch.func.jvp(lambda y: transform(y).value, (x[:8],), (torch.ones_like(x[:8]),))
    point = x[:8].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(transform(point).value.sum(), point)
    assert torch.allclose(tangent, gradient, rtol=1e-9)


def test_errors_name_the_column():
    x = table_of_columns()
    transform = several(x)
    bad = x[:3].clone()
    bad[1, 1] = -2.0
    with pytest.raises(DataError, match=r"column 1 \('income'\) spans \[-2, .*outside the support \(0, inf\) of its log"):
        transform(bad)
    bad = x[:3].clone()
    bad[1, 2] = 1.5
    with pytest.raises(DataError, match=r"column 2 \('share'\).*outside the support \(-0.001, 1.001\) of its logit"):
        transform(bad)
    bad[1, 2] = math.nan
    with pytest.raises(DataError, match=r"NaN or infinity in column 2 \('share'\)"):
        transform(bad)
    with pytest.raises(DataError, match=r"x holds NaN or infinity in column 2"):
        transform.fit(bad)
    with pytest.raises(DataError, match=r"validation holds NaN or infinity in column 2"):
        transform.fit(x, bad)
    with pytest.raises(DataError, match=r"z maps to NaN or infinity in column 1"):
        transform.inverse(torch.full((1, 5), 1e5, dtype=F64))
    with pytest.raises(DataError, match=r"column 2 \('share'\) spans .*outside its bounds \(0, 1\)"):
        several(2 * x)
    constant = x.clone()
    constant[:, 3] = 7.1
    with pytest.raises(DataError, match=r"column 3 \('load'\) is constant at 7.1"):
        several(constant)
    with pytest.raises(DataError, match=r"column 3 \('load'\) spans .*undefined for log"):
        several(x, kinds=["standardize"] * 3 + ["log", "standardize"], fixed=True, bounds=None)
    with pytest.raises(DataError, match=r"expected \(N, 5\)"):
        transform(torch.zeros(3, 4, dtype=F64))
    with pytest.raises(DataError, match=r"type torch.int64, expected floats"):
        transform(torch.zeros(3, 5, dtype=torch.long))
    with pytest.raises(DataError, match="at least 2 rows"):
        transform.fit(x[:1])
    with pytest.raises(DataError, match="validation has no rows"):
        transform.fit(x, x[:0])
    with pytest.raises(DataError, match="at least 2 rows"):
        transform.fit_batches([])
    with pytest.raises(ConfigError, match="5 columns, got event_shape"):
        transform.latent_shape((4,))


def test_arguments():
    for options, message in (
        ({"dim": 0}, "dim"),
        ({"knots": 3}, "knots"),
        ({"margin": 0.0}, "margin"),
        ({"kinds": ["logg", "log"]}, "did you mean 'log'"),
        ({"kinds": ()}, "at least one"),
        ({"kinds": ("log",), "fixed": True}, "kinds must have one entry"),
        ({"names": ["a"]}, "names must have one entry for each of 2 columns, got 1"),
        ({"bounds": [None, (1.0, 0.0)], "names": ["a", "b"]}, r"bounds of column 1 \('b'\)"),
        ({"bounds": [(-math.inf, 0.0), None]}, "bounds of column 0"),
        ({"cells": [None, (0.0, 0.0)]}, "cells of column 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            MarginalTransform(**{"dim": 2, **options})


def test_the_support_of_the_distribution():
    x = table_of_columns()
    transform = several(x)
    low, high = transform.bounds
    assert torch.allclose(low, torch.tensor([-math.inf, 0, -0.001, -math.inf, -math.inf], dtype=F64))
    assert torch.allclose(high, torch.tensor([math.inf, math.inf, 1.001, math.inf, math.inf], dtype=F64))
    distribution = Flow(Sequential([transform]), (5,)).distribution(validate_args=True)
    assert bool(distribution.support.check(x).all())
    with pytest.raises(ValueError, match="support"):
        distribution.log_prob(-x[:3])


def test_a_column_description_has_usable_defaults():
    assert ColumnSpec().kinds == ("standardize", "log", "logit", "gaussianize")


def test_one_outlier_among_few_held_out_rows_hides_no_logarithm():
    """Lognormal columns, so that the logarithm is the truth; of 30 rows standardising loses 10,000 nats for one."""
    for seed in range(5):
        x = np.exp(4 * np.random.default_rng(seed).normal(size=285))
        held_out = np.append(np.exp(4 * np.random.default_rng(100 + seed).normal(size=29)), 100 * x.max())
        column, gain = select_marginal(x, held_out, ColumnSpec(kinds=("standardize", "log")))
        assert column.kind == "log" and gain > 100
