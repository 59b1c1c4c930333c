"""Our training step against jitted JAX programs and zuko: the same network and weights, the same error of log p.

The network is zuko's default (see zuko_cnf.py). The JAX sides are the same closed-form trace in rk4 steps, all unrolled in one
jitted program, and diffrax's CNF, whose term is either the exact trace by D reverse products or Hutchinson's estimate with one
Gaussian probe (Tsit5 on equal steps, diffrax's default adjoint). Each takes the fewest steps whose log p is within the
tolerance of dopri5 at 1e-10 in float64 with the same trace. A step is loss, gradient and Adam; compilation is not timed.

    pip install jax diffrax equinox
    python benchmarks/jax_cnf.py --quick
    python benchmarks/jax_cnf.py --full --json benchmarks/results.json
"""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Callable
from typing import Any

# one thread, as on our side; read when jax is imported
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import torch
from measure import alternate, machine, markdown, record, training_step, versions
from torch import Tensor
from zuko_cnf import fit_steps, fit_tolerance
from zuko_pair import FREQUENCIES, Truth, data, error, options, our_flow, probe_like, train, truth, zuko, zuko_flow

from cnf.flow import Flow
from cnf.ode.divergence import Hutchinson

try:
    import diffrax
    import equinox as eqx
    import jax
    import jax.numpy as jnp
except ImportError:
    jax = None

DIMS = (2, 43, 64)
COLUMNS = {
    "D": "{dim}", "batch": "{batch}", "side": "{side}", "steps": "{steps}", "error, nats/dim": "{error:.1e}",
    "CPU ms a step": "{cpu:.2f}", "wall ms": "{wall:.2f}", "/ ours, eager": "{ratio:.2f}",
}  # fmt: skip
THIRD, EIGHTH = 1 / 3, 1 / 8


def weights(flow: Flow) -> list[Any]:
    """Weights and biases (out, in), (out,) of the three layers, as JAX arrays."""
    return [jnp.asarray(p.detach().numpy()) for p in flow.parameters()]


def value(parameters: list[Any], t: Any, x: Any) -> Any:
    """f at one point x (D,)."""
    w1, b1, w2, b2, w3, b3 = parameters
    angles = t * jnp.pi * jnp.arange(1, FREQUENCIES + 1)
    h = jnp.tanh(w1 @ jnp.concatenate([jnp.cos(angles), jnp.sin(angles), x]) + b1)
    return w3 @ jnp.tanh(w2 @ h + b2) + b3


def closed_form(parameters: list[Any], x: Any, steps: int) -> Any:
    """Log p of rows x (N, D) by rk4 (the 3/8 rule) and the closed-form trace, unrolled."""
    w1, b1, w2, b2, w3, b3 = parameters
    time, inner = w1[:, : 2 * FREQUENCIES], w1[:, 2 * FREQUENCIES :]
    kernel = w2 * (inner @ w3).T
    h, (rows, dim) = 1 / steps, x.shape

    def slopes(t: float, y: Any) -> tuple[Any, Any]:
        angles = t * jnp.pi * jnp.arange(1, FREQUENCIES + 1)
        one = jnp.tanh(y @ inner.T + time @ jnp.concatenate([jnp.cos(angles), jnp.sin(angles)]) + b1)
        two = jnp.tanh(one @ w2.T + b2)
        return two @ w3.T + b3, (((1 - two * two) @ kernel) * (1 - one * one)).sum(1)

    total = jnp.zeros(rows)
    for i in range(steps):
        t = i * h
        k1, d1 = slopes(t, x)
        k2, d2 = slopes(t + THIRD * h, x + h * THIRD * k1)
        k3, d3 = slopes(t + 2 * THIRD * h, x + h * (k2 - THIRD * k1))
        k4, d4 = slopes(t + h, x + h * (k1 - k2 + k3))
        x = x + h * EIGHTH * (k1 + 3 * (k2 + k3) + k4)
        total = total + h * EIGHTH * (d1 + 3 * (d2 + d3) + d4)
    return total - 0.5 * (x * x).sum(1) - 0.5 * dim * math.log(2 * math.pi)


def by_diffrax(parameters: list[Any], x: Any, steps: int, probe: Any = None) -> Any:
    """Log p of rows x (N, D) by diffrax; the exact trace without a probe (N, D)."""
    dim = x.shape[1]

    def exact(t: Any, y: Any, args: Any) -> tuple[Any, Any]:
        dx, pull = jax.vjp(lambda point: value(args[0], t, point), y[0])
        return dx, jnp.trace(jax.vmap(pull)(jnp.eye(dim))[0])

    def estimate(t: Any, y: Any, args: Any) -> tuple[Any, Any]:
        dx, pull = jax.vjp(lambda point: value(args[0], t, point), y[0])
        return dx, pull(args[1])[0] @ args[1]

    def row(point: Any, e: Any) -> Any:
        term = diffrax.ODETerm(exact if probe is None else estimate)
        end = diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, 1.0, 1 / steps, (point, jnp.zeros(())), (parameters, e), max_steps=steps + 1).ys
        z, total = end[0][0], end[1][0]
        return total - 0.5 * (z * z).sum() - 0.5 * dim * math.log(2 * math.pi)

    return jax.vmap(row)(x, x if probe is None else probe)


def fewest(log_prob: Callable[[int], Any], exact: Truth, dim: int, tolerance: float, limit: int = 256) -> tuple[int, float]:
    """The fewest steps whose error is within ``tolerance``, and that error."""
    for steps in range(1, limit + 1):
        found = error(torch.tensor(jax.device_get(log_prob(steps))), exact, dim)
        if found <= tolerance:
            return steps, found
    raise RuntimeError(f"{limit} steps leave an error of {found:.1e} nats/dim, above {tolerance:g}")


def jax_step(parameters: list[Any], log_prob: Callable[[list[Any]], Any]) -> Callable[[], None]:
    """A jitted training step, Adam included; its rate is zero, as in :func:`measure.training_step`."""

    @eqx.filter_jit
    def step(p: list[Any], m: list[Any], v: list[Any], count: Any) -> Any:
        gradient = jax.grad(lambda q: -log_prob(q).mean())(p)
        m = [0.9 * a + 0.1 * g for a, g in zip(m, gradient, strict=True)]
        v = [0.999 * a + 0.001 * g * g for a, g in zip(v, gradient, strict=True)]
        scale = jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        return [w - 0.0 * scale * a / (jnp.sqrt(b) + 1e-8) for w, a, b in zip(p, m, v, strict=True)], m, v, count + 1

    zeros = [jnp.zeros_like(p) for p in parameters]
    state: list[Any] = [(parameters, zeros, zeros, jnp.ones(()))]

    def run() -> None:
        state[0] = jax.block_until_ready(step(*state[0]))

    return run


def compare(flow: Flow, x: Tensor, tolerance: float, repeats: int) -> list[dict[str, Any]]:
    """A row for each side at one batch x (N, D)."""
    flow, dim = copy.deepcopy(flow), x.shape[1]
    plain, noisy = truth(flow, x, None), truth(flow, x, probe_like(x))
    ours = {"ours, eager": fit_steps(flow, x, plain, tolerance)}
    models = {"ours, eager": flow}
    for name, unit in (("ours, steps compiled", True), ("ours, solve compiled", "solve")):
        models[name] = copy.deepcopy(flow)
        models[name].blocks[0].compiles = unit
    steps = dict.fromkeys(models, flow.blocks[0].solver.steps)
    errors = dict.fromkeys(models, ours["ours, eager"])
    estimated = copy.deepcopy(flow)
    estimated.blocks[0].divergence = Hutchinson("gaussian", "forward")
    errors["ours, Hutchinson"] = fit_steps(estimated, x, noisy, tolerance)
    steps["ours, Hutchinson"] = estimated.blocks[0].solver.steps
    models["ours, Hutchinson"] = estimated
    sides = {name: training_step(model, lambda model=model: -model.log_prob(x).mean()) for name, model in models.items()}  # type: ignore[misc]
    whole, name = copy.deepcopy(flow), "ours, loss compiled"
    loss = torch.compile(lambda points: -whole.log_prob(points).mean(), fullgraph=True)  # points and result are not checked
    sides[name], steps[name], errors[name] = training_step(whole, lambda: loss(x)), flow.blocks[0].solver.steps, errors["ours, eager"]
    if zuko is not None:
        other = zuko_flow(flow, "tanh")
        other.transform.exact = True
        errors["zuko, exact"], steps["zuko, exact"] = fit_tolerance(other, x, plain, tolerance), 0
        sides["zuko, exact"] = training_step(other, lambda: -other().log_prob(x).mean())
    parameters, rows, e = weights(flow), jnp.asarray(x.numpy()), jnp.asarray(probe_like(x).numpy())
    programs: dict[str, tuple[Callable[..., Any], Truth]] = {
        "JAX, closed form": (closed_form, plain), "diffrax, exact": (by_diffrax, plain),
        "diffrax, Hutchinson": (lambda p, y, n: by_diffrax(p, y, n, e), noisy),
    }  # fmt: skip
    for name, (program, exact) in programs.items():
        def at(n: int, program: Callable[..., Any] = program) -> Any:
            return eqx.filter_jit(lambda p, y: program(p, y, n))(parameters, rows)

        steps[name], errors[name] = fewest(at, exact, dim, tolerance)
        sides[name] = jax_step(parameters, lambda p, n=steps[name], program=program: program(p, rows, n))  # type: ignore[misc]
    found = alternate(sides, repeats, warmup=2)
    base = found["ours, eager"]["cpu"]
    return [
        {
            "case": f"D={dim}", "dim": dim, "batch": len(x), "side": name, "steps": steps[name] or "adaptive", "error": errors[name],
            "cpu": 1000 * each["cpu"], "wall": 1000 * each["wall"], "ratio": each["cpu"] / base, "repeats": repeats,
        }
        for name, each in found.items()
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and record if asked."""
    args = options(__doc__, DIMS, ("tanh",)).parse_args(argv)
    if jax is None:
        print("jax, diffrax or equinox is missing: pip install -e '.[jax]' brings them", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    updates, repeats = (600, 21) if args.full else (100, 7)
    rows = []
    for dim in args.dims:
        torch.manual_seed(0)
        flow, x = our_flow(dim, "tanh"), data(dim)
        train(flow, x, updates, 256)
        rows += compare(flow, x[: args.batch], args.tolerance, repeats)
        print(markdown(rows[-len(rows) :], COLUMNS), file=sys.stderr, flush=True)
    about = {**machine(), "threads": 1, **versions("torch", "jax", "diffrax", "equinox", "zuko")}
    print(", ".join(f"{k} {v}" for k, v in about.items()) + "\n")
    print(markdown(rows, COLUMNS))
    if args.json:
        record(args.json, "jax_cnf" if args.batch == 256 else f"jax_cnf batch {args.batch}", argv, rows, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
