"""The ways in which one image flow of ours can be trained: the same weights, the same mathematics, another speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from measure import seconds
from memory import available, profile
from torch import Tensor, nn

from cnf import data as datasets
from cnf.config import GridConfig, RunConfig, preset
from cnf.flow import Flow
from cnf.losses import Likelihood
from cnf.models import build
from cnf.ode.continuous import CNF
from cnf.random import Noise
from cnf.solvers import FixedGrid

__all__ = ["MODES", "Mode", "Ours", "evaluations", "floor", "images", "ours"]

SHAPE, LEVELS = (1, 28, 28), 256
MIB = 2**20


@dataclass(frozen=True)
class Mode:
    """Options of :class:`~cnf.config.SolverConfig` that differ from the case's."""

    name: str
    summary: str
    options: dict[str, Any] = field(default_factory=dict)
    plain: bool = False
    """Without the fused tangent: the field has nothing but its forward pass, and torch.func.jvp does the rest."""
    own_solver: bool = False
    """The preset's own solver and gradient in place of the fixed grid with the direct gradient."""

    @property
    def compiled(self) -> bool:
        """Whether torch.compile has a part in it."""
        return bool(self.options.get("compile"))

    @property
    def low(self) -> torch.dtype | None:
        """The type of the field under autocast; None for the state's."""
        return torch.bfloat16 if self.options.get("precision") == "bf16" else None


MODES = {
    mode.name: mode
    for mode in (
        Mode("plain", "eager, torch.func.jvp", plain=True),
        Mode("fused", "point and tangent as one batch, channels-last where the library does so"),
        Mode("compiled", "fused and compiled", {"compile": True}),
        Mode("bf16", "fused, bfloat16 inside the field", {"precision": "bf16"}),
        Mode("bf16 compiled", "fused, compiled, bfloat16 inside the field", {"precision": "bf16", "compile": True}),
        Mode("preset", "the preset as it stands, its own solver and gradient", own_solver=True),
    )
}


class Plain(nn.Module):
    """A field with its forward pass alone."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        value: Tensor = self.inner(t, x, context)
        return value


@dataclass
class Ours:
    """A flow in one mode, with its loss."""

    mode: Mode
    flow: Flow
    objective: Likelihood
    gradient: str


def case_config(case: str, hidden: tuple[int, ...] | None = None, blocks: int | None = None) -> RunConfig:
    """The preset, but for zero initialisation: where f = 0 there is nothing to compare."""
    config = preset(case).config
    model = config.model.change(zero_init=False)
    model = model.change(hidden=hidden or model.field.hidden, blocks=blocks or model.blocks)
    return replace(config, model=model)


def ours(
    config: RunConfig, mode: Mode, steps: int, gradient: str = "direct", like: Flow | None = None, shape: Any = SHAPE
) -> Ours:
    """The flow of a case in one mode, in training mode, with the weights of ``like``.

    Args:
        config: of the case.
        mode: which.
        steps: of rk4 in each block.
        gradient: ``"direct"`` or ``"checkpoint"``.
        like: whose weights to take; fresh ones if None.
        shape: of the images.
    """
    solver = config.solver
    if not mode.own_solver:
        solver = solver.change(method="rk4", train_solver="grid", grid_steps=steps, gradient=gradient)
    if isinstance(solver.train_solver, GridConfig):
        solver = solver.change(automatic_steps=False, grid_steps=steps)
    solver = solver.change(**mode.options)
    flow = build(config.model, solver, shape, levels=LEVELS)
    if like is not None:
        flow.to(like.like).load_state_dict(like.state_dict())
    if mode.plain:
        for block in flow.blocks:
            block.field = Plain(block.field)
    # the released code's weights of the regularisers, so that both sides train on one loss
    objective = Likelihood(flow.train(), config.train.objective.kinetic, config.train.objective.jacobian, "code")
    return Ours(mode, flow, objective, solver.train_solver.gradient)


def fitting_gradient(config: RunConfig, mode: Mode, steps: int, like: Flow, batch: int, shape: Any = SHAPE) -> str:
    """``"direct"`` where what it keeps of a batch fits into two thirds of the free memory, else ``"checkpoint"``.

    A batch of one, not compiled, tells the bytes; they grow with the batch.
    """
    eager = replace(mode, options={k: v for k, v in mode.options.items() if k != "compile"})
    one = ours(config, eager, steps, like=like, shape=shape)
    device = like.like.device
    x = torch.zeros(1, *shape, dtype=torch.uint8, device=device)
    kept = profile(one.objective, x, Noise(0))["saved"] * batch / MIB
    free = available() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0] / MIB
    return "direct" if kept < free * 2 / 3 else "checkpoint"


@contextmanager
def watched(blocks: list[CNF]) -> Iterator[list[tuple[tuple[int, ...], Any]]]:
    """What each block is given, and what its solve costs, while it lasts (not for compiled flows: it would compile anew)."""
    seen: list[tuple[tuple[int, ...], Any]] = []

    def watch(block: CNF) -> None:
        inner = block.forward

        def forward(x: Tensor, *arguments: Any, **options: Any) -> Any:
            out = inner(x, *arguments, **options)
            seen.append((tuple(x.shape), out.stats))
            return out

        block.forward = forward  # type: ignore[method-assign]

    try:
        for block in blocks:
            watch(block)
        yield seen
    finally:
        for block in blocks:
            del block.forward


def evaluations(one: Ours, x: Tensor, noise: Noise) -> list[tuple[tuple[int, ...], int]]:
    """Shape of the point and evaluations of the forward solve, for each block."""
    flow = one.flow
    if one.mode.compiled:
        raise ValueError("evaluations are counted on the same flow, not compiled")
    with torch.no_grad(), watched(flow.blocks) as seen:
        one.objective(x, noise=noise)
    return [(shape, stats.nfe) for shape, stats in seen]


def floor(one: Ours, counts: list[tuple[tuple[int, ...], int]], repeats: int = 5) -> float:
    """6 x evaluations x seconds of one plain forward evaluation of the field, summed over blocks.

    Three for value and gradient, twice for the tangent; eager and without a graph, in the mode's precision and memory format.
    """
    total, like = 0.0, one.flow.like
    for block, (shape, nfe) in zip(one.flow.blocks, counts, strict=True):
        x = torch.randn(shape, device=like.device, dtype=like.dtype)
        if not one.mode.plain:
            x = x.contiguous(memory_format=torch.channels_last)
        t = torch.full((), 0.5, device=like.device, dtype=like.dtype)
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=one.mode.low is not None):
            # what is free of t is computed once a solve, not at every evaluation
            prepare = getattr(block.field, "prepare", None)
            field = prepare(x, None) if prepare else block.field

            def evaluate(field: Any = field, t: Tensor = t, x: Tensor = x) -> None:
                field(t, x)
                if x.is_cuda:
                    torch.cuda.synchronize()

            total += 6 * nfe * seconds(evaluate, repeats)
    return total


def grid(flow: Flow, steps: int) -> None:
    """The same rk4 grid in every block."""
    for block in flow.blocks:
        gradient = block.solver.gradient if isinstance(block.solver, FixedGrid) else "direct"
        block.solver = FixedGrid("rk4", steps, gradient)


def images(batch: int, data_root: str | None = None, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """MNIST's first training images where ``data_root`` has them; else scikit-learn's digits, enlarged, on black."""
    if data_root is not None:
        return datasets.load("mnist", root=data_root, download=False).train[:batch]
    small = datasets.load("digits").train.float() / 16
    small = small[torch.arange(batch) % len(small)]
    # MNIST's digits fill the inner 20 x 20 of 28 x 28
    inner = shape[1] * 5 // 7
    border = (shape[1] - inner) // 2
    large = F.pad(F.interpolate(small, (inner, inner), mode="bilinear"), (border, shape[1] - inner - border) * 2)
    return (255 * large).round().to(torch.uint8)
