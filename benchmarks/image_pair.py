"""The two sides of a training step of the published image models: the published codes' computation, and ours in each mode."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import published_formulation as published
import torch
from measure import alternate, training_step
from modes import MODES, Mode, Ours, case_config, evaluations, fitting_gradient, floor, grid, ours
from published_formulation import Draws, Published
from step_profile import step_profile
from stopwatch import graphs
from torch import Tensor

from cnf import load
from cnf._utils.async_checks import defer_checks
from cnf.errors import CNFError
from cnf.random import Noise

__all__ = ["CASES", "COLUMNS", "compare"]

CASES = {"rnode-mnist": published.RNODE, "ffjord-mnist": published.FFJORD}
ROWS = 8  # of a batch, whose log p is held against a fine grid
STEPS = 4  # of RNODE's grid
FINE = 16  # of the grid that log p is held against
TOLERANCE = 1e-4  # bits/dim that our grid may be off by in FFJORD's place, where dopri5 is off by less
# torch's initial convolutions hardly bend the field: as many times larger, dopri5 takes about 35 evaluations a block
GAINS = {"rnode-mnist": 1.5, "ffjord-mnist": 2.0}
COLUMNS = {
    "case": "{case}",
    "mode": "{mode}",
    "batch": "{batch}",
    "gradient": "{gradient}",
    "steps": "{steps}",
    "published s": "{baseline_s:.3f}",
    "ours s": "{ours_s:.3f}",
    "published / ours": "{ratio:.2f}",
    "by CPU time": "{cpu_ratio:.2f}",
    "ours / floor": "{floor_ratio:.2f}",
    "NFE published": "{baseline_nfe} + {baseline_nfe_backward}",
    "NFE ours": "{ours_nfe}",
    "error published": "{baseline_error:.1e}",
    "error ours": "{ours_error:.1e}",
    "gradient to published": "{gradient_difference:.1e}",
    "to plain": "{plain_difference:.1e}",
    "compilation s": "{compile_s:.0f}",
    "new graphs while timed": "{new_graphs}",
    "turns": "{repeats}",
}


@dataclass
class Checked:
    """What one loss with given noise gave: log p in bits/dim (N,), its gradient, and the seconds it took."""

    nll: Tensor
    gradient: Tensor
    seconds: float


def check(model: torch.nn.Module, nll: Callable[[], Tensor]) -> Checked:
    """The first call, which compiles what is to be compiled."""
    began = time.perf_counter()
    model.zero_grad(set_to_none=True)
    values = nll()
    values.mean().backward()
    gradient = published.gradient(model)
    return Checked(values.detach().double().cpu(), gradient, time.perf_counter() - began)


def rows_of(draws: Draws, rows: int) -> Draws:
    """The noise of the first rows."""
    return Draws(draws.pixels[:rows], [probe[:rows] for probe in draws.probes])


def fine(one: Ours, x: Tensor, draws: Draws) -> Tensor:
    """log p in bits/dim of the first rows on a fine grid, same probes; (ROWS,) in float64."""
    few = rows_of(draws, ROWS)
    solvers = [block.solver for block in one.flow.blocks]
    grid(one.flow, FINE)
    with torch.no_grad():
        values: Tensor = one.objective(x[:ROWS], noise=published.replay(one.flow, few))["nll"].double().cpu()
    for block, solver in zip(one.flow.blocks, solvers, strict=True):
        block.solver = solver
    return values


def error(nll: Tensor, truth: Tensor) -> float:
    """Mean |error| of the first rows, bits/dim."""
    return float((nll[:ROWS].cpu() - truth).abs().mean())


def enough_steps(one: Ours, x: Tensor, draws: Draws, truth: Tensor, tolerance: float) -> int:
    """The fewest rk4 steps with a mean error of log p within ``tolerance``, :data:`FINE` at most."""
    few = rows_of(draws, ROWS)
    for steps in range(1, FINE):
        grid(one.flow, steps)
        with torch.no_grad():
            nll = one.objective(x[:ROWS], noise=published.replay(one.flow, few))["nll"].double().cpu()
        if error(nll, truth) <= tolerance:
            return steps
    return FINE


def difference(a: Tensor, b: Tensor | None) -> float:
    """‖a − b‖ / ‖b‖; not a number where there is no b, or one of another model."""
    return float("nan") if b is None or a.shape != b.shape else float((a - b).norm() / b.norm())


def _loss(one: Ours, x: Tensor, number: int) -> Tensor:
    """Of one training step, as the trainer has it: whether the states are finite is not asked within the step."""
    with defer_checks():
        return one.objective(x, noise=Noise(0, "speed", number))["loss"].mean()


def compare(
    case: str,
    batch: int,
    modes: list[Mode],
    x: Tensor,
    repeats: int,
    *,
    steps: int | None = None,
    deadline: float = float("inf"),
    gradient: str | None = None,
    profile: bool = False,
    weights: Path | None = None,
    shrink: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """A row for each mode.

    Args:
        case: one of :data:`CASES`.
        batch: images a step.
        modes: of ours.
        x: uint8 images, at least ``batch``.
        repeats: timings of each.
        steps: of rk4; RNODE's four, or for FFJORD as few as are no further off than its dopri5, if None.
        deadline: see :func:`measure.alternate`.
        gradient: ``"direct"`` or ``"checkpoint"``; by free memory if None.
        profile: print where a step's time goes.
        weights: folder of a trained run of the case.
        shrink: ``hidden`` and ``blocks`` of a smaller model.
    """
    x, shape, device = x[:batch], tuple(x.shape[1:]), x.device
    config, settings = case_config(case, **(shrink or {})), CASES[case]
    settings = replace(settings, hidden=config.model.field.hidden[0], blocks=config.model.blocks)
    torch.manual_seed(0)
    model = Published(shape, settings)
    master = ours(config, MODES["fused"], STEPS, shape=shape)
    if weights is not None:
        master.flow.load_state_dict(load(weights).state_dict())
    else:
        with torch.no_grad():
            for conv in published.convolutions(master.flow):
                conv.weight.mul_(GAINS[case])
    published.share_weights(master.flow, model)
    model.to(device)
    master.flow.to(device)
    if steps and settings.steps:
        model.settings = replace(settings, steps=steps)
    draws = published.draw(model, batch, torch.Generator(device).manual_seed(0))
    truth = fine(master, x, draws)
    nfe: list[int] = []

    def nll() -> Tensor:
        values: Tensor = model(x, draws)["nll"]
        nfe.append(model.evaluations())
        return values

    base = check(model, nll)
    nfe.append(model.evaluations())
    base_error = error(base.nll, truth)
    if steps is None:
        steps = settings.steps or enough_steps(master, x, draws, truth, max(base_error, TOLERANCE))
    number = itertools.count()
    functions = {"published": training_step(model, lambda: model(x, published.draw(model, batch))["loss"].mean())}
    sides: dict[str, tuple[Ours, Checked]] = {}
    for mode in modes:
        how = gradient or fitting_gradient(config, mode, steps, master.flow, batch, shape)
        one = ours(config, mode, steps, how, master.flow, shape)
        noise = published.replay(one.flow, draws)
        try:
            sides[mode.name] = one, check(one.flow, lambda one=one, noise=noise: one.objective(x, noise=noise)["nll"])
        except CNFError as problem:
            print(f"{case}, {mode.name}: left out: {problem}", file=sys.stderr)
            continue
        step = training_step(one.flow, lambda one=one: _loss(one, x, next(number)))
        if mode.compiled:
            step()
        functions[mode.name] = step
        print(f"  {case}, batch {batch}: {mode.name} ({one.gradient}) ready", file=sys.stderr)
    before = graphs()
    timed = alternate(functions, repeats, warmup=0, deadline=deadline)
    fresh = graphs() - before
    plain = sides["plain"][1].gradient if "plain" in sides else None
    rows = []
    for name, (one, checked) in sides.items():
        eager = one
        if one.mode.compiled:
            options = {k: v for k, v in one.mode.options.items() if k != "compile"}
            eager = ours(config, replace(one.mode, options=options), steps, one.gradient, master.flow, shape)
        counts = evaluations(eager, x, Noise(0))
        lowest = floor(eager, counts)
        wall, cpu = timed[name]["wall"], timed[name]["cpu"]
        rows.append(
            {
                "case": case,
                "mode": name,
                "batch": batch,
                "gradient": one.gradient,
                "steps": str(getattr(one.flow.blocks[0].solver, "steps", config.solver.train_solver.method)),
                "baseline_s": timed["published"]["wall"],
                "ours_s": wall,
                "ratio": timed["published"]["wall"] / wall,
                "cpu_ratio": timed["published"]["cpu"] / cpu,
                "floor_s": lowest,
                "floor_ratio": wall / lowest,
                "baseline_nfe": nfe[0],
                "baseline_nfe_backward": nfe[1],
                "ours_nfe": sum(nfe for _, nfe in counts),
                "baseline_error": base_error,
                "ours_error": error(checked.nll, truth),
                "gradient_difference": difference(checked.gradient, base.gradient),
                "plain_difference": difference(checked.gradient, plain),
                # the first call is a step but for Adam
                "compile_s": max(0.0, checked.seconds - wall) if one.mode.compiled else 0.0,
                "new_graphs": fresh if one.mode.compiled else 0,
                "parameters": sum(p.numel() for p in one.flow.parameters()),
                "repeats": int(timed[name]["repeats"]),
                "device": device.type,
            }
        )
    if profile:
        for name, function in functions.items():
            print(f"\n{case}, batch {batch}, {name}:\n{step_profile(function)}")
    return rows
