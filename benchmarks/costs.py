"""What a training step costs against batch, dimensions, steps and width; and how far the adjoint's gradient is at each order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import published_formulation as published
import torch
from measure import alternate, training_step
from modes import MODES, Mode, case_config, grid, images, ours
from published_formulation import Published
from torch import Tensor

from cnf.config import FlowConfig, SolverConfig
from cnf.flow import Flow
from cnf.losses import Likelihood
from cnf.models import build
from cnf.ode.divergence import Exact
from cnf.random import Noise
from cnf.transforms import Request

__all__ = ["COST_COLUMNS", "ORDER_COLUMNS", "costs", "gradient_orders"]

COST_COLUMNS = {
    "field": "{case}",
    "mode": "{mode}",
    "varied": "{varied}",
    "batch": "{batch}",
    "D or channels": "{dim}",
    "steps": "{steps}",
    "width": "{width}",
    "exact s": "{exact_s:.4f}",
    "Hutchinson s": "{hutchinson_s:.4f}",
    "no trace s": "{value_s:.4f}",
    "D tangents s": "{tangents_s:.4f}",
}
ORDER_COLUMNS = {
    "case": "{case}",
    "steps": "{steps}",
    "loss, relative difference": "{loss_difference:.1e}",
    "gradient, relative difference": "{gradient_difference:.1e}",
}
NAN = float("nan")
FIELDS = {
    # the fields of the vector comparisons, and a block of the image models with two hidden layers
    "vector": {"base": {"batch": 256, "dim": 43, "steps": 8, "width": 64}},
    "conv 14x14": {"base": {"batch": 64, "dim": 4, "steps": 4, "width": 64}},
}
VARIED = {
    "vector": {"batch": (64, 1024), "dim": (2, 6, 64), "steps": (2, 4, 16), "width": (32, 128, 256)},
    "conv 14x14": {"batch": (16, 128), "dim": (1, 2, 8), "steps": (2, 8), "width": (32, 128)},
}
TANGENTS_UP_TO = 64  # D, for the exact trace without its closed form


def settings(case: str) -> Iterator[tuple[str, dict[str, int]]]:
    """The base, and then one thing varied at a time."""
    base = FIELDS[case]["base"]
    yield "base", base
    for name, values in VARIED[case].items():
        for value in values:
            yield name, {**base, name: value}


def block_of(
    case: str, mode: Mode, trace: str, batch: int, dim: int, steps: int, width: int
) -> tuple[Flow, Callable[[], Tensor]]:
    """A flow of one block with two hidden layers, and its loss on a batch.

    Args:
        case: one of :data:`FIELDS`.
        mode: of ours.
        trace: ``"exact"``, ``"hutchinson"``, ``"tangents"`` (exact without the closed form), or ``"value"`` of the point alone.
        batch: rows.
        dim: D of vectors, channels of images.
        steps: of rk4.
        width: of the hidden layers.
    """
    vector = case == "vector"
    model = FlowConfig.of(field="mlp" if vector else "conv", hidden=(width, width), time_conditioning="concatsquash" if vector else "concat", nonlinearity="tanh" if vector else "softplus", preprocess="standardize" if vector else "logit", zero_init=False)
    kind = "hutchinson" if trace == "hutchinson" else "exact"
    solver = SolverConfig.of(method="rk4", grid_steps=steps, divergence=kind, **mode.options)
    torch.manual_seed(0)
    shape = (dim,) if vector else (dim, 14, 14)
    flow = build(model, solver, shape, levels=None if vector else 256).train()
    if trace == "tangents":
        flow.blocks[0].divergence = Exact(closed_form=False)
    objective = Likelihood(flow)
    x = torch.randn(batch, dim) if vector else torch.randint(0, 256, (batch, *shape), dtype=torch.uint8)

    def loss() -> Tensor:
        noise = Noise(0, "speed")
        if trace == "value":
            return flow.evaluate(x, Request(noise=noise, log_det=False)).value.square().mean()
        return objective(x, noise=noise)["loss"].mean()

    return flow, loss


def costs(modes: list[Mode], full: bool = True) -> list[dict[str, Any]]:
    """A row for each field, mode and setting, its traces timed in turn.

    Args:
        modes: of which the eager and the compiled ones in fp32 are taken: here the shapes are what is compared.
        full: the whole table; without it the base of each field alone.
    """
    chosen = [m for m in modes if not (m.plain or m.own_solver or m.low)] or [MODES["fused"]]
    rows = []
    for case in FIELDS:
        for mode in chosen:
            for varied, sizes in settings(case):
                if varied != "base" and not full:
                    continue
                traces = ["exact", "hutchinson", "value"]
                if case == "vector" and sizes["dim"] <= TANGENTS_UP_TO and not mode.compiled:
                    traces.append("tangents")
                if mode.compiled:
                    torch.compiler.reset()  # or graphs of other sizes count against the limit on recompilations
                functions = {trace: training_step(*block_of(case, mode, trace, **sizes)) for trace in traces}
                found = alternate(functions, 7 if full else 2, warmup=2)
                times = {
                    f"{t}_s": found[t]["wall"] if t in found else NAN
                    for t in ("exact", "hutchinson", "value", "tangents")
                }
                rows.append({"case": case, "mode": mode.name, "varied": varied, **sizes, **times})
    return rows


def gradient_orders(steps: tuple[int, ...] = (2, 4, 8)) -> list[dict[str, Any]]:
    """Log-likelihood and gradient of the published formulation against ours, in float64 on a small chain, by steps.

    The values are those of one grid, so they agree to rounding; the continuous adjoint is a discretisation of its own, so
    the gradients differ by the method's order: sixteen times less for twice the steps, and better.
    """
    shape, small = (1, 8, 8), {"hidden": (16, 16, 16), "blocks": 1}
    config = case_config("rnode-mnist", **small)
    one = ours(replace(config, solver=config.solver.change(hutchinson_mode="reverse")), MODES["fused"], 4, shape=shape)
    one.flow.double()
    with torch.no_grad():
        for p in one.flow.parameters():
            p.mul_(1.5)  # a field that bends
    x = images(4, shape=shape)
    rows = []
    for count in steps:
        used = replace(published.RNODE, hidden=16, blocks=1, steps=count)
        model = Published(shape, used).double()
        published.share_weights(one.flow, model)
        draws = published.draw(model, len(x), torch.Generator().manual_seed(0))
        grid(one.flow, count)
        values, gradients = [], []
        for side, terms in (
            (model, model(x, draws)),
            (one.flow, one.objective(x, noise=published.replay(one.flow, draws))),
        ):
            side.zero_grad(set_to_none=True)
            terms["nll"].mean().backward()
            values.append(terms["loss"].detach())
            gradients.append(published.gradient(side))
        rows.append(
            {
                "case": "rnode, 8x8",
                "steps": count,
                "loss_difference": float(((values[0] - values[1]) / values[1]).abs().max()),
                "gradient_difference": float((gradients[0] - gradients[1]).norm() / gradients[1].norm()),
            }
        )
    return rows
