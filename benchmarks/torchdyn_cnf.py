"""Our training step against torchdyn's CNF, on vector data: the same network, weights, data, batch and error of log p.

The comparison is that of zuko_cnf.py with torchdyn in zuko's place (zuko_pair.py makes our side, the data and the truth). The
network takes [cos kπt, sin kπt (k = 1, 2, 3); x] here too; torchdyn hands the time to any module that has an attribute t.
torchdyn solves by its own Dormand-Prince, the trace by D backward passes (its default) or by Hutchinson's estimate; its
gradient is backpropagation through the accepted steps (``autograd``, its default) or the continuous adjoint.

    python -m pip install torchdyn                  # into a virtual environment of your own: it brings 50 packages
    python benchmarks/torchdyn_cnf.py --quick
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import sys
import warnings
from typing import Any

import torch
from measure import alternate, machine, markdown, record, training_step, versions
from torch import Tensor, nn
from zuko_cnf import DIMS, counting, fit_steps, fit_tolerance
from zuko_pair import (
    FREQUENCIES,
    HIDDEN,
    data,
    gradient,
    measured,
    options,
    our_flow,
    our_log_prob,
    probe_like,
    relative,
    train,
    truth,
    zuko_log_prob,
)

from cnf.flow import Flow
from cnf.ode.divergence import Hutchinson

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchdyn.core import NeuralODE
        from torchdyn.models import CNF, autograd_trace, hutch_trace
except ImportError:
    NeuralODE = None

MODES = ("exact", "torchdyn hutchinson", "both hutchinson")
SENSITIVITIES = ("autograd", "adjoint")
COLUMNS = {
    "D": "{dim}",
    "mode": "{mode}",
    "torchdyn s": "{baseline_s:.4f}",
    "ours s": "{ours_s:.4f}",
    "torchdyn / ours": "{ratio:.1f}",
    "by CPU time": "{cpu_ratio:.1f}",
    "torchdyn's error": "{baseline_error:.1e}",
    "our error": "{ours_error:.1e}",
    "torchdyn rtol": "{baseline_rtol:.0e}",
    "our steps": "{ours_steps}",
    "NFE torchdyn": "{baseline_nfe} + {baseline_nfe_backward}",
    "NFE ours": "{ours_nfe} + 0",
    "torchdyn's gradient": "{sensitivity}",
    "gradient error torchdyn": "{baseline_gradient_error:.1e}",
    "ours": "{ours_gradient_error:.1e}",
}
ACTIVATIONS = {"elu": nn.ELU, "tanh": nn.Tanh, "softplus": nn.Softplus, "swish": nn.SiLU}


class Net(nn.Module):
    """The field as torchdyn takes it: called with x alone, the time in ``t``."""

    def __init__(self, dim: int, activation: str):
        super().__init__()
        self.t: Tensor | None = None
        sizes = (2 * FREQUENCIES + dim, *HIDDEN, dim)
        layers = [
            layer
            for a, b in zip(sizes, sizes[1:], strict=False)
            for layer in (nn.Linear(a, b), ACTIVATIONS[activation]())
        ]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        assert self.t is not None
        angles = self.t.reshape(()) * torch.arange(1, FREQUENCIES + 1, dtype=x.dtype) * math.pi
        time = torch.cat([angles.cos(), angles.sin()]).expand(len(x), -1)
        value: Tensor = self.layers(torch.cat([time, x], 1))
        return value


class Normal:
    """What torchdyn draws probes from; a seed before it makes the probe the given one."""

    def __init__(self, dim: int):
        self.dim = dim

    def sample(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (\\*shape, D)."""
        return torch.randn(*shape, self.dim)


class Torchdyn(nn.Module):
    """torchdyn's CNF with the weights of a flow of ours.

    Args:
        flow: ours.
        activation: of both.
        exact: the trace by D backward passes, else Hutchinson's estimate.
        sensitivity: ``"autograd"`` or ``"adjoint"``.
    """

    def __init__(self, flow: Flow, activation: str, exact: bool = True, sensitivity: str = "autograd"):
        super().__init__()
        (dim,) = flow.event_shape
        self.net = Net(dim, activation)
        with torch.no_grad():
            for mine, theirs in zip(flow.parameters(), self.net.parameters(), strict=True):
                theirs.copy_(mine)
        field = CNF(self.net, autograd_trace if exact else hutch_trace, None if exact else Normal(dim))
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has wrapped the field
            self.transform = NeuralODE(field, solver="dopri5", sensitivity=sensitivity, return_t_eval=False)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) (N,), nats: the state's first entry is minus the trace's integral."""
        node = self.transform
        node.atol_adjoint, node.rtol_adjoint = node.atol, node.rtol
        end = node(torch.cat([torch.zeros_like(x[:, :1]), x], 1), x.new_tensor([0.0, 1.0]))[-1]
        z, constant = end[:, 1:], 0.5 * x.shape[1] * math.log(2 * math.pi)
        value: Tensor = -0.5 * z.square().sum(1) - constant - end[:, 0]
        return value

    def forward(self) -> Torchdyn:
        """Itself, as zuko's flows give their distribution."""
        return self


def compare(
    flow: Flow, x: Tensor, mode: str, activation: str, tolerance: float, repeats: int, sensitivity: str = "autograd"
) -> dict[str, Any]:
    """One row: both at an error within ``tolerance`` nats/dim, timed in turn (see :func:`zuko_cnf.compare`)."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {MODES}")
    flow = copy.deepcopy(flow)
    exact = mode == "exact"
    other = Torchdyn(flow, activation, exact, sensitivity)
    plain = truth(flow, x, None)
    noisy = plain if exact else truth(flow, x, probe_like(x))
    mine = noisy if mode == "both hutchinson" else plain
    if mine.probe is not None:
        flow.blocks[0].divergence = Hutchinson("gaussian", "forward")
    ours_error = fit_steps(flow, x, mine, tolerance)
    baseline_error = fit_tolerance(other, x, noisy, tolerance)
    with counting(other.net) as calls:
        loss = zuko_log_prob(other, x, noisy.probe).mean()
        forward = calls[0]
        baseline_gradient = gradient(loss, other.net.parameters())
    seconds = alternate(
        {
            "torchdyn": training_step(other.net, lambda: -other.log_prob(x).mean()),
            "ours": training_step(flow, lambda: -flow.log_prob(x).mean()),
        },
        repeats,
    )
    return {
        **measured(flow, x, mode, activation, seconds, "torchdyn"),
        "sensitivity": sensitivity,
        "baseline_error": baseline_error,
        "ours_error": ours_error,
        "baseline_rtol": other.transform.rtol,
        "baseline_atol": other.transform.atol,
        "baseline_nfe": forward,
        "baseline_nfe_backward": calls[0] - forward,
        "baseline_gradient_error": relative(baseline_gradient, noisy),
        "ours_gradient_error": relative(gradient(our_log_prob(flow, x, mine.probe).mean(), flow.parameters()), mine),
        "repeats": repeats,
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and record if asked."""
    args = options(__doc__, DIMS, ACTIVATIONS).parse_args(argv)
    if NeuralODE is None:
        print(
            "torchdyn is not installed: pip install torchdyn, best into a virtual environment of its own",
            file=sys.stderr,
        )
        return 1
    torch.set_num_threads(1)
    updates, repeats = (1500, 11) if args.full else (300, 3)
    rows = []
    for dim in args.dims:
        torch.manual_seed(0)
        flow, x = our_flow(dim, args.activation), data(dim)
        train(flow, x, updates, args.batch)
        for mode in MODES:
            for sensitivity in SENSITIVITIES if args.full else SENSITIVITIES[:1]:
                row = compare(flow, x[: args.batch], mode, args.activation, args.tolerance, repeats, sensitivity)
                rows.append({**row, "updates": updates})
                print("  " + ", ".join(f"{k} {form.format_map(row)}" for k, form in COLUMNS.items()), file=sys.stderr)
    about = {**machine(), "threads": 1, **versions("torch", "torchdyn")}
    print(", ".join(f"{k} {v}" for k, v in about.items()) + "\n")
    print(markdown(rows, COLUMNS))
    if args.json:
        record(args.json, "torchdyn_cnf", argv, rows, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
