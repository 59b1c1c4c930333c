"""Training, evaluating and sampling for long take no more memory than for short."""

import gc
import math
import resource

import pytest
import torch
import trainers
from torch._subclasses.fake_tensor import FakeTensor
from trainers import training

from cnf.config import DataConfig, FlowConfig, RunConfig, SolverConfig, TrainConfig
from cnf.data import DataSplits
from cnf.evaluation import evaluate
from cnf.ode.logdet_quadrature import RULES, interpolation, patterson
from cnf.random import Noise
from cnf.runs import RunInfo

POINTS = torch.randn(300, 2, generator=torch.Generator().manual_seed(3))
DATA = DataSplits("points", "table", POINTS[:200], POINTS[200:250], POINTS[250:])


def resident():
    """Bytes of memory that this process has."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        pytest.skip("this system does not tell a process's memory (/proc)")


def live():
    """Tensors that are held, and their bytes; not the fake and wrapped ones of graphs traced by torch.compile, which hold no memory."""
    gc.collect()
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    kinds = (torch.Tensor, torch.nn.Parameter)
    found = [o for o in gc.get_objects() if issubclass(type(o), kinds) and not isinstance(o, FakeTensor) and not wrapped(o)]
    return len(found), sum(t.untyped_storage().nbytes() for t in found)


def settle(run, steps, evaluations, samplings):
    """Go on training for so many steps, as the loop does, then evaluate and sample."""
    run.steps = run.state.step + steps
    run.run()
    flow = run.best_model()
    for i in range(evaluations):
        assert math.isfinite(evaluate(flow, DATA.test, seed=i).mean)
    with torch.no_grad():
        for i in range(samplings):
            assert flow.sample(32, noise=Noise(i, "sample")).shape == (32, 2)


def check(tmp_path, warmup, steps, others, solver):
    torch.compiler.reset()  # graphs that other tests traced in this process, whose tensors would be let go at any time
    for nodes in RULES:  # the only caches of tensors: the process keeps each rule from its first use, at whatever step that is
        patterson(nodes)
        if nodes > RULES[0]:
            interpolation(nodes)
    train = TrainConfig.of(steps=10_000, batch_size=64, accumulate=2, validate_every=25, solver_check_every=20, kinetic=0.01)
    config = RunConfig("points", DataConfig(), FlowConfig.of(hidden=(16, 16), blocks=2), solver, train)
    run = training(RunInfo(config, (2,), None, 0, (), ("a", "b")), DATA, tmp_path, quiet=True)
    settle(run, warmup, 5, 5)
    tensors, before = live(), resident()
    settle(run, steps, others, others)
    grown = resident() - before
    print(f"\n{steps} steps, {others} evaluations and samplings: {before / 2**20:.0f} MiB grew by {grown / 2**20:.2f} MiB, tensors {tensors[0]} to {live()[0]}")
    assert all(now <= then for now, then in zip(live(), tensors, strict=True))  # another test's remains may be freed
    assert grown < 30 * 2**20 and grown < 0.05 * before


SOLVERS = [SolverConfig.of(grid_steps=4, divergence="hutchinson"), SolverConfig.of(train_solver="adaptive", gradient="adjoint", rtol=1e-3, atol=1e-3)]


@pytest.mark.slow
def test_memory_does_not_grow_in_a_short_run(tmp_path, monkeypatch):
    monkeypatch.setitem(trainers.CHECKPOINTER, "save_seconds", 0.2)
    check(tmp_path, 12, 30, 3, SOLVERS[0])


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS, ids=["grid", "adjoint"])
def test_memory_does_not_grow(tmp_path, monkeypatch, solver):
    monkeypatch.setitem(trainers.CHECKPOINTER, "save_seconds", 1.0)
    check(tmp_path, 50, 500, 200, solver)
