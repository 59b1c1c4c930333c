"""scikit-learn estimators of densities: sklearn's own checks, and identities with known densities."""

import math
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, slow
from scipy import stats
from scipy.integrate import trapezoid
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

import cnf
from cnf import ConditionalDensityEstimator, DensityEstimator
from cnf.bases import ConditionalMixture, MixtureEnsemble

QUICK = {"max_steps": 2, "hidden": (8,), "components": 1}


def expected(estimator):
    if isinstance(estimator, ConditionalDensityEstimator):
        reason = "score_samples takes y; test_rows_are_independent checks the same"
        return {"check_methods_sample_order_invariance": reason, "check_methods_subset_invariance": reason}
    return {}


# of checks of one thing by several kinds of arrays, and of what both estimators have from one base, one is in the default run
REPEATED = (
    "check_sample_weights_not_an_array", "check_sample_weights_pandas_series", "check_readonly_memmap_input", "check_f_contiguous_array_estimator",
    "check_n_features_in_after_fitting", "check_dtype_object", "check_fit_check_is_fitted", "check_estimators_dtypes",
)  # fmt: skip
OWN = ("check_regress", "check_supervised", "check_fit_idempotent", "check_estimators_nan_inf", "check_sample_weight_equivalence")


def sklearn_checks():
    """scikit-learn's checks of both estimators, and those that fail for a reason."""
    quick = {**QUICK, "max_steps": 1}
    for estimator in (DensityEstimator(**quick), ConditionalDensityEstimator(**quick)):
        for case, check in estimator_checks_generator(estimator, legacy=True):
            name = check.func.__name__
            options = ", ".join(f"{k}={v}" for k, v in check.keywords.items())
            marks = []
            if name in expected(estimator):
                marks.append(pytest.mark.xfail(reason=expected(estimator)[name]))
            if name in REPEATED or check.keywords.get("readonly_memmap") or (isinstance(estimator, ConditionalDensityEstimator) and not name.startswith(OWN)):
                marks.append(pytest.mark.slow)
            yield pytest.param(case, check, marks=marks, id=f"{type(estimator).__name__}-{name}({options})")


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@pytest.mark.parametrize("estimator, check", list(sklearn_checks()))
def test_sklearn_checks(estimator, check):
    check(estimator)


# -- densities -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gaussian():
    """Correlated normal rows, an estimator of them, and their entropy."""
    cov = np.array([[4.0, 1.2], [1.2, 1.0]])
    x = np.random.default_rng(0).multivariate_normal([10, -3], cov, 6000)
    model = DensityEstimator(max_steps=30, hidden=(16,), random_state=0).fit(x[:3000])
    return model, x[3000:], stats.multivariate_normal([10, -3], cov)


def test_score_is_the_negative_entropy(gaussian):
    model, x, truth = gaussian
    assert abs(model.score(x) - truth.logpdf(x).mean()) < 0.02
    assert abs(model.score(x) + truth.entropy()) < 0.05
    assert np.abs(model.score_samples(x) - truth.logpdf(x)).mean() < 0.15


def test_never_worse_than_the_mixture_on_validation(gaussian):
    model = gaussian[0]
    assert model.parts_["flow"] <= model.parts_["mixture"] <= min(v for k, v in model.parts_.items() if k != "flow")


def test_density_integrates_to_one():
    x = np.random.default_rng(0).gamma(2.0, size=(800, 1))
    model = DensityEstimator(max_steps=20, hidden=(8,), random_state=0).fit(x)
    grid = np.linspace(-5, 40, 20001)[:, None]
    assert abs(trapezoid(np.exp(model.score_samples(grid)), grid[:, 0]) - 1) < 5e-3


def test_samples_and_score(gaussian):
    model, x, _ = gaussian
    draws = model.sample(4000, random_state=0)
    assert draws.shape == (4000, 2)
    np.testing.assert_array_equal(draws[:5], model.sample(4000, random_state=0)[:5])
    np.testing.assert_allclose(draws.mean(0), x.mean(0), atol=0.15)
    np.testing.assert_allclose(np.cov(draws.T), np.cov(x.T), atol=0.3)


def test_log_prob_of_tensors_is_differentiable(gaussian):
    model, x, truth = gaussian
    points = torch.tensor(x[:50], requires_grad=True)
    log_p = model.log_prob(points)
    np.testing.assert_allclose(log_p.detach().numpy(), model.score_samples(x[:50]), rtol=1e-9)
    (slope,) = torch.autograd.grad(log_p.sum(), points)
    expected = -(x[:50] - truth.mean) @ np.linalg.inv(truth.cov)
    assert np.abs(slope.numpy() - expected).mean() < 0.3
    assert isinstance(model.flow_, cnf.Flow) and model.log_prob(points.detach().float()).dtype == torch.float32


def test_frames_come_back_as_frames():
    generator = np.random.default_rng(0)
    frame = pd.DataFrame({"height": generator.normal(170, 8, 400).astype("float32"), "children": generator.poisson(2, 400)})
    model = DensityEstimator(max_steps=5, hidden=(8,), random_state=0).fit(frame)
    with warnings.catch_warnings(action="error"):
        model.score_samples(frame)
    assert list(model.feature_names_in_) == ["height", "children"] and model.n_features_in_ == 2
    draws = model.sample(300, random_state=1)
    assert isinstance(draws, pd.DataFrame) and list(draws) == list(frame) and (draws.dtypes == frame.dtypes).all()
    assert abs(draws["children"].mean() - 2) < 0.3
    with pytest.raises(ValueError, match="feature names"):
        model.score_samples(frame[["children", "height"]])


def test_discrete_columns_have_probabilities():
    x = np.random.default_rng(0).binomial(4, 0.3, 3000)[:, None]
    model = DensityEstimator(max_steps=20, hidden=(8,), random_state=0).fit(x)
    values = np.arange(5)[:, None]
    np.testing.assert_allclose(np.exp(model.score_samples(values)), stats.binom.pmf(values[:, 0], 4, 0.3), atol=0.03)
    assert set(np.unique(model.sample(500, random_state=0))) <= set(range(-1, 6))


@pytest.mark.parametrize("dtype", ["float32", slow("float64"), "int64"])
def test_numeric_types(dtype):
    x = (100 * np.random.default_rng(0).normal(size=(200, 2))).astype(dtype)
    model = DensityEstimator(**QUICK, random_state=0).fit(x)
    assert model.score_samples(x).dtype == np.float64 and np.isfinite(model.score(x))


@pytest.mark.parametrize("offset", [1e9, -3e7])
def test_columns_far_from_zero(offset):
    """Single precision, in which the fit computes, does not resolve them."""
    x = offset + np.random.default_rng(0).normal(size=(300, 2))
    held_out = offset + np.random.default_rng(1).normal(size=(300, 2))
    truth = stats.norm.logpdf(held_out - offset)
    model = DensityEstimator(max_steps=3, components=1, hidden=(8,), random_state=0).fit(x)
    assert model.score(held_out) == pytest.approx(truth.sum(1).mean(), abs=0.1)
    np.testing.assert_allclose(model.sample(300, random_state=0).mean(0) - offset, 0, atol=0.2)
    given = ConditionalDensityEstimator(max_steps=3, components=1, hidden=(8,), random_state=0).fit(x[:, :1], x[:, 1])
    assert given.score(held_out[:, :1], held_out[:, 1]) == pytest.approx(truth[:, 1].mean(), abs=0.1)
    np.testing.assert_allclose(given.predict(held_out[:5, :1]) - offset, 0, atol=0.3)


def test_a_lattice_far_from_zero():
    counts = 1e7 + np.random.default_rng(0).poisson(3, size=(500, 1))
    model = DensityEstimator(max_steps=3, components=2, hidden=(8,), random_state=0).fit(counts)
    np.testing.assert_allclose(np.exp(model.score_samples(1e7 + np.arange(8)[:, None])), stats.poisson.pmf(np.arange(8), 3), atol=0.05)
    assert set(np.unique(model.sample(50, random_state=0))) <= set(1e7 + np.arange(-1, 12))


@pytest.mark.slow
def test_a_large_table_is_read_in_part(monkeypatch):
    for name, value in {"_ROWS_PER_SECOND": 0, "_LEAST_READ": 300, "_SCORED": 50}.items():
        monkeypatch.setattr(f"cnf.estimators.rows.{name}", value)
    x = np.random.default_rng(0).lognormal(sigma=2.0, size=(4000, 2))
    model = DensityEstimator(max_minutes=0.01, hidden=(8,), random_state=0).fit(x)
    assert np.isfinite(model.score_samples(x)).all()  # the smallest and largest values too, which few rows would lack
    truth = stats.lognorm.logpdf(x, 2.0).sum(1).mean()
    assert model.score(x) == pytest.approx(truth, abs=0.2)
    given = ConditionalDensityEstimator(max_minutes=0.01, hidden=(8,), random_state=0).fit(x[:, :1], x[:, 1])
    assert given.score(x[:, :1], x[:, 1]) == pytest.approx(stats.lognorm.logpdf(x[:, 1], 2.0).mean(), abs=0.3)


@pytest.mark.parametrize("minutes", [1e-6, 1e-3])
def test_hardly_any_time(minutes):
    rows = np.repeat(np.random.default_rng(0).random((5, 2)), 30, 0)
    assert np.isfinite(DensityEstimator(max_minutes=minutes, hidden=(8,), random_state=0).fit(rows).score(rows))
    model = ConditionalDensityEstimator(max_minutes=minutes, hidden=(8,), random_state=0).fit(*xy(60))
    assert np.isfinite(model.score(*xy(60)))


def test_an_ensemble_of_several_sizes():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(500, 2))
    y = x[:, 0] + 0.3 * generator.normal(size=500)
    model = ConditionalDensityEstimator(max_steps=3, hidden=(8,), random_state=0).fit(x, y)
    assert model.flow_.base.components == 5 * (1 + 3)  # both are as good: five folds of one and of three components
    assert list(model.parts_) == ["linear", "mixture", "calibrated"] and abs(model.parts_["calibrated"] - model.parts_["mixture"]) < 0.05
    assert model.score(x, y) == pytest.approx(-0.5 * np.log(2 * np.pi * np.e * 0.3**2), abs=0.1)


# -- scikit-learn's manners ------------------------------------------------------------------------------------------


def xy(n=300, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, 2))
    return x, x @ [1.0, -2.0] + 0.5 * generator.normal(size=n)


@pytest.mark.parametrize("kind", [slow(DensityEstimator), ConditionalDensityEstimator])
def test_clone_pickle_and_seeds(kind):
    x, y = xy()
    model = kind(max_steps=10, hidden=(8,), components=2, random_state=3).fit(x, y)
    args = (x, y) if kind is ConditionalDensityEstimator else (x,)
    again = clone(model)
    assert not hasattr(again, "flow_") and again.get_params() == model.get_params()
    expected = model.score_samples(*args)
    np.testing.assert_allclose(again.fit(x, y).score_samples(*args), expected, rtol=1e-6)  # linear algebra rounds by memory layout
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).score_samples(*args), expected)
    order = np.random.default_rng(0).permutation(len(x))
    np.testing.assert_allclose(clone(model).fit(x[order], y[order]).score_samples(*args), expected, rtol=1e-5)  # but for rounding
    assert np.abs(clone(model).set_params(random_state=4).fit(x, y).score_samples(*args) - expected).max() > 1e-6


def test_torch_generator_is_untouched():
    x, y = xy(60)
    state = torch.get_rng_state()
    DensityEstimator(**QUICK).fit(x).sample(3)
    ConditionalDensityEstimator(**QUICK).fit(x, y).sample(x, 3)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.slow
def test_grid_search_and_pipeline():
    x, y = xy()
    search = GridSearchCV(DensityEstimator(**QUICK, random_state=0), {"components": [1, 2]}, cv=2).fit(x)
    assert search.best_params_["components"] in (1, 2) and np.isfinite(search.best_score_)
    pipe = make_pipeline(StandardScaler(), ConditionalDensityEstimator(**QUICK, random_state=0)).fit(x, y)
    assert pipe.predict(x).shape == (300,) and pipe.score(x, y) > -1.5
    r2 = cross_val_score(ConditionalDensityEstimator(**QUICK, random_state=0), x, y, scoring="r2", cv=2)
    nats = cross_val_score(ConditionalDensityEstimator(**QUICK, random_state=0), x, y, cv=2)
    assert (r2 > 0.9).all() and (np.abs(nats + 0.5 * math.log(2 * math.pi * math.e * 0.25)) < 0.15).all()


@pytest.mark.parametrize("kind", [slow(DensityEstimator), ConditionalDensityEstimator])
def test_integer_weights_are_repeated_rows(kind):
    x, y = xy(120)
    weight = np.random.default_rng(1).integers(0, 4, 120)
    repeated = kind(max_steps=10, hidden=(8,), components=2, random_state=0).fit(x.repeat(weight, 0), y.repeat(weight))
    weighted = clone(repeated).fit(x, y, sample_weight=weight)
    args = (x, y) if kind is ConditionalDensityEstimator else (x,)
    np.testing.assert_allclose(weighted.score_samples(*args), repeated.score_samples(*args), rtol=1e-5)
    scaled = clone(repeated).fit(x, y, sample_weight=np.full(120, 0.3))
    np.testing.assert_allclose(scaled.score_samples(*args), clone(repeated).fit(x, y).score_samples(*args), rtol=1e-5)


def test_fractional_weights_tilt_the_density():
    """Rows of N(0, 1) with weights e^x are rows of N(1, 1)."""
    x = np.random.default_rng(0).normal(size=(8000, 1))
    model = DensityEstimator(max_steps=1, components=1, random_state=0).fit(x, sample_weight=np.exp(x[:, 0]))
    draws = model.sample(20000, random_state=0)
    assert abs(draws.mean() - 1) < 0.1 and abs(draws.std() - 1) < 0.1


BAD = np.zeros((20, 2)) + np.arange(20)[:, None] / 7


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.where(BAD == 0, np.nan, BAD),), "contains NaN"),
        ((BAD[:, 0],), "Expected 2D array, got 1D"),
        ((BAD[:3],), "minimum of 5 is required"),
        ((BAD * [1, 0] + [0, 2],), "column 1 is constant at 2 and has no density"),
        ((pd.DataFrame({"a": BAD[:, 0], "b": 1.0}),), r"column 1 \('b'\) is constant at 1"),
        ((pd.DataFrame({"a": BAD[:, 0], "b": ["x"] * 20}),), r"column 'b' of X holds 'x', which is no number"),
        ((BAD.astype("datetime64[s]"),), "X holds dates or durations"),
        ((pd.DataFrame(BAD, columns=["a", "a"]),), r"X has two columns 'a': rename one of them"),
        ((BAD, None, -np.ones(20)), "sample_weight must not be negative, got -1 in row 0"),
        ((BAD, None, np.zeros(20)), "at least one non-zero"),
        ((BAD, None, np.arange(20) < 3), "3 rows of positive weight, expected at least 5"),
    ],
)
def test_errors_name_the_problem(arguments, message):
    with pytest.raises(ValueError, match=message):
        DensityEstimator(**QUICK).fit(*arguments)


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"components": "many"}, "components must be 'auto' or a number, got 'many'"),
        ({"max_minutes": 0}, "max_minutes must be positive and finite"),
        ({"validation_fraction": 1.0}, "validation_fraction must be inside"),
        ({"discrete": "always"}, "discrete must be 'auto' or None"),
    ],
)
def test_parameters_are_checked(setting, message):
    for kind in (DensityEstimator, ConditionalDensityEstimator):
        with pytest.raises(ValueError, match=message):
            kind(**{**QUICK, **setting}).fit(*xy(30))


def test_the_extra_is_named():
    code = "import sys; sys.modules['sklearn'] = None\nimport cnf\ntry:\n    cnf.DensityEstimator\nexcept ImportError as e:\n    print(e)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "cnf.estimators needs scikit-learn, which is not installed: pip install 'cnf[data]'\n", done.stderr


# -- conditional densities -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def linear():
    """y ~ N(x·b, 0.5²), an estimator, and test rows with their true means."""
    x, y = xy(4000, seed=1)
    model = ConditionalDensityEstimator(max_steps=60, hidden=(16,), components=1, random_state=0).fit(x[:2000], y[:2000])
    return model, x[2000:], y[2000:], x[2000:] @ [1.0, -2.0]


def test_linear_gaussian(linear):
    model, x, y, mean = linear
    truth = stats.norm(mean, 0.5)
    assert abs(model.score(x, y) - truth.logpdf(y).mean()) < 0.01
    assert np.abs(model.predict(x) - mean).mean() < 0.03
    levels = np.array([0.05, 0.3, 0.9])
    expected = truth.ppf(levels[:, None]).T
    assert np.abs(model.predict_quantiles(x, levels) - expected).mean() < 0.04
    assert np.abs(model.cdf(x, y) - truth.cdf(y)).mean() < 0.02
    assert abs(model.coverage(x, y, 0.9) - 0.9) < 0.03 and abs(model.coverage(x, y, 0.5) - 0.5) < 0.04
    z = (y - mean) / 0.5
    crps = 0.5 * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / math.sqrt(math.pi))
    assert abs(model.crps(x[:300], y[:300]).mean() - crps[:300].mean()) < 0.005


def test_quantiles_invert_the_distribution_function(linear):
    model, x, *_ = linear
    levels = (0.01, 0.5, 0.99)
    q = model.predict_quantiles(x[:200], levels)
    for j, level in enumerate(levels):
        np.testing.assert_allclose(model.cdf(x[:200], q[:, j]), level, atol=1e-4)
    np.testing.assert_array_equal(model.predict_quantiles(x[:200], 0.5), q[:, 1])
    np.testing.assert_allclose(model.predict_interval(x[:200], 0.98), q[:, [0, 2]], rtol=1e-12)


def test_rows_are_independent(linear):
    """The value of a row does not depend on its place or on the other rows."""
    model, x, y, _ = linear
    whole, mean = model.score_samples(x[:40], y[:40]), model.predict(x[:40])
    for i in (0, 17, 39):
        np.testing.assert_allclose(model.score_samples(x[i : i + 1], y[i : i + 1]), whole[i], rtol=1e-9)
        np.testing.assert_allclose(model.predict(x[i : i + 1]), mean[i], rtol=1e-9)
    np.testing.assert_allclose(model.predict(x[:40][::-1]), mean[::-1], rtol=1e-9)


def test_samples_have_the_mean_and_the_quantiles():
    """A skewed, heteroscedastic y: mean by quadrature, draws and distribution function agree."""
    generator = np.random.default_rng(0)
    x = generator.uniform(-1, 1, (1500, 1))
    y = np.exp(0.5 * x[:, 0] + 0.4 * generator.normal(size=1500))
    model = ConditionalDensityEstimator(max_steps=40, hidden=(16,), components=2, random_state=0).fit(x, y)
    at = np.array([[-0.5], [0.7]])
    draws = model.sample(at, 20000, random_state=0)
    assert draws.shape == (2, 20000)
    np.testing.assert_allclose(draws.mean(1), model.predict(at), rtol=0.015)
    np.testing.assert_allclose(np.quantile(draws, (0.1, 0.8), axis=1).T, model.predict_quantiles(at, (0.1, 0.8)), rtol=0.03)
    grid = np.linspace(0.01, 12, 4001)
    density = np.exp(model.score_samples(np.full((4001, 1), 0.7), grid))
    assert abs(trapezoid(density, grid) - 1) < 5e-3
    assert abs(trapezoid(grid * density, grid) - model.predict([[0.7]])[0]) < 0.01


def test_several_columns():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(1500, 2))
    noise = generator.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], 1500)
    y = np.stack([x[:, 0], -x[:, 1]], 1) + noise
    model = ConditionalDensityEstimator(max_steps=30, hidden=(16,), components=1, random_state=0).fit(x, y)
    truth = stats.multivariate_normal(cov=[[1, 0.8], [0.8, 1]]).logpdf(noise)
    assert abs(model.score(x, y) - truth.mean()) < 0.05
    assert np.abs(model.predict(x[:200]) - (y - noise)[:200]).mean() < 0.1
    assert model.sample(x[:4], 3).shape == (4, 3, 2) and model.predict_quantiles(x[:4], (0.1, 0.9, 0.95)).shape == (4, 2, 3)
    assert model.predict_interval(x[:4]).shape == (4, 2, 2) and model.crps(x[:4], y[:4]).shape == (4, 2)
    np.testing.assert_allclose(model.coverage(x[:300], y[:300]), 0.9, atol=0.04)
    with pytest.raises(ValueError, match="cdf is for one column"):
        model.cdf(x, y)
    x_t, y_t = torch.tensor(x[:5], requires_grad=True), torch.tensor(y[:5])
    np.testing.assert_allclose(model.log_prob(x_t, y_t).detach().numpy(), model.score_samples(x[:5], y[:5]), rtol=1e-9)
    assert torch.autograd.grad(model.log_prob(x_t, y_t).sum(), x_t)[0].abs().sum() > 0


def test_conditional_errors():
    x, y = xy(50)
    with pytest.raises(ValueError, match=r"y is constant at 1 and has no density"):
        ConditionalDensityEstimator(**QUICK).fit(x, np.ones(50))
    model = ConditionalDensityEstimator(**QUICK).fit(x, y)
    with pytest.raises(ValueError, match="expected 50 rows of 1 columns"):
        model.score_samples(x, y[:10])
    with pytest.raises(ValueError, match=r"q must be levels inside \(0, 1\)"):
        model.predict_quantiles(x, [0.0, 0.5])


@pytest.mark.parametrize("members", [1, 2])
def test_conditional_mixture_is_a_density(members):
    torch.manual_seed(0)
    each = [ConditionalMixture(2, 3, 4, hidden=(8,)) for _ in range(members)]
    base = (MixtureEnsemble(each) if members > 1 else each[0]).double()
    base.widen(0.1)
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.3 * torch.randn_like(p))
    context = torch.randn(4, dtype=torch.float64)
    side = torch.linspace(-12, 12, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        mass = base.log_prob(grid, context).exp().sum() * (side[1] - side[0]) ** 2
        draws = base.sample(40000, context, noise=cnf.Noise(0))
        weights, means, _ = base.parts(context[None])
    assert abs(float(mass) - 1) < 1e-3
    expected = (weights.exp()[..., None] * means).sum(1)[0]
    assert (draws.mean(0) - expected).abs().max() < 0.1
    assert torch.allclose(base.log_prob(grid[:3], context), base.log_prob(grid[:3], context.expand(3, -1)))
    with pytest.raises(ValueError, match="context is missing"):
        base.log_prob(grid)


def test_an_ensemble_of_few_rows_has_no_field_and_more_rows_have_one(linear):
    assert len(linear[0].flow_.blocks) == 1 and linear[0].parts_["flow"] <= linear[0].parts_["mixture"]
    x, y = xy(100)
    model = ConditionalDensityEstimator(**QUICK, random_state=0).fit(x, y)
    assert not model.flow_.blocks and isinstance(model.flow_.base, MixtureEnsemble) and len(model.flow_.base.members) == 5


def test_samples_of_discrete_columns_are_values_seen():
    rng = np.random.default_rng(0)
    x = pd.DataFrame({"flag": rng.random(300) < 0.5, "count": rng.poisson(1.0, 300), "a": rng.normal(size=300)})
    drawn = DensityEstimator(**QUICK, random_state=0).fit(x).sample(2000, random_state=0)
    assert drawn["flag"].dtype == bool and set(drawn["count"]) <= set(range(x["count"].max() + 1)) and drawn["count"].max() > 1
    y = ConditionalDensityEstimator(**QUICK, random_state=0).fit(x[["a"]], x["flag"].astype(int)).sample(x[["a"]], 5, random_state=0)
    assert set(np.unique(y)) == {0, 1}


def test_masked_values_and_dates_have_no_density_and_no_prediction():
    x = np.random.default_rng(0).normal(size=(60, 2))
    masked = np.ma.MaskedArray(x, np.zeros_like(x, dtype=bool))
    density, given = DensityEstimator(**QUICK, random_state=0).fit(masked), ConditionalDensityEstimator(**QUICK, random_state=0).fit(x[:, :1], x[:, 1])
    masked[3, 0] = np.ma.masked
    dates = x.astype("datetime64[s]")
    for bad, message in ((masked, "masked values, first in row 3"), (dates, "holds dates")):
        for call in (
            lambda: density.score_samples(bad),
            lambda: given.predict(bad[:, :1]),
            lambda: given.score_samples(bad[:, :1], x[:, 1]),
            lambda: given.score_samples(x[:, :1], bad[:, 0]),
        ):
            with pytest.raises(ValueError, match=message):
                call()
