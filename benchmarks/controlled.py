"""What a likelihood whose log-det is controlled row by row costs, next to dopri5 at 1e-5 with the log-det outside its norm.

Fields of two hidden layers with kinks and without, weights at torch's initial scale times ``gain``, and trained flows, 200 rows
each. The error is the worst row's |log p - truth|; the truth is rk4 of float64 with 2,000 steps for the fields, dopri5 at 1e-9
with a tight log-det for the trained flows, whose fields are smooth. CPU seconds are of one evaluation, the least of the turns.

    python benchmarks/evaluation.py --controlled
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cnf import CNF, Adaptive, FixedGrid, Flow
from cnf.transforms import Request

EARLIER = Adaptive("dopri5", 1e-5, 1e-5)  # the default of CNF until the log-det was controlled
KINDS = (nn.ReLU, nn.LeakyReLU, nn.SELU, nn.ELU, nn.Tanh, nn.Softplus)
COLUMNS = {
    "field": "{case}",
    "D": "{dim}",
    "gain": "{gain}",
    "worst row before, nats": "{baseline_worst:.1e}",
    "now": "{ours_worst:.1e}",
    "mean before": "{baseline_mean:.1e}",
    "now ": "{ours_mean:.1e}",
    "NFE before": "{baseline_nfe}",
    "now  ": "{ours_nfe}",
    "with a derivative before": "{baseline_products}",
    "now   ": "{ours_products}",
    "CPU s before": "{baseline_s:.3f}",
    "now    ": "{ours_s:.3f}",
}


class Net(nn.Module):
    """A plain network of [x, t]."""

    def __init__(self, kind: type[nn.Module], dim: int, gain: float, width: int = 32):
        super().__init__()
        layers = [nn.Linear(dim + 1, width), nn.Linear(width, width), nn.Linear(width, dim)]
        for layer in layers:
            layer.weight.data *= gain
        self.net = nn.Sequential(layers[0], kind(), layers[1], kind(), layers[2])

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """dx/dt."""
        return self.net(torch.cat([x, t.expand(len(x), 1)], 1))


@torch.no_grad()
def row(flow: Flow, x: Tensor, truth: Tensor, repeats: int) -> dict[str, Any]:
    """Error and cost of both solvers on the same flow and points."""
    found: dict[str, Any] = {"dim": flow.dim, "batch": len(x), "repeats": repeats}
    for name, solvers in (("baseline", [EARLIER] * len(flow.blocks)), ("ours", [CNF(nn.Identity()).eval_solver] * len(flow.blocks))):
        for block, solver in zip(flow.blocks, solvers, strict=True):
            block.eval_solver = solver
        took = []
        for _ in range(repeats):
            began = time.process_time()
            out = flow.evaluate(x, Request(integrals=False))
            took.append(time.process_time() - began)
        apart = (flow.base_log_prob(out.value).double() + out.log_det.double() - truth).abs()
        found |= {
            f"{name}_worst": float(apart.max()), f"{name}_mean": float(apart.mean()), f"{name}_nfe": out.stats.nfe,
            f"{name}_products": out.stats.products, f"{name}_s": min(took),
        }  # fmt: skip
    return found


@torch.no_grad()
def fields(gains: tuple[float, ...], repeats: int) -> Iterator[dict[str, Any]]:
    """Fields as they come from torch, larger by ``gain``."""
    for kind in KINDS:
        for gain in gains:
            torch.manual_seed(0)
            flow, x = Flow(CNF(Net(kind, 2, gain)), (2,)).eval(), torch.randn(200, 2)
            exact = copy.deepcopy(flow).double()
            exact.blocks[0].eval_solver = FixedGrid("rk4", 2000)
            yield {"case": kind.__name__, "gain": gain, **row(flow, x, exact.log_prob(x.double()), repeats)}


@torch.no_grad()
def trained(name: str, flow: Flow, x: Tensor, repeats: int) -> dict[str, Any]:
    """A trained flow of smooth fields."""
    exact = copy.deepcopy(flow).double()
    for block in exact.blocks:
        block.eval_solver = Adaptive("dopri5", 1e-9, 1e-9, max_steps=10_000, quadratures_in_norm=True)
    return {"case": f"{name} (trained)", "gain": 1, **row(flow, x, exact.log_prob(x.double()), repeats)}
