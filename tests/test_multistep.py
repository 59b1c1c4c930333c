"""Time grids by the noise of a path, exponential multistep samplers, and the options of cnf sample that choose them."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import F64, TIGHT, normal, perturbed, slow

import cnf
from cnf.cli import main
from cnf.cli.sample_options import MULTISTEP
from cnf.config import PRESETS
from cnf.errors import ConfigError, SolverError
from cnf.fields import MLP, AugmentedTimeConditioning, Interpolant, TimePath
from cnf.runs import RunInfo, write_config, write_weights
from cnf.solvers import Adaptive, ExponentialMultistep, FixedGrid, PowerSpacing, RatioSpacing, Reversible
from cnf.transforms import Request

SPACINGS = [PowerSpacing(Interpolant(0.02)), PowerSpacing(Interpolant(), 2), RatioSpacing(Interpolant(0.02)), RatioSpacing(Interpolant(), 7, 80)]
METHODS = ExponentialMultistep.METHODS


class Gaussian(torch.nn.Module):
    """Velocity of the path from data N(m, s²): x = a m + r z at every time, with r² = a² s² + b²; counts evaluations."""

    def __init__(self, interpolant, std, mean=0.0):
        super().__init__()
        self.interpolant, self.std, self.mean, self.calls = interpolant, std, mean, 0

    def forward(self, t, x):
        self.calls += 1
        a, b, da, db = self.interpolant(t)
        slope = (a * da * self.std**2 + b * db) / (a.square() * self.std**2 + b.square())
        return da * self.mean + slope * (x - a * self.mean)

    def at(self, t, z):
        a, b, _, _ = self.interpolant(torch.tensor(t, dtype=F64))
        return a * self.mean + (a.square() * self.std**2 + b.square()).sqrt() * z


# -- grids -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS, ids=repr)
@pytest.mark.parametrize("ends", [(0.0, 1.0), (0.1, 0.7), (0.97, 1.0)])
def test_times_are_monotone_between_the_ends_and_mirrored(spacing, ends):
    low, high = (torch.tensor(t, dtype=F64) for t in ends)
    times = spacing.times(low, high, 9)
    assert times.shape == (10,) and times[0] == low and times[-1] == high and bool((times.diff() > 0).all())
    assert torch.allclose(spacing.times(high, low, 9).flip(0), times, atol=1e-13)


def test_steps_are_equal_in_the_power_of_noise_and_ratio():
    zero, one, sigma = torch.zeros((), dtype=F64), torch.ones((), dtype=F64), 0.02
    b = sigma ** (1 - PowerSpacing(Interpolant(sigma), 3).times(zero, one, 6))
    assert torch.allclose((b ** (1 / 3)).diff(), torch.full((6,), (1 - sigma ** (1 / 3)) / 6, dtype=F64))
    b = sigma ** (1 - RatioSpacing(Interpolant(sigma), 5, 15).times(one, zero, 6))
    ratio = b * (1 - sigma) / (1 - b)
    ratio[0] = 15
    assert torch.allclose((ratio ** (1 / 5)).diff(), torch.full((6,), (sigma ** (1 / 5) - 15 ** (1 / 5)) / 6, dtype=F64))


@pytest.mark.parametrize("spacing", SPACINGS[::2], ids=repr)
def test_order_on_a_spaced_grid(spacing):
    def rhs(s, y):
        return (torch.cos(3 * s) * y[0] - 0.3 * y[0] ** 2,)

    y0, steps = torch.tensor([0.7], dtype=F64), [16, 32, 64]
    truth = TIGHT.solve(rhs, (y0,)).state[0]
    errors = [float((FixedGrid("rk4", n, spacing=spacing).solve(rhs, (y0,)).state[0] - truth).abs()) for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert 3.7 < slope < 4.6, (slope, errors)


@pytest.mark.parametrize("end_time", [1.0, 0.7])
@pytest.mark.parametrize("solver", [FixedGrid("dopri5", 24), Reversible("rk4", 64)], ids=repr)
def test_point_and_log_det_converge_to_the_same_flow(solver, end_time):
    spaced = copy.copy(solver)
    spaced.spacing = SPACINGS[0]
    block = cnf.CNF(perturbed(MLP(3, (6,))), end_time=end_time)
    x = normal(4, 3)
    truth = block(x, Request(solver=TIGHT))
    with torch.no_grad():
        there = block(x, Request(solver=spaced))
        back = block.inverse(there.value, Request(solver=spaced))
    assert torch.allclose(there.value, truth.value, atol=1e-6) and torch.allclose(there.log_det, truth.log_det, atol=1e-6)
    assert torch.allclose(back.value, x, atol=1e-6) and torch.allclose(back.log_det, -truth.log_det, atol=1e-6)
    assert not torch.equal(there.value, block(x, Request(solver=solver)).value)


def test_gradient_modes_agree_on_a_spaced_grid():
    block, x, spacing = cnf.CNF(perturbed(MLP(2, (4,)))), normal(3, 2), SPACINGS[0]
    solvers = [FixedGrid("rk4", 5, "direct", spacing=spacing), FixedGrid("rk4", 5, "checkpoint", spacing=spacing)]
    solvers += [Reversible("rk4", 5, gradient=mode, spacing=spacing) for mode in ("direct", "reversible")]
    found = []
    for solver in solvers:
        out = block(x, Request(solver=solver))
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(out.value.sum() + out.log_det.sum(), list(block.parameters()))]))
    assert torch.allclose(found[0], found[1], atol=1e-13) and torch.allclose(found[2], found[3], atol=1e-9)


def test_grids_are_values_and_travel_with_their_solver():
    assert PowerSpacing(Interpolant(0.1), 3) == SPACINGS[0].__class__(Interpolant(0.1)) != PowerSpacing(Interpolant(0.1), 4)
    for solver in (FixedGrid("rk4", 3, spacing=SPACINGS[0]), Reversible("rk4", 3, spacing=SPACINGS[0]), ExponentialMultistep("unipc", 3, SPACINGS[2])):
        finer = pickle.loads(pickle.dumps(solver)).refined()
        assert finer.steps == 6 and finer.spacing == solver.spacing and repr(solver.spacing) in repr(finer)
    assert repr(FixedGrid("rk4", 3)) == "FixedGrid('rk4', steps=3, gradient='direct')"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FixedGrid("rk4", 4, spacing=3), "spacing must be a time grid such as PowerSpacing.*, got 3"),
        (lambda: PowerSpacing(0.1), "interpolant must be a cnf.fields.Interpolant, got 0.1"),
        (lambda: PowerSpacing(Interpolant(0.1), 0), "rho must be positive and finite, got 0"),
        (lambda: RatioSpacing(Interpolant(0.1), s_max=math.nan), "s_max must be positive and finite, got nan"),
        (lambda: ExponentialMultistep("unipc2", 4, SPACINGS[2]), "method='unipc2' is unknown.*did you mean 'unipc'"),
        (lambda: ExponentialMultistep("unipc", 0, SPACINGS[2]), "steps must be at least 1, got 0"),
        (lambda: ExponentialMultistep("unipc", 4, SPACINGS[0]), "spacing must be a RatioSpacing.*, got PowerSpacing"),
    ],
)
def test_what_no_grid_or_sampler_is(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


# -- samplers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "order"), [("dpm++", 2), ("unipc", 3)])
def test_sampler_converges_to_the_flow_of_a_gaussian_with_its_order(method, order):
    field, z = Gaussian(Interpolant(0.05), 0.7, 0.4), normal(5, 2)
    block = cnf.CNF(field, end_time=0.9)  # at t = 0.9 the ratio is below s_max
    start, steps = field.at(0.9, z), [16, 32, 64]
    errors = []
    for n in steps:
        out = block.inverse(start, Request(log_det=False, solver=ExponentialMultistep(method, n, RatioSpacing(field.interpolant))))
        errors.append(float((out.value - field.at(0.0, z)).abs().max()))
        assert out.stats.nfe == out.stats.accepted == n
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.3, (slope, errors)


@pytest.mark.parametrize("sigma", [0.05, 0.0])
@pytest.mark.parametrize(("method", "s_max"), [("dpm++", 60), ("unipc", 15)])
def test_sampler_from_the_latent(method, s_max, sigma):
    """One evaluation a step, and a large bound of the ratio leaves next to no error."""
    field, z = Gaussian(Interpolant(sigma), 0.7, 0.4), normal(5, 2)
    flow, errors = cnf.Flow(cnf.CNF(field), (2,)), []
    for bound in (3, s_max):
        field.calls = 0
        x = flow.decode(z, solver=ExponentialMultistep(method, 384, RatioSpacing(field.interpolant, 5, bound)))
        assert field.calls == 384
        errors.append(float((x - field.at(0.0, z)).abs().max()))
    assert errors[1] < 1e-4 and 1e-4 < errors[0] < 0.03, errors


@pytest.mark.parametrize("sigma", [0.05, 0.0])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_constant_data_prediction_is_exact(method, sigma, steps):
    field, z = Gaussian(Interpolant(sigma), 0.0, 0.4), normal(5, 2)  # all data are one point
    x = cnf.Flow(cnf.CNF(field), (2,)).decode(z, solver=ExponentialMultistep(method, steps, RatioSpacing(field.interpolant)))
    assert torch.allclose(x, 0.4 + sigma * z, atol=1e-12)


def test_float32_and_context_and_several_blocks():
    """Each block is an ODE whose velocity has a data prediction, whatever it was trained for."""
    blocks = [cnf.CNF(perturbed(MLP(2, (4,), context_dim=1)).float()) for _ in range(2)]
    flow = cnf.Flow(cnf.transforms.Sequential(blocks), (2,)).eval()
    z, context = normal(6, 2).float(), normal(6, 1).float()
    with torch.no_grad():
        x = flow.decode(z, context, solver=ExponentialMultistep("unipc", 128, RatioSpacing(Interpolant(0.2))))
        assert x.dtype == torch.float32 and torch.allclose(x, flow.decode(z, context), atol=1e-3)


def test_samplers_sample_only():
    flow = cnf.Flow(cnf.CNF(MLP(2, (4,))), (2,))
    x, solver = torch.randn(3, 2), ExponentialMultistep("unipc", 4, SPACINGS[2])
    with torch.no_grad():
        assert flow.sample(3, solver=solver).shape == (3, 2)
        for refused, message in (
            (lambda: flow.log_prob(x, solver=solver), "draws samples and has no log-determinant"),
            (lambda: flow.sample_and_log_prob(3, solver=solver), "draws samples and has no log-determinant"),
            (lambda: flow.encode(x, solver=solver), r"from noise to data within t in \[0, 1\], got t 0 to 1"),
        ):
            with pytest.raises(ConfigError, match=message):
                refused()
        longer = cnf.CNF(MLP(2, (4,)), end_time=1.5)
        with pytest.raises(ConfigError, match=r"within t in \[0, 1\], got t 1.5 to 0"):
            longer.inverse(x, Request(log_det=False, solver=solver))
        augmented = cnf.CNF(MLP(2, (4,), AugmentedTimeConditioning("concat", 2)), path=TimePath(2))
        with pytest.raises(ConfigError, match="is for a CNF without an augmented time"):
            augmented.inverse(x, Request(log_det=False, solver=solver))
    with pytest.raises(ConfigError, match=r"has no gradient: call it under torch.no_grad\(\)"):
        flow.decode(x, solver=solver)


def test_state_that_is_not_finite():
    class Bad(torch.nn.Module):
        def forward(self, t, x):
            return torch.exp(50 * x.abs()) * x

    with pytest.raises(SolverError, match=r"not finite after 4 steps \(unipc\)"):
        cnf.Flow(cnf.CNF(Bad()), (2,)).decode(5 * torch.ones(1, 2), solver=ExponentialMultistep("unipc", 4, SPACINGS[2]))


# -- cnf sample --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of two untrained runs on the digits: a denoiser, and a plain convolutional field."""
    folder, options = tmp_path_factory.mktemp("runs"), {"hidden": (4,), "zero_init": False, "noise_samples": 1, "test_items": 5}
    for name, preset in (("denoiser", "fm-digits"), ("plain", "digits")):
        info = RunInfo(PRESETS[preset].config.change(**options), (1, 8, 8), 17, 0, (), ())
        (folder / name).mkdir()
        torch.manual_seed(0)
        write_config(folder / name, info)
        write_weights(folder / name, info.build())
    return folder


def drawn(folder, words, capsys, out="x.npz"):
    """The printed line and the arrays of a file."""
    assert main(["sample", str(folder), "-n", "2", "--seed", "5", "--out", str(folder / out), *words.split()]) == 0
    return capsys.readouterr().out.strip(), dict(np.load(folder / out)) if out.endswith("npz") else {}


@pytest.mark.parametrize(
    ("words", "solver", "said"),
    [
        ("", ("unipc", 12), "drawn by unipc, 12 evaluations; log_prob by exponential Adams of order 4, 49 evaluations"),
        ("--quality draft", ("unipc", 6), "drawn by unipc, 6 evaluations"),
        slow("--quality default", ("unipc", 12), "drawn by unipc, 12 evaluations"),
        ("--quality exact", None, "drawn by dopri5 at rtol 2e-06"),
        slow("--grid-steps 3 --method dpm++", ("dpm++", 3), "drawn by dpm++, 3 evaluations"),
        ("--grid-steps 2", ("rk4", 2), "drawn by rk4, 2 solver steps (8 evaluations)"),
    ],
)
def test_quality_chooses_the_solver_of_a_denoiser(runs, capsys, words, solver, said):
    line, arrays = drawn(runs / "denoiser", words, capsys)
    assert said in line
    flow = cnf.load(runs / "denoiser")
    path, noise, used = flow.blocks[0].field.interpolant, cnf.Noise(5, "sample"), None
    if solver is None:
        used = Adaptive("dopri5", 2e-6, 2e-6, max_steps=10_000)
    else:
        used = ExponentialMultistep(*solver, RatioSpacing(path)) if solver[0] in METHODS else FixedGrid(*solver, spacing=PowerSpacing(path))
    with torch.no_grad():
        x = flow.sample(2, noise=noise, solver=used)
        assert np.array_equal(arrays["samples"], x.numpy())
        assert np.array_equal(arrays["log_prob"], flow.log_prob(x, noise=noise).numpy())


def test_paths_of_a_denoiser_are_solved_by_the_runs_solver(runs, capsys):
    line, arrays = drawn(runs / "denoiser", "--trajectory", capsys)
    assert "drawn by unipc, 12 evaluations; log_prob and trajectory by exponential Adams of order 4, 49 evaluations (paths by dopri5 at rtol 2e-06)" in line and arrays["trajectory"].shape == (21, 2, 1, 8, 8)
    assert "drawn by dopri5 at rtol 2e-06" in drawn(runs / "denoiser", "", capsys, "x.gif")[0]
    assert "drawn by rk4, 1 solver step (4 evaluations) in bf16" in drawn(runs / "denoiser", "--grid-steps 1 --precision bf16", capsys, "x.gif")[0]


def test_other_runs_keep_the_adaptive_solver(runs, capsys):
    for words in ("", "--quality exact"):
        line, arrays = drawn(runs / "plain", words, capsys)
        assert "drawn by dopri5" in line and "log_prob" not in line
        assert np.array_equal(arrays["samples"], cnf.load(runs / "plain").sample(2, noise=cnf.Noise(5, "sample")).numpy())


@pytest.mark.parametrize(("name", "words"), [("denoiser", ""), slow("denoiser", "--grid-steps 2"), ("plain", "--grid-steps 2")])
def test_bf16_draws_nearly_the_same_samples(runs, capsys, name, words):
    plain = drawn(runs / name, words, capsys)[1]["samples"]
    line, arrays = drawn(runs / name, f"{words} --precision bf16", capsys)
    assert "in bf16" in line and arrays["samples"].dtype == np.float32
    assert 0 < np.abs(arrays["samples"] - plain).max() < 0.05


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("denoiser", "--quality draft --grid-steps 3", "--quality draft and --grid-steps 3 both choose the solver: give one of them"),
        ("denoiser", "--quality best", "invalid choice: 'best'"),
        ("denoiser", "--method unipc", "--method unipc is for --grid-steps N: give both, or neither"),
        ("denoiser", "--quality draft --out x.gif", "--quality draft draws samples without the way to them, which a .gif shows"),
        ("denoiser", "--method unipc --grid-steps 3 --out x.gif", "--method unipc draws samples without the way to them"),
        ("denoiser", "--quality exact --precision bf16", "--precision bf16 has three digits, too few for the error control"),
        ("plain", "--quality draft", "--quality draft is for denoisers (presets such as fm-mnist), and this run's field is none: use --quality exact"),
        ("plain", "--quality default", "--quality default is for denoisers"),
        ("plain", "--grid-steps 3 --method dpm++", "--method dpm++ is for denoisers"),
        ("plain", "--precision bf16", "--precision bf16 has three digits"),
    ],
)
def test_sample_refuses_solvers_that_do_not_fit(runs, capsys, monkeypatch, name, words, message):
    monkeypatch.chdir(runs)
    assert main(["sample", name, *words.split()]) == 2
    assert message in capsys.readouterr().err and not list(runs.glob("x.*"))


def test_names_that_stand_in_for_imports_agree():
    assert MULTISTEP == METHODS
