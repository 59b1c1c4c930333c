"""Solver steps whose stages are prepared together: values and gradients of the plain path, cost, torchdiffeq's own steps."""

import warnings

import pytest
import torch
import torchdiffeq
from conftest import F64, perturbed, slow
from test_fast import LAYERS, Plain, close, gradients, made, traced
from torch.utils._python_dispatch import TorchDispatchMode

from cnf import CNF, Flow
from cnf._utils.compilation import CompilationWarning
from cnf._utils.errors import ConfigError
from cnf.config import FlowConfig, SolverConfig
from cnf.fields import MLP, precomputed
from cnf.fields.activations import _RationalTanh
from cnf.models import build
from cnf.ode.divergence import Exact, Hutchinson
from cnf.ode.quadratures import Kinetic, TotalDerivative
from cnf.random import Noise
from cnf.solvers import Adaptive, FixedGrid
from cnf.transforms import Request

__all__ = ["traced"]


def blocks(layer, hidden=(6, 5), context_dim=0, divergence=None, **options):
    """The block, and one that evaluates its field at one time after another, by autodiff."""
    field = perturbed(MLP(3, hidden, layer, context_dim=context_dim))
    divergence = divergence or Exact()
    plain = Exact(closed_form=False) if isinstance(divergence, Exact) else divergence
    return [CNF(f, d, **options).double().train() for f, d in ((field, divergence), (Plain(field), plain))]


class Squares:
    """Nodes whose square roots are equally spaced."""

    def times(self, start, stop, steps):
        return start + (stop - start) * torch.linspace(0, 1, steps + 1, dtype=start.dtype).square()


def contexts(n):
    generator = torch.Generator().manual_seed(3)
    return {
        "none": None,
        "shared": torch.randn(2, generator=generator, dtype=F64),
        "rows": torch.randn(n, 2, generator=generator, dtype=F64),
    }


CASES = [
    (layer, context, gradient)
    for layer in LAYERS
    for context in ("none", "shared", "rows")
    for gradient in ("direct", "checkpoint")
]
QUICK = [("concatsquash", "none", "direct"), ("concat", "shared", "direct"), ("concatsquash", "rows", "checkpoint")]


@pytest.mark.parametrize("layer, context, gradient", [case if case in QUICK else slow(*case) for case in CASES])
def test_prepared_stages_have_the_plain_paths_gradient(layer, context, gradient):
    x, c = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=F64), contexts(4)[context]
    for spacing, divergence in ((None, Exact()), (Squares(), Hutchinson())):
        solver = FixedGrid("rk4", 2, gradient, spacing=spacing)
        quadratures = (TotalDerivative(),) if spacing else (Kinetic(),)
        pair = blocks(
            layer, context_dim=0 if c is None else 2, divergence=divergence, solver=solver, quadratures=quadratures
        )
        found = []
        for block in pair:
            out = block(x, Request(c, Noise(0)))
            loss = (out.value.square().sum(1) - out.log_det + sum(out.integrals.values())).mean()
            found.append([loss.detach(), *torch.autograd.grad(loss, list(block.parameters()), materialize_grads=True)])
        assert close(*found, 1e-10)


@pytest.mark.parametrize(
    "hidden, residual",
    [((), "none"), ((5,), "minus"), ((5, 4), "linear"), slow((5, 4, 3), "none"), slow((5,), "linear")],
)
def test_any_number_of_layers_and_residual_term(hidden, residual):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    field = perturbed(MLP(3, hidden, residual=residual))
    fast, plain = (
        CNF(f, Exact(closed_form=f is field), FixedGrid("rk4", 2)).double().train() for f in (field, Plain(field))
    )
    assert close(gradients(fast, x), gradients(plain, x), 1e-10)
    for one, other in zip(fast.inverse(x)[:2], plain.inverse(x)[:2], strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_a_grid_too_large_to_prepare_at_once_is_prepared_step_by_step(monkeypatch):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    block = blocks("concatsquash", solver=FixedGrid("rk4", 6))[0]
    truth = gradients(block, x)
    for largest in (1500, 0):  # one step at a time; not at all
        monkeypatch.setattr(precomputed, "LARGEST", largest)
        assert close(gradients(block, x), truth, 1e-12)


@pytest.mark.slow  # test_fast.py compiles the estimated trace
def test_the_compiled_unit_is_one_step_for_any_number_of_steps(traced):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    fast, plain = blocks("concatsquash")
    fast.compiles = True
    counts = []
    for steps in (2, 5):
        fast.solver = plain.solver = FixedGrid("rk4", steps)
        assert close(gradients(fast, x), gradients(plain, x), 1e-10)
        counts.append(made())
    assert counts[0] == counts[1]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["closed form", "estimate", "context", "spacing"])
def test_a_whole_solve_compiled_has_the_plain_paths_gradient(case, traced):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    divergence = Hutchinson() if case == "estimate" else None
    fast, plain = blocks("concatsquash", context_dim=2 if case == "context" else 0, divergence=divergence, quadratures=(Kinetic(),))
    fast.compiles = "solve"
    for steps in (2, 3):
        fast.solver = plain.solver = FixedGrid("rk4", steps, spacing=Squares() if case == "spacing" else None)
        if case == "context":
            request = Request(contexts(4)["rows"], Noise(0))
            found = [torch.autograd.grad(b(x, request).log_det.sum(), list(b.parameters()), materialize_grads=True) for b in (fast, plain)]
            assert close(*found, 1e-10)
            continue
        assert close(gradients(fast, x), gradients(plain, x), 1e-10)
        before = made()
        gradients(fast, x)
        assert made() == before
    assert made() >= 2  # a graph for each number of steps: it was compiled


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["step", "solve"])
def test_the_settings_choose_what_is_compiled(unit, traced):
    """A step is one graph for any number of steps; whole solves have one each."""
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    solver = SolverConfig.of(compile=True, compile_unit=unit, gradient="direct", grid_steps=1)
    flow = build(FlowConfig.of(hidden=(6,)), solver, (2,)).train()
    (block,), before = flow.blocks, made()
    for steps in (1, 2):
        block.solver = block.solver.with_steps(steps)
        flow.log_prob(x).sum().backward()
    assert made() - before == {"step": 1, "solve": 2}[unit]


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_machine_code_of_a_whole_solve_has_the_plain_paths_gradient(dtype, tolerance):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=F64).to(dtype)
    fast, plain = (block.to(dtype) for block in blocks("concatsquash", solver=FixedGrid("rk4", 2)))
    fast.compiles = "solve"
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompilationWarning)
        assert close(gradients(fast, x), gradients(plain, x), tolerance)


def test_the_compiled_unit_has_a_known_name():
    with pytest.raises(ConfigError, match=r"compile='loss' is unknown: expected True, False or 'solve'"):
        CNF(MLP(2), compile="loss")


def test_the_tanh_of_compiled_code_is_exact_to_rounding():
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([1e-6, -1e-30, 0.0, 88.0, torch.inf])])
    value, slope = _RationalTanh.apply(x)
    truth = x.double().tanh()
    assert ((value - truth).abs() <= 5e-7 * truth.abs()).all() and ((slope - (1 - truth**2)).abs() <= 1e-6).all()
    assert value.abs().max() <= 1 and slope.min() >= 0
    assert torch.autograd.gradcheck(_RationalTanh.apply, torch.linspace(-3, 3, 7, dtype=F64).requires_grad_(), atol=1e-6)


class Operators(TorchDispatchMode):
    """Count of operator calls."""

    calls = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.calls += 1
        return function(*arguments, **(options or {}))


def test_a_step_of_a_log_likelihood_makes_few_operator_calls():
    flow, x, calls = Flow(CNF(MLP(2, (64, 64))), (2,)).eval(), torch.zeros(1, 2), []
    for steps in (4, 5):
        with torch.no_grad(), Operators() as operators:
            flow.log_prob(x, solver=FixedGrid("rk4", steps))
        calls.append(operators.calls)
    # a stage: three products, two activations with derivatives, the trace's three; span, and the step's sums
    assert calls[1] - calls[0] <= 4 * 20, calls


@pytest.mark.parametrize("norm", ["row", "batch"])
def test_dopri5_takes_the_steps_of_torchdiffeq(norm):
    field = perturbed(MLP(3, (16, 16)), 0.5)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    times = torch.linspace(0, 1, 9, dtype=F64)
    for tolerance in (1e-3, 1e-7):
        solver, sizes = Adaptive("dopri5", tolerance, tolerance, norm=norm), []

        class Field:
            def __call__(self, s, y):
                return (field(s, y[0]),)

            def callback_accept_step(self, s, y, h):
                sizes.append(float(h))

        options = {
            "step_t": times[-1:],
            "norm": lambda y: y[0].detach().square().mean(1 if norm == "row" else (0, 1)).sqrt().max(),
        }
        truth = torchdiffeq.odeint(
            Field(), (x,), times, rtol=tolerance, atol=tolerance, method="dopri5", options=options
        )[0]
        (path,), stats = solver.path(lambda s, y: (field(s, y[0]),), (x,), times)
        assert stats.accepted == len(sizes)
        assert torch.allclose(path, truth, rtol=0, atol=1e-10)
        ours, theirs = (torch.autograd.grad(v.square().sum(), list(field.parameters())) for v in (path, truth))
        assert close(ours, theirs, 1e-10)
