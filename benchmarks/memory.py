"""Memory of one training step of an image preset, for direct, checkpointed and reversible gradients and several grids.

Three figures, each in a process of its own:

- saved: bytes held for the backward pass when the forward pass ends (storages counted once, parameters left out);
- peak: the most bytes alive at once in tensors made during the step, what a checkpoint recomputes included;
- RSS: the most the step added to the process's resident memory, which also counts the allocator's and the kernels' own.

    python benchmarks/memory.py                      # rnode-mnist, batch 16; some minutes, several GiB
    python benchmarks/memory.py --preset digits --batch 64
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from measure import machine, markdown, record, versions
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cnf.config import preset
from cnf.losses import Likelihood
from cnf.models import build
from cnf.random import Noise
from cnf.solvers import FixedGrid, Reversible

MIB = 2**20
ALLOWED = 0.15  # how much the thrifty gradients may grow from 4 to 16 steps
THRIFTY = ("checkpoint", "reversible")
COLUMNS = {
    "gradient": "{gradient}",
    "steps a block": "{steps}",
    "batch": "{batch}",
    "saved MiB": "{saved_mib:,.1f}",
    "peak MiB": "{peak_mib:,.0f}",
    "RSS MiB, of the step": "{rss_mib:,.0f}",
    "peak RSS MiB, of the process": "{whole_mib:,.0f}",
    "peak at batch {large}, by arithmetic, GiB": "{large_gib:,.1f}",
}


class _Held:
    """What autograd keeps in place of a saved tensor; gone when it lets go."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class Saved:
    """Counts what autograd saves while it is active; :meth:`bytes` tells what is still held."""

    def __init__(self, known: set[int]):
        self.known = known
        self.held: weakref.WeakSet[_Held] = weakref.WeakSet()
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def _pack(self, tensor: Tensor) -> _Held:
        held = _Held(tensor.detach())  # an output saved with its history would hold itself for ever
        self.held.add(held)
        return held

    def bytes(self) -> int:
        """Storages held now, each once, without the known ones."""
        storages = {_key(h.tensor): h.tensor.untyped_storage().nbytes() for h in self.held}
        return sum(size for key, size in storages.items() if key not in self.known)


class Alive(TorchDispatchMode):
    """Follows every storage that an operation returns until it is freed: ``now`` and ``peak`` bytes."""

    def __init__(self, known: set[int]):
        super().__init__()
        self.sizes = dict.fromkeys(known, 0)
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return out

    def _note(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key in self.sizes:
            return
        storage = tensor.untyped_storage()
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def profile(objective: Likelihood, x: Tensor, noise: Noise) -> dict[str, int]:
    """Bytes ``saved`` when the forward pass ends and alive at the ``peak`` of forward and backward pass."""
    known = {_key(t) for t in (x, *objective.parameters(), *objective.buffers())}
    saved, alive = Saved(known), Alive(known)
    with alive:
        with saved.hooks:
            loss = objective(x, noise=noise)["loss"].mean()
        held = saved.bytes()
        loss.backward()
    return {"saved": held, "peak": alive.peak}


def case(name: str, batch: int, gradient: str, steps: int) -> tuple[Likelihood, Tensor]:
    """The preset's objective with this grid, and a batch of random pixels: memory does not depend on their values."""
    chosen = preset(name)
    if chosen.levels is None:
        raise SystemExit(f"--preset {name}: memory is measured on image presets")
    torch.manual_seed(0)
    config = chosen.config
    flow = build(config.model, config.solver, chosen.shape, levels=chosen.levels).train()
    for block in flow.blocks:
        block.solver = Reversible("rk4", steps) if gradient == "reversible" else FixedGrid("rk4", steps, gradient)
    objective = Likelihood(flow, config.train.objective.kinetic, config.train.objective.jacobian)
    return objective, torch.randint(0, chosen.levels, (batch, *chosen.shape), dtype=torch.uint8)


def high_water() -> int:
    """The most resident bytes this process ever had."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure would start from the parent's
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def child(name: str, batch: int, gradient: str, steps: int) -> dict[str, Any]:
    """One row, measured in this process."""
    torch.set_num_threads(1)
    objective, x = case(name, batch, gradient, steps)
    # the first checkpoint and the first backward pass load libraries, which are not the step's
    warm, one = case(name, 1, gradient, 1)
    warm(one, noise=Noise(0))["loss"].mean().backward()
    before = high_water()
    objective(x, noise=Noise(0))["loss"].mean().backward()
    rss = high_water() - before
    objective.zero_grad(set_to_none=True)
    sizes = profile(objective, x, Noise(0))
    return {
        "case": name,
        "gradient": gradient,
        "steps": steps,
        "batch": batch,
        "saved_mib": sizes["saved"] / MIB,
        "peak_mib": sizes["peak"] / MIB,
        "rss_mib": rss / MIB,
        "whole_mib": (before + rss) / MIB,
        "before_mib": before / MIB,
        "parameters_mib": sum(p.nbytes for p in objective.parameters()) / MIB,
    }


def available() -> float:
    """MiB that a process may take now; infinite where it cannot be told."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return float("inf")
    line = next(line for line in path.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) / 1024


def measured(name: str, batch: int, gradient: str, steps: int) -> dict[str, Any]:
    """One row, measured in a fresh process."""
    command = [sys.executable, __file__, "--preset", name, "--batch", str(batch), "--child", gradient, str(steps)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    row: dict[str, Any] = json.loads(output.splitlines()[-1])
    return row


def growth(rows: list[dict[str, Any]], first: int, last: int) -> dict[str, dict[str, float]]:
    """Relative growth of each figure from ``first`` to ``last`` steps, for each gradient."""
    table = {(row["gradient"], row["steps"]): row for row in rows}
    return {
        gradient: {
            k: table[gradient, last][k] / table[gradient, first][k] - 1 for k in ("saved_mib", "peak_mib", "rss_mib")
        }
        for gradient in sorted({row["gradient"] for row in rows})
        if first < last and (gradient, first) in table and (gradient, last) in table
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and record if asked; 1 where the bytes of a thrifty gradient grow by more than is allowed.

    RSS is reported, not judged: of a small model it is mostly the allocator's.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="rnode-mnist", help="an image preset")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--large", type=int, default=200, help="the batch to which the figures are scaled")
    parser.add_argument("--steps", type=int, nargs="+", default=(4, 8, 16), help="steps a block")
    parser.add_argument("--json", type=Path, help="file of measured rows to add to")
    parser.add_argument("--child", nargs=2, metavar=("GRADIENT", "STEPS"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(child(args.preset, args.batch, args.child[0], int(args.child[1]))))
        return 0
    rows: list[dict[str, Any]] = []
    for gradient in (*THRIFTY, "direct"):
        for steps in sorted(args.steps):
            last = rows[-1] if rows and gradient == "direct" == rows[-1]["gradient"] else None
            expected = last["peak_mib"] * steps / last["steps"] if last else 0.0
            if expected > 0.8 * available():
                print(f"{gradient}, {steps} steps: left out, it would take about {expected:,.0f} MiB", file=sys.stderr)
                continue
            row = measured(args.preset, args.batch, gradient, steps)
            # everything alive scales with the batch but the parameters' gradients
            fixed = row["parameters_mib"]
            scaled = fixed + (row["peak_mib"] - fixed) * args.large / args.batch
            rows.append({**row, "large": args.large, "large_gib": scaled / 1024})
            print(json.dumps(rows[-1]), file=sys.stderr)
    about = {**machine(), "threads": 1, **versions("torch")}
    print(f"{args.preset}: " + ", ".join(f"{k} {v}" for k, v in about.items()) + "\n")
    print(markdown(rows, {k.format(large=args.large): v for k, v in COLUMNS.items()}))
    found = growth(rows, min(args.steps), max(args.steps))
    for gradient, by in found.items():
        grown = ", ".join(f"{k.removesuffix('_mib')} {v:+.1%}" for k, v in by.items())
        print(f"\n{gradient}, {min(args.steps)} to {max(args.steps)} steps: {grown}")
    if args.json:
        about["growth"] = found
        record(args.json, f"memory {args.preset}", argv, rows, about)
    return int(any(found.get(g, {}).get(k, 0.0) > ALLOWED for g in THRIFTY for k in ("saved_mib", "peak_mib")))


if __name__ == "__main__":
    sys.exit(main())
