"""Request: options of one call, overrides of solver and divergence, and the former arguments with their warning."""

import dataclasses

import pytest
import torch
from torch.func import vmap

import cnf.ode.multiscale
import cnf.transforms
from cnf import CNF, Exact, FixedGrid, Flow, Hutchinson, Noise
from cnf.errors import ConfigError
from cnf.fields import MLP
from cnf.solvers import Stats, refined
from cnf.transforms import Request, Sequential, Standardize, Transform, TransformOutput, iter_leaves

F64 = torch.float64


def flow_of(context_dim=0, **options):
    torch.manual_seed(0)
    blocks = [CNF(MLP(2, (6,), context_dim=context_dim), solver=FixedGrid("rk4", 2), **options) for _ in range(2)]
    return Flow(Sequential([Standardize(torch.zeros(2), torch.ones(2)), *blocks]), (2,)).to(F64)


def test_overrides_are_those_of_replaced_solvers_and_divergences():
    flow, other, x = flow_of(), flow_of(), torch.randn(5, 2, dtype=F64)
    for block in other.blocks:
        block.solver, block.divergence = FixedGrid("midpoint", 3), Hutchinson()
    fine, noise = FixedGrid("midpoint", 3), Noise(0)
    given = {"noise": noise, "solver": fine}
    assert torch.equal(flow.log_prob(x, **given, divergence=Hutchinson()), other.log_prob(x, noise=noise))
    assert torch.equal(flow.score(x, **given, divergence=lambda block: Hutchinson()), other.score(x, noise=noise))
    assert torch.equal(flow.encode(x, **given), other.encode(x)) and torch.equal(flow.decode(x, **given), other.decode(x))
    assert torch.equal(flow.sample(3, **given), other.sample(3, noise=noise))
    assert torch.equal(flow.rsample(3, **given), other.rsample(3, noise=noise))
    for mine, theirs in zip(flow.sample_and_log_prob(3, **given, divergence=Hutchinson()), other.sample_and_log_prob(3, noise=noise), strict=True):
        assert torch.equal(mine, theirs)
    times = torch.linspace(0, 1, 3)
    assert torch.equal(flow.trajectory(x, times, solver=fine), other.trajectory(x, times))
    assert [block.solver.steps for block in flow.blocks] == [2, 2] and all(isinstance(block.divergence, Exact) for block in flow.blocks)


def test_overrides_by_block_and_by_mode():
    flow, x = flow_of(), torch.randn(5, 2, dtype=F64)
    first, second = flow.blocks
    assert flow.evaluate(x, Request(solver={first: FixedGrid("rk4", 1), second: FixedGrid("rk4", 5)}.__getitem__)).stats.nfe == 24
    assert flow.evaluate(x, Request(solver=refined)).stats.nfe == 2 * 16
    assert refined(first).steps == 4 and refined(first.eval()).rtol == pytest.approx(0.1 * first.eval_solver.rtol)
    for wrong in (FixedGrid, 3, "rk4"):
        with pytest.raises(ConfigError, match=r"solver=.*expected a solver such as"):
            flow.log_prob(x, solver=wrong)
    for wrong in (Exact, 3):
        with pytest.raises(ConfigError, match="divergence must be a strategy such as"):
            flow.log_prob(x, divergence=wrong)


def test_a_request_is_frozen_and_belongs_to_its_place():
    request = Request(noise=Noise(3), log_det=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.log_det = True
    assert request.child(4).noise.path == (4,) and not request.child(4).log_det
    assert [own.noise.path for _, own in iter_leaves(Sequential([Sequential([CNF(MLP(2))]), CNF(MLP(2))]), request)] == [(0, 0), (1,)]


def test_a_request_inside_torch_transformations():
    chain = flow_of(context_dim=3).transform
    x, context = torch.randn(5, 2, dtype=F64), torch.randn(5, 3, dtype=F64)
    truth = chain(x, Request(context)).value
    one = vmap(lambda v, request: chain(v[None], Request(request.context[None], log_det=False)).value[0])(x, Request(context))
    torch.testing.assert_close(one, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.slow  # one block with a context is compiled in test_hostile_fields.py
def test_a_request_inside_a_compiled_chain():
    chain = flow_of(context_dim=3).transform
    x, context = torch.randn(5, 2, dtype=F64), torch.randn(5, 3, dtype=F64)
    truth = chain(x, Request(context)).value
    compiled = torch.compile(chain, backend="aot_eager")
    torch.testing.assert_close(compiled(x, Request(context, log_det=False)).value, truth, rtol=1e-9, atol=1e-9)


def test_former_transforms_and_calls_work_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r"Doubling.forward\(x, context.*write forward\(self, x, request\)"):

        class Doubling(Transform):
            def forward(self, x, context=None, *, noise=None, log_det=True, integrals=True):
                scale = 2 if noise is None else noise.seed
                return TransformOutput(scale * x + context, x.new_zeros(len(x)), {}, Stats())

            def inverse(self, z, context=None, **wanted):
                assert sorted(wanted) == ["integrals", "log_det", "noise"]
                return TransformOutput((z - context) / 2, z.new_zeros(len(z)), {}, Stats())

    x, shift = torch.randn(4, 2, dtype=F64), torch.ones(2, dtype=F64)
    chain = Sequential([Doubling(), CNF(MLP(2), solver=FixedGrid("rk4", 1))]).to(F64)
    truth = chain(x, Request(shift)).value
    with pytest.warns(DeprecationWarning, match=r"write transform\(x, Request"):
        assert torch.equal(chain(x, shift, log_det=False).value, truth)
    with pytest.warns(DeprecationWarning):
        assert torch.equal(chain.transforms[0].inverse(truth, context=shift).value, (truth - 1) / 2)
    with pytest.warns(DeprecationWarning):
        assert torch.equal(Doubling()(x, shift, noise=Noise(3)).value, 3 * x + 1)
    with pytest.raises(TypeError, match="a transform takes no argument 'steps'"):
        chain(x, steps=3)


@pytest.mark.parametrize(
    "module, old, new",
    [(cnf.transforms, "CenterShift", "Rescale"), (cnf.transforms, "Transformed", "TransformOutput"), (cnf.ode.multiscale, "Carried", "SharedAugmentedTime")],
)
def test_former_names_warn(module, old, new):
    with pytest.warns(DeprecationWarning, match=f"{old} is called {new}"):
        assert getattr(module, old) is getattr(module, new)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        module.Nothing  # noqa: B018
