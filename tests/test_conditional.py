"""Conditional flows: a context standardised and embedded inside the model, trained, saved and matched."""

import numpy as np
import pytest
import torch
from conftest import F64, normal, perturbed
from torch import nn

import cnf
from cnf.bases import ConditionalMixture
from cnf.cli import sample_main, train_main
from cnf.errors import ConfigError, DataError
from cnf.fields import MLP
from cnf.losses import FlowMatching
from cnf.transforms import Sequential, Standardize

GRID = cnf.FixedGrid("rk4", 3)


def flow_of(embedding=None, size=2, base=None, width=4):
    torch.manual_seed(0)
    block = cnf.CNF(MLP(2, (5,), context_dim=width), None, GRID, GRID)
    options = {"embedding": embedding or nn.Linear(size, width), "context_dim": size}
    return perturbed(cnf.Flow(Sequential([Standardize(torch.zeros(2), torch.ones(2)), block]), (2,), base=base, **options))


@pytest.mark.parametrize("base", [None, lambda: ConditionalMixture(2, 2, 4, (4,))])
def test_the_embedding_is_that_of_a_flow_whose_context_is_embedded(base):
    """Every method against the same flow without embedding, which is given the embedded context."""
    flow = flow_of(base=base and base())
    plain = cnf.Flow(flow.transform, (2,), base=flow.base)
    c, x = 5 + 3 * normal(6, 2), normal(6, 2)
    flow.fit_statistics(1 + normal(50, 2), 5 + 3 * normal(50, 2, seed=9))
    e = flow.embedding.network((c - flow.embedding.mean) / flow.embedding.std)
    assert flow.context_dim == 2 and plain.context_dim == 4 and float(flow.embedding.mean.mean() - 5) < 2
    with torch.no_grad():
        for name in ("log_prob", "encode", "decode", "score"):
            assert torch.allclose(getattr(flow, name)(x, c), getattr(plain, name)(x, e), atol=1e-12), name
            assert torch.allclose(getattr(flow, name)(x, c[0]), getattr(plain, name)(x, e[0]), atol=1e-12), name
        assert torch.allclose(flow.sample(3, c, noise=cnf.Noise(0)), plain.sample(3, e, noise=cnf.Noise(0)), atol=1e-12)
        for a, b in zip(flow.sample_and_log_prob(3, c, noise=cnf.Noise(0)), plain.sample_and_log_prob(3, e, noise=cnf.Noise(0)), strict=True):
            assert torch.allclose(a, b, atol=1e-12)
        assert torch.allclose(flow.trajectory(x, torch.linspace(0, 1, 3), c), plain.trajectory(x, torch.linspace(0, 1, 3), e), atol=1e-12)
        assert torch.allclose(flow(c).log_prob(x), plain(e).log_prob(x), atol=1e-12)
        assert torch.allclose(flow(c).transform(x), plain(e).transform(x), atol=1e-12)
        y, log_p = flow(c).rsample_and_log_prob((3,)) if flow(c).has_rsample else (flow(c).sample((3,)), None)
        assert log_p is None or torch.allclose(flow(c).log_prob(y), log_p, atol=1e-1)
        out = flow.evaluate(x, cnf.transforms.Request(c))
        assert torch.allclose(flow.density(out.value, out.log_det, c), flow.log_prob(x, c), atol=1e-12)
        if base is None:
            noise = cnf.Noise(0)
            assert torch.allclose(FlowMatching(flow)(x, c, noise), FlowMatching(plain)(x, e, noise), atol=1e-12)
    flow.log_prob(x, c).sum().backward()
    assert all(p.grad is not None for p in flow.parameters())


@pytest.mark.slow
def test_a_trained_embedding_is_saved_with_the_flow(tmp_path):
    torch.manual_seed(0)
    c = 100 + 20 * torch.randn(400, 1)
    x = (c - 100) / 20 + 0.5 * torch.randn(400, 2)
    flow = flow_of(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 4)), size=1).float()
    result = cnf.fit(flow, (x, c), validation=0.2, steps=120, lr=0.02, folder=tmp_path / "run", quiet=True)
    assert abs(float(flow.embedding.mean) - 100) < 5 and 15 < float(flow.embedding.std) < 25
    assert result.best < 2.0  # the truth is 1.45, the marginal 3.0
    again = flow_of(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 4)), size=1).float()
    cnf.load(tmp_path / "run", flow=again)
    with torch.no_grad():
        assert torch.equal(again.log_prob(x[:5], c[:5]), flow.log_prob(x[:5], c[:5]))


def test_what_is_refused():
    with pytest.raises(ConfigError, match="embedding=Linear and context_dim=None belong together"):
        cnf.Flow(cnf.CNF(MLP(2, context_dim=4)), (2,), embedding=nn.Linear(2, 4))
    flow = flow_of(nn.Flatten(0))
    with pytest.raises(ConfigError, match=r"embedding returned \(6,\) for a context of shape \(3, 2\)"):
        flow.log_prob(normal(3, 2), normal(3, 2))
    with pytest.raises(DataError, match=r"context has shape \(3, 4\), expected \(2,\) or \(N, 2\)"):
        flow.log_prob(normal(3, 2), normal(3, 4))
    with pytest.raises(DataError, match="two or more finite rows of 2"):
        flow.fit_statistics(normal(9, 2), torch.full((1, 2), 3.0, dtype=F64))


# -- guidance ----------------------------------------------------------------------------------------------------------


class Custom(nn.Module):
    context_dim = 3

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, t, x, context):
        return self.net(torch.cat([x, context.expand(len(x), 3)], 1)) * (1 + t)


@pytest.mark.parametrize("field", [lambda: MLP(2, (5,), context_dim=3), Custom])
@pytest.mark.parametrize("trace", [cnf.Exact, cnf.Hutchinson])
def test_guidance_mixes_the_velocities(field, trace):
    torch.manual_seed(0)
    flow = perturbed(cnf.Flow(cnf.CNF(field(), trace(), GRID, GRID), (2,)))
    strong, x, c = cnf.guided(flow, 2.5), normal(4, 2), normal(4, 3)
    f, t = flow.transform.field, torch.tensor(0.3, dtype=F64)
    with torch.no_grad():
        wanted = f(t, x, torch.zeros_like(c)) * (1 - 2.5) + 2.5 * f(t, x, c)
        assert torch.allclose(strong.transform.field(t, x, c), wanted, atol=1e-12)
        noise = cnf.Noise(0)
        for weight, context in ((1.0, c), (0.0, 0 * c)):
            assert torch.allclose(cnf.guided(flow, weight).log_prob(x, c, noise=noise), flow.log_prob(x, context, noise=noise), atol=1e-12)
    z = strong.encode(x.requires_grad_(), c)
    j = torch.stack([torch.autograd.grad(z[:, i].sum(), x, retain_graph=True)[0] for i in range(2)], 1)
    if trace is cnf.Exact:
        truth = strong.base_log_prob(z) + torch.linalg.slogdet(j)[1]
        assert torch.allclose(strong.log_prob(x, c), truth, atol=2e-2)  # the grid's error
    assert {id(p) for p in strong.parameters()} == {id(p) for p in flow.parameters()} and flow.transform.field is f
    assert f"{strong.transform.field!r}".count("weight=2.5")


def test_dropped_contexts_are_trained():
    torch.manual_seed(0)
    flow, x, c = flow_of(nn.Identity(), size=4), normal(2000, 2), normal(2000, 4)
    noise = cnf.Noise(0)
    whole, mixed = (FlowMatching(flow, times="even", drop_context=p)(x, c, noise) for p in (0.0, 0.25))
    none = FlowMatching(flow, times="even")(x, flow.embedding.mean.expand(2000, 4), noise)
    dropped = mixed == none
    assert bool((dropped | (mixed == whole)).all()) and 0.2 < float(dropped.double().mean()) < 0.3
    objective = FlowMatching(flow, drop_context=0.5)
    assert torch.equal(objective.validation_loss(x[:5], c[:5]), FlowMatching(flow).validation_loss(x[:5], c[:5]))
    with pytest.raises(ConfigError, match=r"drop_context=0\.1 is for a conditional flow"):
        FlowMatching(cnf.Flow(cnf.CNF(MLP(2)), (2,)), drop_context=0.1)
    with pytest.raises(ConfigError, match="less than 1, got 1"):
        FlowMatching(flow, drop_context=1.0)
    with pytest.raises(ConfigError, match="takes no context, which guidance needs"):
        cnf.guided(cnf.Flow(cnf.CNF(MLP(2)), (2,)), 2.0)


@pytest.mark.slow
def test_the_programs_train_and_sample_with_guidance(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = [f"--{name}={n}" for name, n in {"steps": 2, "warmup": 1, "hidden": 4, "validation-items": 4, "test-items": 4, "noise-samples": 1}.items()]
    tiny = ["digits", "--objective", "flow-matching", "--condition", "label", *sizes]
    assert train_main([*tiny, "--drop-condition", "0.2", "--out", "run"]) == 0
    assert train_main([*tiny, "--out", "plain"]) == 0
    for weight in ("1", "3"):
        assert sample_main(["run", "-n", "4", "--class", "3", "--guidance", weight, "--grid-steps", "2", "--out", f"{weight}.npz"]) == 0
    one, three = (np.load(f"{weight}.npz") for weight in ("1", "3"))
    assert one["samples"].shape == (4, 1, 8, 8) and np.isfinite(three["log_prob"]).all()
    assert sample_main(["plain", "--guidance", "2"]) == 2
    assert "never saw rows without their condition: train with --drop-condition" in capsys.readouterr().err
