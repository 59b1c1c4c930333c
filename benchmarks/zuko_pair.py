"""The two sides of the comparison with zuko's CNF: one function in two implementations, its data, and the truth."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnf import data as datasets
from cnf.fields import MLP
from cnf.fields.maps import Conv, Linear
from cnf.fields.time import Affine, Constants, TimeLayer
from cnf.flow import Flow
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Exact, Hutchinson
from cnf.random import Noise
from cnf.solvers import Adaptive, FixedGrid
from cnf.transforms import Dequantize, Logit, Request, Sequential

try:
    import zuko
except ImportError:
    zuko = None

FREQUENCIES = 3  # zuko's default
HIDDEN = (64, 64)
PROBE_SEED = 1


class Frequencies(TimeLayer):
    """W [cos kπt; sin kπt; x] + b: time as zuko's field takes it."""

    def __init__(self, map: Linear, frequencies: int = FREQUENCIES):
        super().__init__(map)
        self.core = map.module(extra=2 * frequencies)
        self.count = frequencies

    def params_at(self, t: Tensor, constants: Constants, logits: Tensor | None = None) -> Affine:
        angles = t[..., None] * torch.arange(1, self.count + 1, dtype=t.dtype) * math.pi
        time, weight = self.map.split(self.core.weight, 2 * self.count)
        return Affine(weight, None, torch.cat([angles.cos(), angles.sin()], -1) @ time.T + self.core.bias)


class FirstFrequencies:
    """Layer factory: time enters the first layer alone. A layer replaced in a finished field would lose the closed form."""

    after_first = "ignore"

    def __call__(self, map: Linear | Conv, context_dim: int = 0, *, context_gate: bool = True) -> TimeLayer:
        assert isinstance(map, Linear)
        return Frequencies(map)


def our_flow(dim: int, activation: str, steps: int = 8) -> Flow:
    """zuko's default CNF in our parts, with the closed-form trace and a fixed rk4 grid."""
    field = MLP(dim, HIDDEN, layer=FirstFrequencies(), nonlinearity=activation)
    assert field.closed_form
    return Flow(CNF(field, Exact(), FixedGrid("rk4", steps)), (dim,))


def zuko_flow(flow: Flow, activation: str) -> Any:
    """zuko's CNF with the weights of ours."""
    dim = flow.event_shape[0]
    kinds = {"elu": nn.ELU, "tanh": nn.Tanh, "softplus": nn.Softplus, "swish": nn.SiLU}
    other = zuko.flows.CNF(dim, freqs=FREQUENCIES, hidden_features=HIDDEN, activation=kinds[activation])
    with torch.no_grad():
        for mine, theirs in zip(flow.parameters(), other.parameters(), strict=True):
            theirs.copy_(mine)
    return other


def data(dim: int, rows: int = 4096) -> Tensor:
    """Standardised real points (N, dim): 8gaussians in the plane, else principal components of the digits' logits."""
    if dim == 2:
        x = datasets.load("8gaussians", sizes=(rows, 1, 1)).train
    else:
        images = datasets.load("digits").train
        spread = Sequential([Dequantize(17), Logit(0.01)])(images, Request(noise=Noise(0, "benchmark"))).value.flatten(1)
        spread = spread - spread.mean(0)
        x = spread if dim == spread.shape[1] else spread @ torch.linalg.svd(spread, full_matrices=False).Vh[:dim].T
    return (x - x.mean(0)) / x.std(0)


def train(flow: Flow, x: Tensor, updates: int, batch: int) -> float:
    """Adam for a while, so that the field bends; the last loss in nats."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    loss = torch.zeros(())
    for _ in range(updates):
        rows = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        loss = -flow.log_prob(x[rows]).mean()
        loss.backward()
        optimizer.step()
    return loss.item()


@dataclass(frozen=True)
class Truth:
    """log p in float64 at 1e-10 and the gradient of its mean; with a probe, of the estimate with that probe."""

    log_prob: Tensor
    gradient: Tensor
    probe: Tensor | None


def gradient(loss: Tensor, parameters: Iterator[nn.Parameter]) -> Tensor:
    """d loss, flattened."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters))])


def truth(flow: Flow, x: Tensor, probe: Tensor | None) -> Truth:
    """Both with D tangents or reverse products through the network, not with the closed form that is being timed."""
    flow, x = copy.deepcopy(flow).double().eval(), x.double()
    block = flow.blocks[0]
    block.divergence = Exact(closed_form=False) if probe is None else Hutchinson("gaussian", "reverse")
    block.eval_solver = Adaptive("dopri5", 1e-10, 1e-10, max_steps=10_000, quadratures_in_norm=True)
    noise = None if probe is None else Noise.replay({"probe": probe[None].double()})
    with torch.no_grad():
        log_prob = flow.log_prob(x, noise=noise)
    # the gradient need not be that exact: 64 steps of order 5, of the discretisation itself
    block.divergence = Exact() if probe is None else block.divergence
    block.eval_solver = FixedGrid("dopri5", 64, gradient="checkpoint")
    mean = flow.log_prob(x, noise=noise).mean()
    return Truth(log_prob, gradient(mean, flow.parameters()), probe)


def error(log_prob: Tensor, exact: Truth, dim: int) -> float:
    """Mean |log p - true log p|, nats per dimension; infinite where it is not finite."""
    value = float((log_prob.detach().double() - exact.log_prob).abs().mean()) / dim
    return value if math.isfinite(value) else math.inf


def relative(g: Tensor, exact: Truth) -> float:
    """‖g − true g‖ / ‖true g‖."""
    return float((g.double() - exact.gradient).norm() / exact.gradient.norm())


def our_log_prob(flow: Flow, x: Tensor, probe: Tensor | None) -> Tensor:
    """Ours, with a given probe if it takes one."""
    return flow.log_prob(x, noise=None if probe is None else Noise.replay({"probe": probe[None]}))


def zuko_log_prob(other: Any, x: Tensor, probe: Tensor | None) -> Tensor:
    """zuko's; its probe is the first normal draw, so a seed makes it the given one."""
    if probe is not None:
        torch.manual_seed(PROBE_SEED)
    result: Tensor = other().log_prob(x)
    return result


def measured(
    flow: Flow, x: Tensor, mode: str, activation: str, seconds: Mapping[str, Mapping[str, float]], baseline: str
) -> dict[str, Any]:
    """What a row says of both sides' seconds and of ours; ``seconds`` as measure.alternate gives them."""
    solver = flow.blocks[0].solver
    assert isinstance(solver, FixedGrid)
    return {
        "case": f"D={x.shape[1]}",
        "dim": x.shape[1],
        "mode": mode,
        "batch": len(x),
        "activation": activation,
        "baseline_s": seconds[baseline]["wall"],
        "ours_s": seconds["ours"]["wall"],
        "ratio": seconds[baseline]["wall"] / seconds["ours"]["wall"],
        "cpu_ratio": seconds[baseline]["cpu"] / seconds["ours"]["cpu"],
        "ours_steps": solver.steps,
        "ours_nfe": len(solver.tableau.b) * solver.steps,
    }


def options(description: str | None, dims: Sequence[int], activations: Collection[str]) -> argparse.ArgumentParser:
    """The command line that the comparisons on vectors share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="short training, few repeats (the default)")
    extent.add_argument("--full", action="store_true", help="longer training, more repeats")
    parser.add_argument("--dims", type=int, nargs="+", default=dims, help="numbers of data dimensions, up to 64")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--activation", choices=activations, default="tanh", help="of both")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="mean error of log p, nats per dimension")
    parser.add_argument("--json", type=Path, help="file of measured rows to add to")
    return parser


def probe_like(x: Tensor) -> Tensor:
    """What zuko will draw."""
    torch.manual_seed(PROBE_SEED)
    return torch.randn_like(x)
