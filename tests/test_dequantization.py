"""Variational dequantisation: an exact density, the bound against known bin probabilities, training through it."""

import math

import numpy as np
import pytest
import torch
from conftest import F64

from cnf.config import FlowConfig, SolverConfig
from cnf.errors import ConfigError, DataError
from cnf.evaluation import evaluate
from cnf.flow import Flow
from cnf.losses import Likelihood
from cnf.models import build
from cnf.random import Noise
from cnf.solvers import Stats
from cnf.transforms import Dequantize, Request, Sequential, Transform, TransformOutput
from cnf.transforms.dequantization import TruncatedNormalDequantize, VariationalDequantize

pytestmark = pytest.mark.usefixtures("double")



def logistic_posterior(u, m, s):
    """CDF and log-density on (0, 1) of sigmoid(m + e^s v), v a standard logistic variable."""
    v = (torch.logit(u) - m) * torch.exp(-s)
    log_slope = torch.nn.functional.logsigmoid(v) + torch.nn.functional.logsigmoid(-v)
    return torch.sigmoid(v), log_slope - s - torch.log(u) - torch.log1p(-u)


class Bins(Transform):
    """A density on [0, 1] with probability P_k in bin k and a logistic shape within it, carried to N(0, 1) by its CDF."""

    def __init__(self, p, m, s):
        super().__init__()
        self.p, self.m, self.s = (torch.tensor(v, dtype=F64) for v in (p, m, s))

    def log_density(self, x):
        k = (x * len(self.p)).floor().long().clamp(0, len(self.p) - 1)
        cdf, log_q = logistic_posterior((x * len(self.p) - k).clamp(1e-15, 1 - 1e-15), self.m[k], self.s[k])
        before = torch.cumsum(self.p, 0)[k] - self.p[k]
        return before + self.p[k] * cdf, (self.p[k] * len(self.p)).log() + log_q

    def forward(self, x, request):
        cdf, log_p = self.log_density(x)
        z = torch.special.ndtri(cdf.clamp(1e-15, 1 - 1e-15))
        total = (log_p + 0.5 * z.square() + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
        return TransformOutput(z, total, {}, Stats())


P, M, S = (0.5, 0.2, 0.3), (1.0, -2.0, 0.4), (-0.3, 0.5, -0.9)
PIXELS = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1)


class Lookup(torch.nn.Module):
    """In place of the network: shift and log-scale of each of three grey levels, read off a table."""

    def __init__(self, m, s):
        super().__init__()
        self.m, self.s = torch.tensor(m, dtype=F64), torch.tensor(s, dtype=F64)

    def forward(self, inputs):
        k = ((inputs[:, :1] + 1) * 3 / 2).floor().long()
        return torch.cat([3 * torch.atanh(self.s[k] / 3), self.m[k]], 1)  # undoes the bound on the log-scale


def spread_out(levels=5, channels=2, couplings=3):
    torch.manual_seed(0)
    dequantize = VariationalDequantize(levels, channels, hidden=6, couplings=couplings)
    for p in dequantize.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return dequantize


def test_log_det_is_the_autodiff_slogdet():
    dequantize = spread_out()
    x = torch.randint(0, 5, (3, 2, 3, 4), dtype=torch.uint8)
    e = torch.rand(3, 2, 3, 4)
    out = dequantize(x, Request(noise=Noise.replay({"dequantize": e})))
    for i in range(3):

        def value(flat, i=i):
            return dequantize(x[i : i + 1], Request(noise=Noise.replay({"dequantize": flat.reshape(1, 2, 3, 4)}))).value.flatten()

        jacobian = torch.autograd.functional.jacobian(value, e[i].flatten())  # d value / d e, e being uniform
        assert abs(float(torch.linalg.slogdet(jacobian)[1] - out.log_det[i].detach())) < 1e-10
    assert bool((out.value * 5 >= x).all() and (out.value * 5 <= x + 1).all())


def test_noise_depends_on_the_neighbours_noise_and_on_all_pixels():
    dequantize = spread_out(channels=1, couplings=2)
    x = torch.full((1, 1, 3, 3), 2, dtype=torch.uint8)
    e = torch.rand(1, 1, 3, 3)
    jacobian = torch.autograd.functional.jacobian(lambda v: dequantize.spread(x, v)[0].flatten(), e).reshape(9, 9)
    assert bool((jacobian.diagonal() > 0).all())
    assert float(jacobian[0, 1].abs()) > 1e-6  # the first colour sees the second's noise
    assert float(jacobian[1, 0].abs()) > 1e-6  # and the other way round
    other = x.clone()
    other[0, 0, 1, 1] = 3
    moved = (dequantize.spread(x, e)[0] - dequantize.spread(other, e)[0]).detach()
    assert float(moved[0, 0, 0, 0].abs()) > 1e-6


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_untrained_it_is_plain_dequantisation(dtype):
    torch.set_default_dtype(dtype)
    learned, plain = VariationalDequantize(17, 3), Dequantize(17)
    x = torch.randint(0, 17, (4, 3, 5, 6), dtype=torch.uint8)
    a, b = learned(x, Request(noise=Noise(3))), plain(x, Request(noise=Noise(3)))
    assert a.value.dtype == dtype
    assert torch.allclose(a.value, b.value, rtol=0, atol=10 * torch.finfo(dtype).eps)
    assert bool((learned.quantize(a.value) == x).all())
    assert bool((a.log_det == b.log_det).all())  # exactly uniform: log q = 0
    edges = torch.tensor([0.0, 1 - torch.finfo(dtype).eps / 2]).reshape(1, 1, 1, 2).expand(1, 3, 1, 2)
    end = learned(x[:1, :, :1, :2], Request(noise=Noise.replay({"dequantize": edges})))
    assert bool(torch.isfinite(end.value).all()) and bool(torch.isfinite(end.log_det).all())
    assert bool((learned.quantize(end.value) == x[:1, :, :1, :2]).all())


def test_bound_is_the_truth_for_every_draw_where_q_is_the_posterior():
    dequantize = VariationalDequantize(3, 1, couplings=1)
    dequantize.networks[0] = Lookup(M, S)
    flow = Flow(Sequential([dequantize, Bins(P, M, S)]), (1, 1, 1))
    for seed in range(5):
        log_prob = flow.log_prob(PIXELS, noise=Noise(seed))
        assert torch.allclose(log_prob, torch.tensor(P).log(), atol=1e-10, rtol=0)


def test_deficit_is_the_divergence_between_noise_and_posterior():
    """E[bound] = ln P - KL(q | posterior); the KL by quadrature over the uniform e."""
    m, s = (0.5, -1.0, 0.0), (0.1, 0.2, -0.4)
    dequantize = VariationalDequantize(3, 1, couplings=1)
    dequantize.networks[0] = Lookup(m, s)
    flow = Flow(Sequential([dequantize, Bins(P, M, S)]), (1, 1, 1))
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(400))
    for k in range(3):
        e = (nodes + 1) / 2
        u = torch.sigmoid(m[k] + math.exp(s[k]) * torch.logit(e))
        log_q = logistic_posterior(u, torch.tensor(m[k]), torch.tensor(s[k]))[1]
        log_posterior = logistic_posterior(u, torch.tensor(M[k]), torch.tensor(S[k]))[1]
        kl = float(((log_q - log_posterior) * weights / 2).sum())
        pixels = PIXELS[k : k + 1].expand(400, 1, 1, 1)
        bound = flow.log_prob(pixels, noise=Noise.replay({"0/dequantize": e.reshape(400, 1, 1, 1)}))
        assert kl > 0.01
        assert abs(float((bound * weights / 2).sum()) - (math.log(P[k]) - kl)) < 1e-10


@pytest.mark.slow
def test_importance_weighting_reaches_the_truth_from_any_noise():
    """E exp(bound) = P for every K, two-sided; and the bound itself rises towards ln P."""
    dequantize = VariationalDequantize(3, 1, couplings=1)
    # the right shift, and tails a little heavier than the posterior's, so that the weights have a variance
    dequantize.networks[0] = Lookup(M, tuple(v + 0.25 for v in S))
    flow = Flow(Sequential([dequantize, Bins(P, M, S)]), (1, 1, 1))
    n = 3000
    for k in range(3):
        x = PIXELS[k : k + 1].expand(n, 1, 1, 1)
        gaps = []
        for importance in (1, 4, 16):
            found = evaluate(flow, x, importance=importance)
            assert found.dequantisation == "variational" and found.bound
            weights = found.log_prob.exp()
            z = float((weights.mean() - P[k]) / (weights.std() / math.sqrt(n)))
            assert abs(z) < 5, (k, importance, z)
            gaps.append(math.log(P[k]) - float(found.log_prob.mean()))
        assert gaps[0] > gaps[1] > gaps[2] > 0
        assert gaps[2] < gaps[0] / 8, gaps  # for many samples the gap falls as 1 / K
        uniform = evaluate(flow, x, dequantisation="uniform")
        assert uniform.dequantisation == "uniform" and float(uniform.log_prob.mean()) < math.log(P[k]) - gaps[0]


@pytest.mark.slow
def test_training_closes_the_gap():
    """Noise trained by the bound alone, the density held fixed: from the plain bound to nearly the truth."""
    torch.manual_seed(0)
    dequantize = VariationalDequantize(3, 1, hidden=16, couplings=1)
    flow = Flow(Sequential([dequantize, Bins(P, M, S)]), (1, 1, 1))
    objective = Likelihood(flow)
    x = PIXELS.repeat(64, 1, 1, 1)
    weight = torch.tensor(P).repeat(64) * 3  # the data's distribution is the density's own
    truth = -sum(p * math.log(p) for p in P) / math.log(2)
    optimizer = torch.optim.Adam(dequantize.parameters(), lr=0.03)
    grid = ((torch.arange(500) + 0.5) / 500).repeat_interleave(3).reshape(-1, 1, 1, 1)

    def exact():
        nll = objective(PIXELS.repeat(500, 1, 1, 1), noise=Noise.replay({"0/dequantize": grid}))["nll"].reshape(500, 3)
        return float((nll.detach().mean(0) * torch.tensor(P)).sum())

    plain = exact()
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 300)
        loss = (objective(x, noise=Noise(0, "train", step))["loss"] * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = exact()
    assert plain > truth + 0.3 and truth < trained < truth + 0.01, (plain, trained, truth)


def test_gradients_reach_the_noise_through_the_flow():
    """Analytic gradients of the objective against central differences, the draws held fixed."""
    torch.manual_seed(0)
    config = FlowConfig.of(hidden=(5,), dequantize="variational", alpha=0.05, zero_init=False)
    flow = build(config, SolverConfig(), (1, 2, 2), levels=4).double()
    objective = Likelihood(flow, kinetic=0.1)
    for p in flow.parameters():
        p.data += 0.2 * torch.randn_like(p)
    x = torch.randint(0, 4, (3, 1, 2, 2), dtype=torch.uint8)

    def loss():
        return objective(x, noise=Noise(1))["loss"].mean()

    names = [n for n, _ in flow.named_parameters() if "networks" in n]
    gradients = torch.autograd.grad(loss(), [flow.get_parameter(n) for n in names])
    for name, gradient in zip(names, gradients, strict=True):
        p = flow.get_parameter(name)
        place = int(gradient.abs().argmax())
        assert float(gradient.flatten()[place].abs()) > 1e-7, name
        with torch.no_grad():
            kept, values = float(p.flatten()[place]), []
            for sign in (1, -1):
                p.view(-1)[place] = kept + sign * 1e-5
                values.append(float(loss()))
            p.view(-1)[place] = kept
        difference = (values[0] - values[1]) / 2e-5
        assert abs(difference - float(gradient.flatten()[place])) < 1e-7 * max(1, abs(difference)), name


def test_a_flow_built_with_it_trains_from_the_plain_bound_and_behaves_as_before():
    sizes = dict(hidden=(8,), alpha=0.05)
    torch.manual_seed(0)
    learned = build(FlowConfig.of(dequantize="variational", **sizes), SolverConfig(), (3, 4, 4), levels=9).eval()
    plain = build(FlowConfig.of(**sizes), SolverConfig(), (3, 4, 4), levels=9).eval()
    plain.load_state_dict({k: v for k, v in learned.state_dict().items() if "networks" not in k})
    x = torch.randint(0, 9, (6, 3, 4, 4), dtype=torch.uint8)
    assert learned.levels == 9
    assert torch.allclose(learned.log_prob(x, noise=Noise(0)), plain.log_prob(x, noise=Noise(0)), atol=1e-9, rtol=0)
    floats = torch.rand(6, 3, 4, 4)
    assert bool((learned.log_prob(floats) == plain.log_prob(floats)).all())
    sample = learned.sample(4, quantize=True)
    assert sample.dtype == torch.uint8 and int(sample.max()) < 9
    learned.fit_statistics(x)
    assert bool(torch.isfinite(learned.log_prob(x)).all())


def test_errors_say_what_is_wrong():
    with pytest.raises(ConfigError, match="couplings must be at least 1, got 0"):
        VariationalDequantize(4, couplings=0)
    with pytest.raises(ConfigError, match="levels must be between 2 and 256, got 1"):
        VariationalDequantize(1)
    dequantize = VariationalDequantize(4)
    with pytest.raises(DataError, match=r"expected \(N, 1, H, W\)"):
        dequantize(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"got 4"):
        dequantize(torch.full((2, 1, 4, 4), 4, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="dequantize='variational' is for images"):
        build(FlowConfig.of(dequantize="variational"), SolverConfig(), (2,))


# -- truncated normal noise --------------------------------------------------------------------------------------


def test_truncated_normal_noise_has_the_density_that_it_says():
    from scipy import stats

    dequantize = TruncatedNormalDequantize(levels=17, tau=2.0)
    pixels = torch.randint(0, 17, (400, 1, 8, 8), dtype=torch.uint8)
    out = dequantize(pixels, Request(noise=Noise(0)))
    away = (out.value - (pixels.to(F64) + 0.5) / 17).numpy()
    law = stats.truncnorm(-2, 2, scale=dequantize.scale)
    truth = -law.logpdf(away).reshape(400, -1).sum(1)
    np.testing.assert_allclose(out.log_det.numpy(), truth, rtol=1e-9)
    assert stats.kstest(away.ravel(), law.cdf).pvalue > 1e-3
    assert dequantize.entropy == pytest.approx(float(law.entropy()), abs=1e-10)
    spread = float(out.log_det.std()) / 400**0.5
    assert abs(float(out.log_det.mean()) - 64 * dequantize.entropy) < 5 * spread
    assert abs(away).max() < 0.5 / 17 and torch.equal(dequantize.quantize(out.value), pixels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_truncated_normal_noise_stays_in_its_level(dtype, levels):
    class Ends(Noise):
        def draw(self, name, kind, shape, **options):
            e = torch.linspace(0, 1, 9, dtype=torch.float64)
            return e.repeat(shape[0])[: shape[0]].reshape(-1, 1, 1, 1).expand(shape)

    dequantize = TruncatedNormalDequantize(levels).to(dtype)
    pixels = torch.arange(levels, dtype=torch.uint8).repeat_interleave(9).reshape(-1, 1, 1, 1)
    out = dequantize(pixels, Request(noise=Ends(0)))
    assert out.value.dtype == dtype and bool(out.log_det.isfinite().all())
    assert torch.equal(dequantize.quantize(out.value), pixels)


def test_truncated_normal_bound_is_the_truth_where_the_peaks_have_its_form():
    """p = sum over k of P(k) q(. | k): log p(y) - log q(y | k) = ln P(k) for every draw, since the levels do not overlap."""
    dequantize = TruncatedNormalDequantize(levels=5)
    p = torch.tensor([0.4, 0.1, 0.2, 0.05, 0.25])
    pixels = torch.randint(0, 5, (50, 1, 1, 1), dtype=torch.uint8)
    out = dequantize(pixels, Request(noise=Noise(0)))
    from scipy import stats

    law = stats.truncnorm(-dequantize.tau, dequantize.tau, scale=dequantize.scale)
    middles = (torch.arange(5) + 0.5) / 5
    density = sum(p[k] * torch.from_numpy(law.pdf((out.value.flatten() - middles[k]).numpy())) for k in range(5))
    torch.testing.assert_close(density.log() + out.log_det, p[pixels.flatten().long()].log(), rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_a_flow_with_truncated_normal_noise_is_scored_by_it_and_importance_weighting_helps():
    torch.manual_seed(0)
    config = FlowConfig.of(hidden=(8,), dequantize="truncated-normal", preprocess="logit", alpha=0.05, zero_init=False)
    flow = build(config, SolverConfig(), (1, 2, 2), levels=4).double().eval()
    x = torch.randint(0, 4, (200, 1, 2, 2), dtype=torch.uint8)
    own = evaluate(flow, x, draws=2)
    assert (own.dequantisation, own.bound) == ("truncated-normal", True)
    weighted, uniform = evaluate(flow, x, draws=2, importance=64), evaluate(flow, x, importance=64, dequantisation="uniform")
    # both bound the same probability of the pixels; the narrow noise comes near it slowly where the density is flat
    assert uniform.mean < weighted.mean < own.mean
    with pytest.raises(ConfigError, match="built without it"):
        evaluate(flow, x, dequantisation="variational")


@pytest.mark.parametrize("tau", [0.0, -1.0, 6.0])
def test_truncated_normal_settings(tau):
    with pytest.raises(ConfigError, match="tau"):
        TruncatedNormalDequantize(17, tau)
