"""Our training step against zuko's CNF: the same network with the same weights, data, batch and error of log p.

The network is zuko's default: two hidden layers of 64 that take [cos kπt, sin kπt (k = 1, 2, 3); x]. Ours computes the
same function with a layer of our own kind, so both integrate one and the same ODE, and either log p is measured against
dopri5 at 1e-10 in float64 on those weights. The weights are first trained for a while: at initialisation f is almost
constant and any step size would do.

    python benchmarks/zuko_cnf.py --quick      # two to three minutes
    python benchmarks/zuko_cnf.py --full --json benchmarks/results.json
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from measure import alternate, machine, markdown, record, training_step, versions
from torch import Tensor, nn
from zuko_pair import (
    Truth,
    data,
    error,
    gradient,
    measured,
    options,
    our_flow,
    our_log_prob,
    probe_like,
    relative,
    train,
    truth,
    zuko,
    zuko_flow,
    zuko_log_prob,
)

from cnf.flow import Flow
from cnf.ode.divergence import Hutchinson
from cnf.solvers import FixedGrid

DIMS = (2, 6, 43, 64)  # a toy, POWER's and MINIBOONE's sizes, the 8x8 digits
MODES = ("exact", "zuko hutchinson", "both hutchinson")
COLUMNS = {
    "D": "{dim}",
    "mode": "{mode}",
    "zuko s": "{baseline_s:.4f}",
    "ours s": "{ours_s:.4f}",
    "zuko / ours": "{ratio:.1f}",
    "by CPU time": "{cpu_ratio:.1f}",
    "zuko's error": "{baseline_error:.1e}",
    "our error": "{ours_error:.1e}",
    "zuko rtol": "{baseline_rtol:.0e}",
    "our steps": "{ours_steps}",
    "NFE zuko": "{baseline_nfe} + {baseline_nfe_backward}",
    "NFE ours": "{ours_nfe} + 0",
    "gradient error zuko": "{baseline_gradient_error:.1e}",
    "ours": "{ours_gradient_error:.1e}",
    "zuko s at its defaults": "{baseline_default_s:.4f}",
}


@contextmanager
def counting(module: nn.Module) -> Iterator[list[int]]:
    """Calls of a module while it lasts."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    handle = module.register_forward_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


def fit_steps(flow: Flow, x: Tensor, exact: Truth, tolerance: float, limit: int = 256) -> float:
    """Give ``flow`` the fewest rk4 steps whose error is within ``tolerance``; that error."""
    for steps in range(1, limit + 1):
        flow.blocks[0].solver = FixedGrid("rk4", steps)
        with torch.no_grad():
            found = error(our_log_prob(flow, x, exact.probe), exact, x.shape[1])
        if found <= tolerance:
            return found
    raise RuntimeError(f"{limit} rk4 steps leave an error of {found:.1e} nats/dim, above {tolerance:g}")


def fit_tolerance(other: Any, x: Tensor, exact: Truth, tolerance: float) -> float:
    """Give ``other`` the loosest tolerances, rtol a power of √10 and atol a tenth of it as in zuko's defaults."""
    for k in range(0, 17):
        other.transform.rtol, other.transform.atol = 10 ** (-k / 2), 10 ** (-k / 2 - 1)
        with torch.no_grad():
            found = error(zuko_log_prob(other, x, exact.probe), exact, x.shape[1])
        if found <= tolerance:
            return found
    raise RuntimeError(f"rtol 1e-8 leaves an error of {found:.1e} nats/dim, above {tolerance:g}")


def compare(flow: Flow, x: Tensor, mode: str, activation: str, tolerance: float, repeats: int) -> dict[str, Any]:
    """One row: both at an error within ``tolerance`` nats/dim, timed in turn.

    Args:
        flow: ours, trained.
        x: the batch (N, D).
        mode: ``"exact"``, both traces; ``"zuko hutchinson"``, where ours stays exact; or ``"both hutchinson"``.
        activation: between the layers.
        tolerance: mean |error| of log p per dimension, nats; of an estimate the solver's error, its probe held fixed.
        repeats: timings of each.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {MODES}")
    flow, dim = copy.deepcopy(flow), x.shape[1]
    other = zuko_flow(flow, activation)
    defaults = other.transform.rtol, other.transform.atol
    plain = truth(flow, x, None)
    noisy = plain if mode == "exact" else truth(flow, x, probe_like(x))
    other.transform.exact = mode == "exact"
    mine = noisy if mode == "both hutchinson" else plain
    if mine.probe is not None:
        flow.blocks[0].divergence = Hutchinson("gaussian", "forward")
    ours_error = fit_steps(flow, x, mine, tolerance)
    baseline_error = fit_tolerance(other, x, noisy, tolerance)
    with counting(other.transform.ode) as calls:
        loss = zuko_log_prob(other, x, noisy.probe).mean()
        forward = calls[0]
        baseline_gradient = gradient(loss, other.parameters())
    default = copy.deepcopy(other)
    default.transform.rtol, default.transform.atol = defaults
    with torch.no_grad():
        default_error = error(zuko_log_prob(default, x, noisy.probe), noisy, dim)
    seconds = alternate(
        {
            "zuko": training_step(other, lambda: -other().log_prob(x).mean()),
            "ours": training_step(flow, lambda: -flow.log_prob(x).mean()),
            "zuko default": training_step(default, lambda: -default().log_prob(x).mean()),
        },
        repeats,
    )
    return {
        **measured(flow, x, mode, activation, seconds, "zuko"),
        "parameters": sum(p.numel() for p in flow.parameters()),
        "baseline_error": baseline_error,
        "ours_error": ours_error,
        "baseline_rtol": other.transform.rtol,
        "baseline_atol": other.transform.atol,
        "baseline_nfe": forward,
        "baseline_nfe_backward": calls[0] - forward,
        "baseline_gradient_error": relative(baseline_gradient, noisy),
        "ours_gradient_error": relative(gradient(our_log_prob(flow, x, mine.probe).mean(), flow.parameters()), mine),
        "baseline_default_s": seconds["zuko default"]["wall"],
        "baseline_default_error": default_error,
        "repeats": repeats,
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and record if asked."""
    args = options(__doc__, DIMS, ("elu", "tanh", "softplus", "swish")).parse_args(argv)
    if zuko is None:
        print("zuko is not installed: pip install -e '.[dev]' brings it, or pip install 'zuko>=1.2'", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    updates, repeats = (1500, 21) if args.full else (300, 5)
    rows = []
    for dim in args.dims:
        torch.manual_seed(0)
        flow, x = our_flow(dim, args.activation), data(dim)
        loss = train(flow, x, updates, args.batch)
        print(f"D = {dim}: {updates} updates, {loss:.3f} nats", file=sys.stderr)
        for mode in MODES:
            row = compare(flow, x[: args.batch], mode, args.activation, args.tolerance, repeats)
            rows.append({**row, "updates": updates})
            print("  " + ", ".join(f"{k} {form.format_map(rows[-1])}" for k, form in COLUMNS.items()), file=sys.stderr)
    about = {**machine(), "threads": 1, **versions("torch", "zuko")}
    print(", ".join(f"{k} {v}" for k, v in about.items()) + "\n")
    print(markdown(rows, COLUMNS))
    if args.json:
        name = "zuko_cnf" if args.activation == "tanh" else f"zuko_cnf {args.activation}"
        record(args.json, name, argv, rows, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
