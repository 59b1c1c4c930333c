"""Flow matching against closed forms: its minimiser, its path, its couplings, its times."""

import itertools
import math

import pytest
import torch
from conftest import normal
from torch import nn

from cnf import CNF, Flow, Noise, build
from cnf.config import FlowConfig, SolverConfig
from cnf.errors import ConfigError
from cnf.fields import MLP, AugmentedTimeConditioning, Denoiser, Interpolant, TimePath
from cnf.flow_matching import MatchingPath, TimeDistribution, couple, stratified
from cnf.losses import FlowMatching
from cnf.solvers import Adaptive
from cnf.transforms import Sequential, Squeeze, Standardize

TIGHT = Adaptive("dopri5", 1e-10, 1e-10)


class Best(nn.Module):
    """The mean velocity between N(m, S) and N(0, I) on straight paths, plus weights times some other fields."""

    time_rows = True

    def __init__(self, m, s):
        super().__init__()
        self.register_buffer("m", m)
        self.register_buffer("s", s)
        self.weights = nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def others(self, t, x):
        return torch.stack([x, t * x.flip(1), torch.cos(3 * x), (1 - t) * torch.ones_like(x)])

    def forward(self, t, x, context=None):
        t = t.reshape(-1, 1)
        eye = torch.eye(len(self.m), dtype=x.dtype)
        covariance = (1 - t[..., None]) ** 2 * self.s + t[..., None] ** 2 * eye
        gain = (t[..., None] * eye - (1 - t[..., None]) * self.s) @ torch.linalg.inv(covariance)
        best = -self.m + (gain @ (x - (1 - t) * self.m)[..., None])[..., 0]
        return best + torch.tensordot(self.weights, self.others(t, x), 1)


def gaussian():
    m = torch.tensor([1.0, -2.0], dtype=torch.float64)
    a = torch.tensor([[0.9, 0.3], [0.0, 0.5]], dtype=torch.float64)
    return m, a @ a.T, lambda n: m + torch.randn(n, 2, dtype=torch.float64) @ a.T


@pytest.mark.parametrize("weights", ["even", "likelihood"])
@pytest.mark.parametrize("times", ["even", "importance"])
def test_the_minimiser_on_a_gaussian_pair_is_the_closed_form(weights, times):
    torch.manual_seed(0)
    m, s, sample = gaussian()
    field = Best(m, s)
    objective = FlowMatching(Flow(CNF(field), (2,)), weights=weights, times=times)
    objective.learn(sample(2000))
    gradients = []
    for _ in range(100):
        loss = objective(sample(2000)).mean()
        gradients.append(torch.autograd.grad(loss, field.weights)[0])
    gradients = torch.stack(gradients)
    z = gradients.mean(0) / (gradients.std(0) / 10)
    assert bool((z.abs() < 5).all()), z
    # and it is a minimum that the test can see: a small step away the gradient is not zero
    field.weights.data.fill_(0.3)
    away = torch.stack([torch.autograd.grad(objective(sample(2000)).mean(), field.weights)[0] for _ in range(20)])
    assert float((away.mean(0) / (away.std(0) / 20**0.5)).abs().max()) > 20


def test_the_minimiser_carries_the_gaussian_to_the_base():
    m, s, sample = gaussian()
    torch.manual_seed(1)
    flow = Flow(CNF(Best(m, s), eval_solver=TIGHT), (2,)).double().eval()
    x = sample(20)
    truth = torch.distributions.MultivariateNormal(m, s).log_prob(x)
    assert torch.allclose(flow.log_prob(x), truth, atol=1e-7)


def test_importance_leaves_the_loss_what_it_is_and_steadies_it():
    torch.manual_seed(0)
    flow = build(FlowConfig.of(hidden=(8,), zero_init=False), SolverConfig(), (2,)).double()
    x = torch.randn(512, 2, dtype=torch.float64)
    even, chosen = (FlowMatching(flow, weights="likelihood", times=times) for times in ("even", "importance"))
    for i in range(20):
        chosen.learn(x, noise=Noise(1, step=i))
    found = [torch.stack([o(x, noise=Noise(0, step=i)).mean() for i in range(200)]).detach() for o in (even, chosen)]
    spread = sum(float(f.var()) / len(f) for f in found) ** 0.5
    assert abs(float(found[0].mean() - found[1].mean())) < 5 * spread
    rows = [o(x, noise=Noise(7)).detach().std() for o in (even, chosen)]
    assert rows[1] < 0.8 * rows[0]


@pytest.mark.parametrize("sigma", [0.0, 0.01])
def test_the_schedule_is_a_straight_line_with_its_own_derivatives(sigma):
    schedule = Interpolant(sigma)
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    a, b, da, db = schedule(t)
    values, slopes = torch.func.jvp(lambda s: torch.stack(schedule(s)[:2]), (t,), (torch.ones_like(t),))
    assert torch.allclose(values, torch.stack([a, b])) and torch.allclose(slopes, torch.stack([da, db]), atol=1e-12)
    assert torch.allclose(a * (1 - sigma) + b, torch.ones_like(t), atol=1e-12)  # one line, whatever its speed
    assert float(a[0]) == pytest.approx(1) and float(b[0]) == pytest.approx(sigma) and float(b[-1]) == 1 and abs(float(a[-1])) < 1e-12
    inside = t[1:-1]
    _, change = torch.func.jvp(lambda s: schedule(s).b.log() - schedule(s).a.log(), (inside,), (torch.ones_like(inside),))
    assert torch.allclose(schedule.likelihood_weight(inside), 1 / (schedule(inside).b ** 2 * change), rtol=1e-10)
    with pytest.raises(ConfigError, match=r"got 1.0"):
        Interpolant(1.0)


def test_a_denoiser_without_a_network_is_the_flow_of_a_gaussian():
    torch.manual_seed(0)
    sigma, s = 0.02, 0.7
    field = Denoiser(1, Interpolant(sigma), level=0.1, hidden=(4,), depth=1).double()
    field.fit_batches([torch.full((3, 1, 2, 2), s, dtype=torch.float64)])
    flow = Flow(CNF(field, eval_solver=TIGHT), (1, 2, 2)).double().eval()
    x = s * torch.randn(5, 1, 2, 2, dtype=torch.float64)
    truth = torch.distributions.Normal(0.0, math.hypot(s, sigma)).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(flow.log_prob(x), truth, atol=1e-6)


def test_a_denoiser_is_what_its_network_says_of_the_clean_image():
    """f = da D + db (x - a D)/b with D = c x + ..., and the loss weighted by likelihood is the error of D by the change of SNR."""
    torch.manual_seed(0)
    schedule = Interpolant(0.05)
    field = Denoiser(1, schedule, level=0.1, hidden=(4,), depth=1, zero_init=False).double()
    field.data_std.fill_(0.8)
    x0, z = (torch.randn(6, 1, 4, 4, dtype=torch.float64) for _ in range(2))
    t = torch.linspace(0.01, 0.99, 6, dtype=torch.float64)
    a, b, da, db = (c[:, None, None, None] for c in schedule(t))
    x = a * x0 + b * z
    f = field(t, x)
    d = (f - db / b * x) / (da - a * db / b)
    error = (f - (da * x0 + db * z)).square().flatten(1).sum(1)
    snr = torch.func.jvp(lambda s: (schedule(s).a / schedule(s).b).square(), (t,), (torch.ones_like(t),))[1]
    bound = -0.5 * snr * (x0 - d).square().flatten(1).sum(1)  # 2107.00630, eq. 17
    assert torch.allclose(schedule.likelihood_weight(t) * error, bound, rtol=1e-8)


def test_couplings_against_all_permutations():
    torch.manual_seed(0)
    x, z = torch.randn(5, 3), torch.randn(5, 3)
    costs = {p: float((x - z[list(p)]).square().sum()) for p in itertools.permutations(range(5))}
    found = couple(x, z)
    assert float((x - found).square().sum()) == pytest.approx(min(costs.values()))
    assert couple(x, z, kind="independent") is z


def test_transport_is_shorter_and_keeps_the_marginals():
    torch.manual_seed(0)
    x, z = torch.randn(256, 2) * torch.tensor([2.0, 0.3]), torch.randn(256, 2)
    found = couple(x, z)
    assert float((x - found).square().sum()) < 0.5 * float((x - z).square().sum())
    assert torch.equal(found[found[:, 0].argsort()], z[z[:, 0].argsort()])


def test_conditional_couplings_never_mix_contexts():
    torch.manual_seed(0)
    context = torch.eye(3)[torch.randint(0, 3, (90,))]
    x = torch.randn(90, 2) + 10 * context[:, :2]
    z = torch.randn(90, 2)
    found = couple(x, z, context)
    for row in context.unique(dim=0):
        mine = (context == row).all(1)
        assert torch.equal(found[mine].sort(0).values, z[mine].sort(0).values)  # its own noise, in another order
    lengths = [(x - y).square().sum() for y in (found, z, couple(x, z))]
    assert lengths[2] < lengths[0] < lengths[1]


def test_times_are_stratified_and_distributed_as_learned():
    times = TimeDistribution(4)
    u = stratified(Noise(0), 10_000)
    t, density = times.quantile(u)
    assert torch.allclose(t, u) and bool((density == 1).all()) and not bool((u.diff() > 0).all())
    u = u.sort().values
    times.learn(torch.tensor([0.1, 0.3, 0.6, 0.9]), torch.tensor([8.0, 1.0, 1.0, 0.0]))
    t, density = times.quantile(u)
    shares = torch.histc(t.float(), 4, 0, 1) / len(t)
    assert torch.allclose(shares.double(), times.shares, atol=1e-3) and bool((t.diff() >= 0).all())
    assert float((1 / density).mean()) == pytest.approx(1, abs=1e-3)  # ∫ p (1/p)
    assert float(times.shares.min()) >= 0.1 / 4 - 1e-12
    with pytest.raises(ConfigError, match="bins must be at least 1, got 0"):
        TimeDistribution(0)


def test_rows_of_a_joint_batch_get_the_times_that_one_process_gives_them():
    whole = stratified(Noise(3, total=12), 12)
    parts = [stratified(Noise(3, start=i, total=12), 4) for i in (0, 4, 8)]
    assert torch.equal(torch.cat(parts), whole)
    grouped = stratified(Noise(3, total=12), 12, groups=3)
    assert len(grouped.unique()) == 3
    assert torch.equal(torch.cat([stratified(Noise(3, start=i, total=12), 4, groups=3) for i in (0, 4, 8)]), grouped)


@pytest.mark.parametrize("layer", ["concatsquash", "blend", "hyper"])
def test_blocks_share_the_time_of_the_path(layer):
    torch.manual_seed(0)
    config = FlowConfig.of(hidden=(8,), blocks=3, time_conditioning=layer, end_time=0.5, zero_init=False)
    flow = build(config, SolverConfig(), (2,)).double()
    path = MatchingPath(flow)
    assert path.together == (layer != "concatsquash")
    t = torch.tensor([0.0, 0.1, 0.4, 0.5, 0.9, 1.0], dtype=torch.float64)
    x = torch.randn(6, 2, dtype=torch.float64)
    found = path.velocity(t, x)
    for i, value in enumerate(t.tolist()):
        k = min(2, int(value * 3))
        local = torch.tensor((value * 3 - k) * 0.5, dtype=torch.float64)
        truth = flow.blocks[k].field(local, x[i : i + 1]) * 3 * 0.5
        assert torch.allclose(found[i : i + 1], truth, atol=1e-12)


def test_an_augmented_time_is_where_the_block_has_it():
    torch.manual_seed(0)
    block = CNF(MLP(2, (8,), AugmentedTimeConditioning("hyper", k=4, m=3)), path=TimePath(4, learn_start=True)).double()
    nn.init.normal_(block.path.initial)
    path = MatchingPath(Flow(block, (2,)))
    t = torch.tensor([0.1, 0.1, 0.7], dtype=torch.float64)
    x = torch.randn(3, 2, dtype=torch.float64)
    block.solver = Adaptive("dopri5", 1e-10, 1e-10, "direct")
    found = path.velocity(t, x)
    truth = torch.cat([block.velocity(t[i], x[i : i + 1]) for i in range(3)])
    assert torch.allclose(found, truth, atol=1e-8)
    loss = FlowMatching(Flow(block, (2,)))(torch.randn(32, 2, dtype=torch.float64)).mean()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in block.parameters())


@pytest.mark.parametrize("kind", ["mlp", "unet", "denoiser", "conditional"])
def test_every_parameter_of_the_field_gets_a_gradient(kind):
    torch.manual_seed(0)
    context = None
    if kind in ("mlp", "conditional"):
        dim = 3 if kind == "conditional" else 0
        flow = build(FlowConfig.of(hidden=(8,), blocks=2), SolverConfig(), (2,), context_dim=dim)
        x = torch.randn(16, 2)
        context = torch.eye(3)[torch.arange(16) % 3] if dim else None
    else:
        more = {"dequantize": "truncated-normal", "preprocess": "center"} if kind == "denoiser" else {}
        config = FlowConfig.of(field="unet", hidden=(4, 8), unet_depth=1, attention=True, zero_init=False, **more)
        flow = build(config, SolverConfig.of(divergence="hutchinson"), (1, 8, 8), levels=17)
        for p in flow.parameters():
            p.data += 0.1 * torch.randn_like(p)  # past the zeros of its residual branches
        x = torch.randint(0, 17, (16, 1, 8, 8), dtype=torch.uint8)
        flow.fit_statistics(x)
    FlowMatching(flow, "optimal-transport" if context is not None else "independent")(x, context).mean().backward()
    without = [name for name, p in flow.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
    assert not without


def test_chains_without_such_a_path_are_refused():
    with pytest.raises(ConfigError, match=r"a Multiscale: use --architecture stack, or the preset fm-digits"):
        FlowMatching(build(FlowConfig.of(architecture="multiscale", field="conv", hidden=(4,)), SolverConfig(), (1, 4, 4), levels=17))
    with pytest.raises(ConfigError, match="between or after"):
        blocks = [CNF(MLP(16, (4,))), Squeeze(), CNF(MLP(16, (4,)))]
        FlowMatching(Flow(Sequential(blocks), (1, 4, 4)))
    with pytest.raises(ConfigError, match="no block"):
        FlowMatching(Flow(Sequential([Standardize(torch.zeros(2), torch.ones(2))]), (2,)))
    with pytest.raises(ConfigError, match="end time is learned or random"):
        FlowMatching(build(FlowConfig.of(hidden=(4,), learn_end_time=True), SolverConfig(), (2,)))
    with pytest.raises(ConfigError, match="end time is learned or random"):
        FlowMatching(build(FlowConfig.of(hidden=(4,)), SolverConfig(steer=0.1), (2,)))
    with pytest.raises(ConfigError, match="--dequantize variational"):
        FlowMatching(build(FlowConfig.of(hidden=(4,), dequantize="variational"), SolverConfig(), (1, 2, 2), levels=17))
    denoiser = FlowConfig.of(field="unet", hidden=(4,), dequantize="truncated-normal", preprocess="center")
    with pytest.raises(ConfigError, match="it has to be independent"):
        FlowMatching(build(denoiser, SolverConfig(), (1, 4, 4), levels=17), coupling="optimal-transport")
    with pytest.raises(ConfigError, match="coupling='nearest' is unknown"):
        FlowMatching(build(FlowConfig.of(hidden=(4,)), SolverConfig(), (2,)), coupling="nearest")


@pytest.mark.slow
def test_the_validation_loss_is_a_function_of_the_row():
    torch.manual_seed(0)
    flow = Flow(Sequential([Standardize(torch.ones(2), 2 * torch.ones(2)), CNF(MLP(2, (8,), context_dim=3))]), (2,)).double()
    objective, x, c = FlowMatching(flow), normal(6, 2), normal(6, 3)
    found = objective.validation_loss(x, c)
    assert found.shape == (6,) and torch.equal(found, objective.validation_loss(x, c))
    assert torch.allclose(found[[4, 1]], objective.validation_loss(x[[4, 1]], c[[4, 1]]))
    many = objective.validation_loss(x, c, draws=2000, seed=1)  # the mean of the training loss, row by row
    drawn = torch.stack([objective(x, c) for _ in range(500)])
    assert bool(((many - drawn.mean(0)).abs() < 5 * drawn.std(0) / 500**0.5 + 5 * drawn.std(0) / 2000**0.5).all())
